"""``hpc-closure generate``: compute the DNS ensemble and its closure targets, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.schema import Experiment
from hpc_closure.generate import memory
from hpc_closure.work import atomic, log, loop
from hpc_closure.work.options import Options, chosen_members, chosen_shard
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger
from hpc_closure.work.worker import Outcome

if TYPE_CHECKING:
    from hpc_closure.generate.replicas import Plan

# cost on one core in float64, forcing and noise included; `bench dns` measures it
NS_PER_POINT_AND_STEP = 25.0
EVALUATIONS = {
    "etdrk4": 4,
    "imex_rk3": 4,
    "rk2": 2,
    "rk4": 4,
}  # of the nonlinear term in a step; else one


def run(experiment: Experiment, options: Options = Options()) -> int:
    """Compute the missing blocks of RUN/data. Returns the exit code."""
    chosen = chosen_members(options.members, experiment.generate.members)
    chosen_shard(options.shard, [])
    if experiment.data is not None and experiment.data.in_place:
        return look(experiment, options)
    books = Ledger.of(experiment, "generate")
    if options.dry_run and experiment.data is not None:
        return look(experiment, options, books)
    if options.dry_run:
        return print_plan(experiment, books, chosen)
    with Session(experiment, "generate", options) as session:
        from hpc_closure.generate.dns import DNSBlock

        if experiment.data is not None:
            return of_others(experiment, session, books, chosen, options)
        domain, stride = session.groups.domain, 1
        subgrid = experiment.generate.closure == "subgrid"
        if subgrid:
            if code := run_pilot(experiment, session, options):
                return code
            stride = Choices(experiment).stride
        outcome = work(
            session,
            books,
            chosen,
            options,
            lambda unit: DNSBlock(unit, books, session, domain, stride),
        )
        if outcome.exit_code or options.members or not subgrid:
            return outcome.exit_code
        if books.incomplete(books.survey()):
            if session.world.root and experiment.own_replicas:
                log.get().info("replicas wait for the members that are not there yet")
            return 0
        return go_on(experiment, session, options, log_findings=bool(outcome.done))


def of_others(
    experiment: Experiment, session: Session, books: Ledger, chosen, options: Options
) -> int:
    """Compute closures of stored trajectories of others. Returns the exit code.

    Raises:
        ValueError: they have errors that are not accepted.
    """
    from hpc_closure.data.reader import DataSet
    from hpc_closure.generate import outside, summary
    from hpc_closure.generate.outside_block import OutsideBlock

    domain = session.groups.domain
    if not books.incomplete(books.survey()):
        log.get().info(f"{session.run.data} is complete")
        return 0
    if outside.advance_of(experiment) is None:
        raise ValueError(
            "data.closure names no stored closure, and there is no reduced solver to compute it: "
            "state reduced.python, an equation of this package in physics, or data.closure"
        )
    outside.require_in(session, log_findings=True)
    outcome = work(
        session, books, chosen, options, lambda unit: OutsideBlock(unit, books, session, domain)
    )
    if outcome.done and session.world.root and not books.incomplete(books.survey()):
        data = DataSet(session.run.data)
        log.get().info(summary.share(experiment, data, 1))
        data.close()
    return outcome.exit_code


def look(experiment: Experiment, options: Options, books: Ledger | None = None) -> int:
    """Check data of others that are read where they are; nothing is computed. Returns 0.

    Raises:
        ValueError: they have errors that are not accepted.
    """
    from hpc_closure.generate import outside

    if options.dry_run:
        print("\n".join(outside.check(experiment).lines()))
        if books is not None:
            counts = books.survey().counts().items()
            print("units: " + ", ".join(f"{count} {state}" for state, count in counts))
        return 0
    with Session(experiment, "generate", options) as session:
        outside.require_in(session, log_findings=True)
        if session.world.root:
            log.get().info("the data are read where they are: nothing to compute")
    return 0


def go_on(experiment: Experiment, session: Session, options: Options, log_findings: bool) -> int:
    """Summarise complete data of closure ``subgrid``, then compute the replicas.

    ``log_findings``: log the summary. Returns the exit code.
    """
    from hpc_closure.data.reader import DataSet
    from hpc_closure.generate import summary
    from hpc_closure.generate.replicas import Plan

    data = DataSet(session.run.data)
    if log_findings and session.world.root:
        for line in summary.lines(experiment, data, Choices(experiment).stride):
            log.get().info(line)
    cases = []
    if experiment.own_replicas:
        cases = data.starts(experiment.train.split, experiment.rollout.initial_conditions)
    data.close()
    if not cases:
        return 0
    return run_replicas(
        session, options, Plan.replicas(experiment, cases, Choices(experiment).stride)
    )


def run_pilot(
    experiment: Experiment, session: Session, options: Options, always: bool = False
) -> int:
    """Compute the pilot's trajectories and choose steps and drains on them.

    Programs that share the work (``--shard``) all need the complete pilot, so each one waits for
    units that another computes. ``always``: run it even if no setting is missing. Returns the exit
    code.
    """
    if not (experiment.needs_pilot or always):
        return 0
    from hpc_closure.generate import pilot
    from hpc_closure.generate.replicas import Plan

    all_units = replace(options, members=None, shard=None)
    if code := run_replicas(session, all_units, Plan.pilot(experiment)):
        return code
    error: BaseException | None = None
    if session.world.root:
        try:
            pilot.find(experiment)
        except (ValueError, RuntimeError, OSError) as failure:
            error = failure
    error = session.world.agree_on_error(error)
    if error is not None:
        raise error
    return 0


def work(session: Session, books: Ledger, chosen, options: Options, make: Callable) -> Outcome:
    """Run the missing units of a ledger; ``make(unit)`` returns the block of a unit."""
    settings = session.experiment.cluster

    def run_unit(unit, claim):
        make(unit).run(claim, settings.checkpoint_every)

    outcome = loop.work(
        books,
        chosen_shard(options.shard, books.plan(chosen)),
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


def print_plan(experiment: Experiment, books: Ledger, chosen: list[int]) -> int:
    """Print the work and the cost of a run; write nothing."""
    survey = books.survey(chosen)
    generate = experiment.generate
    missing = sum(
        len(unit.members) for state in ("missing", "failed") for unit in survey.states[state]
    )
    steps = round(generate.t_end / generate.dt)
    evaluations, sides = EVALUATIONS.get(generate.scheme, 1), experiment.physics.dimensions
    if sides < 3:  # the cost of a point in three dimensions is that of all velocities
        evaluations *= len(experiment.physics.channels)
    size = missing * generate.bytes_per_member(experiment.physics)
    sizes = experiment.problem.sizes
    evaluated = missing * steps * math.prod(sizes) * evaluations
    core_hours = evaluated * NS_PER_POINT_AND_STEP * 1e-9 / 3600
    print(f"run folder {books.run}")
    print("units: " + ", ".join(f"{count} {state}" for state, count in survey.counts().items()))
    points = f"{sizes[0]}^{sides}" if len(set(sizes)) == 1 else " x ".join(map(str, sizes))
    print(f"members to compute: {missing}, {steps} steps each at {points}")
    print(memory.line(experiment.problem))
    starts = {
        "pilot": experiment.pilot.initial_conditions,
        "replicas": experiment.rollout.initial_conditions,
    }
    for stage, cases in starts.items():
        if stage in experiment.stages:
            stage_counts = Ledger.of(experiment, stage).survey().counts()
            states = ", ".join(f"{count} {state}" for state, count in stage_counts.items())
            print(f"{stage} of {cases} start(s): {states}")
    print(f"bytes to write: {size / 1e9:.3g} GB")
    print(f"cost: about {core_hours:.2g} core-hours on CPU; `hpc-closure bench dns` measures it")
    return 0
