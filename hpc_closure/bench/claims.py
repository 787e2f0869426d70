"""What it costs to claim, publish and book units, measured with units that only wait.

    python -m hpc_closure.bench.claims FOLDER WORKERS UNITS SECONDS

Workers of one machine share a stage, as the workers of an allocation do. With ``strace`` the calls
that name a file of the run folder are counted: on a cluster each is a request to a server.
"""

import heapq
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hpc_closure.experiment.folder import Run
from hpc_closure.work import claims, hdf5, launch, log, loop, units
from hpc_closure.work.header import Header
from hpc_closure.work.stop import Stop
from hpc_closure.work.worker import Worker

#: of each worker: seconds of processor time; times at which its first unit began, its last unit
#: ended and it ended itself; seconds between its units
TIMES = ("cpu", "first", "last", "ended", "between")
PER_UNIT = 4  # members of a unit
# columns of the table and their formats
COLUMNS = {
    "workers": "",
    "units": "",
    "units_per_s": ".0f",
    "calls_per_unit": ".2f",
    "cpu_ms": ".2f",
    "start_s": ".2f",
    "between_ms": ".1f",
    "end_s": ".2f",
    "share": ".3f",
}


def ledger_of(
    folder: Path, num_units: int, workers: int, stale_after: float = 600.0
) -> units.Ledger:
    """Return the books of a stage of ``num_units`` blocks, the last of which are cut again."""
    return units.Ledger(
        Run(folder),
        "rollout",
        "empty",
        {"t_end": 1.0},
        stale_after=stale_after,
        cuts=units.Cuts(PER_UNIT, num_units * PER_UNIT, workers),
    )


def length(unit: units.Unit, seconds: float, chance: random.Random) -> float:
    """Return the seconds of a unit: those of a whole block, more or less by up to a fifth."""
    return seconds * chance.uniform(0.8, 1.2) * len(unit.members) / PER_UNIT


def publish(ledger: units.Ledger, unit: units.Unit, claim: claims.Claim | None) -> None:
    """Publish a product without data sets, as a solver publishes its own."""

    def check(part: Path) -> Header:
        return Header.read(part, flush=True, written=file.finish())

    with ledger.publish(unit, check, claim=claim) as part:
        file = hdf5.WritableHDF5(part, "w")
        file.attrs.update({**ledger.attributes(unit), "complete": 1})


def work_as(folder: Path, index: int, workers: int, num_units: int, seconds: float) -> list[float]:
    """Work as worker ``index`` of ``workers`` until no unit is left; returns its :data:`TIMES`."""
    cpu = time.process_time()
    os.environ[launch.WORKER] = f"{index}/{workers}"
    log.setup(verbosity=-1)
    ledger = ledger_of(folder, num_units, workers)
    chance = random.Random(index)
    spans: list[tuple[float, float]] = []  # begin and end of each unit's wait

    def run_unit(unit, claim):
        first = time.perf_counter()
        time.sleep(length(unit, seconds, chance))
        spans.append((first, time.perf_counter()))
        publish(ledger, unit, claim)

    loop.work(ledger, ledger.plan(), run_unit, stop=Stop())
    ended = time.perf_counter()
    spans = spans or [(ended, ended)]
    between = sum(following[0] - span[1] for span, following in zip(spans, spans[1:]))
    return [time.process_time() - cpu, spans[0][0], spans[-1][1], ended, between]


def _work_and_end(start, times, index, folder, *arguments) -> None:
    start.wait()
    own = work_as(folder, index, *arguments)
    times[len(TIMES) * index : len(TIMES) * (index + 1)] = own
    os._exit(0)


