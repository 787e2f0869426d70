"""Closed-form statistics on the shares of processes, and a process that fails in the middle.

::

    python tests/shares_case.py OUT.pt RUN
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import trajectory_case
from torch import Tensor
from train_case import run_fit

from hpc_closure.closure.artifact import build
from hpc_closure.closure.composed import centre
from hpc_closure.closure.composed.part_selection import Gate, ImprovementGate
from hpc_closure.closure.fitting.judging import samples_improve
from hpc_closure.closure.model import ClosureModel, Phase
from hpc_closure.data.samples import Past, TrainingSet
from hpc_closure.train import processes
from hpc_closure.train.processes import Processes
from hpc_closure.train.shares import SharedReader
from hpc_closure.train.trainer import TrainData
from hpc_closure.work import mpi

SIZES = {"width": 4, "modes": 4, "layers": 1, "mean_layers": 1}
LAYERS = {"equation": "two_layer_qg", "length": 1.0, "deformation_radius": 0.2}
AT_ONCE = 20  # snapshots: shares end within a batch
MEMBERS, VALID = range(16), range(16, 18)  # fewer to judge by than three processes


def models() -> dict[str, ClosureModel]:
    """Models with a network in every part that has one, and weights that do something."""
    torch.manual_seed(0)
    made: dict[str, ClosureModel] = {
        "default": build(
            {"preset": "default", "validate_parts": "off", **SIZES}, trajectory_case.GRID
        ),
        "learned": build({"preset": "fno_score", **SIZES}, trajectory_case.GRID),
        "published": build({"preset": "published", "width": 4}, trajectory_case.GRID),
        "trajectory": trajectory_case.model(),
        "layers": build(
            {
                "preset": "convolutional",
                "equation": LAYERS,
                "conditions": {"sensors": "none", "previous_closures": trajectory_case.PREVIOUS},
                **SIZES,
            },
            trajectory_case.GRID,
        ),
    }
    with torch.no_grad():
        for model in made.values():
            for weight in model.parameters():
                number = torch.arange(weight.numel(), dtype=torch.float32)
                weight += 0.03 * torch.cos(number).view(weight.shape)
    return made


@contextlib.contextmanager
def evidence() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect the sums that gates decide on, and the pairs that centres are fitted to."""
    seen: list[Tensor] = []
    pairs: list[Tensor] = []
    fit = centre.fit

    def noting_pairs(numbers, means, *channels):
        pairs.extend((numbers, means))
        return fit(numbers, means, *channels)

    def noting(ask):
        def asked(gate):
            seen.extend(one.sums() for one in gate.evidence)
            return ask(gate)

        return asked

    members, gains = noting(Gate.members.fget), noting(ImprovementGate.gains)
    with (
        mock.patch.object(Gate, "members", property(members)),
        mock.patch.object(ImprovementGate, "gains", gains),
        mock.patch.object(centre, "fit", noting_pairs),
    ):
        yield seen, pairs


class TwoLayers(trajectory_case.DNS):
    """Two fields: that of a member, and a mixture with that of another one."""

    channels = ("q_upper", "q_lower")

    def __init__(self, members: int, times: int):
        super().__init__(members, times)
        self.channels = type(self).channels
        for name, values in self.fields.items():
            other = np.roll(values, 1, 0)
            self.fields[name] = np.stack([values, 0.5 * values + other], 2)


def reader_of(phase: Phase, data: TrainData, found: Processes) -> SharedReader:
    """As the trainer makes it, in smaller batches."""
    part = data.of(phase.members)
    if phase.through:
        part = part.followed(phase.through.calls[1])
        return SharedReader(found, part, part.some(10), 4)
    return SharedReader(found, part, part.some(0), AT_ONCE, len(part.indices))


def statistics(found: Processes) -> dict[str, Tensor]:
    """Every result of every model's phases, what they were made of, and what the gates saw."""
    stores = {"layers": TwoLayers(18, 12)}
    one, results = trajectory_case.DNS(18, 12), {}
    for name, model in models().items():
        past = Past(closures=trajectory_case.PREVIOUS if name in ("trajectory", "layers") else 0)
        store = stores.get(name, one)
        data = TrainData(*(TrainingSet(store, ids, past=past) for ids in (MEMBERS, VALID)))
        with evidence() as (seen, pairs):
            for phase in model.phases:
                reader = reader_of(phase, data, found)
                for key, value in model.begin(phase.name, reader).items():
                    if key == "across_channels":  # the grouping, a word
                        value = "isotropic_handed zonal mode".find(value)
                    if isinstance(value, (int, str)):  # counts, and figures in print
                        results[f"{name}: {key}"] = torch.tensor(float(value))
                for key, tensor in model.saved_statistics().items():
                    results[f"{name} after {phase.name}: {key}"] = tensor
            if name == "default":  # gates that are off do not ask
                samples_improve(model, reader)
        results |= {f"{name}: evidence {number}": sums for number, sums in enumerate(seen)}
        results |= {f"{name}: pairs {number}": values for number, values in enumerate(pairs)}
    return results


def fail(target: Path, found: Processes) -> None:
    """A training whose last process cannot read its share a second time."""
    reads, gather = iter(range(9)), TrainingSet.gather

    def broken(part, samples):
        if found.rank == found.size - 1 and next(reads):
            raise OSError("the disk is gone")
        return gather(part, samples)

    model = build({"preset": "default", **SIZES}, trajectory_case.GRID)
    with mock.patch.object(TrainingSet, "gather", broken):
        run_fit(target, found, model, steps=6, batch=6, engine="torch")


def main() -> None:
    torch.set_num_threads(1)
    found = processes.join("cpu", mpi.world().bcast)
    results = found.together(lambda: statistics(found))
    if found.first:
        torch.save(results, sys.argv[1])
    try:
        fail(Path(sys.argv[2]), found)
    except Exception as error:
        sys.stdout.write(f"{found.rank} {type(error).__name__}: {error}\n")
    processes.leave()


if __name__ == "__main__":
    main()
