"""``hpc-closure submit``: submit the verbs of an experiment as a chain of batch jobs."""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from hpc_closure.batch import submit as submission
from hpc_closure.batch.site import Stage, load_profile
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import STAGES, Run
from hpc_closure.experiment.schema import Experiment
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work.loop import SINGLE
from hpc_closure.work.session import check_recipe, store_settings
from hpc_closure.work.units import Ledger


def run(
    experiment: Experiment,
    stages: str = ",".join(STAGES),
    dependency: str = "",
    dry_run: bool = False,
    typed: Sequence[str] = (),
) -> None:
    """Submit stages, each dependent on the one before, or print what would be submitted.

    Args:
        experiment: the experiment.
        stages: names joined by commas; they run in the order of the verbs.
        dependency: id of a job that must succeed before the first stage starts.
        dry_run: print costs and batch scripts, submit nothing.
        typed: experiment and overrides as typed by the user, for the suggested next command.

    Raises:
        ValueError: a stage does not exist, or the experiment or its profile cannot be submitted.
        RuntimeError: there is no Slurm here, or it refused.
    """
    requests = requested(experiment, stages)
    if not dry_run:
        place = Run.of(experiment)
        for request in requests:
            submission.check_place(request)
            check_recipe(place, experiment, request.stage)
        store_settings(place, experiment)
    for request in requests:
        request = replace(request, after=dependency)
        print(f"{request.stage}: {submission.cost(request)}")
        if dry_run:
            print(*submission.batch_text(request), sep="\n")
            dependency = f"<job of {request.stage}>"
        else:
            dependency = send(request)
    if not dry_run:
        print("follow it with: " + shlex.join(["hpc-closure", "status", *typed]))


def requested(experiment: Experiment, stages: str) -> list[submission.Request]:
    """Build the requests of the stages, in their order.

    Skips a stage whose product comes from another run (``use.data``, ``use.model``).
    """
    names = stages.split(",")
    if not set(names) <= set(STAGES):
        raise ValueError(f"--stages {stages}: expected some of {','.join(STAGES)}")
    place, profile = Run.of(experiment), load_profile(experiment.cluster.profile)
    data_are_there = experiment.data is not None and experiment.data.in_place
    elsewhere = {
        "generate": experiment.use.data or data_are_there,
        "train": experiment.use.model,
    }
    names = [stage for stage in names if not elsewhere.get(stage)]
    if not names:
        raise ValueError(f"--stages {stages}: use.data and use.model leave nothing to do there")
    return [
        submission.Request.of(
            experiment,
            place,
            units_of(experiment, stage),
            functools.partial(run_stage, stage),
            stage,
            profile,
        )
        for stage in get_args(Stage)
        if stage in names and stage in experiment.stages
    ]


def send(request: submission.Request) -> str:
    """Submit a stage; returns the ids of its jobs, joined by colons."""
    try:
        sent = submission.submit(request)
    except RuntimeError as error:
        job_ids = request.after.replace(":", " ")
        earlier = f"; `scancel {job_ids}` takes the stage before back"
        raise RuntimeError(f"{error}{earlier if request.after else ''}") from error
    for submitted in sent:
        print(f"  {submitted}")
    return ":".join(submitted.job for submitted in sent)


def units_of(experiment: Experiment, stage: str) -> list[str]:
    """List the names of all units of a stage; the job itself skips finished units."""
    blocks = stage in ("generate", "rollout")
    plan = Ledger.of(experiment, stage).plan() if blocks else [SINGLE]
    return [unit.name for unit in plan]


def run_stage(stage: str, config_path: str, units: list[str]) -> int:
    """Run the verb of a stage as in a terminal; the body of a job. Returns the exit code.

    ``units`` is used by ``rollout``; the other verbs compute all their units.
    """
    if stage == "rollout":
        return rollout.run_units(config_path, units, wait="all")
    verbs = {"generate": generate, "train": train, "evaluate": evaluate}
    return verbs[stage].run(reading.load(Path(config_path), warn=False))
