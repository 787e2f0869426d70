"""``hpc-closure generate``: the DNS ensemble and its closure targets, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import atomic, log, loop
from hpc_closure.work.options import Options, chosen_members, chosen_part
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger

if TYPE_CHECKING:
    from hpc_closure.generate.replicas import Plan

# one core, float64, forcing and noise included; `bench dns` measures it
NS_PER_POINT_AND_STEP = 25.0


def run(experiment: Experiment, options: Options = Options()) -> int:
    """Compute the missing blocks of RUN/data. Returns the exit code."""
    wanted = chosen_members(options.members, experiment.generate.members)
    chosen_part(options.parts, [])
    books = Ledger.of(experiment, "generate")
    if options.dry_run:
        return print_plan(experiment, books, wanted)
    with Session(experiment, "generate", options) as session:
        from hpc_closure.generate.dns import DNSBlock

        domain, stride = session.groups.domain, 1
        subgrid = experiment.generate.closure == "subgrid"
        if subgrid:
            if code := run_pilot(experiment, session, options):
                return code
            stride = Choices(experiment).stride
        outcome = work(
            session,
            books,
            wanted,
            options,
            lambda unit: DNSBlock(unit, books, session, domain, stride),
        )
        if outcome.exit_code or options.members or not subgrid:
            return outcome.exit_code
        if books.incomplete(books.survey()):
            if session.world.root and experiment.own_replicas:
                log.get().info("replicas wait for the members that are not there yet")
            return 0
        return go_on(experiment, session, options, tell=bool(outcome.done))


def go_on(experiment: Experiment, session: Session, options: Options, tell: bool) -> int:
    """What follows once all data of closure ``subgrid`` are there. Returns the exit code."""
    from hpc_closure.data.reader import DataSet
    from hpc_closure.generate import summary
    from hpc_closure.generate.replicas import Plan

    data = DataSet(session.run.data)
    if tell and session.world.root:
        for line in summary.lines(experiment, data, Choices(experiment).stride):
            log.get().info(line)
    cases = []
    if experiment.own_replicas:
        cases = data.starts(experiment.train.split, experiment.rollout.cases)
    data.close()
    if not cases:
        return 0
    return run_replicas(
        session, options, Plan.replicas(experiment, cases, Choices(experiment).stride)
    )


def run_pilot(
    experiment: Experiment, session: Session, options: Options, always: bool = False
) -> int:
    """Compute the pilot's trajectories, and find on them what is to be found.

    Every program of several needs all of it, whatever part of the data is its own, so it waits for
    what others compute. ``always``: even where no setting is to be found. Returns the exit code.
    """
    if not (experiment.needs_pilot or always):
        return 0
    from hpc_closure.generate import pilot
    from hpc_closure.generate.replicas import Plan

    whole = replace(options, members=None, parts=None)
    if code := run_replicas(session, whole, Plan.pilot(experiment)):
        return code
    error: BaseException | None = None
    if session.world.root:
        try:
            pilot.find(experiment)
        except (ValueError, RuntimeError, OSError) as found:
            error = found
    error = session.world.agree_on_error(error)
    if error is not None:
        raise error
    return 0


def work(
    session: Session, books: Ledger, wanted, options: Options, make: Callable
) -> loop.Outcome:
    """Run the missing units of a ledger; ``make(unit)`` is the block."""
    settings = session.experiment.cluster

    def run_unit(unit, claim):
        make(unit).run(claim, settings.checkpoint_every)

    outcome = loop.work(
        books,
        chosen_part(options.parts, books.plan(wanted)),
        run_unit,
        stop=session.stop,
        groups=session.groups,
        retry_failed=options.retry_failed,
    )
    if session.world.root:
        outcome.report()
    return outcome


def run_replicas(session: Session, options: Options, plan: Plan) -> int:
    """Compute the missing replicas of a plan. Returns the exit code."""
    from hpc_closure.generate.replicas import ReplicaBlock

    books = Ledger.of(session.experiment, plan.stage)
    atomic.make_folder(session.run.folder(books.stage))
    domain = session.groups.domain
    return work(
        session,
        books,
        None,
        options,
        lambda unit: ReplicaBlock(unit, books, session, domain, plan),
    ).exit_code


def print_plan(experiment: Experiment, books: Ledger, wanted: list[int]) -> int:
    """What a run would do and cost; writes nothing."""
    survey = books.survey(wanted)
    generate = experiment.generate
    missing = sum(
        len(unit.members) for state in ("missing", "failed") for unit in survey.states[state]
    )
    steps = round(generate.t_end / generate.dt)
    sides = experiment.physics.dimensions
    size = missing * generate.bytes_per_member(experiment.physics)
    core_hours = missing * steps * generate.grid**sides * NS_PER_POINT_AND_STEP * 1e-9 / 3600
    print(f"run folder {books.run}")
    print("units: " + ", ".join(f"{count} {state}" for state, count in survey.counts().items()))
    print(f"members to compute: {missing}, {steps} steps each at {generate.grid}^{sides}")
    starts = {"pilot": experiment.pilot.cases, "replicas": experiment.rollout.cases}
    for stage, cases in starts.items():
        if stage in experiment.stages:
            there = Ledger.of(experiment, stage).survey().counts()
            states = ", ".join(f"{count} {state}" for state, count in there.items())
            print(f"{stage} of {cases} start(s): {states}")
    print(f"bytes to write: {size / 1e9:.3g} GB")
    print(f"cost: about {core_hours:.2g} core-hours on CPU; `hpc-closure bench dns` measures it")
    return 0
