"""``hpc-closure solver check``: does a user's reduced solver keep the rules, one line each?

A rule that a run needs fails with FAIL and exit code 1. A property that only some uses need, such
as a gradient, is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpc_closure.closure.targets import users_solver
from hpc_closure.experiment.user_modules import beside
from hpc_closure.spectral.modes.grid import Grid, hermitian, to_fields, to_spectra
from hpc_closure.spectral.outside.solver import OutsideSolver
from hpc_closure.work.options import UsageError

OK, FAIL, NOTE = "OK", "FAIL", "--"
MEMBERS, STEPS = 8, 2
ROUND_OFF = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative, of what must be equal
SLOPE = 1e-3  # relative error of a gradient
TIMED = 0.2  # seconds


@dataclass(frozen=True)
class Line:
    """Result of one rule.

    Attributes:
        rule: the rule in a few words.
        verdict: OK, FAIL, or -- for a property that is only reported.
        found: what was found.
    """

    rule: str
    verdict: str
    found: str

    def __str__(self) -> str:
        return f"{self.verdict:4}  {self.rule:24}  {self.found}"


def run(
    python: str,
    grid: int = 32,
    fields: int = 1,
    sides: int = 2,
    length: float = 1.0,
    size: float = 1.0,
    seed: int = 0,
) -> int:
    """Check a solver, print a line for each rule; returns 1 if one fails, else 0.

    Args:
        python: ``file.py:Name`` or ``module:Name``.
        grid: points per side.
        fields: number of fields of the state.
        sides: number of sides of the box.
        length: side of the box, for the wavenumbers of the test states.
        size: root mean square of the test states.
        seed: seed of the test states.

    Raises:
        UsageError: a number is out of range.
        ValueError: the solver cannot be imported.
    """
    for option, value, least in (("--grid", grid, 8), ("--fields", fields, 1)):
        if value < least:
            raise UsageError(f"{option} {value}: expected at least {least}")
    if sides not in (1, 2, 3):
        raise UsageError(f"--sides {sides}: expected 1, 2 or 3")
    for option, number in (("--length", length), ("--size", size)):
        if not 0 < number < math.inf:
            raise UsageError(f"{option} {number:g}: expected a positive number")
    solver = users_solver(beside(python, Path()), "solver")
    states = test_states(Grid(grid, length, sides), fields, size, seed).to(solver.dtype)
    failed = False
    for line in lines(solver, states, sides):
        print(line, flush=True)
        failed = failed or line.verdict == FAIL
    return int(failed)


def test_states(grid: Grid, fields: int, size: float, seed: int) -> Tensor:
    """Draw smooth states (MEMBERS, *sides), or (MEMBERS, C, *sides), within the retained modes.

    Amplitudes fall as 1 / (1 + shell^2); the mean is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (MEMBERS, *((fields,) if fields > 1 else ()), *grid.shape)
    parts = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    shell = grid.shell().double()
    spectra = torch.view_as_complex(parts) * (shell > 0) / (1 + shell**2)
    out = to_fields(hermitian(spectra, grid.dimensions), grid.sizes)
    return out * (size / out.square().mean().sqrt())


test_states.__test__ = False  # type: ignore[attr-defined]  # not a test of pytest


