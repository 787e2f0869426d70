"""The rollout block: rows of the coupled ensemble with their references.

Row ``e`` of the ensemble is member ``e // cases`` started from test trajectory ``e % cases``, so
more members append rows.
"""

import json
from collections.abc import Sequence

import numpy as np

from hpc_closure.data.block import Block, record_steps, times_of
from hpc_closure.data.dns import full_problem
from hpc_closure.data.store import BlockWriter, DataSet, split_members
from hpc_closure.rollout.coupling import CoupledRun
from hpc_closure.units import read_product


def start_cases(experiment, data: DataSet) -> list[int]:
    """Test trajectories to start from. Raises ValueError when there are too few."""
    test = split_members(data.members, experiment.train.split)["test"]
    cases = experiment.rollout.cases
    if len(test) < cases:
        raise ValueError(
            f"rollout.cases={cases}, but the data hold {len(test)} test trajectories; "
            "lower it, raise generate.members or the test share in train.split"
        )
    return test[:cases]


class RolloutBlock(Block):
    """Rows of the closure-coupled ensemble from ``rollout.t_start`` to ``rollout.t_end``.

    Args:
        closure: the loaded model.
        data: the DNS, for the states to start from.
    """

    def __init__(self, unit, books, session, domain, closure, data: DataSet):
        super().__init__(unit, books, session, domain)
        experiment, product = session.experiment, books.run.product(books.stage, unit)
        if unit.extends and product.exists():  # it is replaced: nothing of it is to be lost
            there = experiment.rollout.keeping(read_product(product).holds)
            experiment = experiment.model_copy(update={"rollout": there})
        self.experiment = experiment
        rollout, self.dt = experiment.rollout, experiment.generate.dt
        self.data, self.grid, self.stride = data, experiment.train_grid, rollout.interval
        cases = start_cases(experiment, data)
        rows = [(cases[row % len(cases)], row // len(cases)) for row in unit.members]
        self.cases = [case for case in cases if any(case == own for own, _ in rows)]
        self.record_steps = record_steps(rollout.t_start, rollout.t_end, rollout.every, self.dt)
        self.first_step = self.record_steps[0]
        self.coupled = CoupledRun(
            full_problem(experiment),
            experiment.generate.closure,
            self.grid,
            closure,
            rows,
            self.cases,
            seed=experiment.seed,
            interval=rollout.interval,
            sensors=rollout.sensors,
            sampler=rollout.sampler.options(),
            references=rollout.references,
            device=session.device,
        )

    @property
    def step_index(self) -> int:
        return self.coupled.step_index

    @property
    def holds(self) -> dict:
        return self.experiment.rollout.holds

    def initialise(self) -> None:
        index = self.data.time_index(self.experiment.rollout.t_start)
        states = [self.data.read(case, index, grid=self.grid) for case in self.cases]
        self.coupled.start(np.stack(states).astype(np.float64), self.record_steps[0])

    def advance(self, steps: int) -> None:
        self.coupled.advance(steps // self.stride)

    def record(self):
        fields = {
            name: value.cpu().numpy().astype(np.float32)
            for name, value in self.coupled.fields().items()
        }
        references = {name: fields.pop(name) for name in self._references() if name in fields}
        if not self.coupled.exact:
            now = self.step_index * self.dt
            index = self.data.time_index(now)
            references["truth"] = np.stack(
                [self.data.read(case, index, grid=self.grid) for case in self.cases]
            )
        fields["vorticity"] = fields.pop("model")
        return fields, {}, references

    def _references(self) -> Sequence[str]:
        return ("none", "truth")

    def save_state(self) -> dict:
        return self.coupled.save_state()

    def load_state(self, state: dict) -> None:
        self.coupled.load_state(state)

    def cost(self) -> dict:
        return dict(self.coupled.seconds)

    def open_writer(self, path) -> BlockWriter:
        experiment = self.experiment
        rollout = experiment.rollout
        names = ["vorticity"] + ["oracle"] * ("oracle" in self.coupled.simulations)
        shared = {"truth": len(self.cases)}
        if "none" in self.coupled.simulations:
            shared["none"] = len(self.cases)
        rows = self.coupled.rows
        return BlockWriter(
            path,
            self.unit.members,
            times_of(self.record_steps, self.dt),
            self.grid,
            {
                "dataset_name": experiment.name,
                "stage": "rollout",
                "closure_kind": experiment.generate.closure,
                "interval": rollout.interval,
                "length": experiment.physics.length,
                "dt": self.dt,
                "seed": experiment.seed,
                "row_case": [case for case, _ in rows],
                "row_member": [member for _, member in rows],
                "cases": list(self.cases),
                "recipe": json.dumps(experiment.stage_settings("rollout"), sort_keys=True),
            },
            fields=names,
            references=shared,
        )
