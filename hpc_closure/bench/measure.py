"""Timing of several programs in turns in the same run, without the first pass.

No machine is quiet for long, so programs are compared in turns: each pass runs every contender
once, and a ratio is the median over the passes of the quotient *within* a pass. A disturbance of a
second then affects both.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: takes a number of steps; what it returns is not timed
Advance = Callable[[int], object]
COPY_BYTES = 1 << 28  # size of the copied array, far beyond any cache
MOST_STEPS = 100_000


def machine(device: str = "cpu") -> dict[str, object]:
    """Describe the machine of the measurements."""
    description: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
    return description


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_line(description: Mapping[str, object]) -> str:
    """Describe the machine in one line."""
    line = (
        f"{description['cpu']}, {description['cores']} cores, {description['threads']} threads, "
        f"torch {description['torch']}"
    )
    return f"{line}, {description['gpu']}" if "gpu" in description else line


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def wait_for(device: str) -> Callable[[], None]:
    """Return a function that waits until the work of a device is done."""
    if torch.device(device).type == "cuda":
        return torch.cuda.synchronize
    return lambda: None


@dataclass(frozen=True)
class Timing:
    """Settings of a comparison.

    Attributes:
        steps: steps per block; 0 = as many as fill ``seconds``.
        repeats: number of passes.
        seconds: length of a block if ``steps`` is 0.
        device: device to wait for.
    """

    steps: int = 0
    repeats: int = 5
    seconds: float = 0.5
    device: str = "cpu"

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: expected at least 1")

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of a record that say how it was timed."""
        threads = torch.get_num_threads()
        return {"device": self.device, "threads": threads, "repeats": self.repeats}


def repeat(step: Callable[[], Any]) -> Callable[[int], Any]:
    """Return a function that calls ``step`` a number of times and returns the last result."""

    def advance(num_steps: int) -> Any:
        result = None
        for _ in range(num_steps):
            result = step()
        return result

    return advance


def interleave(
    contenders: Mapping[str, Advance],
    timing: Timing,
    *,
    meet: Callable[[], None] = lambda: None,
    agree: Callable[[float], float] = lambda value: value,
) -> dict[str, list[float]]:
    """Time contenders in turns; returns seconds per step of each contender in each pass.

    Args:
        contenders: by name, a function that takes a number of steps. Each takes a few steps and
            then a full block before the first pass.
        meet: waits for the other ranks, before and after each block.
        agree: maximum over the ranks; a block's time is that of its last rank.
    """
    finish = wait_for(timing.device)

    def block(advance: Advance, steps: int) -> float:
        meet()
        finish()
        start = time.perf_counter()
        advance(steps)
        finish()
        taken = time.perf_counter() - start
        meet()
        return agree(taken) / steps

    steps = {}
    for name, advance in contenders.items():
        block(advance, timing.steps or 1)  # compiles, allocates
        guess = block(advance, timing.steps or 1)
        steps[name] = timing.steps or min(MOST_STEPS, max(1, round(timing.seconds / guess)))
        block(advance, steps[name])
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(timing.repeats):
        for name, advance in contenders.items():
            taken[name].append(block(advance, steps[name]))
    return taken


def ratio(ours: list[float], others: list[float]) -> float:
    """Return our speed-up: median over the passes of other / ours within a pass."""
    return statistics.median(other / our for our, other in zip(ours, others, strict=True))


def copy_bandwidth(
    device: str = "cpu",
    *,
    size: int = COPY_BYTES,
    repeats: int = 5,
    meet: Callable[[], None] = lambda: None,
) -> float:
    """Measure bytes per second, read plus written, of copying a large array with all threads."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    finish, taken = wait_for(device), []
    for _ in range(repeats + 1):
        meet()
        finish()
        start = time.perf_counter()
        target.copy_(source)
        finish()
        taken.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(taken[1:])


def columns(text: str) -> dict[str, str]:
    """Parse the columns of a table, ``name`` or ``name:format`` each, into formats by name."""
    return {name: form for name, _, form in (word.partition(":") for word in text.split())}


def table(rows: list[dict], columns: Mapping[str, str], widths: int = 0) -> str:
    """Format rows as aligned text; ``columns`` maps keys to formats, and None becomes ``-``.

    ``widths`` is the least width of a column, so that successive tables are aligned.
    """
    cells = [list(columns)]
    for row in rows:
        cells.append(
            [
                "-" if row.get(key) is None else format(row[key], form)
                for key, form in columns.items()
            ]
        )
    wide = [max(widths, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, wide)).rstrip() for line in cells
    )


def check(members: int, against: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError if a case has no member, or is compared with an unknown method."""
    for name in against:
        if name not in known:
            raise ValueError(f"against {name!r}: expected one of {', '.join(known)}")
    if members < 1:
        raise ValueError(f"members={members}: expected at least 1")
