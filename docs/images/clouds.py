"""Make the picture of the clouds for README.md and docs/results/clouds.md.

    python docs/images/clouds.py RUN GAUSSIAN

RUN is the folder of a finished run of preset ``clouds``, GAUSSIAN that of a training on its data
without a generator (docs/results/clouds.md has the commands).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import max_pool2d

import hpc_closure
from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate.report import figures
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run

HERE = Path(__file__).resolve().parent
MOISTURE, RAIN = 1, 2
DRAWS = 64


def patch_maxima(closures: np.ndarray) -> np.ndarray:
    """Return the largest value of each 4 x 4 patch of fields (..., n, n), flat."""
    fields = torch.from_numpy(closures).double().flatten(0, -3)[:, None]
    return max_pool2d(fields, 4).flatten().numpy()


def main(folder: Path, gaussian: Path) -> None:
    """Draw the closure of rain at one state, and the laws of extremes over all starts."""
    experiment = reading.load(folder / "config.yaml", warn=False)
    blocks = sorted((folder / "replicas").glob("block_*.h5"))
    replicas = CoupledEnsemble(blocks)
    now = replicas.index(0.0)
    truth = replicas.read("closure", now)  # (replicas, starts, C, n, n)
    states = replicas.read("model", now)[0]
    span = experiment.generate.closure_interval
    problem = experiment.problem
    from hpc_closure.closure.targets import reduced_problem

    reduced = reduced_problem(problem, experiment.train_grid, "subgrid", 1)
    forecast = Forecaster(reduced, span).after(states)
    ids = [[1000 * start + member for member in range(DRAWS)] for start in range(len(states))]
    model, plain = hpc_closure.load(Run(folder).model), hpc_closure.load(Run(gaussian).model)
    drawn = model.sample(forecast, members=ids)  # (starts, draws, C, n, n)
    without = plain.sample(forecast, members=ids)

    start = int(truth[0, :, RAIN].max((-2, -1)).argmax())
    panels = [
        ("DNS", truth[0, start]),
        ("DNS, other births", truth[1, start]),
        ("generator", drawn[start, 0]),
        ("generator", drawn[start, 1]),
        ("Gaussian, sd(x)", without[start, 0]),
    ]
    figures.apply_style() if hasattr(figures, "apply_style") else None
    fig = plt.figure(figsize=(10, 5.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 1.15])
    axes = top.subplots(1, len(panels))
    limit = float(np.abs(truth[:, start, RAIN]).max()) * 0.7
    for axis, (title, closure) in zip(axes, panels):
        image = axis.imshow(closure[RAIN].T, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=title, xticks=[], yticks=[])
    top.colorbar(image, ax=axes, shrink=0.8, label="closure of rain, 1/time²")
    left, right = bottom.subplots(1, 2)
    laws = [
        ("DNS, replicas", truth.swapaxes(0, 1), "k", "-"),
        ("generator", drawn, "C0", "-"),
        ("Gaussian, sd(x)", without, "C1", "--"),
    ]
    for axis, channel, title in (
        (left, MOISTURE, "closure of moisture"),
        (right, RAIN, "closure of rain"),
    ):
        for name, closures, colour, line in laws:
            values = np.sort(patch_maxima(closures[:, :, channel]))
            above = 1 - (np.arange(len(values)) + 0.5) / len(values)
            axis.plot(values, above, colour, linestyle=line, label=name)
        axis.set(yscale="log", ylim=(2e-4, 1), xlabel=f"largest value of 4 x 4 points, {title}")
        axis.set_ylabel("probability of a larger one")
    left.legend(frameon=False)
    fig.savefig(HERE / "clouds.png", dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
