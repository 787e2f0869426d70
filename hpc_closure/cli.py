"""The command line: four verbs that run an experiment in order, and their helpers.

Only the parser lives here. Each verb imports what it needs when it runs, so that ``--help`` and
shell completion answer at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from hpc_closure.bench.cli import app as bench
from hpc_closure.work.options import Options, UsageError

app = typer.Typer(
    name="hpc-closure",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers three times sooner
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Learn a stochastic closure from DNS ensembles, use it in coupled ensembles.

    One YAML file describes an experiment; four verbs run it in order, and each reads the folder
    that the previous one filled:

    \b
        hpc-closure generate  x.yaml   MPI DNS ensemble            RUN/data
        hpc-closure train     x.yaml   score-based closure model   RUN/train
        hpc-closure rollout   x.yaml   closure-coupled ensemble    RUN/rollout
        hpc-closure evaluate  x.yaml   scores, figures, report     RUN/evaluate

    `advise x.yaml` says before any training whether a subgrid closure can be expected to pay.

    The same command again does only what is missing. `config list` names the presets, `config
    show --doc` explains every key. Exit codes: 0 done, 1 error, 2 bad config or usage, 3 some
    units failed, 75 stopped early (run it again).""",
)
config = typer.Typer(
    no_args_is_help=True, help="List, show, check, compare and copy experiment files."
)


def _complete_experiment(incomplete: str) -> list[str]:
    shipped = Path(__file__).parent / "experiment" / "presets"
    names = [path.stem for path in shipped.glob("*.yaml")]
    names += [str(path) for path in Path(".").glob("*.y*ml")]
    return sorted(name for name in names if name.startswith(incomplete))


Experiment = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="An experiment file, or the name of a shipped preset (`config list`).",
        autocompletion=_complete_experiment,
        show_default=False,
    ),
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, for example train.lr=3e-4."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved plan and its cost; write nothing.")
]
MaxElapsed = Annotated[
    Optional[str],
    typer.Option(help="Stop cleanly (exit 75) after this long, e.g. 3h50m.", metavar="TIME"),
]
Redo = Annotated[bool, typer.Option("--redo", help="Delete this stage's products first; asks.")]
Yes = Annotated[bool, typer.Option("--yes", help="Answer yes to questions.")]
Parts = Annotated[
    Optional[str],
    typer.Option(help="Work on part I of N of the units (1-based), e.g. 2/8.", metavar="I/N"),
]
Members = Annotated[
    Optional[str], typer.Option(help="Only these members, e.g. 0-31 or 4,7,9.", metavar="LIST")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try failed units again.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Warnings and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


@app.command()
def generate(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    members: Members = None,
    parts: Parts = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    redo: Redo = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Make the DNS ensemble and its targets: RUN/data.

    Under MPI (`mpirun -n 4 hpc-closure generate x.yaml`) the members are shared among the ranks;
    with cluster.domain_ranks=k each field is split over k ranks. The numbers are the same.
    """
    from hpc_closure.generate import verb

    _run(verb.run, context)


@app.command()
def train(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    redo: Redo = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Fit the closure model: RUN/train/model.safetensors.

    One process or many (`launch/train -n 4 x.yaml`); DeepSpeed when installed, plain torch
    otherwise. Resumes from the newest whole checkpoint.
    """
    from hpc_closure.train import verb

    _run(verb.run, context)


@app.command()
def rollout(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    executor: Annotated[
        Optional[str],
        typer.Option(help="inline, local (submitit on this machine) or slurm.", metavar="WHERE"),
    ] = None,
    members: Members = None,
    parts: Parts = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    redo: Redo = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Run the closure inside the solver: RUN/rollout.

    With --executor slurm the missing units go to the queue through submitit and the command
    returns; run it again whenever something was lost.
    """
    from hpc_closure.rollout import verb

    _run(verb.run, context, (f"cluster.executor={executor}",) if executor else ())


@app.command()
def evaluate(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Score what there is; the report says so.")
    ] = False,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    redo: Redo = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Score it beside exact laws: RUN/evaluate/report.html."""
    from hpc_closure.evaluate import verb

    _run(verb.run, context)


@app.command()
def submit(
    experiment: Experiment,
    overrides: Overrides = None,
    stages: Annotated[
        str, typer.Option(help="Verbs to submit; they run in order.", metavar="VERB,...")
    ] = "generate,train,rollout,evaluate",
    after: Annotated[
        str, typer.Option(help="Start after this job has succeeded.", metavar="JOB")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cost and batch scripts; write nothing.")
    ] = False,
):
    """Queue the verbs as Slurm jobs, each after the one before.

    Account, partition, modules and sizes come from the profile that the experiment names
    (cluster.profile, see slurm/profiles/template.yaml). A job that was stopped early goes back
    to the queue by itself. The same command again does what is missing.
    """
    from hpc_closure.tools import submit

    typed = (experiment, *(overrides or []))
    try:
        submit.run(_experiment(*typed), stages, after, dry_run, typed)
    except ValueError as error:  # what cannot be submitted was asked wrongly
        raise UsageError(str(error)) from None


@app.command()
def status(
    experiment: Experiment,
    overrides: Overrides = None,
    json: Json = False,
    failed: Annotated[bool, typer.Option("--failed", help="List the failures.")] = False,
    watch: Annotated[
        Optional[float],
        typer.Option(help="Repeat every SECONDS (at least 30 on a cluster).", metavar="SECONDS"),
    ] = None,
):
    """Say what is done, failed and missing, and how to go on."""
    from hpc_closure.tools import status

    typed = (experiment, *(overrides or []))
    _end(status.run(_experiment(*typed), typed, json=json, failed=failed, watch=watch))


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A data file, model, checkpoint or run folder, or a shipped model's name."
        ),
    ],
    deep: Annotated[bool, typer.Option("--deep", help="Read every value.")] = False,
    json: Json = False,
):
    """Show what a file of a run holds, and where it is from."""
    from hpc_closure.tools import inspect

    _end(inspect.run(path, deep=deep, json=json))


