"""Replicas: DNS that share the resolved past of a start; the true ensemble of a subgrid closure.

The *master* is the trajectory of the start, recomputed bit for bit from t = 0. From the first step
of a :class:`Plan` on, the replicas run in lockstep with it: after every step, the modes that the
reduced solver retains are copied from the master. Unresolved modes and forcing differ from replica
to replica. Replicas begin with the master's unresolved modes shifted by a random distance. Where
unresolved scales follow the resolved ones, replicas soon forget this beginning, and their closures
are draws of p(U | history of V). At the start the replicas are released.

The master's states with all modes are stored too, as initial states of finer solvers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.targets import Target, reduced_problem
from hpc_closure.data.layout import STATE, Layout, WholeLayout, by_data_set, data_sets
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.grid import Grid, resize
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.block import Block, times_of

MASTER, OWN = "master.", ""  # key prefixes in a restart file
PILOT_IDS = 1 << 24  # first member id of the pilot's trajectories, above those of any data set


@dataclass(frozen=True)
class Plan:
    """Starts, members and storage times of a set of replicas; times are in DNS steps.

    Attributes:
        stage: stage of the run, which determines the recipe.
        draws: stage in the key of the replicas' draws.
        cases: member ids of the starts.
        members: replicas of each start.
        released: step of the start.
        steps: steps at which replicas are stored; replicas begin at the first.
        whole: those of ``steps`` at which the master is stored with all modes.
        again: whether unresolved modes are shifted again when the replicas are released.
        stride: DNS steps per step of the reduced solver.
    """

    stage: str
    draws: str
    cases: Sequence[int]
    members: int
    released: int
    steps: Sequence[int]
    whole: Sequence[int]
    again: bool
    stride: int

    @classmethod
    def replicas(cls, experiment: Experiment, cases: Sequence[int], stride: int) -> Self:
        """Plan the true ensemble of the rollout's starts."""
        dt, rollout = experiment.generate.dt, experiment.rollout
        begin = round((rollout.t_start - experiment.replicas.spinup) / dt)
        released, end = round(rollout.t_start / dt), round(rollout.t_end / dt)
        steps = range(begin, end + 1, round(rollout.every / dt))
        number = experiment.replicas.members
        return cls(
            "replicas",
            "replica",
            cases,
            number,
            released,
            steps,
            [released],
            False,
            stride,
        )

    @classmethod
    def pilot(cls, experiment: Experiment) -> Self:
        """Plan the pilot: separate trajectories, stored every interval before the start."""
        dt, rollout = experiment.generate.dt, experiment.rollout
        released = round(rollout.t_start / dt)
        begin = released - round(experiment.pilot_spinup / dt)
        end = round((rollout.t_start + max(experiment.evaluate.lead_times)) / dt)
        before = range(begin, released, experiment.generate.interval)
        steps = [*before, *range(released, end + 1, round(rollout.every / dt))]
        cases = [PILOT_IDS + number for number in range(experiment.pilot.initial_conditions)]
        again = not experiment.replicas.spinup
        members = experiment.pilot.members
        whole = [*before, released]
        return cls("pilot", "pilot", cases, members, released, steps, whole, again, 1)

    def rows(self, members: Sequence[int]) -> list[tuple[int, int]]:
        """List (start, replica) of each of the stage's members."""
        return [(self.cases[row // self.members], row % self.members) for row in members]


class ReplicaBlock(Block):
    """Integrate replicas from the first step of a plan, where they are pinned, to its last."""

    def __init__(self, unit, books, session, domain, plan: Plan):
        super().__init__(unit, books, session, domain)
        experiment: Experiment = session.experiment
        self.experiment, self.problem, self.plan = experiment, experiment.problem, plan
        self.rows = plan.rows(unit.members)
        self.cases = list(dict.fromkeys(case for case, _ in self.rows))
        self.case_of_row = torch.tensor([self.cases.index(case) for case, _ in self.rows])
        self.record_steps, self.released = plan.steps, plan.released
        self.master = self._simulation(self.cases, "generate")
        names = [keyed_noise.pair(case, member) for case, member in self.rows]
        self.replicas = self._simulation(names, plan.draws)
        # scratch copy: released from a pinned state for one closure target
        self.free = self._simulation(names, plan.draws)
        self.grid, self.sides = experiment.data_grid, self.problem.dimensions
        reduced = reduced_problem(self.problem, self.grid, "subgrid", plan.stride)
        self.target = Target("subgrid", experiment.generate.interval, reduced)
        self.stored = Transform(
            Grid(self.grid, self.problem.length, self.sides),
            self.problem.precision,
            session.device,
        )
        self.resolved = self._resolved()

    def _simulation(self, members, stage: str) -> Simulation:
        """Build a simulation of DNS members whose draws are keyed by ``stage``."""
        session, comm = self.session, self.domain.comm
        seed = self.experiment.seed
        return Simulation(
            self.problem, members, seed, device=session.device, comm=comm, stage=stage
        )

    def _resolved(self) -> torch.Tensor:
        """Build the mask of this rank's modes that a start knows."""
        known = Grid(self.experiment.known_grid, self.problem.length, self.sides)
        whole, inside = self.master.grid, torch.ones(1, *known.shape)
        mask = resize(inside.to(torch.complex64), whole.mode_counts).real > 0
        return self.master.transform.local(mask)[0].to(self.session.device)

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the fields of the state; empty if it has one."""
        return self.problem.physics.channel_names

    # interface of Block

    @property
    def step_index(self) -> int:
        return max(self.master.step_index, self.replicas.step_index)

    @property
    def pinned(self) -> bool:
        """Whether the resolved modes are still imposed at this step."""
        return self.step_index < self.released

    def initialise(self) -> None:
        self.master.initialise()
        if self.record_steps[0] == 0:
            self._begin()

    def advance(self, steps: int) -> None:
        begin, end = self.record_steps[0], self.step_index + steps
        while self.step_index < end:
            if self.step_index < begin:
                self.master.advance(min(begin, end) - self.step_index)
                if self.step_index == begin:
                    self._begin()
            elif self.pinned:
                self.master.advance(1)
                self.replicas.advance(1)
                self._impose()
                if self.plan.again and not self.pinned:
                    self._begin()
            else:
                self.replicas.advance(end - self.step_index)

    def _begin(self) -> None:
        """Set the replicas to the master's present state with other unresolved modes."""
        whole = self.master.transform.gather(self.master.state)[self.case_of_row]
        factors = self._factors().to(whole)
        if self.channels:
            factors = factors[:, None]
        self.replicas.load_state(self.step_index, whole * factors)
        self._impose()

    def _factors(self) -> torch.Tensor:
        """Return factors of the master's modes: phases of a random shift, or zero (``empty``).

        Shape (rows, 2K + 1, K + 1).
        """
        grid = self.problem.make_grid()
        if self.experiment.replicas.start == "empty":
            return torch.zeros(len(self.rows), *[1] * self.sides, dtype=torch.complex128)
        return keyed_noise.moves(
            grid, self.experiment.seed, self.plan.draws, self.replicas.members
        )

    def _impose(self) -> None:
        """Overwrite the replicas' resolved modes with the master's."""
        resolved = self.master.state[self.case_of_row]
        torch.where(self.resolved, resolved, self.replicas.state, out=self.replicas.state)

    def record(self):
        running = self.replicas
        if self.step_index in self.plan.whole:
            self._write_whole(self.plan.whole.index(self.step_index))
        state = self._coarse(running)
        if self.pinned:  # the target advances a copy; the replicas stay with their master
            saved = running.save_state()
            running = self.free.load_state(**saved)
        closure = self.target.compute(running)
        closures = self._plain(self.stored.to_physical(closure))
        states = by_data_set(STATE, state, self.channels, self.sides)
        return states | by_data_set("closure", closures, self.channels), {}, {}

    def _write_whole(self, index: int) -> None:
        """Write the master's states with all modes at entry ``index`` of ``plan.whole``."""
        states = self.master.transform.gather_field(
            self.master.transform.to_physical(self.master.state)
        )
        if self.writer is not None:
            self.writer.write_whole(index, self._plain(states))

    def _coarse(self, simulation: Simulation) -> np.ndarray:
        """Return the states (rows, n, n) on the data grid."""
        spectra = simulation.transform.gather(simulation.state)
        small = resize(spectra, self.stored.grid.mode_counts)
        return self._plain(self.stored.to_physical(small))

    def _plain(self, field) -> np.ndarray:
        """Convert a field to numpy float32."""
        return field.cpu().numpy().astype(np.float32)

    def save_state(self) -> dict:
        saved: dict = {}
        for prefix, simulation in ((MASTER, self.master), (OWN, self.replicas)):
            saved |= {prefix + key: value for key, value in simulation.save_state().items()}
        return saved

    def load_state(self, state: dict) -> None:
        for prefix, simulation in ((MASTER, self.master), (OWN, self.replicas)):
            stored = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(MASTER) == (prefix == MASTER)
            }
            simulation.load_state(**stored)

    def open_writer(self, path) -> BlockWriter:
        experiment, dt = self.experiment, self.experiment.generate.dt
        whole = WholeLayout(times_of(self.plan.whole, dt), len(self.cases), self.problem.grid)
        layout = Layout(
            self.unit.members,
            times_of(self.record_steps, dt),
            self.grid,
            self.sides,
            fields=[
                *data_sets(STATE, self.channels, self.sides),
                *data_sets("closure", self.channels),
            ],
            channels=self.channels,
            whole=whole,
        )
        attributes = {
            "dataset_name": experiment.name,
            "stage": self.plan.stage,
            "closure_kind": "subgrid",
            "interval": experiment.generate.interval,
            "length": experiment.physics.length,
            "dt": dt,
            "seed": experiment.seed,
            "released": self.released * dt,
            "stride": self.plan.stride,
            "row_case": [case for case, _ in self.rows],
            "row_member": [member for _, member in self.rows],
            "cases": self.cases,
            "recipe": experiment.stage_recipe(self.plan.stage),
        }
        return BlockWriter(path, layout, attributes)
