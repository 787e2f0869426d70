"""The command line: four verbs that run an experiment in order, and their helpers.

Only the parser lives here. Each verb imports what it needs when it runs, so that ``--help`` and
shell completion answer at once.
"""

from pathlib import Path
from typing import Annotated, Optional

import typer

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

    The same command again does only what is missing. `config list` names the presets, `config
    show --doc` explains every key. Exit codes: 0 done, 1 error, 2 bad config or usage, 3 some
    units failed, 75 stopped early (run it again).""",
)
config_app = typer.Typer(
    no_args_is_help=True, help="List, show, check, compare and copy experiment files."
)
bench_app = typer.Typer(
    no_args_is_help=True, help="Measure speed and calibration on this machine."
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


def _experiment(name: str, overrides: list[str] | None, verb: str = "generate"):
    from hpc_closure.experiment import reading

    try:
        experiment = reading.load(name, overrides)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if verb not in experiment.stages:
        raise UsageError(
            f"{name}: generate.closure={experiment.generate.closure} makes data but no closure: "
            f"there is nothing to {verb}"
        )
    return experiment


class UsageError(Exception):
    """Bad config or usage: one line, exit code 2."""


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

    _work(verb.run, context)


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

    _work(verb.run, context)


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

    _work(verb.run, context, (f"cluster.executor={executor}",) if executor else ())


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

    _work(verb.run, context)


@app.command()
def status(
    experiment: Experiment,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="List the failures.")] = False,
    watch: Annotated[
        Optional[float],
        typer.Option(help="Repeat every SECONDS (at least 30 on a cluster).", metavar="SECONDS"),
    ] = None,
):
    """Say what is done, failed and missing, and how to go on."""
    from hpc_closure.tools import status as verb

    _finish(
        verb.run,
        _experiment(experiment, overrides),
        source=experiment,
        overrides=overrides or [],
        json=json,
        failed=failed,
        watch=watch,
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A data file, model, checkpoint or run folder.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every value.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """Show what a file of a run holds, and where it is from."""
    from hpc_closure.tools import inspect as verb

    _finish(verb.run, path, deep=deep, json=json)


@config_app.command("list")
def config_list():
    """Name the shipped presets."""
    from hpc_closure.tools import config as verb

    _finish(verb.list_presets)


@config_app.command("show")
def config_show(
    experiment: Experiment,
    overrides: Overrides = None,
    doc: Annotated[bool, typer.Option("--doc", help="With descriptions and ranges.")] = False,
):
    """Print the resolved experiment."""
    from hpc_closure.tools import config as verb

    _finish(verb.show, _experiment(experiment, overrides), doc=doc)


@config_app.command("check")
def config_check(experiment: Experiment, overrides: Overrides = None):
    """Check an experiment file; silence and exit code 0 when it is right."""
    from hpc_closure.tools import config as verb

    _finish(verb.check, _experiment(experiment, overrides), experiment)


@config_app.command("diff")
def config_diff(one: Experiment, other: Experiment):
    """Print the keys in which two experiments differ."""
    from hpc_closure.tools import config as verb

    _finish(verb.diff, _experiment(one, None), _experiment(other, None))


@config_app.command("copy")
def config_copy(
    preset: Experiment,
    target: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
):
    """Write a preset to a file of your own, comments included."""
    from hpc_closure.tools import config as verb

    _finish(verb.copy, preset, target)


Threads = Annotated[int, typer.Option(help="Threads in all; 0 = as torch has it.", metavar="N")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
BenchSteps = Annotated[
    int, typer.Option(help="Steps per timed block; 0 = what fills --seconds.", metavar="N")
]
Repeats = Annotated[int, typer.Option(help="Timed blocks; medians are given.", metavar="N")]
Seconds = Annotated[float, typer.Option(help="Length of a timed block.")]
Json = Annotated[
    Optional[Path], typer.Option("--json", help="Write the records there too.", metavar="FILE")
]


@bench_app.command("dns")
def bench_dns(
    grid: Annotated[str, typer.Option(help="Points per side.", metavar="N,...")] = "64,256",
    members: Annotated[str, typer.Option(help="Ensemble sizes.", metavar="N,...")] = "20",
    precision: Annotated[
        str, typer.Option(help="float64, float32 or both.", metavar="WORD,...")
    ] = "float64",
    ranks: Annotated[
        str, typer.Option(help="Processes; more than one are started by mpirun.", metavar="N,...")
    ] = "1",
    domain_ranks: Annotated[
        int, typer.Option(help="Ranks that share one field; the others share members.")
    ] = 1,
    against: Annotated[
        Optional[str],
        typer.Option(
            help="published (ten draws), published-1 (one), one-rank, exponax, jax-cfd, shenfun, "
            "fluidsim, dedalus; several with commas.",
            metavar="METHOD,...",
        ),
    ] = None,
    scheme: Annotated[str, typer.Option(help="Our time scheme.")] = "cn_euler",
    noise: Annotated[bool, typer.Option(help="With the published stochastic forcing.")] = True,
    steps: BenchSteps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 0.5,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Speed of the DNS, beside other methods in the same run.

    A ratio is our speed over the method's: medians of blocks timed by turns, the first ones left
    out. Other solvers are measured when installed, without stochastic forcing, which they lack.
    """
    from hpc_closure.bench import verb as verb

    _measure(
        verb.dns,
        grids=grid,
        members=members,
        precisions=precision,
        num_ranks=ranks,
        domain_ranks=domain_ranks,
        against=against,
        scheme=scheme,
        noise=noise,
        steps=steps,
        repeats=repeats,
        seconds=seconds,
        threads=threads,
        device=device,
        json=json,
    )


