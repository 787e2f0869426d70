"""Programs that the training tests start on several processes.

::

    python tests/train_case.py engines OUT.json torch:0 deepspeed:2 ...
    python tests/train_case.py fit RUN key=value ... [+ RUN key=value ...]

Trainings that are asked to stop let the next one start; the exit code is the last one's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trajectory_case
from torch import nn

from hpc_closure.closure.artifact import build
from hpc_closure.closure.model import ClosureModel, Phase
from hpc_closure.data.samples import TrainingSet
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral.noise.counters import standard_normals
from hpc_closure.train import deepspeed, processes, trainer
from hpc_closure.train.trainer import Plan, TrainData, fit
from hpc_closure.work import log, mpi
from hpc_closure.work.stop import Stop, Stopped

needs_deepspeed = pytest.mark.skipif(
    not deepspeed.installed(), reason="DeepSpeed is not installed"
)
GRID = 16
trainer.ROW_EVERY = 1  # the tests compare each step


class FourierLayer(nn.Module):
    """A spectral convolution whose complex weights are stored as real pairs."""

    def __init__(self, width: int, modes: int):
        super().__init__()
        self.modes = modes
        scale = 0.5 / width
        self.weight = nn.Parameter(scale * torch.randn(2, modes, modes, width, width, 2))
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x):
        modes, x_hat = self.modes, torch.fft.rfft2(x.float())
        # not view_as_complex: engines place weights at odd offsets of one long buffer
        weight = torch.complex(self.weight[..., 0], self.weight[..., 1])
        out = torch.zeros_like(x_hat)
        for side, rows in enumerate((slice(0, modes), slice(-modes, None))):
            kept = x_hat[:, :, rows, :modes]
            out[:, :, rows, :modes] = torch.einsum("bixy,xyio->boxy", kept, weight[side])
        return nn.functional.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.pointwise(x))


class Denoising(Phase):
    """Learn to denoise targets over their root mean square."""

    def begin(self, model, reader):
        squares, count = 0.0, 0
        for batch in reader:
            squares += float((batch["target"].double() ** 2).sum())
            count += batch["target"].numel()
        squares, count = reader.sum(squares, count)
        model.statistics = {**model.statistics, self.name: torch.tensor((squares / count) ** 0.5)}
        return {"rms": float(model.statistics[self.name])}

    def loss(self, model, batch, seed, step):
        state, target = batch["state"], batch["target"] / model.scale
        noise = torch.stack(
            [
                torch.from_numpy(standard_normals(seed, "standin", int(index), width=GRID**2))
                for index in batch["sample_index"]
            ]
        ).reshape(target.shape)
        noise = noise.to(target)
        return ((model.denoise(state, target + noise) - target) ** 2).mean((-2, -1))

    def parameters(self, model):
        named = model.named_parameters()
        return [weight for name, weight in named if self.name != "second" or "lift" not in name]


class StandIn(ClosureModel):
    """Denoises a target given a state: a small FNO with weights of odd sizes at odd places."""

    def __init__(self, width: int = 8, modes: int = 3, phases=(Denoising("all", 1.0, "train"),)):
        super().__init__({"conditions": {"sensors": "none"}}, GRID, 1.0)
        torch.manual_seed(0)
        self.phases = phases
        self.statistics = {}
        self.gain = nn.Parameter(torch.ones(7))
        self.register_buffer("two", torch.full((), 2.0))
        self.lift = nn.Conv2d(2, width, 1)
        self.layers = nn.Sequential(FourierLayer(width, modes), FourierLayer(width, modes))
        self.project = nn.Conv2d(width, 1, 1)

    def parts(self):
        return []

    def saved_statistics(self, spacing=None):
        return dict(self.statistics)

    def load_statistics(self, statistics):
        self.statistics = dict(statistics)

    def weight_decay(self, name):
        return 0.1 if "project" in name else 0.0

    @property
    def scale(self):
        return float(list(self.statistics.values())[-1])

    def denoise(self, state, noisy):
        both = torch.stack([state, noisy], dim=1)
        return self.project(self.layers(self.lift(both)))[:, 0] * self.gain.mean() * self.two / 2

    @torch.no_grad()
    def sample_batch(self, request):
        state, seed = request.state, request.seed
        noise = [
            standard_normals(seed, "sample", one, width=GRID**2)[0] for one in request.members
        ]
        noise = torch.from_numpy(np.stack(noise)).reshape(state.shape)
        return self.denoise(state, noise.to(state)) * self.scale

    def sample_hat(self, request):
        raise NotImplementedError


class Memory:
    """A data set in memory: states are noise, closures a quadratic function of them."""

    def __init__(self, members=12, times=20, grid=GRID):
        self.members, self.grid, self.dimensions = list(range(members)), grid, 2
        self.channels: tuple = ()
        self.times = np.arange(times) * 0.1
        shape = (members, times, grid, grid)
        state = standard_normals(3, "memory", 0, width=int(np.prod(shape))).reshape(shape)
        closure = 0.3 * np.roll(state, 1, -1) + 0.1 * state**2
        self.fields = {"state": state.astype("f4"), "closure": closure.astype("f4")}

    def read(self, member, index, field="state", grid=None):
        stride = self.grid // (grid or self.grid)
        return self.fields[field][member, index, ::stride, ::stride]


def training_data(**options) -> TrainData:
    store = Memory()
    return TrainData(TrainingSet(store, range(9), **options), TrainingSet(store, range(9, 12)))


def small_model(preset: str, phases: int = 2):
    """The real model, small; the last of the first ``phases`` of its training has begun."""
    torch.manual_seed(0)
    model = build({"preset": preset, "width": 8, "modes": 4}, GRID)
    data = training_data()
    for phase in model.phases[:phases]:
        model.begin(phase.name, data.of(phase.members).passes)
    return model


def losses(
    name: str, stage: int, found, accumulate: int = 1, preset: str = "", **more
) -> list[float]:
    """Losses of the stand-in, of a preset or of ``trajectory``, on the same global batches.

    ``more`` are further settings.
    """
    settings = Train(
        batch=8,
        engine=name,
        zero_stage=stage,
        schedule="constant",
        accumulate=accumulate,
        **more,
    )
    steps = {"trajectory": 12, "fno_score": 12}.get(preset, 50)  # dear; whose round-off grows
    if preset == "trajectory":
        model, samples = trajectory_case.fitted(), trajectory_case.data().train.followed(4)
        model.begin("trajectory", lambda: [samples.gather(samples.some(8))])
    else:
        model, samples = small_model(preset) if preset else StandIn(), training_data().train
    model.to(found.device)
    samples.to(found.device)
    if not preset:
        model.begin("all", samples.passes)
    chosen = trainer.start_engine(model, settings, found)
    size = 8 // found.size // accumulate
    seen = []
    for step in range(steps):
        first = step * 8 + found.rank * size * accumulate
        micro = [(samples.batch(first + part * size, size), 1, step) for part in range(accumulate)]
        seen.append(float(found.mean(chosen.step(micro, settings.lr))))
    chosen.close()
    return seen


def export(model, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(path))


class StopAfter(Stop):
    """Asks to stop when the trainer has looked, once a step, this many times."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.looks = steps, 0

    @property
    def requested(self) -> bool:
        self.looks += 1
        if self.looks == self.steps:
            self.request(f"{self.steps} steps done")
        return super().requested


