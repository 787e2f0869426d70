"""Whether the model file of a run is the one that its experiment describes."""

from pathlib import Path

from hpc_closure.experiment.checks import smallest_grid
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work.session import check_recipe


def check_model(experiment: Experiment) -> None:
    """Raise ValueError unless the experiment's own model, or the one it uses, is there."""
    run = Run.of(experiment)
    if run.model_file:
        return _check_used_model(experiment, run.model_file)
    if not run.model.exists():
        raise ValueError(f"{run.model}: no trained model; run `hpc-closure train` first")
    from hpc_closure.closure import artifact  # late: it brings PyTorch

    made = artifact.read_header(run.model)["provenance"].get("hashes", {}).get("train", "")
    wanted = experiment.stage_hash("train")
    if made != wanted:
        check_recipe(run, experiment, "rollout", redo=True)  # names the keys, where it can
        raise ValueError(
            f"{run.model}: trained by another experiment (hash {made[:12] or 'none'}, expected "
            f"{wanted[:12]}); change `name`, or run `hpc-closure train --redo`"
        )


def _check_used_model(experiment: Experiment, path: Path) -> None:
    """Raise ValueError unless a model from elsewhere fits the experiment."""
    from hpc_closure.closure import artifact

    key = f"use.model={experiment.use.model}"
    if not path.exists():
        shipped = ", ".join(artifact.shipped()) or "none"
        raise ValueError(
            f"{key}: no run, file or shipped model of this name (shipped: {shipped}; looked for "
            f"{path})"
        )
    header = artifact.read_header(path)
    generate, target = experiment.generate, header["target"]
    for name, have, want in (
        ("closure", target["kind"], generate.closure),
        ("dt", target["dt"], generate.dt),
        ("interval", target["interval"], generate.interval),
        ("length", header["grid"]["length"], experiment.physics.length),
    ):
        if have != want:
            raise ValueError(f"{key}: its {name} is {have}, the experiment's is {want}")
    least = smallest_grid(header["grid"]["size"])
    for grid in (experiment.train_grid, *experiment.score_grids):
        if grid < least:
            raise ValueError(
                f"{key}: trained at {header['grid']['size']}^2, it needs a grid of at least "
                f"{least}^2; got {grid}^2"
            )
