"""Measure each switch of the GPU code against no switch and against torch.compile.

A row is a switch (:mod:`hpc_closure.spectral.switches`) in a case: a solver step of all members, a
draw of the shipped model ``two_regimes``, or a training step of the ``default`` preset's
generator. ``torch.compile(mode="reduce-overhead")``, which makes CUDA graphs itself, compiles the
solver in its form for autograd, and the methods of the networks that ``captured`` and ``replays``
would record. ``difference`` is the largest difference between results with and without the switch,
over the largest result.

On a CPU switches have no effect and torch.compile only traces; such a run tests the bench.
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.model.known import Known, fit
from hpc_closure.bench.model.training import training_batch, training_step
from hpc_closure.closure import artifact
from hpc_closure.closure.header import read_header
from hpc_closure.closure.networks.compiled import compiling
from hpc_closure.closure.networks.layers import CheckpointedModule
from hpc_closure.experiment.folder import shipped_model
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral import switches
from hpc_closure.spectral.differentiable import DifferentiableSolver
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.spectral.switches import CAPTURED, FUSED, GRAPHS, REPLAYS
from hpc_closure.train.processes import Processes

WITHOUT, COMPILED = "without", "torch.compile"
MODEL = "two_regimes"  # the shipped model that draws by a network
NOISE = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
GAIN = 1.1  # least speed-up, over the faster alternative, that is worth the code of a switch
TOLERANCE = 1e-3  # relative difference beyond which a switch is wrong
FIRST = 20  # steps before results are compared, which include the solver's longer graph
COLUMNS = measure.columns(
    "switch case grid:d number:d without_ms:.3f with_ms:.3f compiled_ms:.3f "
    "difference:.1e verdict"
)

#: takes a number of steps; returns the result, or None if it is not compared
Advance = Callable[[int], Tensor | None]


def run(
    timing: Timing,
    *,
    grid: int,
    members: Sequence[int],
    samples: Sequence[int],
    batch: int,
    config: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a record per switch and case, and remarks: failures, and switches to keep.

    Args:
        timing: settings of the blocks.
        grid: points per side of solver and training.
        members: ensemble sizes of the solver.
        samples: numbers of members drawn at once for a state.
        batch: batch of the training step.
        config: differences from the ``default`` preset in training.
    """
    records: list[dict[str, Any]] = []
    remarks: list[str] = []

    def add(case: str, grid: int, number: int, contenders: dict[str, Advance]) -> None:
        running: dict[str, Callable[[int], Any]] = {}
        results: dict[str, Tensor | None] = {}
        for name, advance in contenders.items():
            try:
                results[name] = advance(FIRST)
            except Exception as error:  # of the code under test, or of torch.compile
                if name == WITHOUT:
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                remarks.append(f"{case}, {number}: {name} fails ({reason})")
            else:
                running[name] = advance
        taken = measure.interleave(running, timing)
        for name in contenders:
            if name not in (WITHOUT, COMPILED):
                difference = _difference(results.get(name), results[WITHOUT])
                records.append(
                    {
                        "switch": name,
                        "case": case,
                        "grid": grid,
                        "number": number,
                        "without_ms": _milliseconds(taken, WITHOUT),
                        "with_ms": _milliseconds(taken, name),
                        "compiled_ms": _milliseconds(taken, COMPILED),
                        "difference": difference,
                        "verdict": verdict(taken, name, difference, timing.device),
                        **timing.columns,
                    }
                )

    for number in members:
        for case, noise in (("solver step", {"kind": "none"}), ("with noise", NOISE)):
            add(case, grid, number, _solvers(grid, number, noise, timing.device))
    for number in samples:
        add("draw", read_header(shipped_model(MODEL)).size, number, _draws(number, timing.device))
    add("training step", grid, batch, _trainings(grid, batch, config, timing.device))
    return records, remarks + conclude(records)


def _milliseconds(taken: Mapping[str, list[float]], name: str) -> float | None:
    return 1e3 * statistics.median(taken[name]) if name in taken else None


def _difference(result: Tensor | None, plain: Tensor | None) -> float | None:
    """Return the largest difference of two results over the largest number of the second."""
    if result is None or plain is None:
        return None
    return float((result - plain).abs().max() / plain.abs().max())


def verdict(
    taken: Mapping[str, list[float]], name: str, difference: float | None, device: str
) -> str:
    """Return ``keep``, or the reason to remove the switch.

    Args:
        taken: seconds per step in each pass, by contender.
        name: name of the switch.
        difference: difference between results with and without it.
        device: device of the measurement.
    """
    if torch.device(device).type != "cuda":
        return "not measured"
    if name not in taken:
        return "remove: fails"
    if difference is not None and not difference <= TOLERANCE:
        return "remove: wrong"
    if measure.ratio(taken[name], taken[WITHOUT]) < GAIN:
        return "remove: no faster"
    if COMPILED in taken and measure.ratio(taken[name], taken[COMPILED]) < GAIN:
        return "remove: torch.compile does"
    return "keep"