def run_fit(
    target: Path, found=processes.Processes(), model=None, max_steps=0, data=None, **values
) -> None:
    """A training of the stand-in; ``values`` are settings, as text or typed.

    Args:
        max_steps: ask it to stop after so many steps; 0 = do not.
        data: to train on; by default :func:`training_data`.
    """
    more = ("first", 1.0, "fit"), ("second", 2.0, "hold"), ("last", 0.0, "valid")
    chosen = more if values.pop("phases", None) else (("all", 1.0, "train"),)
    phases = tuple(Denoising(*one) for one in chosen)
    settings = Train(**{"batch": 8, "validate_every": 10, "checkpoint_every": 10, **values})
    model = StandIn(phases=phases) if model is None else model
    with StopAfter(int(max_steps)) as stop:
        plan = Plan(settings, 0, Run(target))
        fit(model, data or training_data(), plan, export, processes=found, stop=stop)


def main() -> None:
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    world = mpi.world()
    found = processes.join("cpu", world.bcast if world.size > 1 else None)
    log.setup(found.rank, found.size)
    if what == "engines":
        target, *variants = rest
        results = {}
        for variant in variants:
            name, stage, *more = variant.split(":")
            accumulate, preset = int(more[0]) if more else 1, more[1] if more[1:] else ""
            again = bool(more[2:])
            results[variant] = losses(name, int(stage), found, accumulate, preset, recompute=again)
        if found.first:
            Path(target).write_text(json.dumps(results))
    for job in " ".join(rest).split(" + ") if what == "fit" else ():
        target, *words = job.split()
        stopped = None
        try:
            run_fit(Path(target), found, **dict(word.split("=") for word in words))
        except Stopped as reason:
            stopped = reason
    processes.leave()
    if what == "fit" and stopped:
        raise stopped


if __name__ == "__main__":
    main()
