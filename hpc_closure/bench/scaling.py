"""Scaling of the training step: one batch on more processes (strong), more of them as well (weak).

The step is that of :mod:`.training`, of the ``default`` preset's generator, through the engines
that train. Processes of every number asked for are alive together and take turns, as all that is
compared here does; who waits for a turn waits for a line of text, and computes nothing. They are
started as torchrun would start them, so no launcher and no MPI is needed.
"""

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.known import Known, fit
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.training import training_batch, training_step
from hpc_closure.experiment.schema import Train
from hpc_closure.train import deepspeed, processes
from hpc_closure.work import launch

STRONG, WEAK = "strong", "weak"
COLUMNS = {
    "engine": "",
    "scaling": "",
    "ranks": "d",
    "cores": "d",
    "batch": "d",
    "milliseconds": ".2f",
    "speedup": ".2f",
    "efficiency": ".2f",
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        asked: numbers of processes; one is measured anyway.
        grid: points per side.
        batch: of one process, and the global one of strong scaling.
        engines: by name.
        threads: of each process.
        device: ``cpu``, or ``cuda``: a GPU for each process.
        config: differences from the ``default`` preset.
    """

    asked: Sequence[int]
    grid: int = 64
    batch: int = 80
    engines: Sequence[str] = ("torch",)
    threads: int = 1
    device: str = "cpu"
    config: dict[str, Any] | None = None

    def __post_init__(self):
        if self.device.startswith("cuda") and torch.cuda.device_count() < self.counts[-1]:
            raise ValueError(
                f"--ranks {self.counts[-1]}: each process takes its own GPU, and torch sees "
                f"{torch.cuda.device_count()} here; ask for no more"
            )
        for count in self.counts:
            if self.batch % count:
                raise ValueError(
                    f"--batch {self.batch} does not divide among {count} processes: take "
                    f"{max(1, round(self.batch / count)) * count}"
                )

    @property
    def counts(self) -> list[int]:
        """Numbers of processes that are measured, increasing."""
        return sorted({1, *self.asked})

    def batch_of(self, scaling: str, count: int) -> int:
        """The global batch."""
        return self.batch if scaling == STRONG else self.batch * count

    def cases(self, count: int) -> list[tuple[str, int]]:
        """(engine, global batch) of what is measured on ``count`` processes."""
        batches = sorted({self.batch_of(scaling, count) for scaling in (STRONG, WEAK)})
        return [(engine, batch) for engine in self.engines for batch in batches]


def engines() -> tuple[str, ...]:
    """Names of the engines that are installed."""
    return ("torch", "deepspeed") if deepspeed.installed() else ("torch",)


def run(plan: Plan, timing: Timing, cores: int) -> list[dict[str, Any]]:
    """Records: a row for each engine, scaling and number of processes.

    ``speedup`` is samples per second over those of one process in the same passes, ``efficiency``
    that over the number of processes.

    Args:
        plan: what.
        timing: of the blocks.
        cores: of this machine.
    """
    with contextlib.ExitStack() as closing:
        groups = [Group(count, plan) for count in plan.counts]
        for group in groups:
            closing.callback(group.wait)
        for group in groups:
            closing.callback(group.end)  # all of them before the first is waited for
        contenders = {}
        for group in groups:
            group.meet()
            for case in plan.cases(group.count):
                contenders[_name(group.count, *case)] = group.turn(*case)
        taken = measure.interleave(contenders, replace(timing, device="cpu"))
    return [
        record(plan, taken, engine, scaling, count)
        | {"cores": min(cores, count * plan.threads), "repeats": timing.repeats}
        for engine in plan.engines
        for scaling in (STRONG, WEAK)
        for count in plan.counts
    ]


def _name(count: int, engine: str, batch: int) -> str:
    return f"{engine}, {batch} on {count}"


def record(plan: Plan, taken: dict, engine: str, scaling: str, count: int) -> dict[str, Any]:
    """A row of times (passes,) by contender."""
    batch = plan.batch_of(scaling, count)
    ours, one = taken[_name(count, engine, batch)], taken[_name(1, engine, plan.batch)]
    speedup = measure.ratio(ours, one) * batch / plan.batch
    return {
        "engine": engine,
        "scaling": scaling,
        "ranks": count,
        "grid": plan.grid,
        "batch": batch,
        "milliseconds": 1e3 * statistics.median(ours),
        "speedup": speedup,
        "efficiency": speedup / count,
        "device": plan.device,
        "threads": plan.threads,
    }


def remarks(plan: Plan, cores: int) -> list[str]:
    """What the rows do not tell by themselves."""
    more = [count for count in plan.counts if count * plan.threads > cores]
    if plan.device.startswith("cuda") or not more:
        return []
    told = ", ".join(map(str, more))
    return [f"{told} processes share {cores} core(s): there the speedup is not the program's"]


class Group:
    """Processes that train together, in turns that :meth:`turn` gives them.

    Args:
        count: how many.
        plan: what they make ready.
    """

    def __init__(self, count: int, plan: Plan):
        self.count, self.errors, self.ready = count, tempfile.TemporaryFile("w+"), False
        self.members = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(asdict(plan))],
                env=_environment(rank, count),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
            for rank in range(count)
        ]

    def meet(self) -> None:
        """Tell all where the first one is, and wait until they are ready."""
        if self.count > 1:
            first, *others = self.members
            met = self._hear(first)
            for other in others:
                self._tell(other, met)
        self._hear_all()
        self.ready = True

    def end(self) -> None:
        """Tell them that there are no more turns."""
        for member in self.members:
            if not self.ready:
                member.terminate()  # it may wait for the others
            with contextlib.suppress(BrokenPipeError):
                member.stdin.close()  # type: ignore[union-attr]

    def wait(self) -> None:
        """Wait until they have ended."""
        for member in self.members:
            member.wait()
            member.stdout.close()  # type: ignore[union-attr]
        self.errors.close()

    def turn(self, engine: str, batch: int):
        """What takes a number of steps of a case, and returns when all processes have."""

        def advance(steps: int) -> None:
            for member in self.members:
                self._tell(member, json.dumps([engine, batch, steps]))
            self._hear_all()

        return advance

    def _tell(self, member: subprocess.Popen, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is not heard any more, either
            member.stdin.write(line.strip() + "\n")  # type: ignore[union-attr]
            member.stdin.flush()  # type: ignore[union-attr]

    def _hear(self, member: subprocess.Popen) -> str:
        line = member.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._fail(self.members.index(member))
        return line

    def _hear_all(self) -> None:
        for member in self.members:
            self._hear(member)

    def _fail(self, rank: int) -> None:
        for member in self.members:
            member.terminate()  # the others wait for it
        self.errors.seek(0)
        told = [line.strip() for line in self.errors if line.strip()]
        last = told[-1] if told else "without a word"
        raise RuntimeError(f"process {rank} of {self.count} ended: {last}")


def _environment(rank: int, count: int) -> dict[str, str]:
    """As torchrun sets it, but for the meeting point, which the first process tells."""
    here = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    own = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    return {**here, **{key: str(value) for key, value in own.items()}}


def main() -> None:
    """One of the processes: make ready what the plan has for them, and wait for turns."""
    answers, sys.stdout = sys.stdout, sys.stderr
    plan = Plan(**json.loads(sys.argv[1]))

    def say(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    def broadcast(met):
        if met is None:
            return json.loads(sys.stdin.readline())
        say(json.dumps(met))
        return met

    torch.set_num_threads(plan.threads)
    found = processes.join(launch.choose_device(plan.device, shared=False), broadcast)
    steps = dict(_cases(plan, found))
    finish = measure.wait_for(plan.device)
    say("ready")
    for line in sys.stdin:
        engine, batch, number = json.loads(line)
        steps[engine, batch](number)
        finish()
        say("done")
    processes.leave()


def _cases(plan: Plan, found: processes.Processes) -> Iterator[tuple]:
    known = Known("diffusion", plan.grid)
    pairs = training_batch(known, plan.batch, str(found.device))
    fitted = fit(known, samples=max(plan.batch, 64), steps=0, config=plan.config)
    for engine, batch in plan.cases(found.size):
        settings = Train(steps=1, batch=batch, engine=engine, lr=1e-3)
        state, target = (one[: batch // found.size] for one in pairs)
        model = copy.deepcopy(fitted).to(found.device)
        yield (engine, batch), training_step(model, settings, state, target, found)


if __name__ == "__main__":
    main()
