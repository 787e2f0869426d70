"""Replicas: DNS that share the resolved past of a start; the true ensemble of a subgrid closure.

The *master* is the start's own trajectory, computed again from t = 0 to the same bits. From
``rollout.t_start - replicas.pinned`` on replicas run in lockstep with it: after every step the
modes that the reduced solver retains are copied from the master, while unresolved modes and
forcing are each replica's own. They begin with the master's unresolved modes moved by a random
distance, so with their structure at other places. Where they follow the resolved scales they have
soon forgotten that, and their closures are draws of p(U | history of V). At ``rollout.t_start``
they are released.
"""

import json

import numpy as np
import torch

from hpc_closure.closure import draws
from hpc_closure.closure.targets import Target, reduced_problem
from hpc_closure.data.layout import STATES, Layout
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.grid import Grid, from_row, resize
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.spectral.transform import Transform
from hpc_closure.work.block import Block, record_steps, times_of

STAGE = "replica"  # whose draws they are
MASTER, OWN = "master.", ""  # prefixes in a restart


def rows_of(experiment: Experiment, cases: list[int], members: tuple[int, ...]):
    """(start, replica) of each member of the stage."""
    number = experiment.replicas.members
    return [(cases[row // number], row % number) for row in members]


class ReplicaBlock(Block):
    """Replicas of starts, from the time that they are pinned to ``rollout.t_end``.

    Args:
        cases: the starts, members of the data.
    """

    def __init__(self, unit, books, session, domain, cases: list[int]):
        super().__init__(unit, books, session, domain)
        experiment: Experiment = session.experiment
        self.experiment, self.problem = experiment, experiment.problem
        generate, rollout = experiment.generate, experiment.rollout
        self.rows = rows_of(experiment, cases, unit.members)
        self.cases = list(dict.fromkeys(case for case, _ in self.rows))
        self.case_of_row = torch.tensor([self.cases.index(case) for case, _ in self.rows])
        begin = rollout.t_start - experiment.replicas.pinned
        self.record_steps = record_steps(begin, rollout.t_end, rollout.every, generate.dt)
        self.released = round(rollout.t_start / generate.dt)
        self.master = self._simulation(self.cases, "generate")
        names = [draws.pair(case, member) for case, member in self.rows]
        self.replicas = self._simulation(names, STAGE)
        self.free = self._simulation(names, STAGE)  # released for one closure, from a pinned state
        self.grid, self.sides = experiment.data_grid, self.problem.dimensions
        reduced = reduced_problem(self.problem, self.grid, "subgrid")
        self.target = Target("subgrid", generate.interval, reduced)
        self.stored = Transform(
            Grid(self.grid, self.problem.length, self.sides),
            self.problem.precision,
            session.device,
        )
        self.resolved = self._resolved()

    def _simulation(self, members, stage: str) -> Simulation:
        session, comm = self.session, self.domain.comm
        seed = self.experiment.seed
        return Simulation(
            self.problem, members, seed, device=session.device, comm=comm, stage=stage
        )

    def _resolved(self) -> torch.Tensor:
        """Which of this rank's modes the reduced solver retains."""
        whole, inside = self.master.grid, torch.ones(1, *self.stored.grid.shape)
        mask = resize(inside.to(torch.complex64), whole.modes, self.sides).real > 0
        return self.master.transform.local(mask)[0].to(self.session.device)

    # the loop's

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
            else:
                self.replicas.advance(end - self.step_index)

    def _begin(self) -> None:
        """Replicas of the master as it is now, with other unresolved modes."""
        whole = self.master.transform.gather(self.master.state)[self.case_of_row]
        factors = from_row(self._factors(), self.sides).to(whole)
        self.replicas.load_state(self.step_index, whole * factors)
        self._impose()

    def _factors(self) -> torch.Tensor:
        """Of the master's modes, (rows, 2K + 1, K + 1), on a line (rows, 1, K + 1): those of a
        shift, or zero."""
        grid = self.problem.make_grid()
        if self.experiment.replicas.start == "empty":
            return torch.zeros(len(self.rows), 1, 1, dtype=torch.complex128)
        return draws.moves(grid, self.experiment.seed, STAGE, self.replicas.members)

    def _impose(self) -> None:
        """The master's resolved modes, in place of the replicas' own."""
        resolved = self.master.state[self.case_of_row]
        torch.where(self.resolved, resolved, self.replicas.state, out=self.replicas.state)

    def record(self):
        running = self.replicas
        state = self._coarse(running)
        if self.pinned:  # the replicas themselves stay with their master
            saved = running.save_state()
            running = self.free.load_state(**saved)
        closure = self.target.compute(running)
        fields = {
            STATES[self.sides]: state,
            "closure": self._plain(self.stored.to_physical(closure)),
        }
        return fields, {}, {}

    def _coarse(self, simulation: Simulation) -> np.ndarray:
        whole = simulation.transform.gather(simulation.state)
        small = resize(whole, self.stored.grid.modes, self.sides)
        return self._plain(self.stored.to_physical(small))

    def _plain(self, field) -> np.ndarray:
        return field.cpu().numpy().astype(np.float32)

    def save_state(self) -> dict:
        saved: dict = {}
        for prefix, simulation in ((MASTER, self.master), (OWN, self.replicas)):
            saved |= {prefix + key: value for key, value in simulation.save_state().items()}
        return saved

    def load_state(self, state: dict) -> None:
        for prefix, simulation in ((MASTER, self.master), (OWN, self.replicas)):
            own = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(MASTER) == (prefix == MASTER)
            }
            simulation.load_state(**own)

    def open_writer(self, path) -> BlockWriter:
        experiment = self.experiment
        layout = Layout(
            self.unit.members,
            times_of(self.record_steps, experiment.generate.dt),
            self.grid,
            self.sides,
            fields=[STATES[self.sides], "closure"],
        )
        attributes = {
            "dataset_name": experiment.name,
            "stage": "replicas",
            "closure_kind": "subgrid",
            "interval": experiment.generate.interval,
            "length": experiment.physics.length,
            "dt": experiment.generate.dt,
            "seed": experiment.seed,
            "released": experiment.rollout.t_start,
            "row_case": [case for case, _ in self.rows],
            "row_member": [member for _, member in self.rows],
            "cases": self.cases,
            "recipe": json.dumps(experiment.stage_settings("replicas"), sort_keys=True),
        }
        return BlockWriter(path, layout, attributes)
