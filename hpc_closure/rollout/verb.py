"""``hpc-closure rollout``: compute the closure-coupled ensemble here or as batch jobs."""

import shlex
from pathlib import Path

from hpc_closure.closure.compatibility import check_model, is_made_by
from hpc_closure.data import held_out
from hpc_closure.data.held_out import HeldOut
from hpc_closure.experiment import reading
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.opponents import opponents_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import extras, log, loop
from hpc_closure.work.options import Options, chosen_members, chosen_shard
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger
from hpc_closure.work.worker import Hopeless, Outcome, Wait


def run(experiment: Experiment, options: Options = Options()) -> int:
    """Compute or submit the missing blocks of RUN/rollout. Returns the exit code."""
    members = chosen_members(options.members, experiment.rollout.trajectories)
    chosen_shard(options.shard, [])
    books = Ledger.of(experiment, "rollout")
    if options.dry_run:
        return print_plan(experiment, books, members, options)
    if experiment.cluster.executor != "inline":
        extras.need(f"cluster.executor={experiment.cluster.executor}", "submitit")
    check_inputs(experiment)
    with Session(experiment, "rollout", options) as session:
        plan = chosen_shard(options.shard, books.plan(members))
        if experiment.cluster.executor != "inline":
            return submit(experiment, session, books, plan, options)
        outcome = work(experiment, session, books, plan, options.retry_failed)
        if session.world.root:
            outcome.report()
        left = session.options_left()
    # --members and --shard select units of this run; opponents run only if neither is used
    all_units = not (options.members or options.shard)
    others = opponents_of(experiment).values() if all_units and not outcome.exit_code else ()
    return max([outcome.exit_code, *(run(one, left) for one in others if is_there(one))])


def check_inputs(experiment: Experiment) -> None:
    """Raise ValueError, one line, unless a coupled run has all that it reads."""
    check_solver(experiment)
    held_out.check(experiment)
    Choices(experiment).check()
    check_model(experiment)


def check_solver(experiment: Experiment) -> None:
    """Raise ValueError unless there is a reduced solver that the closure can be coupled to."""
    if experiment.physics.equation == "external" and not experiment.reduced.python:
        raise ValueError(
            "rollout needs a reduced solver, and physics.equation=external has none: state "
            "reduced.python, or score the closure on states by `hpc-closure evaluate --partial`"
        )


def is_there(opponent: Experiment) -> bool:
    """Return whether an opponent has been trained; log a warning if not."""
    if is_made_by(Run.of(opponent).model, opponent):
        return True
    log.get().warning(f"opponent {opponent.name} is not trained: run `hpc-closure train` for it")
    return False


def work(experiment, session, books, plan, retry_failed=False, wait="all") -> Outcome:
    """Run units in this process or MPI program; returns the outcome.

    Args:
        experiment, session, books: the experiment, its session and ledger.
        plan: the units.
        retry_failed: run units that failed before.
        wait: whose units to wait for: ``all``, ``job`` or ``none``.
    """
    import hpc_closure
    from hpc_closure.data.opening import open_data
    from hpc_closure.rollout.block import RolloutBlock

    groups = session.world.groups(1)
    closure = hpc_closure.load(session.run.model)
    if session.world.root:
        log.get().info(
            f"samples of the closure are {closure.describe_interval(experiment.rollout.interval)}"
        )
    closure = closure.to(session.device) if session.device != "cpu" else closure
    test_set = HeldOut.of(experiment)
    if session.world.root:
        log.get().info(f"starts are {test_set.in_words()}")
    data = open_data(test_set.experiment, test_set.run)

    def run_unit(unit, claim):
        block = RolloutBlock(unit, books, session, groups.domain, closure, data)
        before = closure.model.num_rescaled
        block.run(claim, experiment.cluster.checkpoint_every)
        if back := closure.model.num_rescaled - before:
            log.get().info(
                f"rollout {unit}: {back} draws had a shell beyond the training's range and were "
                "rescaled to its mean size"
            )
        if reason := block.hopeless():
            raise Hopeless(reason)

    return loop.work(
        books,
        plan,
        run_unit,
        stop=session.stop,
        groups=groups,
        retry_failed=retry_failed,
        wait=wait,
    )


