"""Climate of two-layer flow: the two online errors of Perezhogin, Zanna, Fernandez-Granda (2023).

The DNS, bare solvers on coarser grids and the trained closure run freely for years. All are cut to
the modes of the reduced grid, and their statistics are averaged after a spin-up:

* distributional error: Wasserstein-1 distance of the law at a point over the root mean square of
  the truth, of potential vorticity, both velocities, kinetic energy and enstrophy; the mean of
  these and of both layers;
* spectral error: root mean square over wavenumber shells of the difference over that of the
  truth, of the kinetic energy of each layer, the flux of total energy and the generation of
  available potential energy, at wavenumbers up to two thirds of the reduced grid's largest; the
  mean of these four.

Bare solvers have pyqg's filter, as pyqg's own, each on its own step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure import artifact
from hpc_closure.closure.compatibility import check_model
from hpc_closure.closure.fields.features import Features
from hpc_closure.closure.fields.modes import band
from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.opening import open_data
from hpc_closure.evaluate.scores.pointwise import wasserstein1
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment
from hpc_closure.generate.rungs import rung_problem
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.simulation import Simulation

__all__ = ["COLUMNS", "Climate", "run"]

COLUMNS = {"run": "s", "step": ".0f", "distributional": ".4f", "spectral": ".4f", "lost": "d"}
VALUES = 200_000  # values of a field that enter a Wasserstein distance
EVERY = 10  # closure intervals from one look at a flow to the next


class Climate:
    """Means of spectra and samples of fields of a two-layer flow.

    Args:
        equation: :class:`~hpc_closure.spectral.equations.two_layer.TwoLayerQG`.
        modes: largest wavenumber; states are cut to it.
    """

    def __init__(self, equation: Any, modes: int):
        self.equation, self.band = equation, band(modes, equation.length)
        self.features, grid = Features(self.band, equation), self.band.grid
        self.factors = equation.stream_factors(grid)
        self.shells = int(2 * (modes + 1) / 3) + 1
        depths = torch.tensor([equation.depth_ratio, 1.0]) / (1 + equation.depth_ratio)
        self.depths = depths.double()[:, None, None]
        self.spectra: list[Tensor] = []
        self.samples: list[Tensor] = []

    def add(self, state: Tensor) -> None:
        """Add retained spectra (members, 2, ...) of potential vorticity; lost members are left."""
        q = resize(state, self.band.modes)
        q = q[q.abs().flatten(1).sum(1).isfinite()]
        if not len(q):
            return
        size = self.band.grid.size
        kinetic, transfer, generated = self.budget(q)
        flux = transfer.flip(-1).cumsum(-1).flip(-1)
        means = [*kinetic.mean(0), flux.mean(0), generated.mean(0)]
        self.spectra.append(torch.stack(means))
        velocities = self.band.to_physical(self.features.velocities(q), size)
        u, v = velocities[:, ::2], velocities[:, 1::2]
        field = self.band.to_physical(q, size)
        values = [field, u, v, 0.5 * (u.square() + v.square()), 0.5 * field.square()]
        self.samples.append(torch.stack(values).transpose(1, 2).flatten(2))

    def budget(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute spectra per shell of spectra (members, 2, ...) of potential vorticity.

        Returns the kinetic energy of each layer (members, 2, shells); the rates at which advection
        by the eddies and the mean shear change the total energy, (members, shells) each.
        """
        grid, means = self.band.grid, self.depths.new_tensor(self.equation.mean_flow)
        psi = -torch.einsum("lcxy,bcxy->blxy", self.factors.to(q), q)
        kinetic = 0.5 * grid.shell_sum(grid.k2 * psi.abs().square())
        mean_advection = 1j * grid.kx * means[:, None, None] * q
        by_eddies = self.features.carried(q, q[:, None])[:, 0] + mean_advection
        # the total energy is -1/2 sum of depth psi* q
        transfer, generated = (
            grid.shell_sum((sign * self.depths * (psi.conj() * term).real).sum(1))
            for sign, term in ((-1, by_eddies), (1, mean_advection))
        )
        return kinetic, transfer, generated

    def errors(self, truth: Climate) -> tuple[float, float]:
        """Return the distributional and the spectral error."""
        if not self.samples:
            return float("nan"), float("nan")
        ours, theirs = (_pool(one.samples) for one in (self, truth))
        laws = [
            float(wasserstein1(a, b) / b.square().mean().sqrt())
            for a, b in zip(ours.flatten(0, 1), theirs.flatten(0, 1))
        ]
        means = [torch.stack(one.spectra).mean(0)[:, 1 : self.shells] for one in (self, truth)]
        apart = (means[0] - means[1]).square().mean(-1) / means[1].square().mean(-1)
        return sum(laws) / len(laws), float(apart.sqrt().mean())


