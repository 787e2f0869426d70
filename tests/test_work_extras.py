"""A core-only install: what needs no extra works, and what needs one says which, in a line."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_closure.work import extras

ROOT = Path(__file__).resolve().parent.parent
ALL = tuple(module for modules in extras.EXTRAS.values() for module in modules)

# Runs the command line in a Python whose path has none of the modules in argv[1].
WITHOUT = """
import sys
from importlib.machinery import PathFinder

absent, found = set(sys.argv.pop(1).split(",")), PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else found(name, path, target)

PathFinder.find_spec = find_spec
code = sys.argv[1] if sys.argv[1].startswith("import") else ""
if code:
    exec(code)
else:
    from hpc_closure.__main__ import main
    main()
"""


@pytest.fixture
def without(environment):
    """Run a command, or Python code, where some modules are not installed."""

    def start(absent, *words, cwd=None):
        command = [sys.executable, "-c", WITHOUT, ",".join(absent), *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=400, env=environment, cwd=cwd
        )

    return start


def requirements():
    """(core, {extra: modules}) of setup.cfg, as distribution names in lower case."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def names(text):
        return {re.split(r"[<>=!~;\[ ]", line)[0] for line in text.split("\n") if line}

    found = {name: names(text) for name, text in setup["options.extras_require"].items()}
    return names(setup["options"]["install_requires"]), found


def test_the_table_is_that_of_setup_cfg():
    """Of these packages the name to install is the name to import."""
    core, found = requirements()
    for extra, modules in extras.EXTRAS.items():
        assert set(modules) == found[extra]
    assert not core & set(ALL)
    assert core == {
        *("numpy", "scipy", "numba", "torch", "h5py", "pydantic", "pyyaml", "typer"),
        "safetensors",
    }


def test_every_extra_that_is_named_somewhere_exists():
    """In messages, docs, launchers and the image: ``hpc_closure[hpc,mpi]`` and ``.[docs]``."""
    found = set(requirements()[1])
    paths = [path for room in ("docs", "launch", "slurm") for path in (ROOT / room).rglob("*")]
    paths += [*(ROOT / "hpc_closure").rglob("*.py"), ROOT / "README.md", ROOT / "setup.cfg"]
    named = set()
    for path in paths:
        if path.is_file() and path.suffix not in (".png", ".pdf"):
            for names in re.findall(r"(?:hpc_closure|\.|\.whl\))\[([a-z,]+)\]", path.read_text()):
                named |= set(names.split(","))
    assert {"hpc", "mpi", "report", "docs", "peers"} <= named <= found


def test_a_core_install_samples_a_shipped_model(without):
    code = (
        "import sys, torch, hpc_closure; "
        "u = hpc_closure.load('diffusion').sample(torch.zeros(1, 64, 64), members=2, seed=0, "
        "call=0); print(tuple(u.shape), sorted(set(sys.modules) & absent))"
    )
    done = without(ALL, code)
    assert done.stdout == "(2, 64, 64) []\n", done.stderr


@pytest.mark.parametrize(
    "words",
    ["--help", "config list", "config copy quickstart mine.yaml", "status {tiny}"]
    + ["config profile template site.yaml", "inspect two_regimes", "evaluate {tiny} --dry-run"],
)
def test_commands_of_a_core_install(without, tiny, tmp_path, words):
    done = without(ALL, *words.format(tiny=tiny).split(), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


def test_three_verbs_of_a_core_install_and_what_the_fourth_says(without, tiny, tmp_path):
    for verb in ("generate", "train", "rollout"):
        done = without(ALL, verb, tiny, "-q")
        assert done.returncode == 0, done.stderr
    done = without(ALL, "evaluate", tiny)
    assert done.returncode == 1 and not (tmp_path / "runs" / "tiny" / "evaluate").exists()
    assert done.stderr == (
        "hpc-closure: evaluate needs pandas, matplotlib, jinja2, which are not installed: "
        "pip install 'hpc_closure[report]'\n"
    )
    done = without(["jinja2"], "evaluate", tiny)
    assert "needs jinja2, which is not installed" in done.stderr


@pytest.mark.parametrize(
    "words, module, extra",
    [
        ("submit {tiny} --dry-run", "submitit", "hpc"),
        ("rollout {tiny} --executor local", "submitit", "hpc"),
        ("bench gpu here", "pandas", "report"),
    ],
    ids=["submit", "rollout", "bench"],
)
def test_a_command_says_what_it_lacks(without, tiny, tmp_path, words, module, extra):
    done = without(ALL, *words.format(tiny=tiny).split(), cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"needs {module}, which is not installed: " in done.stderr
    assert done.stderr.endswith(f"pip install 'hpc_closure[{extra}]'\n")
    assert not (tmp_path / "runs").exists()


def test_a_missing_core_package_is_one_line_as_well(without, tiny):
    done = without(["h5py"], "generate", tiny)
    assert done.returncode == 1
    assert done.stderr == (
        "hpc-closure: this command needs h5py, which is not installed: pip install hpc_closure\n"
    )


def test_a_broken_package_is_one_line_that_names_the_doctor(
    hpc_closure_command, tmp_path, tiny, environment
):
    (tmp_path / "h5py.py").write_text("raise ImportError('libhdf5.so.310: cannot open')")
    path = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    done = hpc_closure_command("generate", tiny, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr == (
        "hpc-closure: libhdf5.so.310: cannot open; `hpc-closure doctor` lists what is broken and "
        "how to mend it\n"
    )
    done = hpc_closure_command("generate", tiny, PYTHONPATH=path, HPC_CLOSURE_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_commands_for_several_extras():
    assert extras.command("zarr", "mpi4py") == "pip install 'hpc_closure[hpc,data]'"
    assert extras.command("numpy") == "pip install hpc_closure"
    extras.need("this test", "numpy", "json")
    with pytest.raises(extras.MissingPackage, match="this test needs no_such, which is not"):
        extras.need("this test", "json", "no_such")
