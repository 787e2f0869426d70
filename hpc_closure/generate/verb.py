"""``hpc-closure generate``: the DNS ensemble and its closure targets, block by block."""

from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import loop
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

        groups = session.groups

        def run_unit(unit, claim):
            block = DNSBlock(unit, books, session, groups.domain)
            block.run(claim, experiment.cluster.checkpoint_every)

        plan = books.plan(wanted)
        outcome = loop.work(
            books,
            chosen_part(options.parts, plan),
            run_unit,
            stop=session.stop,
            give_up=experiment.cluster.give_up,
            groups=groups,
            retry_failed=options.retry_failed,
        )
        if session.world.root:
            outcome.report()
        return outcome.exit_code


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
    print(f"bytes to write: {size / 1e9:.3g} GB")
    print(f"cost: about {core_hours:.2g} core-hours on CPU; `hpc-closure bench dns` measures it")
    return 0
