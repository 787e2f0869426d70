"""The DNS block: members of the full system, their closure targets and diagnostics."""

import json

import numpy as np

from hpc_closure.data.block import Block, record_steps, times_of
from hpc_closure.data.store import BlockWriter
from hpc_closure.data.targets import Target
from hpc_closure.experiment import Experiment
from hpc_closure.spectral import diagnostics
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulate import Simulation

SERIES = ("energy", "enstrophy", "cfl")


def full_problem(experiment: Experiment) -> Problem:
    """The full system on the grid of the DNS."""
    plain = experiment.model_dump(mode="json")
    return Problem.from_dict(plain["physics"], plain["generate"])


def stored_steps(experiment: Experiment) -> range:
    generate = experiment.generate
    return record_steps(
        generate.record.start, generate.t_end, generate.record.every, generate.dt
    )


class DNSBlock(Block):
    """Trajectories of the full system from their initial law to ``generate.t_end``."""

    series = SERIES

    def __init__(self, unit, books, session, domain):
        super().__init__(unit, books, session, domain)
        experiment: Experiment = session.experiment
        generate = experiment.generate
        self.experiment = experiment
        self.problem = full_problem(experiment)
        self.record_steps = stored_steps(experiment)
        self.grid = experiment.data_grid
        self.dtype = np.dtype(generate.record.precision)
        self.target = Target(
            generate.closure,
            generate.interval,
            self.problem.reduced(self.grid) if generate.closure == "subgrid" else None,
        )
        self.simulation = Simulation(
            self.problem,
            list(unit.members),
            experiment.seed,
            device=session.device,
            comm=domain.comm,
        )

    @property
    def step_index(self) -> int:
        return self.simulation.step_index

    def initialise(self) -> None:
        self.simulation.initialise()

    def advance(self, steps: int) -> None:
        self.simulation.advance(steps)

    def record(self):
        state = self._stored(self.simulation.state)
        series = diagnostics.series(self.simulation, SERIES)
        closure = self._stored(self.target.compute(self.simulation))
        return {"vorticity": state, "closure": closure}, series, {}

    def _stored(self, spectrum) -> np.ndarray:
        field = self.simulation.physical(spectrum, self.grid)
        return field.cpu().numpy().astype(self.dtype)

    def save_state(self) -> dict:
        return self.simulation.save_state()

    def load_state(self, state: dict) -> None:
        self.simulation.load_state(state)

    def certificate(self, state: dict) -> dict:
        return diagnostics.certificate(self.problem, state)

    def open_writer(self, path) -> BlockWriter:
        experiment = self.experiment
        physics, generate = experiment.physics, experiment.generate
        return BlockWriter(
            path,
            self.unit.members,
            times_of(self.record_steps, generate.dt),
            self.grid,
            {
                "dataset_name": experiment.name,
                "stage": "generate",
                "closure_kind": generate.closure,
                "interval": generate.interval,
                "viscosity": physics.viscosity,
                "drag": physics.drag,
                "length": physics.length,
                "dt": generate.dt,
                "seed": experiment.seed,
                "member_hash": self.problem.member_hash(),
                "recipe": json.dumps(experiment.stage_settings("generate"), sort_keys=True),
            },
            fields=("vorticity", "closure"),
            series=SERIES,
            precision=generate.record.precision,
        )
