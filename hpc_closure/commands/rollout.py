"""``hpc-closure rollout``: the closure-coupled ensemble, here or through a scheduler."""

from pathlib import Path

from hpc_closure import config, log, units, worker
from hpc_closure.commands.generate import tell
from hpc_closure.commands.session import Session, chosen_members, chosen_part
from hpc_closure.experiment import Experiment
from hpc_closure.run import Run
from hpc_closure.stop import SIGNALS


def run(
    experiment: Experiment,
    *,
    members: str | None = None,
    parts: str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    max_elapsed: str | None = None,
    redo: bool = False,
    yes: bool = False,
    verbosity: int = 0,
    source: str = "",
    overrides: list[str] | None = None,
) -> int:
    """Compute or submit the missing blocks of RUN/rollout. Returns the exit code."""
    wanted = chosen_members(members, num_rows(experiment))
    books = ledger(experiment)
    if dry_run:
        return print_plan(experiment, books, wanted)
    with Session(
        experiment, "rollout", max_elapsed=max_elapsed, redo=redo, yes=yes, verbosity=verbosity
    ) as session:
        check_model(session.run)
        plan = books.plan(wanted, experiment.cluster.members_per_block)
        plan = chosen_part(parts, plan)
        if experiment.cluster.executor != "inline":
            return submit(experiment, session, books, plan, retry_failed)
        outcome = work(experiment, session, books, plan, retry_failed)
        if session.world.root:
            tell(outcome)
        return outcome.exit_code


def num_rows(experiment: Experiment) -> int:
    """Trajectories of the ensemble: members times starting cases."""
    return experiment.rollout.members * experiment.rollout.cases


def ledger(experiment: Experiment) -> units.Ledger:
    """The books of the stage; what a block must be and hold to count as done."""
    return units.Ledger(
        Run(experiment.folder),
        "rollout",
        recipe=experiment.stage_hash("rollout"),
        holds={
            "t_end": experiment.rollout.t_end,
            "references": list(experiment.rollout.references),
        },
        stale_after=experiment.cluster.stale_after,
    )


def check_model(run: Run) -> None:
    if not run.model.exists():
        raise ValueError(f"{run.model}: no trained model; run `hpc-closure train` first")


def work(experiment, session, books, plan, retry_failed=False, wait=True) -> worker.Outcome:
    """Run units in this process (or MPI program)."""
    import hpc_closure
    from hpc_closure.data.store import DataSet
    from hpc_closure.rollout.block import RolloutBlock

    groups = session.world.groups(1)
    closure = hpc_closure.load(session.run.model)
    closure = closure.to(session.device) if session.device != "cpu" else closure
    data = DataSet(session.run.data)

    def run_unit(unit, claim):
        block = RolloutBlock(unit, books, session, groups.domain, closure, data)
        block.run(claim, experiment.cluster.checkpoint_every)

    return worker.work(
        books,
        plan,
        run_unit,
        stop=session.stop,
        world=session.world,
        groups=groups,
        retry_failed=retry_failed,
        wait=wait,
    )


def run_units(config_path: str, unit_ids: list[str]) -> int:
    """Body of one scheduler task: read the resolved experiment again, run the named units.

    Nothing but names travels to the task; what is done already is looked up on disk.
    """
    experiment = config.load(Path(config_path))
    books = ledger(experiment)
    signals = tuple(name for name in SIGNALS if name != "SIGUSR2")  # submitit's own
    with Session(experiment, "rollout", signals=signals) as session:
        plan = books.plan(range(num_rows(experiment)), experiment.cluster.members_per_block)
        named = [unit for unit in plan if unit.name in set(unit_ids)]
        outcome = work(experiment, session, books, named, retry_failed=True, wait=False)
        tell(outcome)
        return outcome.exit_code


def submit(experiment, session, books, plan, retry_failed) -> int:
    """Hand the units that nobody works on to submitit; returns at once."""
    from hpc_closure.rollout import submit as submission

    survey = books.survey(
        range(num_rows(experiment)),
        experiment.cluster.members_per_block,
        queued=submission.queued_members(session.run, experiment.cluster.executor),
    )
    states = ("missing", "failed") if retry_failed else ("missing",)
    ready = {unit.name for state in states for unit in survey.states[state]}
    names = [unit.name for unit in plan if unit.name in ready]
    failed = len(survey.states["failed"])
    if failed and not retry_failed:
        log.get().warning(f"{failed} unit(s) failed before; --retry-failed submits them again")
    if not names:
        log.get().info("nothing to submit: " + str(survey.counts()))
        return 3 if failed else 0
    submission.submit(experiment, session.run, names)
    log.get().info("follow it with `hpc-closure status`; run the same command again if lost")
    return 0


def print_plan(experiment: Experiment, books: units.Ledger, wanted: list[int]) -> int:
    """What a run would do and cost, and the exact batch text; writes nothing."""
    from hpc_closure.rollout import submit as submission

    survey = books.survey(wanted, experiment.cluster.members_per_block)
    rollout, grid = experiment.rollout, experiment.train_grid
    rows = sum(
        len(unit.members) for state in ("missing", "failed") for unit in survey.states[state]
    )
    times = 1 + round((rollout.t_end - rollout.t_start) / rollout.every)
    fields = 1 + ("oracle" in rollout.references)
    print(f"run folder {books.run}")
    print("units: " + ", ".join(f"{count} {state}" for state, count in survey.counts().items()))
    print(f"trajectories to compute: {rows}, on {grid}^2, {times} stored times")
    print(f"bytes to write: {fields * rows * times * grid**2 * 4 / 1e9:.3g} GB")
    if experiment.cluster.executor != "inline":
        names = [
            unit.name for state in ("missing", "failed") for unit in survey.states[state]
        ]
        print(submission.describe_plan(experiment, books.run, names))
    return 0