@app.command()
def advise(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    grids: Annotated[
        str, typer.Option(help="Grids of the ladder, e.g. 48,64,80.", metavar="LIST")
    ] = "",
    within: Annotated[
        float, typer.Option(help="Error over the true ensemble's that is good enough.")
    ] = 1.3,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Say whether a subgrid closure can be expected to pay, before one is trained.

    Runs the pilot, DNS in no data set: how fast unresolved scales forget how they began, and what
    bare solvers on finer grids reach at what cost, each at its own step and with its best start.
    """
    from hpc_closure.tools import advise

    known = {key: context.params[key] for key in ("dry_run", "max_elapsed")}
    typed = (experiment, *(overrides or []))
    options = Options(**known, verbosity=verbose - quiet, typed=typed)
    _end(advise.run(_experiment(*typed), options, _numbers("--grids", grids), within))


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise UsageError(f"{option} {text}: expected whole numbers, for example 48,64,80")
    return [int(part) for part in parts]


@config.command("list")
def config_list():
    """Name the shipped presets."""
    from hpc_closure.tools import config

    config.list_presets()


@config.command("show")
def config_show(
    experiment: Experiment,
    overrides: Overrides = None,
    doc: Annotated[bool, typer.Option("--doc", help="With descriptions and ranges.")] = False,
):
    """Print the resolved experiment."""
    from hpc_closure.tools import config

    config.show(_experiment(experiment, *(overrides or [])), doc)


@config.command("check")
def config_check(experiment: Experiment, overrides: Overrides = None):
    """Check an experiment file; exit code 0 when it is right."""
    from hpc_closure.tools import config

    config.check(_experiment(experiment, *(overrides or [])), experiment)


@config.command("diff")
def config_diff(one: Experiment, other: Experiment):
    """Print the keys in which two experiments differ."""
    from hpc_closure.tools import config

    config.diff(_experiment(one), _experiment(other))


@config.command("copy")
def config_copy(
    preset: Experiment,
    target: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
):
    """Write a preset to a file of your own, comments included."""
    from hpc_closure.tools import config

    config.copy(preset, target)


app.add_typer(config, name="config")
app.add_typer(bench, name="bench")


def _run(verb: Callable[..., int], context: typer.Context, more: tuple[str, ...] = ()) -> None:
    """Run a verb on its experiment; ``more`` are overrides that an option stands for."""
    asked, stage = context.params, str(context.info_name)
    typed = (asked["experiment"], *(asked["overrides"] or []), *more)
    experiment = _experiment(*typed)
    if stage not in experiment.stages:
        made = f"generate.closure={experiment.generate.closure} makes data but no closure"
        if experiment.generate.closure != "none":
            made = (
                f"train.split={list(experiment.train.split)} makes a test set for other runs "
                "(use.test)"
            )
        raise UsageError(f"{typed[0]}: {made}: there is nothing to {stage}")
    known = {key: asked[key] for key in Options.__dataclass_fields__ if key in asked}
    _end(
        verb(
            experiment, Options(**known, verbosity=asked["verbose"] - asked["quiet"], typed=typed)
        )
    )


def _experiment(name: str, *overrides: str):
    """The experiment of a file or preset; what is wrong in it is wrong usage."""
    from hpc_closure.experiment import reading

    try:
        return reading.load(name, list(overrides))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)
