"""The world fails: full disks, read-only folders, foreign and cut files. Nothing is lost."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from hpc_closure import claims, config, files
from hpc_closure.commands import generate, train
from hpc_closure.run import Run
from hpc_closure.worker import SINGLE

QUIET = {"verbosity": -1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with data and model."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(root=folder / "runs"))
    experiment = config.load(path)
    assert generate.run(experiment, **QUIET) == 0
    assert train.run(experiment, **QUIET) == 0
    return Run(experiment.folder)


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of it, with its experiment file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path / "runs"))
    shutil.copytree(trained.root, tmp_path / "runs/tiny")
    return path, Run(tmp_path / "runs/tiny")


def contents(folder):
    return {path.name: files.sha256_datasets(path) for path in folder.glob("block_*.h5")}


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@contextlib.contextmanager
def mounted(folder, size):
    """A small file system of its own."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                          capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# the disk


def limited(words, size, environment):
    """Run a command whose files may not grow beyond ``size`` bytes."""
    code = (f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
            f"sys.argv = ['hpc-closure', *{[str(word) for word in words]!r}]; "
            "from hpc_closure.__main__ import main; main()")
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, timeout=200)


@pytest.mark.parametrize("verb, size", [("generate", 30_000), ("train", 1_000_000),
                                        ("rollout", 8_000)])
def test_files_may_not_grow(copy, environment, hpc_closure_command, verb, size):
    path, run = copy
    expected = contents(run.data)
    shutil.rmtree(run.folder(verb), ignore_errors=True)
    shutil.rmtree(run.units(verb), ignore_errors=True)
    done = limited([verb, path], size, environment)
    assert done.returncode == 1, done.stderr
    assert "file-size limit" in last_line(done) and "Traceback" not in done.stderr, done.stderr
    assert not list(run.folder(verb).glob("block_*.h5")) and not run.claim(verb, SINGLE).exists()
    done = hpc_closure_command(verb, path)
    assert done.returncode == 0, done.stderr
    assert contents(run.data) == expected


@pytest.mark.parametrize("size", ["64k", "150k"])
def test_full_disk(tmp_path, hpc_closure_command, size):
    path = tmp_path / "tiny.yaml"
    with mounted(tmp_path / "small", size) as disk:
        path.write_text(TINY.format(root=disk))
        done = hpc_closure_command("generate", path)
        assert done.returncode == 1, done.stderr
        assert "no space left on the device; free some" in last_line(done), done.stderr
        assert "Traceback" not in done.stderr
        whole = contents(disk / "tiny/data")
        done = hpc_closure_command("status", path)
        assert done.returncode == 0 and "failed" in done.stdout
        subprocess.run(["mount", "-o", "remount,size=4M", disk], check=True)
        done = hpc_closure_command("generate", path)
        assert done.returncode == 0, done.stderr
        found = contents(disk / "tiny/data")
        assert len(found) == 4 and whole.items() <= found.items()


def test_read_only_file_system(tmp_path, hpc_closure_command, copy):
    path, run = copy
    with mounted(tmp_path / "readonly", "8M") as disk:
        shutil.copytree(run.root, disk / "tiny")
        path.write_text(TINY.format(root=disk))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for verb in ("generate", "rollout"):
            done = hpc_closure_command(verb, path, "generate.members=10")
            assert done.returncode == 1, done.stderr
            assert "read-only; change `root`" in last_line(done), done.stderr
            assert done.stderr.count("\n") == 1
        for words in (["status", path], ["inspect", disk / "tiny"],
                      ["generate", path, "--dry-run"]):
            done = hpc_closure_command(*words)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_folder_not_writable(tmp_path, environment, mode):
    path, locked = tmp_path / "tiny.yaml", tmp_path / "locked"
    path.write_text(TINY.format(root=locked))
    locked.mkdir()
    locked.chmod(mode)
    program = [sys.executable, "-m", "hpc_closure", "generate", path]
    if os.geteuid() == 0:  # root may write everywhere, unless it gives the right away
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere")
        program[:0] = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    locked.chmod(0o755)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"{locked}" in done.stderr and "permission denied; change `root`" in done.stderr