@bench_app.command("training")
def bench_training(
    grid: Annotated[int, typer.Option(help="Points per side.")] = 64,
    batch: Annotated[int, typer.Option(help="Batch of the training step.")] = 80,
    samples: Annotated[
        str, typer.Option(help="Members sampled at once.", metavar="N,...")
    ] = "1,20",
    steps: BenchSteps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 1.0,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Speed of training and sampling, beside the published network's form in eager PyTorch."""
    from hpc_closure.bench import verb as verb

    _measure(
        verb.training,
        grid=grid,
        batch=batch,
        samples=samples,
        steps=steps,
        repeats=repeats,
        seconds=seconds,
        threads=threads,
        device=device,
        json=json,
    )


@bench_app.command("sampling")
def bench_sampling(
    case: Annotated[
        str, typer.Option(help="Law of the data: diffusion, amplitude or regimes.")
    ] = "diffusion",
    grid: Annotated[int, typer.Option(help="Points per side.")] = 64,
    model: Annotated[
        Optional[str],
        typer.Option(help="A trained model; without it one is trained first.", metavar="FILE"),
    ] = None,
    methods: Annotated[
        Optional[str], typer.Option(help="Samplers; all without it.", metavar="NAME,...")
    ] = None,
    evaluations: Annotated[
        str, typer.Option(help="Evaluations per sample.", metavar="N,...")
    ] = "1,2,4,8,16,32",
    states: Annotated[int, typer.Option(help="Unseen states.")] = 32,
    members: Annotated[int, typer.Option(help="Members per state.")] = 32,
    steps: Annotated[int, typer.Option(help="Training steps; 0 = closed form only.")] = 2000,
    samples: Annotated[int, typer.Option(help="States to train on.")] = 2000,
    one_pass: Annotated[
        bool, typer.Option("--one-pass", help="Train a one-pass CRPS ensemble, too: one more row.")
    ] = False,
    correct: Annotated[
        bool,
        typer.Option(
            "--correct",
            help="Make up the spread that each setting lacks on unseen states, as training does "
            "for the model's own.",
        ),
    ] = False,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Error, spread per shell and cost of every sampler on data with a known law."""
    from hpc_closure.bench import verb as verb

    _measure(
        verb.sampling,
        case=case,
        grid=grid,
        model=model,
        methods=methods,
        evaluations=evaluations,
        states=states,
        members=members,
        steps=steps,
        samples=samples,
        one_pass=one_pass,
        correct=correct,
        threads=threads,
        device=device,
        json=json,
    )


app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")


def _measure(verb, **options) -> None:
    """A bench reads nothing but its options, so what is wrong is wrong in them."""
    try:
        _finish(verb, **options)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _work(run, context: typer.Context, more: tuple[str, ...] = ()) -> None:
    """Run a verb on its experiment; ``more`` are overrides that an option stands for."""
    from hpc_closure.work.options import Options

    asked = context.params
    overrides = [*(asked["overrides"] or []), *more]
    known = {key: asked[key] for key in Options.__dataclass_fields__ if key in asked}
    options = Options(
        **known,
        verbosity=asked["verbose"] - asked["quiet"],
        typed=(asked["experiment"], *overrides),
    )
    _finish(run, _experiment(asked["experiment"], overrides, str(context.info_name)), options)


def _finish(verb, *args, **options) -> None:
    code = verb(*args, **options)
    if code:
        raise typer.Exit(code)
