"""Scaling of the training step: one batch on more processes (strong), or one per process (weak).

The step is that of :mod:`.training`, with the generator of the ``default`` preset and the training
engines. torchrun starts a group of processes for every number. The groups exist together and take
turns, as all compared programs here. A group waits for its turn without computing: its first
process reads a line of text, the others a broadcast.
"""

import contextlib
import copy
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.model.known import Known, fit
from hpc_closure.bench.model.training import training_batch, training_step
from hpc_closure.experiment.schema import Train
from hpc_closure.train import deepspeed, processes
from hpc_closure.work import launch

STRONG, WEAK = "strong", "weak"
PATIENCE = timedelta(days=1)
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]+Error: ")  # the last line of a traceback
COLUMNS = measure.columns(
    "engine scaling ranks:d cores:d batch:d milliseconds:.2f speedup:.2f efficiency:.2f"
)


@dataclass(frozen=True)
class Plan:
    """Settings of the measurement.

    Attributes:
        ranks: numbers of processes; a single process is measured in any case.
        grid: points per side.
        batch: batch of a process, and the global batch of strong scaling.
        engines: names of the engines.
        threads: threads of each process.
        device: ``cpu``, or ``cuda`` with a GPU per process.
        config: differences from the ``default`` preset.
    """

    ranks: Sequence[int]
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
        """Measured numbers of processes, increasing."""
        return sorted({1, *self.ranks})

    def batch_of(self, scaling: str, count: int) -> int:
        """Return the global batch."""
        return self.batch if scaling == STRONG else self.batch * count

    def cases(self, count: int) -> list[tuple[str, int]]:
        """List (engine, global batch) of the measurements on ``count`` processes."""
        batches = sorted({self.batch_of(scaling, count) for scaling in (STRONG, WEAK)})
        return [(engine, batch) for engine in self.engines for batch in batches]


def engines() -> tuple[str, ...]:
    """Return the names of the installed engines."""
    return ("torch", "deepspeed") if deepspeed.installed() else ("torch",)


def run(plan: Plan, timing: Timing, cores: int) -> list[dict[str, Any]]:
    """Measure; returns a row for each engine, scaling and number of processes.

    ``speedup`` is samples per second over those of a single process in the same passes.
    ``efficiency`` is the speedup over the number of processes.

    Args:
        plan: settings of the measurement.
        timing: settings of the blocks.
        cores: cores of this machine.
    """
    with contextlib.ExitStack() as stack:
        groups = {count: stack.enter_context(group(count, plan)) for count in plan.counts}
        contenders = {}
        for count, ask in groups.items():
            ask("")
            for case in plan.cases(count):
                contenders[_name(count, *case)] = partial(_turn, ask, case)
        taken = measure.interleave(contenders, replace(timing, device="cpu"))
    return [
        record(plan, taken, engine, scaling, count)
        | {"cores": min(cores, count * plan.threads), "repeats": timing.repeats}
        for engine in plan.engines
        for scaling in (STRONG, WEAK)
        for count in plan.counts
    ]


def _turn(ask: Callable[[str], None], case: tuple[str, int], num_steps: int) -> None:
    ask(json.dumps([*case, num_steps]))


def _name(count: int, engine: str, batch: int) -> str:
    return f"{engine}, {batch} on {count}"


def record(plan: Plan, taken: dict, engine: str, scaling: str, count: int) -> dict[str, Any]:
    """Create a row from times (passes,) by contender."""
    batch = plan.batch_of(scaling, count)
    ours, single = taken[_name(count, engine, batch)], taken[_name(1, engine, plan.batch)]
    speedup = measure.ratio(ours, single) * batch / plan.batch
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
    """Return remarks on rows that measure the machine instead of the program."""
    more = [count for count in plan.counts if count * plan.threads > cores]
    if plan.device.startswith("cuda") or not more:
        return []
    counts = ", ".join(map(str, more))
    return [f"{counts} processes share {cores} core(s): their speedup is limited by the cores"]


@contextlib.contextmanager
def group(count: int, plan: Plan) -> Iterator[Callable[[str], None]]:
    """Start processes of a torchrun that train together in turns; end them on exit.

    Args:
        count: number of processes.
        plan: settings of the measurement.

    Yields:
        A function that sends a line, a turn for :func:`main`, and returns when all processes have
        answered; "" sends nothing and waits until all have prepared their cases. It raises
        RuntimeError with the first of their errors if the processes ended.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, "-m", *launcher, "-m", __name__, json.dumps(asdict(plan))]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as agent,
    ):
        questions, answers = agent.stdin, agent.stdout
        assert questions and answers

        def ask(line: str) -> None:
            if line:
                with contextlib.suppress(BrokenPipeError):  # the error is read below
                    questions.write(line + "\n")
                    questions.flush()
            if answers.readline():
                return
            agent.wait()
            errors.seek(0)
            lines = [text.strip() for text in errors if ERROR.match(text)]
            reason = lines[0] if lines else f"exit code {agent.returncode}"
            raise RuntimeError(f"a process of {count} ended: {reason}")

        try:
            yield ask
        except BaseException:
            agent.terminate()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                questions.close()  # ends the turns


def main() -> None:
    """Prepare the cases of this process, and take turns until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr
    plan = Plan(**json.loads(sys.argv[1]))
    torch.set_num_threads(plan.threads)
    joined = processes.join(launch.choose_device(plan.device, shared=False))
    # a gloo group, which waits without computing while the other groups run
    turns = dist.new_group(backend="gloo", timeout=PATIENCE) if joined.size > 1 else None
    steps = dict(_cases(plan, joined))
    finish = measure.wait_for(plan.device)

    def say(line: str) -> None:
        if turns is not None:
            dist.barrier(turns)
        if joined.rank == 0:
            answers.write(line + "\n")
            answers.flush()

    say("ready")
    while (line := _next(joined.rank, turns)) is not None:
        engine, batch, number = json.loads(line)
        steps[engine, batch](number)
        finish()
        say("done")
    processes.leave()


def _next(rank: int, turns: dist.ProcessGroup | None) -> str | None:
    """Return the next turn, which the first process reads for all; None after the last."""
    lines = [(sys.stdin.readline() or None) if rank == 0 else None]
    if turns is not None:
        dist.broadcast_object_list(lines, 0, group=turns)
    return lines[0]


def _cases(plan: Plan, joined: processes.Processes) -> Iterator[tuple]:
    known = Known("diffusion", plan.grid)
    pairs = training_batch(known, plan.batch, str(joined.device))
    fitted = fit(known, samples=max(plan.batch, 64), steps=0, config=plan.config)
    for engine, batch in plan.cases(joined.size):
        settings = Train(steps=1, batch=batch, engine=engine, lr=1e-3)
        state, target = (tensor[: batch // joined.size] for tensor in pairs)
        model = copy.deepcopy(fitted).to(joined.device)
        yield (engine, batch), training_step(model, settings, state, target, joined)


if __name__ == "__main__":
    main()