# cut and foreign files


@pytest.mark.parametrize("content", [b"", b"junk" * 99, "half"])
def test_a_damaged_product_is_set_aside_and_made_again(copy, hpc_closure_command, content):
    path, run = copy
    expected = contents(run.data)
    product = run.product("generate", "000002-000003")
    cut = product.read_bytes()[:5000] if content == "half" else content
    product.write_bytes(cut)
    done = hpc_closure_command("generate", path)
    assert done.returncode == 0, done.stderr
    assert f"not used: {product}" in done.stderr and "kept as" in done.stderr
    assert contents(run.data) == expected
    assert product.with_name(product.name + ".damaged").read_bytes() == cut


@pytest.mark.parametrize("content", [b"", b"junk" * 99, "half"])
def test_a_damaged_model_is_set_aside_and_made_again(copy, hpc_closure_command, content):
    path, run = copy
    whole = run.model.read_bytes()
    run.model.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    done = hpc_closure_command("rollout", path)
    assert done.returncode == 1 and str(run.model) in last_line(done)
    done = hpc_closure_command("train", path)
    assert done.returncode == 0, done.stderr
    assert run.model.name in done.stderr and "kept as" in done.stderr
    assert hpc_closure_command("rollout", path).returncode == 0


def test_files_of_others_in_the_folders_do_no_harm(copy, hpc_closure_command):
    path, run = copy
    for folder in (run.data, run.train, run.checkpoints, run.units("generate"), run.root):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (".nfs0001", "notes.txt", "other.h5", "block_1.h5", "step_x", "x.part",
                     "block_000000-000001.h5.other-7.part", "Thumbs.db"):
            (folder / name).write_text("not ours")
    run.model.unlink()
    for verb in ("generate", "train", "rollout", "status"):
        done = hpc_closure_command(verb, path)
        assert done.returncode == 0, done.stderr
    assert (run.data / "notes.txt").exists()


def test_lost_books_are_written_again(copy, hpc_closure_command):
    path, run = copy
    expected = contents(run.data)
    shutil.rmtree(run.units_dir, ignore_errors=True)
    shutil.rmtree(run.logs)
    run.config.unlink()
    done = hpc_closure_command("generate", path, "generate.members=10")
    assert done.returncode == 0, done.stderr
    assert "1 unit(s) done now, 4 before" in done.stderr
    assert expected.items() <= contents(run.data).items()


# others at work


def test_another_host_at_work_is_waited_for_and_taken_over_when_silent(copy, hpc_closure_command):
    path, run = copy
    expected = contents(run.data)
    run.product("generate", "000002-000003").unlink()
    claim = run.claim("generate", "000002-000003")
    files.write_json(claim, {**claims.owner(), "host": "x", "machine": "x", "mark": "y"})
    done = hpc_closure_command("generate", path, "--max-elapsed", "5s")
    assert done.returncode == 75 and "waiting for 1 unit(s)" in done.stderr
    done = hpc_closure_command("generate", path, "cluster.stale_after=4")
    assert done.returncode == 0, done.stderr
    assert contents(run.data) == expected and not claim.exists()


def test_train_is_held_by_one(copy, hpc_closure_command):
    path, run = copy
    run.model.unlink()
    claim = run.claim("train", SINGLE)
    files.write_json(claim, {**claims.owner(), "host": "node7", "machine": "x", "mark": "y",
                             "since": "today"})
    done = hpc_closure_command("train", path)
    assert done.returncode == 1
    assert "train is being run by process" in last_line(done) and "node7" in last_line(done)
    status = hpc_closure_command("status", path)
    assert "wait: train is running" in status.stdout
    os.utime(claim, (1e9, 1e9))
    assert hpc_closure_command("train", path).returncode == 0


# the manual


def test_every_row_of_the_manual_has_its_test():
    manual = (Path(__file__).parent.parent / "docs/restart.md").read_text()
    rows = [line.split("|")[1:-1] for line in manual.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for row in rows:
        for name in row[-1].replace("`", "").split(","):
            module, _, function = name.strip().partition("::")
            source = (Path(__file__).parent / f"{module}.py").read_text()
            assert f"def {function}(" in source, name