def lines(solver: OutsideSolver, states: Tensor, sides: int) -> Iterator[Line]:
    """Yield the result of each rule; stop if the solver does not run at all."""
    tolerance = ROUND_OFF[solver.dtype]

    def after(fields: Tensor, steps: int) -> Tensor:
        return solver.advance(fields.clone(), steps)[0].clone()

    try:
        once = after(states, STEPS)
    except (ValueError, RuntimeError) as error:
        yield Line("runs", FAIL, str(error))
        return
    how = "all members at once" if solver.vectorized else "one member at a time"
    kind = str(solver.dtype).removeprefix("torch.")
    shape = " x ".join(map(str, states.shape))
    yield Line("shape and precision", OK, f"{shape}, {kind}, {solver.library}, {how}")
    finite = bool(once.isfinite().all())
    change = distance(once, states)
    yield Line(
        "finite",
        OK if finite else FAIL,
        f"changes by {change:.2g} in {STEPS} steps" if finite else "NaN or Inf: smaller --size?",
    )
    if not finite:
        return
    passed = states.clone()
    again = solver.advance(passed, STEPS)[0].clone()
    same = bool((states == passed).all())
    yield Line("input untouched", OK if same else FAIL, "" if same else "step writes into v")
    yield _equal("same call, same result", again, once, 0.0, "it keeps something")
    twice, whole = after(after(states, STEPS), STEPS), after(states, 2 * STEPS)
    yield _equal(
        "step(v, 2n) twice step n",
        twice,
        whole,
        tolerance,
        "a hidden state: see start(v) and fields(state)",
        fails=not solver.starts,
    )
    order = torch.arange(len(states)).flip(0)
    yield _equal("members in any order", after(states[order], STEPS), once[order], tolerance, "")
    alone = torch.cat([after(states[number : number + 1], STEPS) for number in (0, 1)])
    yield _equal("members are independent", alone, once[:2], tolerance, "one changes another")
    axes = tuple(range(-sides, 0))
    shift = (3, 1, 2)[:sides]
    moved = after(states.roll(shift, axes), STEPS)
    yield _equal(
        "translations commute",
        moved,
        once.roll(shift, axes),
        tolerance,
        "not homogeneous or not periodic: closures assume both",
    )
    yield _beyond(once, sides)
    yield _gradient(solver, states, after)
    yield _speed(solver, states)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest value of ``other``."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


def _equal(
    rule: str, one: Tensor, other: Tensor, most: float, why: str, fails: bool = True
) -> Line:
    """Compare two results that the rule wants equal to ``most``."""
    far = distance(one, other)
    good = far <= most
    text = f"differ by {far:.1g}" + ("" if good or not why else f": {why}")
    return Line(rule, OK if good else FAIL if fails else NOTE, text)


def _beyond(ends: Tensor, sides: int) -> Line:
    """Report the share of the variance in modes that the package does not retain."""
    modes, size = (ends.shape[-1] - 1) // 3, ends.shape[-1]
    kept = to_fields(to_spectra(ends, modes, sides), size, sides)
    share = float((ends - kept).square().mean() / ends.square().mean())
    text = f"a share of {share:.1g} of the variance after {STEPS} steps is cut"
    return Line(f"modes beyond {modes}", NOTE, text)


def _gradient(solver: OutsideSolver, states: Tensor, after: Callable) -> Line:
    """Compare the gradient along a random direction with differences; none is no failure."""
    rule = "gradient"
    try:
        solver.check_gradient(states)
    except ValueError:
        return Line(rule, NOTE, "none: numpy without vjp(v, n, g); no training through the solver")
    generator = torch.Generator().manual_seed(1)

    def like() -> Tensor:
        return torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states)

    weights, along = like(), like() * states.abs().mean()
    try:
        found = float((solver.pullback(states, STEPS, weights) * along).double().sum())
    except Exception as error:  # the user's gradient may raise anything
        return Line(rule, FAIL, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    step = 1e-5 if states.dtype == torch.float64 else 1e-2
    ends = [after(states + sign * step * along, STEPS).double() for sign in (1, -1)]
    expected = float(((ends[0] - ends[1]) * weights).sum() / (2 * step))
    far = abs(found - expected) / max(abs(expected), 1e-300)
    most = SLOPE if states.dtype == torch.float64 else 30 * SLOPE
    own = "vjp" if hasattr(solver.solver, "vjp") else solver.library
    return Line(rule, OK if far <= most else FAIL, f"by {own}, {far:.1g} from differences")


def _speed(solver: OutsideSolver, states: Tensor) -> Line:
    """Time calls of STEPS steps, and of the whole way from and to spectra."""
    spent = math.inf
    solver.advance(states, STEPS)
    until = time.perf_counter() + TIMED
    while time.perf_counter() < until:
        begun = time.perf_counter()
        solver.advance(states, STEPS)
        spent = min(spent, time.perf_counter() - begun)
    each = 1e6 * spent / len(states) / STEPS
    return Line("speed", NOTE, f"{each:.3g} microseconds per member and step, dt = {solver.dt:g}")
