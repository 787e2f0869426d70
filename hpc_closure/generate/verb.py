"""``hpc-closure generate``: the DNS ensemble and its closure targets, block by block."""

from collections.abc import Callable

from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import atomic, log, loop
from hpc_closure.work.options import Options, chosen_members, chosen_part
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger

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

        domain = session.groups.domain
        outcome = work(
            session, books, wanted, options, lambda unit: DNSBlock(unit, books, session, domain)
        )
        subgrid = experiment.generate.closure == "subgrid"
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

    data = DataSet(session.run.data)
    if tell and session.world.root:
        for line in summary.lines(experiment, data):
            log.get().info(line)
    cases = []
    if experiment.own_replicas:
        cases = data.starts(experiment.train.split, experiment.rollout.cases)
    data.close()
    return run_replicas(experiment, session, options, cases) if cases else 0


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


def run_replicas(
    experiment: Experiment, session: Session, options: Options, cases: list[int]
) -> int:
    """Compute the missing replicas of starts. Returns the exit code."""
    from hpc_closure.generate.replicas import ReplicaBlock

    books = Ledger.of(experiment, "replicas")
    atomic.make_folder(session.run.folder(books.stage))
    domain = session.groups.domain
    return work(
        session,
        books,
        None,
        options,
        lambda unit: ReplicaBlock(unit, books, session, domain, cases),
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
    if experiment.own_replicas:
        there = Ledger.of(experiment, "replicas").survey().counts()
        states = ", ".join(f"{count} {state}" for state, count in there.items())
        print(f"replicas of {experiment.rollout.cases} start(s): {states}")
    print(f"bytes to write: {size / 1e9:.3g} GB")
    print(f"cost: about {core_hours:.2g} core-hours on CPU; `hpc-closure bench dns` measures it")
    return 0
