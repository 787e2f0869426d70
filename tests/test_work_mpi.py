import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hpc_closure
from hpc_closure.work.mpi import World


def test_serial_world():
    world = World()
    assert world.root and world.size == 1 and world.comm is None
    assert world.bcast("x") == "x" and world.allgather(1) == [1]
    assert world.any(True) and not world.any(False)
    world.barrier()
    groups = world.groups(1)
    assert (groups.index, groups.count, groups.domain.size) == (0, 1, 1)
    with pytest.raises(ValueError, match="cluster.domain_ranks=2 does not divide the 1 ranks"):
        world.groups(2)


def test_a_plain_start_does_not_import_mpi():
    code = (
        "import sys; from hpc_closure.work import mpi; w = mpi.world(); "
        "print(w.size, 'mpi4py' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False", "False"]


def test_no_mpi_on_one_rank_is_fine_and_on_two_is_an_error(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no libmpi')")
    code = "from hpc_closure.work import mpi; print(mpi.world())"
    for size, word in (("1", "size=1"), ("2", "MPI cannot be loaded")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(tmp_path), "PMI_RANK": "0", "PMI_SIZE": size},
        )
        assert word in done.stdout + done.stderr


def test_only_this_module_imports_mpi4py():
    def imports(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module or ""

    package = Path(hpc_closure.__file__).parent
    importers = [
        path.name
        for path in package.rglob("*.py")
        if any(name.split(".")[0] == "mpi4py" for name in imports(path))
    ]
    assert importers == ["mpi.py"]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, domain_ranks", [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_groups(mpirun, ranks, domain_ranks):
    code = f"""
from hpc_closure.work import mpi
world = mpi.world()
groups = world.groups({domain_ranks})
assert world.size == {ranks}
assert groups.count == {ranks // domain_ranks} and groups.index == world.rank // {domain_ranks}
assert groups.domain.size == {domain_ranks} and groups.domain.rank == world.rank % {domain_ranks}
assert world.bcast(world.rank) == 0 and world.allgather(world.rank) == list(range(world.size))
assert world.any(world.rank == world.size - 1) and not world.any(False)
with world.guard():
    world.barrier()
"""
    done = mpirun(ranks, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


@pytest.mark.mpi
def test_one_failing_rank_ends_all_with_its_message(mpirun):
    code = """
from hpc_closure.work import mpi
mpi._PATIENCE = 2.0
world = mpi.world()
with world.guard():
    if world.rank == 1:
        raise ValueError("the slab is bad")
    world.barrier()
"""
    started = time.monotonic()
    done = mpirun(2, [sys.executable, "-c", code], timeout=60)
    assert done.returncode != 0 and time.monotonic() - started < 30
    assert "rank 1/2: ValueError: the slab is bad" in done.stderr


@pytest.mark.mpi
def test_all_failing_alike_is_an_ordinary_error(mpirun):
    code = """
import sys
from hpc_closure.work import mpi
world = mpi.world()
try:
    with world.guard():
        raise ValueError("wrong config")
except ValueError as error:
    if world.root:
        print(error)
    sys.exit(2)
"""
    done = mpirun(2, [sys.executable, "-c", code])
    assert done.stdout.split("\n")[0] == "wrong config" and "Abort" not in done.stderr


@pytest.mark.mpi
def test_an_error_of_one_rank_reaches_the_others_at_the_end_of_the_work(mpirun):
    code = """
from hpc_closure.work import mpi
world = mpi.world()
error = world.agree_on_error(OSError(28, "full") if world.rank == 1 else None)
assert isinstance(error, OSError) and error.errno == 28, error
assert world.agree_on_error(None) is None
"""
    done = mpirun(2, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