def elapsed(folder: Path, workers: int, num_units: int, seconds: float) -> dict[str, float]:
    """Return where the time of ``workers`` processes goes that share the units.

    Returns:
        ``took``: seconds from their common start to the end of the last worker. Means over the
        workers: ``cpu``, seconds of processor time; ``start``, seconds to the first unit;
        ``between`` units; ``end``, from the last unit of each to the end of the last worker.
    """
    context = multiprocessing.get_context("fork")
    start, times = context.Event(), context.Array("d", len(TIMES) * workers, lock=False)
    processes = [
        context.Process(
            target=_work_and_end, args=(start, times, index, folder, workers, num_units, seconds)
        )
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    began = time.perf_counter()
    start.set()
    for process in processes:
        process.join()
    columns = {name: times[number :: len(TIMES)] for number, name in enumerate(TIMES)}
    mean = {name: sum(column) / workers for name, column in columns.items()}
    ended = max(columns["ended"])
    return {
        "took": ended - began,
        "cpu": mean["cpu"],
        "start": mean["first"] - began,
        "between": mean["between"],
        "end": ended - mean["last"],
    }


def simulated(folder: Path, workers: int, num_units: int, seconds: float) -> dict[str, float]:
    """Return what :func:`elapsed` returns, for workers that have a core each.

    One process takes the steps of all workers in the order of a simulated clock. What a worker
    does between two units is done on real files and takes the processor time that was measured;
    a unit takes ``seconds``, more or less by at most a fifth, without waiting.
    """
    log.setup(verbosity=-1)
    stop, chance = Stop(), random.Random(0)

    def steps_of(index: int) -> Iterator[units.Unit]:
        os.environ[launch.WORKER] = f"{index}/{workers}"
        ledger = ledger_of(folder, num_units, workers)
        worker = Worker(ledger, ledger.plan(), (index, workers), False, "none")
        while (unit := worker.next(stop)) is not None:
            yield unit
            publish(ledger, unit, worker.claim)
            worker.record_result(unit, None)
        worker.close(stop, alone=False)

    running = [steps_of(index) for index in range(workers)]
    clock = [(0.0, index) for index in range(workers)]
    started: set[int] = set()
    cpu = start = between = last = ended = busy = 0.0
    while clock:
        now, index = heapq.heappop(clock)
        began = time.process_time()
        unit = next(running[index], None)
        spent = time.process_time() - began
        cpu, ended = cpu + spent, max(ended, now + spent)
        if unit is None:
            last += now
            continue
        if index in started:
            between += spent
        else:
            start += spent
            started.add(index)
        took = length(unit, seconds, chance)
        busy += took
        heapq.heappush(clock, (now + spent + took, index))
    del os.environ[launch.WORKER]
    mean = {"cpu": cpu, "start": start, "between": between, "busy": busy, "last": last}
    mean = {name: total / workers for name, total in mean.items()}
    return {**mean, "took": ended, "end": ended - mean.pop("last")}


def calls(folder: Path, workers: int, num_units: int, seconds: float) -> Counter:
    """Count the calls that name a file in ``folder``, by name of the system call."""
    trace = folder.with_name("trace")
    program = [sys.executable, "-m", __name__, folder, workers, num_units, seconds]
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


def run(workers: list[int], num_units: int, seconds: float, simulate: bool = False) -> list[dict]:
    """Return a record per number of workers.

    Calls are counted in a run of their own, because tracing slows a run.

    Raises:
        RuntimeError: a unit is missing afterwards.
    """
    records = []
    for number in workers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "run")
            measure = simulated if simulate else elapsed
            spent = {"busy": num_units * seconds / number}
            spent |= measure(folder, number, num_units, seconds)
            counts = ledger_of(folder, num_units, number).survey().counts()
            if counts["done"] != counts["units"]:
                raise RuntimeError(f"{folder}: {counts}, expected {counts['units']} done")
            done = counts["done"]
            record: dict = {
                "workers": number,
                "units": done,
                "units_per_s": done / spent["took"],
                "cpu_ms": 1e3 * spent["cpu"] * number / done,
                "start_s": spent["start"],
                "between_ms": 1e3 * spent["between"] * number / done,
                "end_s": spent["end"],
            }
            if seconds:
                record["share"] = spent["busy"] / spent["took"]
            if not simulate and shutil.which("strace"):
                by_name = calls(Path(scratch, "traced"), number, num_units, seconds)
                record["calls_per_unit"] = sum(by_name.values()) / done
                record["calls"] = dict(by_name)
        records.append(record)
    return records


if __name__ == "__main__":
    elapsed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