def _pool(samples: list[Tensor]) -> Tensor:
    """Return at most VALUES values of each field, (fields, layers, values)."""
    whole = torch.cat(samples, -1)
    return whole[..., :: max(1, whole.shape[-1] // VALUES)].double()


def run(
    experiment: Experiment,
    members: int,
    duration: float,
    rungs: dict[int, int],
    device: str = "cpu",
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run the members; returns a record per solver.

    Args:
        experiment: a trained experiment of two layers with its data.
        members: number of trajectories of each solver.
        duration: time of each run; the first quarter is left out.
        rungs: DNS steps per step of the bare solver by its points per side.
        device: device of the closure's run.
        report: called with a line when a run has ended.

    Raises:
        ValueError: another equation, unequal sides, or data or model are missing.
    """
    physics, generate = experiment.physics, experiment.generate
    if physics.equation != "two_layer_qg":
        raise ValueError(
            f"physics.equation={physics.equation}: this comparison is for two_layer_qg"
        )
    if not experiment.problem.equal_sides:
        raise ValueError(
            f"physics.length={physics.length}, generate.grid={generate.grid}: this comparison is "
            "for a square"
        )
    modes = retained_modes(experiment.train_grid)
    steps = EVERY * generate.interval
    looks = round(duration / (generate.dt * steps))
    if looks < 8:
        raise ValueError(
            f"duration={duration:g}: expected at least {8 * steps * generate.dt:g}, eight looks"
        )

    def climate() -> Climate:
        return Climate(physics, modes)

    def settled(look: int) -> bool:
        return look >= looks // 4

    records: list[dict[str, Any]] = []
    truth = climate()
    dns = Simulation(experiment.problem, range(members), experiment.seed + 1).initialise()
    dns.advance(round(generate.record.start / generate.dt))
    begin = resize(dns.state, dns.grid.modes).clone()
    for look in range(looks):
        dns.advance(steps)
        if settled(look):
            truth.add(dns.state)
    report(f"DNS {generate.grid}^2: {looks} looks")
    halves = climate(), climate()
    middle = len(truth.spectra) // 2
    for half, part in zip(halves, (slice(None, middle), slice(middle, None))):
        half.spectra, half.samples = truth.spectra[part], truth.samples[part]
    for grid, stride in rungs.items():
        problem = rung_problem(experiment.problem, grid, stride)
        found, own = climate(), Simulation(problem, range(members), 0)
        own.load_state(0, resize(begin, own.grid.modes))
        for look in range(looks):
            own.advance(own.problem.steps_in(steps * generate.dt))
            if settled(look):
                found.add(own.state)
        records.append(_record(f"{grid}^2", stride, found, truth, int(own.mark_lost().sum())))
        report(f"{grid}^2: {looks} looks")
    check_model(experiment)
    closure = artifact.load(Run.of(experiment).model).to(device)
    rollout = experiment.rollout.model_copy(update={"baselines": (), "rungs": ()})
    alone = experiment.model_copy(update={"rollout": rollout})
    held = HeldOut.of(experiment)
    data = open_data(held.experiment, held.run)
    coupled = coupled_run(alone, closure, data, range(members), device)
    start(coupled, data, alone)
    found = climate()
    model = coupled.simulations["model"]
    for look in range(looks):
        coupled.advance(EVERY)
        if settled(look):
            found.add(model.state)
    lost = int(model.mark_lost().sum())
    stride = round(model.problem.dt / generate.dt)
    name = f"{experiment.train_grid}^2 + {experiment.model.preset}"
    records.append(_record(name, stride, found, truth, lost))
    records.append(_record("halves of the DNS", 1, *halves, 0))
    return records


def _record(name: str, stride: int, found: Climate, truth: Climate, lost: int) -> dict[str, Any]:
    distributional, spectral = found.errors(truth)
    return {
        "run": name,
        "step": float(stride),
        "distributional": distributional,
        "spectral": spectral,
        "lost": lost,
    }
