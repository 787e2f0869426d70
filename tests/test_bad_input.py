"""Bad input: one clear line, a non-zero exit code, nothing created. The table is the contract."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import TINY

from hpc_closure import __main__

# Changes to a sound experiment file (key=value) and the line that each gets.
CONFIG = [
    # unknown keys, with the nearest valid one
    ("generate.gird=16", r"unknown key generate.gird; did you mean generate.grid\? valid here: "),
    ("trian.lr=1", r"unknown key trian; did you mean train\? valid here: base, name, root, seed"),
    ("generate.record.evry=1", r"unknown key generate.record.evry; did you mean generate.record."),
    ("physics.noise.amplitud=1", r"unknown key physics.noise.amplitud; did you mean physics.nois"),
    ("generate.grid.x=3", r"generate.grid=\{'x': 3\}: Input should be a valid integer"),
    # wrong types
    ("generate.grid=sixteen", r"generate.grid='sixteen': Input should be a valid integer"),
    ("generate.members=2.5", r"generate.members=2.5: .*fractional part"),
    ("generate.dt=fast", r"generate.dt='fast': Input should be a valid number"),
    ("train.lr=abc", r"train.lr='abc': Input should be a valid number"),
    ("seed=abc", r"seed='abc': Input should be a valid integer"),
    ("physics=3", r"physics=3: Input should be a valid dictionary"),
    ("generate=[1,2]", r"generate=\[1, 2\]: Input should be a valid dictionary"),
    ("train.window=[0.2]", r"train.window=\[0.2\]: too few values, at least 2 expected"),
    ("name=", r"name=None: Input should be a valid string"),
    # out of range
    ("generate.members=0", r"generate.members=0: Input should be greater than or equal to 1"),
    ("generate.members=-3", r"generate.members=-3: Input should be greater than or equal to 1"),
    ("generate.grid=4", r"generate.grid=4: Input should be greater than or equal to 8"),
    ("generate.grid=15", r"generate.grid=15: Input should be a multiple of 2"),
    ("generate.dt=0", r"generate.dt=0: Input should be greater than 0"),
    ("generate.dt=.nan", r"generate.dt=nan: Input should be a finite number"),
    ("generate.dt=.inf", r"generate.dt=inf: Input should be a finite number"),
    ("physics.viscosity=-1", r"physics.viscosity=-1: Input should be greater than or equal to 0"),
    ("physics.viscosity=.nan", r"physics.viscosity=nan: Input should be a finite number"),
    ("generate.interval=0", r"generate.interval=0: Input should be greater than or equal to 1"),
    ("train.batch=0", r"train.batch=0: Input should be greater than or equal to 1"),
    ("train.ema=1", r"train.ema=1: Input should be less than 1"),
    ("train.zero_stage=4", r"train.zero_stage=4: Input should be less than or equal to 3"),
    ("evaluate.members=1", r"evaluate.members=1: Input should be greater than or equal to 2"),
    ("evaluate.lead_times=[]", r"evaluate.lead_times=\[\]: .*at least 1 item"),
    ("evaluate.lead_times=[-1]", r"evaluate.lead_times.0=-1: Input should be greater than 0"),
    ("cluster.members_per_block=0", r"cluster.members_per_block=0: Input should be greater"),
    ("cluster.claim_timeout=0", r"cluster.claim_timeout=0: Input should be greater than 0"),
    ("seed=-1", r"seed=-1: Input should be greater than or equal to 0"),
    # no such choice
    ("physics.equation=euler", r"physics.equation='euler': Input should be 'vorticity2d'"),
    ("physics.noise.kind=qwiener", r"physics.noise.kind='qwiener': Input should be 'none', 'q_w"),
    ("generate.scheme=rk3", r"generate.scheme='rk3': Input should be 'cn_euler', 'cn_ab2'"),
    ("generate.closure=all", r"generate.closure='all': Input should be 'diffusion', 'convection'"),
    (
        "model.preset=huge",
        r"model.preset='huge': Input should be 'default', 'fno_score', 'one_pass', 'gaussian'",
    ),
    ("rollout.sampler.method=rk4", r"rollout.sampler.method='rk4': Input should be 'preset', "),
    ("cluster.device=tpu", r"cluster.device='tpu': Input should be 'auto', 'cpu' or 'cuda'"),
    ("cluster.executor=pbs", r"cluster.executor='pbs': Input should be 'inline', 'local' or 'sl"),
    (
        "rollout.baselines=[x]",
        r"rollout.baselines.0='x': Input should be 'none', 'oracle' or 'mean_gp'",
    ),
    ("name=a/b", r"name='a/b': String should match pattern"),
    # impossible combinations
    ("generate.t_end=0.4012", r"generate.t_end=0.4012 is not a multiple of 0.005; nearest: 0.4"),
    ("generate.record.every=0.013", r"generate.record.every=0.013 is not a multiple of 0.005"),
    ("generate.record.start=5", r"generate.record.start=5.0 is after generate.t_end=0.4: nothing"),
    (
        "physics.equation=clouds",
        r"generate.closure=diffusion is for equations of one field, but clouds has the fields vo",
    ),
    ("generate.record.grid=32", r"generate.record.grid=32 is finer than generate.grid=16, the gr"),
    ("train.grid=12", r"train.grid=12 does not divide 16"),
    ("evaluate.grids=[64]", r"evaluate.grids=64 does not divide 16"),
    ("train.split=[0.9,0.9,0.9]", r"train.split=\[0.9, 0.9, 0.9\] sums to 2.7, expected 1"),
    ("train.split=[0,0.5,0.5]", r"train.split=\[0.0, 0.5, 0.5\] has no training members"),
    ("train.window=[0.4,0.2]", r"train.window=\[0.4, 0.2\] must lie in \[record.start, t_end\]"),
    ("train.accumulate=3", r"train.batch=4 cannot be divided into train.accumulate=3 equal parts"),
    ("rollout.t_start=0.1", r"rollout.t_start=0.1 must be a stored time of generate"),
    ("rollout.t_end=0.2", r"rollout.t_end=0.2 must be after rollout.t_start=0.2"),
    ("rollout.interval=7", r"rollout.every=0.1 is not a multiple of 0.035"),
    ("evaluate.lead_times=[5]", r"evaluate.lead_times: 5 is beyond the horizon 0.2 of rollout"),
    (
        "evaluate.event={threshold: 1, lead_time: 0.1, channel: rain}",
        r"evaluate.event.channel=rain is for a state of several fields, but vorticity2d has one",
    ),
    ("evaluate.lead_times=[0.13]", r"evaluate.lead_times=0.13 is not a multiple of 0.1"),
    ("model.modes=100", r"model.modes=100 needs a grid of at least 200, train.grid is 16"),
    (
        "model.preset=published",
        r"preset=published is trained either with sensors or without: set ",
    ),
    (
        "model={preset: published, conditions: {sensors: none, previous_states: 1}}",
        r"model.preset=published has no previous_states: remove model.conditions.previous_states",
    ),
    ("model.upscaling=conv", r"model.upscaling is no setting of model.preset=default: remove it"),
    ("model.schedule=edm", r"model.schedule='edm': Input should be 'trigonometric'"),
    ("model.base_noise=white", r"model.base_noise='white': Input should be 'matched'$"),
    (
        "cluster.domain_ranks=64",
        r"cluster.domain_ranks=64 is more than the number of retained rows",
    ),
    ("generate.cfl=0.5", r"generate.cfl=0.5: closure diffusion is defined for steps of one len"),
    (
        "physics.drag=0.1",
        r"physics.drag=0.1: closure diffusion is defined for viscosity as the on",
    ),
    (
        "physics.beta=1",
        r"physics.beta=1: closure diffusion is .* set physics.beta to 0, or set gen",
    ),
    (
        "generate.scheme=etdrk4",
        r"generate.scheme=etdrk4: closure diffusion is half the viscous te",
    ),
    (
        "physics.forcing={kind: kolmogorov, wavenumber: 9}",
        r"physics.forcing.kind=kolmogorov: mode \(0, 9\) is beyond the 5 that a grid of 16 points",
    ),
    (
        "generate={closure: subgrid, grid: 64, record: {grid: 16}, cfl: 0.5, scheme: cn_ab2}",
        r"generate.cfl=0.5: scheme cn_ab2 needs steps of one length",
    ),
    ("physics.noise={kind: none, draws: 0}", r"physics.noise.draws=0: Input should be greater th"),
    ("generate.cfl=0", r"generate.cfl=0: Input should be greater than 0"),
    (
        "generate.max_refinements=0",
        r"generate.max_refinements=0: Input should be greater than or equal to 1",
    ),
    ("generate.interval=5", r"generate.record.every=0.02 is shorter than the 0.025 that one"),
    ("generate.record.fields=[pressure]", r"record.fields.0='pressure': Input should be 'vort"),
    ("generate.record.spectra=[energy]", r"\['energy'\] are part of the series: set generate.rec"),
    ("generate.record.series_every=0.013", r"series_every=0.013 is not a multiple of 0.005"),
    ("generate.record.filters=[{kind: box, width: 1}]", r"filters.0.kind='box': Input should be"),
    ("generate.record.filters=[{kind: sharp, width: 2}]", r"sharp, width=2 keeps 0 modes of the"),
    ("generate.record.filters=[{kind: sharp, width: 0.1}]", r"keeps 5 modes of the 5 of the DNS"),
    (
        "generate.record.filters=[{kind: gaussian, width: 9}]",
        r"gaussian, width=9 removes all modes",
    ),
    ("physics.equation=kuramoto_sivashinsky1d", r"initial.kind=gaussian_field does not fit kuram"),
    ("physics.initial.kind=line", r"initial.kind=line does not fit vorticity2d; expected gauss"),
    ("cluster.walltime=soon", r"duration 'soon': expected seconds or for example"),
    (
        "cluster.signal_before_end=50m",
        r"signal_before_end=50m is longer than max\(10m, 20 % of walltime=1h\)",
    ),
    ("root=$NOT_SET_ANYWHERE/x", r"environment variable \$NOT_SET_ANYWHERE of root=.* is not set"),
    # overrides that are none
    ("generate", r"'generate': an override is key=value, for example train.lr=3e-4"),
    ("=3", r"'=3': an override is key=value"),
    ("base=quickstart", r"'base=quickstart': base cannot be overridden"),
]

# Experiment files that are none.
TEXTS = [
    (b"", r"tiny.yaml: empty; a first line `base: quickstart` names a preset"),
    (b"a: [1", r"tiny.yaml:1:6: not valid YAML: expected ',' or '\]'"),
    (b"- 1\n- 2", r"tiny.yaml: read a list, expected key: value lines"),
    (b"\x00", r"tiny.yaml: not valid YAML: unacceptable character"),
    (b"\xff\xfe\x00", r"tiny.yaml: cannot be read \(not UTF-8 text\)"),
    (b"generate: {grid: 16, grid: 32}", r"tiny.yaml:1:22: not valid YAML: key 'grid' stated twic"),
    (b"base: 3", r"tiny.yaml: base=3 is not a preset's name"),
    (b"base: tiny.yaml", r"tiny.yaml: base leads back to itself"),
    (b"base: quickstrat", r"quickstrat: neither a file nor a preset .*; did you mean quickstart"),
    (b"1: 2", r"tiny.yaml:1:1: not valid YAML: key 1 is not a word"),
    (b"x: !!python/object:os.system 1", r"tiny.yaml:1:4: not valid YAML: could not determine a c"),
    (b"a: " + b"[" * 3000, r"tiny.yaml: not valid YAML: maximum recursion depth"),
]

# Other command lines and the exit code and line that each gets.
COMMANDS = [
    ("generate", 2, r"Missing argument 'EXPERIMENT'. See `hpc-closure generate --help`"),
    ("generat tiny.yaml", 2, r"No such command 'generat'. Did you mean 'generate'\?"),
    (
        "generate tiny.yaml --share",
        2,
        r"No such option: --share .* See `hpc-closure generate --he",
    ),
    ("generate absent.yaml", 2, r"absent.yaml: no such file; `hpc-closure config list` names the"),
    ("generate quickstrat", 2, r"neither a file nor a preset .*; did you mean quickstart\?"),
    ("generate .", 2, r"\.: cannot be read \(Is a directory\); expected a YAML experiment file"),
    ("generate tiny.yaml --members 3-99", 1, r"--members 3-99: the experiment has members 0 to 7"),
    ("generate tiny.yaml --members x", 1, r"--members x: expected numbers and ranges"),
    ("generate tiny.yaml --shard 3/2", 1, r"--shard 3/2: expected I/N with 1 <= I <= N"),
    ("generate tiny.yaml --shard two", 1, r"--shard two: expected I/N"),
    ("generate tiny.yaml --max-elapsed soon", 1, r"duration 'soon': expected seconds"),
    ("generate tiny.yaml --max-elapsed 0", 1, r"duration '0': expected seconds .* more than 0"),
    ("generate tiny.yaml cluster.domain_ranks=2", 1, r"cluster.domain_ranks=2 does not divide th"),
    ("generate tiny.yaml root=/dev/null", 1, r"cannot write /dev/null.*a part of the path is a f"),
    ("generate tiny.yaml root=/proc/nope", 1, r"cannot write /proc/nope.*: No such file"),
    ("train kuramoto_sivashinsky", 2, r"closure=none makes data but no closure: there is nothing"),
    ("rollout tiny.yaml generate.closure=none", 2, r"closure: there is nothing to rollout"),
    (
        "generate kuramoto_sivashinsky physics.forcing.kind=ring",
        2,
        r"physics.forcing.kind=ring is for flows in two dimensions; kuramoto_sivashinsky1d needs",
    ),
    ("generate kuramoto_sivashinsky cluster.domain_ranks=2", 2, r"domain_ranks=2 is for flows in"),
    (
        "generate kuramoto_sivashinsky generate.record.spectra=[enstrophy]",
        2,
        r"generate.record.spectra=\['enstrophy'\] is for flows in two dimensions",
    ),
    (
        "generate tiny.yaml generate.closure=none generate.cfl=1 generate.scheme=cn_ab2",
        2,
        r"generate.cfl=1: scheme cn_ab2 needs steps of one length",
    ),
    ("train tiny.yaml", 1, r"data are not complete \(4 missing of 4 units\); run `hpc-closure ge"),
    ("rollout tiny.yaml", 1, r"model.safetensors: no trained model; run `hpc-closure train` firs"),
    (
        "rollout tiny.yaml rollout.initial_conditions=50",
        1,
        r"rollout.initial_conditions=50, but .* leave 2 test trajector",
    ),
    ("rollout tiny.yaml --executor slurm cluster.profile=no --dry-run", 1, r"profile no: not in"),
    ("evaluate tiny.yaml", 1, r"model.safetensors: no trained model"),
    ("status tiny.yaml --watch 0", 1, r"--watch 0: expected at least 1 seconds"),
    ("status tiny.yaml --watch x", 2, r"Invalid value for '--watch'"),
    ("status absent.yaml", 2, r"absent.yaml: no such file"),
    ("inspect absent.h5", 1, r"absent.h5: no such file or folder"),
    ("inspect tiny.yaml", 1, r"tiny.yaml: not a product of this package; expected .csv, .h5"),
    ("inspect .", 1, r"\.: no product of this package in this folder"),
    ("config show nowhere", 2, r"nowhere: neither a file nor a preset"),
    ("config check tiny.yaml seed=x", 2, r"seed='x': Input should be a valid integer"),
    ("config copy quickstart tiny.yaml", 1, r"tiny.yaml: exists already; choose another name"),
    ("config copy quickstart /nowhere/x.yaml", 1, r"/nowhere/x.yaml: cannot be written"),
    ("config copy nowhere x.yaml", None, r"nowhere: neither a file nor a preset"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a sound tiny.yaml, which is the current one."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(root="runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(place, monkeypatch, capfd):
    """Run a command line in this process, check that it is refused as it should be."""

    def check(words, code, line):
        before = {path: path.stat().st_mtime_ns for path in sorted(Path(".").rglob("*"))}
        monkeypatch.setattr(sys, "argv", ["hpc-closure", *words])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        told = capfd.readouterr()
        assert ended.value.code == code if code else ended.value.code in (1, 2), told
        assert told.out == ""
        assert told.err.count("\n") == 1, told.err
        assert re.match(f"hpc-closure: .*{line}", told.err), told.err
        after = {path: path.stat().st_mtime_ns for path in sorted(Path(".").rglob("*"))}
        assert after == before

    return check


def test_the_table_is_long_enough():
    assert len(CONFIG) + len(TEXTS) + len(COMMANDS) >= 40
    for table in (CONFIG, TEXTS, COMMANDS):
        assert len({row[0] for row in table}) == len(table)


@pytest.mark.parametrize("change, line", CONFIG, ids=[change for change, _ in CONFIG])
def test_experiment_reading(refused, change, line):
    refused(["generate", "tiny.yaml", change], 2, line)


@pytest.mark.parametrize("text, line", TEXTS, ids=[repr(text[:30]) for text, _ in TEXTS])
def test_texts(place, refused, text, line):
    (place / "tiny.yaml").write_bytes(text)
    refused(["generate", "tiny.yaml"], 2, line)


@pytest.mark.parametrize("words, code, line", COMMANDS, ids=[words for words, *_ in COMMANDS])
def test_commands(refused, words, code, line):
    refused(words.split(), code, line)


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_an_unknown_switch_of_gpu_code(refused, monkeypatch):
    monkeypatch.setenv("HPC_CLOSURE_CUDA", "graph")
    line = "HPC_CLOSURE_CUDA=graph: 'graph' is no switch; expected some of graphs, fused, replays"
    refused(["generate", "tiny.yaml"], 1, line)


def test_unavailable_device(refused):
    refused(
        ["generate", "tiny.yaml", "cluster.device=cuda"],
        1,
        "cluster.device=cuda, but torch sees no CUDA device; use cpu or auto",
    )


@pytest.mark.mpi
@pytest.mark.parametrize(
    "change, line",
    [
        ("cluster.domain_ranks=3", "cluster.domain_ranks=3 does not divide the 2 ranks"),
        ("generate.gird=3", "unknown key generate.gird"),
        ("root=/dev/null", "cannot write /dev/null"),
    ],
)
def test_ranks_speak_with_one_voice(place, mpirun, change, line):
    done = mpirun(
        2, [sys.executable, "-m", "hpc_closure", "generate", "tiny.yaml", change], cwd=place
    )
    assert done.returncode in (1, 2)
    lines = [text for text in done.stderr.splitlines() if text.startswith("hpc-closure:")]
    assert len(lines) == 1 and line in lines[0], done.stderr
    assert [path.name for path in place.iterdir()] == ["tiny.yaml"]


# Products that do not fit, in a run folder that has data.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from hpc_closure.experiment import reading
    from hpc_closure.generate import verb as generate
    from hpc_closure.work.options import Options

    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(TINY.format(root=folder / "runs"))
    assert generate.run(reading.load(folder / "tiny.yaml"), Options(verbosity=-1)) == 0
    return folder


@pytest.fixture
def again(made, tmp_path, monkeypatch):
    """A copy of the run folder with data."""
    import shutil

    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(TINY.format(root="runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(words, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["hpc-closure", *words.split()])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    told = capfd.readouterr().err
    assert ended.value.code in (1, 2)
    lines = [line for line in told.splitlines() if line.startswith("hpc-closure: ")]
    assert len(lines) == 1 and "Traceback" not in told, told
    return lines[0]


@pytest.mark.parametrize("verb", ["generate", "train", "rollout", "evaluate"])
def test_data_of_another_experiment(again, monkeypatch, capfd, verb):
    line = refuse(f"{verb} tiny.yaml physics.viscosity=2e-3", monkeypatch, capfd)
    if verb in ("generate", "train"):
        assert "physics.viscosity: 0.001 -> 0.002" in line or "made by another experiment" in line
        assert "change `name`" in line
    assert not list((again / "runs/tiny").glob("train/*"))


def test_a_data_file_is_missing(again, monkeypatch, capfd):
    (again / "runs/tiny/data/block_000002-000003.h5").unlink()
    line = refuse("train tiny.yaml", monkeypatch, capfd)
    assert "the data are not complete (3 done, 1 missing of 4 units)" in line


@pytest.mark.parametrize("content", [b"", b"junk" * 100, "half"])
def test_a_damaged_data_file_is_never_used(again, monkeypatch, capfd, content):
    path = Path("runs/tiny/data/block_000002-000003.h5").absolute()
    path.write_bytes(path.read_bytes()[:4000] if content == "half" else content)
    line = refuse("train tiny.yaml", monkeypatch, capfd)
    assert "the data are not complete (3 done, 1 missing of 4 units)" in line
    assert f"not used: {path}: " in line


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"\x08" + b"\x00" * 7 + b"{}      "])
def test_a_damaged_model_is_never_used(again, monkeypatch, capfd, content):
    path = again / "runs/tiny/train/model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert "model.safetensors" in refuse("rollout tiny.yaml", monkeypatch, capfd)


def test_a_damaged_stored_config(again, monkeypatch, capfd):
    (again / "runs/tiny/config.yaml").write_text("a: [")
    line = refuse("generate tiny.yaml", monkeypatch, capfd)
    assert "config.yaml:1:5: not valid YAML" in line


def test_a_foreign_json_record_is_not_ours(again, monkeypatch, capfd):
    (again / "runs/tiny/scores.json").write_text(json.dumps([1])[:-1])
    assert "not a valid JSON file" in refuse("inspect runs/tiny/scores.json", monkeypatch, capfd)