def conclude(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per switch: keep it if it pays in a case and fails in none."""
    lines = []
    for name in dict.fromkeys(record["switch"] for record in records):
        verdicts = [record["verdict"] for record in records if record["switch"] == name]
        paying = verdicts.count("keep")
        if "not measured" in verdicts:
            lines.append(f"{name}: not measured, for there is no GPU")
        elif paying and not {"remove: fails", "remove: wrong"} & set(verdicts):
            lines.append(f"{name}: keep (pays in {paying} of {len(verdicts)} cases)")
        else:
            lines.append(f"{name}: remove ({', '.join(dict.fromkeys(verdicts))})")
    return lines


def _with(names: Sequence[str], advance: Advance) -> Advance:
    """Run ``advance`` with these switches alone."""

    def switched(num_steps: int) -> Tensor | None:
        with switches.only(*names):
            return advance(num_steps)

    return switched


def _compile(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Compile a function for CUDA graphs; on a CPU only trace it."""
    if torch.device(device).type == "cuda":
        return torch.compile(function, mode="reduce-overhead")
    return torch.compile(function, backend="eager")


def _marked(step: Callable[[], Any]) -> Advance:
    """Repeat a step, with a mark at the start of each, as torch.compile's CUDA graphs require."""

    def marked() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return measure.repeat(marked)


# ---- the solver ---------------------------------------------------------------------------------


def _solvers(grid: int, members: int, noise: dict, device: str) -> dict[str, Advance]:
    """Create solvers of the published problem that start from the same states."""
    problem = Problem(grid=grid, forcing={"kind": "published"}, noise=noise)
    contenders = {
        ",".join(names) or WITHOUT: _solver(problem, members, names, device)
        for names in ((), (GRAPHS,), (FUSED,), (GRAPHS, FUSED))
    }
    if noise["kind"] == "none":  # the form for autograd cannot draw noise
        contenders[COMPILED] = _compiled_solver(problem, members, device)
    return contenders


def _solver(problem: Problem, members: int, names: Sequence[str], device: str) -> Advance:
    with switches.only(*names):
        simulation = Simulation(problem, range(members), 0, device=device).initialise()

    def advance(num_steps: int) -> Tensor:
        return simulation.advance(num_steps).state.clone()

    return _with(names, advance)


def _compiled_solver(problem: Problem, members: int, device: str) -> Advance:
    start = Simulation(problem, range(members), 0, device=device).initialise()
    solver = DifferentiableSolver(problem, device)
    forcing, w = solver.steady(start.pairs), start.pairs.clone()
    stretch = _compile(lambda w, forcing: solver.stretch(1, w, forcing, None)[0], device)

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal w
        w = stretch(w, forcing).clone()  # the next replay overwrites it
        return torch.view_as_complex(w)

    return _marked(step)


# ---- draws --------------------------------------------------------------------------------------


def _draws(number: int, device: str) -> dict[str, Advance]:
    """Create closures that draw ``number`` members for the same state."""
    contenders = {}
    for names in ((), (REPLAYS,), (FUSED,)):
        with switches.only(*names):
            closure = artifact.load(MODEL).to(device)
        contenders[",".join(names) or WITHOUT] = _with(names, _draw(closure, number))
    closure = artifact.load(MODEL).to(device)
    compile_networks(closure.model, device)
    contenders[COMPILED] = _with((), _draw(closure, number))
    return contenders


def _draw(closure: artifact.Closure, number: int) -> Advance:
    grid, device = closure.model.grid, closure.device
    problem = Problem(grid=grid, forcing={"kind": "published"})
    simulation = Simulation(problem, [0], 0, threads=1).initialise()
    state = simulation.fields(["vorticity"])["vorticity"][0].float().to(device)
    call = itertools.count(1)
    return _marked(lambda: closure.sample(state, members=number, call=next(call)))


def compile_networks(model: nn.Module, device: str) -> None:
    """Compile the methods of a model's networks that take tensors alone, in place."""
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            for name in module.passes:
                setattr(module, name, _traced(_compile(getattr(module, name), device)))


def _traced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Call a method of a network as operations of torch, without the code compiled by Numba."""

    def called(*inputs: Any) -> Any:
        with compiling.off():
            return method(*inputs)

    return called


# ---- training -----------------------------------------------------------------------------------


def _trainings(grid: int, batch: int, config: dict, device: str) -> dict[str, Advance]:
    """Create training steps of equal models on one batch."""
    settings = Train(steps=1, batch=batch, engine="torch", lr=1e-3)
    here, known = Processes(device=torch.device(device)), Known("diffusion", grid)
    pair = training_batch(known, batch, device)
    fitted = fit(known, samples=max(batch, 64), steps=0, config=config).to(device)
    contenders: dict[str, Advance] = {}
    for names in ((), (CAPTURED,), None):
        model = copy.deepcopy(fitted)
        if names is None:
            compile_networks(model, device)
        with switches.only(*(names or ())):
            advance = training_step(model, settings, *pair, here)
        name = COMPILED if names is None else ",".join(names) or WITHOUT
        contenders[name] = _with(names or (), _marked(partial(advance, 1)))
    return contenders
