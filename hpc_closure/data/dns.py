"""The DNS block: members of the full system, their closure targets and diagnostics."""

import json

import numpy as np

from hpc_closure import log
from hpc_closure.data.block import Block, record_steps, times_of
from hpc_closure.data.store import BlockWriter
from hpc_closure.data.targets import Target, reduced_problem
from hpc_closure.experiment import Experiment
from hpc_closure.spectral.certificate import certify
from hpc_closure.spectral.diagnostics import SERIES, Diagnostics
from hpc_closure.spectral.grid import Grid, resize
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulate import Simulation
from hpc_closure.spectral.transform import Transform


def full_problem(experiment: Experiment) -> Problem:
    """The full system on the grid of the DNS."""
    generate = experiment.generate
    return Problem.from_dict(experiment.physics.parameters(), generate.model_dump(mode="json"))


def stored_steps(experiment: Experiment) -> range:
    generate = experiment.generate
    return record_steps(
        generate.record.start, generate.t_end, generate.record.every, generate.dt
    )


class DNSBlock(Block):
    """Trajectories of the full system from their initial law to ``generate.t_end``."""

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
            reduced_problem(self.problem, self.grid, generate.closure),
        )
        self.stored = Transform(
            Grid(self.grid, self.problem.length), self.problem.precision, session.device
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
        series = Diagnostics(self.simulation).measure()
        closure = self._stored(self.target.compute(self.simulation))
        return {"vorticity": state, "closure": closure}, series, {}

    def _stored(self, spectrum) -> np.ndarray:
        transform = self.simulation.transform
        if self.grid == self.simulation.grid.size:
            field = transform.gather_field(transform.to_physical(spectrum))
        else:
            whole = resize(transform.gather(spectrum), self.stored.grid.modes)
            field = self.stored.to_physical(whole)
        return field.cpu().numpy().astype(self.dtype)

    def save_state(self) -> dict:
        return self.simulation.save_state()

    def load_state(self, state: dict) -> None:
        self.simulation.load_state(**state)

    def certificate(self) -> dict:
        found = certify(self.simulation)
        if self.experiment.generate.certificate == "required":
            found.check()
        elif found.reasons and self.domain.root:
            log.get().warning(f"members {self.unit}: " + "; ".join(found.reasons))
        return found.as_dict()

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
