"""A case on several MPI ranks: start them, and what each of them runs.

mpirun -n 2 python -m hpc_closure.bench.ranks CASE.json OUT.json
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hpc_closure.bench import dns, measure
from hpc_closure.work import mpi


def start(case: dns.Case) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Run a case under ``mpirun``; records, remarks and the machine as the ranks see it.

    Raises:
        RuntimeError: no ``mpirun``, or the ranks failed.
    """
    program = mpirun()
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "case.json", Path(folder) / "records.json"
        asked.write_text(json.dumps(dns.as_plain(case)), encoding="utf-8")
        threads = str(case.threads or 1)
        done = subprocess.run(
            [
                *program,
                "-n",
                str(case.ranks),
                sys.executable,
                "-m",
                __name__,
                str(asked),
                str(answer),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        if done.returncode or not answer.exists():
            tail = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"{case.ranks} ranks failed (exit {done.returncode}): {tail}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    return found["records"], found["remarks"], found["machine"]


def mpirun() -> list[str]:
    """The launcher: beside this Python first, then on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        raise RuntimeError("--ranks needs mpirun: pip install 'hpc_closure[mpi]'")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return [program, "--oversubscribe"] if "Open MPI" in version else [program]


def main(asked: str, answer: str) -> None:
    """One rank."""
    world = mpi.world()
    with world.guard():
        case = dns.from_plain(json.loads(Path(asked).read_text(encoding="utf-8")))
        records, remarks = dns.run(case, world)
        found = {"records": records, "remarks": remarks, "machine": measure.machine(case.device)}
        if world.root:
            Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
