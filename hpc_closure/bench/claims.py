"""What it costs to claim, publish and book units, measured with units that only wait.

    python -m hpc_closure.bench.claims FOLDER WORKERS UNITS SECONDS

Workers of one machine share a stage, as the workers of an allocation do. With ``strace`` the calls
that name a file of the run folder are counted: on a cluster each is a request to a server.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hpc_closure.experiment.folder import Run
from hpc_closure.work import hdf5, launch, log, loop, units
from hpc_closure.work.stop import Stop

# columns of the table and their formats
COLUMNS = {
    "workers": "",
    "units": "",
    "units_per_s": ".0f",
    "calls_per_unit": ".2f",
    "share": ".3f",
}


def ledger_of(folder: Path, stale_after: float = 600.0) -> units.Ledger:
    """Return the books of the stage that is measured."""
    return units.Ledger(Run(folder), "rollout", "empty", {"t_end": 1.0}, stale_after=stale_after)


def work_as(folder: Path, index: int, workers: int, num_units: int, seconds: float) -> int:
    """Work as worker ``index`` of ``workers`` until no unit is left; returns the units done."""
    os.environ[launch.WORKER] = f"{index}/{workers}"
    log.setup(verbosity=-1)
    ledger = ledger_of(folder)

    def run_unit(unit, claim):
        time.sleep(seconds)
        with ledger.publish(unit, claim=claim) as part, hdf5.open_hdf5(part, "w") as file:
            file.attrs.update({**ledger.attributes(unit), "complete": 1})

    return len(loop.work(ledger, ledger.plan(num_units, 1), run_unit, stop=Stop()).done)


def _work_and_end(start, *arguments) -> None:
    start.wait()
    work_as(*arguments)
    os._exit(0)


def elapsed(folder: Path, workers: int, num_units: int, seconds: float) -> float:
    """Return the seconds in which ``workers`` processes, once started, do all units."""
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [
        context.Process(
            target=_work_and_end, args=(start, folder, index, workers, num_units, seconds)
        )
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    began = time.perf_counter()
    start.set()
    for process in processes:
        process.join()
    return time.perf_counter() - began


def calls(folder: Path, workers: int, num_units: int) -> Counter:
    """Count the calls that name a file in ``folder``, by name of the system call."""
    trace = folder.with_name("trace")
    program = [sys.executable, "-m", __name__, folder, workers, num_units, 0.0]
    subprocess.run(
        [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-e",
            "trace=%file",
            "-o",
            trace,
            *map(str, program),
        ],
        check=True,
    )
    lines = trace.read_text().splitlines()
    calls_made = [line.split(maxsplit=1)[1] for line in lines if f'"{folder}/' in line]
    return Counter(call.partition("(")[0] for call in calls_made)


def run(workers: list[int], num_units: int, seconds: float) -> list[dict]:
    """Return a record per number of workers.

    Calls are counted in a run of their own, because tracing slows a run, and only with units that
    take no time.

    Raises:
        RuntimeError: a unit is missing afterwards.
    """
    records = []
    for number in workers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "run")
            took = elapsed(folder, number, num_units, seconds)
            counts = ledger_of(folder).survey(num_units, 1).counts()
            if counts["done"] != num_units:
                raise RuntimeError(f"{folder}: {counts}, expected {num_units} done")
            record: dict = {"workers": number, "units": num_units, "units_per_s": num_units / took}
            if seconds:
                record["share"] = num_units * seconds / (number * took)
            elif shutil.which("strace"):
                by_name = calls(Path(scratch, "traced"), number, num_units)
                record["calls_per_unit"] = sum(by_name.values()) / num_units
                record["calls"] = dict(by_name)
        records.append(record)
    return records


if __name__ == "__main__":
    elapsed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