def run_units(config_path: str, unit_ids: list[str], wait: Wait = "none") -> int:
    """Run the named units; the body of a scheduler task. Returns the exit code.

    The task receives names only. It reads the resolved experiment, and looks up on disk which
    units are finished.

    Args:
        config_path: file of the resolved experiment.
        unit_ids: names of units.
        wait: whose units a single process waits for: ``all``, ``job`` or ``none``.
    """
    experiment = reading.load(Path(config_path), warn=False)
    check_inputs(experiment)
    books = Ledger.of(experiment, "rollout")
    with Session(experiment, "rollout") as session:
        plan = books.plan()
        names = set(unit_ids)
        named = [unit for unit in plan if unit.name in names]
        outcome = work(experiment, session, books, named, retry_failed=True, wait=wait)
        outcome.report()
        return outcome.exit_code


def submit(experiment, session, books, plan, options=Options()) -> int:
    """Submit all units that are not done, running or queued. Returns the exit code."""
    from hpc_closure.batch import submit as submission

    names, failed = ready(experiment, books, plan, options.retry_failed)
    if failed and not options.retry_failed:
        log.get().warning(f"{failed} unit(s) failed before; --retry-failed submits them again")
    if not names:
        log.get().info("nothing to submit: every unit is done, running, queued or failed")
        return 3 if failed and not options.retry_failed else 0
    request = submission.Request.of(experiment, session.run, names, run_units)
    if experiment.cluster.executor == "slurm":
        print(submission.cost(request))
    for sent in submission.submit(request, experiment.cluster.executor):
        print(sent)
    typed = options.typed or (str(session.run.config),)
    follow = shlex.join(["hpc-closure", "status", *typed])
    print(f"follow it with: {follow}")
    return 0


def ready(experiment, books, plan, retry_failed) -> tuple[list[str], int]:
    """List the names of the units to submit; also returns how many units failed before."""
    from hpc_closure.batch.squeue import queued_members

    slurm = experiment.cluster.executor == "slurm"
    survey = books.survey(queued=queued_members(books.run) if slurm else ())
    states = ["missing", "failed"] if retry_failed else ["missing"]
    if experiment.cluster.allocation and experiment.cluster.allocation.join:
        states += ["queued", "running"]
    unit_names = {unit.name for state in states for unit in survey.states[state]}
    return [unit.name for unit in plan if unit.name in unit_names], len(survey.states["failed"])


def print_plan(experiment, books, members, options=Options()) -> int:
    """Print the work and the cost of a run, and the batch scripts; write nothing."""
    from hpc_closure.data.reader import BESIDE

    survey = books.survey(members)
    rollout, grid = experiment.rollout, experiment.train_grid
    rows = sum(
        len(unit.members) for state in ("missing", "failed") for unit in survey.states[state]
    )
    times = 1 + round((rollout.t_end - rollout.begin) / rollout.every)
    fields = 1 + len(set(BESIDE) & set(rollout.baselines)) + len(rollout.rungs)
    batch: list[str] = []
    if experiment.cluster.executor != "inline":
        from hpc_closure.batch import submit as submission

        plan = chosen_shard(options.shard, books.plan(members))
        names, _ = ready(experiment, books, plan, options.retry_failed)
        request = submission.Request.of(experiment, books.run, names, run_units)
        batch.append("cost: " + submission.cost(request))
        if experiment.cluster.executor == "slurm":
            batch += submission.batch_text(request)
    print(f"run folder {books.run}")
    print(f"starts: {rollout.initial_conditions} of {HeldOut.of(experiment).in_words()}")
    print("units: " + ", ".join(f"{count} {state}" for state, count in survey.counts().items()))
    print(f"trajectories to compute: {rows}, on {grid}^2, {times} stored times")
    print(f"bytes to write: {fields * rows * times * grid**2 * 4 / 1e9:.3g} GB")
    print(*batch, sep="\n", end="\n" if batch else "")
    return 0
