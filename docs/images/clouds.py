"""Make the picture of the clouds for README.md and docs/results/clouds.md.

    python docs/images/clouds.py RUN RESAMPLED GAUSSIAN

RUN is the folder of a finished run of preset ``clouds``, the others are those of its opponents
``resampled`` and ``gaussian_amplitude`` (docs/results/clouds.md has the commands).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import max_pool2d

import hpc_closure
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run

HERE = Path(__file__).resolve().parent
MOISTURE, RAIN = 1, 2
DRAWS = 64


def patch_maxima(closures: np.ndarray) -> np.ndarray:
    """Return the largest value of each 4 x 4 patch of fields (..., n, n), flat."""
    fields = torch.from_numpy(closures).double().flatten(0, -3)[:, None]
    return max_pool2d(fields, 4).flatten().numpy()


def main(folder: Path, resampled: Path, gaussian: Path) -> None:
    """Draw the closure of rain at one state, and the laws of extremes over all starts."""
    experiment = reading.load(folder / "config.yaml", warn=False)
    replicas = CoupledEnsemble(sorted((folder / "replicas").glob("block_*.h5")))
    now = replicas.index(0.0)
    truth = replicas.read("closure", now)  # (replicas, starts, C, n, n)
    reduced = reduced_problem(experiment.problem, experiment.train_grid, "subgrid", 1)
    forecaster = Forecaster(reduced, experiment.generate.closure_interval)
    forecast = forecaster.after(replicas.read("model", now)[0])
    ids = [[1000 * start + member for member in range(DRAWS)] for start in range(len(forecast))]
    drawn, again, without = (  # (starts, draws, C, n, n)
        hpc_closure.load(Run(run).model).sample(forecast, members=ids)
        for run in (folder, resampled, gaussian)
    )

    start = int(truth[0, :, RAIN].max((-2, -1)).argmax())
    panels = [
        ("DNS", truth[0, start]),
        ("DNS, other births", truth[1, start]),
        ("generator", drawn[start, 0]),
        ("resampled", again[start, 0]),
        ("Gaussian, sd(x)", without[start, 0]),
    ]
    fig = plt.figure(figsize=(10, 5.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 1.15])
    axes = top.subplots(1, len(panels))
    limit = float(np.abs(truth[:, start, RAIN]).max()) * 0.7
    for axis, (title, closure) in zip(axes, panels):
        field = closure[RAIN].T
        image = axis.imshow(field, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=title, xticks=[], yticks=[])
    top.colorbar(image, ax=axes, shrink=0.8, label="closure of rain, 1/time²")
    left, right = bottom.subplots(1, 2)
    laws = [
        ("DNS, replicas", truth.swapaxes(0, 1), "k", "-"),
        ("generator", drawn, "C0", "-"),
        ("resampled residuals", again, "C2", "-."),
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
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
