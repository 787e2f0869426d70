"""Define the command line: four verbs that run an experiment in order, and further commands.

This module is only the parser. A verb imports its modules when it runs, so that ``--help`` and
shell completion are fast.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from hpc_closure.bench.cli import app as bench
from hpc_closure.tools.old_names import RenamedGroup
from hpc_closure.work.options import Options, UsageError

app = typer.Typer(
    name="hpc-closure",
    cls=RenamedGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is three times faster
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Learn a stochastic closure from DNS ensembles, use it in coupled ensembles.

    One YAML file describes an experiment; four verbs run it in order, and each reads the folder
    that the previous one filled:

    \b
        hpc-closure generate  x.yaml   MPI DNS ensemble            RUN/data
        hpc-closure train     x.yaml   score-based closure model   RUN/train
        hpc-closure rollout   x.yaml   closure-coupled ensemble    RUN/rollout
        hpc-closure evaluate  x.yaml   scores, figures, report     RUN/evaluate

    `advise x.yaml` estimates before any training whether a subgrid closure is worth its cost.

    Repeat a command to compute only what is missing. `config list` names the presets, `config
    show --doc` explains every key. Exit codes: 0 done, 1 error, 2 bad config or usage, 3 some
    units failed, 75 stopped early (run it again).""",
)
config = typer.Typer(
    no_args_is_help=True, help="List, show, check, compare and copy experiment files."
)
solver = typer.Typer(no_args_is_help=True, help="Check a reduced solver of your own.")

data = typer.Typer(no_args_is_help=True, help="Check trajectories of others, before training.")


def _complete_experiment(incomplete: str) -> list[str]:
    """List presets and YAML files of this folder, for shell completion."""
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
    typer.Argument(metavar="[KEY=VALUE]...", help="Changed keys, for example train.lr=3e-4."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved plan and its cost; write nothing.")
]
MaxElapsed = Annotated[
    Optional[str],
    typer.Option(help="Stop cleanly (exit 75) after this long, e.g. 3h50m.", metavar="TIME"),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Delete this stage's products first, after a question."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Answer yes to questions.")]
Shard = Annotated[
    Optional[str],
    typer.Option(help="Compute shard I of N of the units (from 1), e.g. 2/8.", metavar="I/N"),
]
Members = Annotated[
    Optional[str], typer.Option(help="Only these members, e.g. 0-31 or 4,7,9.", metavar="LIST")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run failed units again.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Log more.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Log only warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def generate(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    members: Members = None,
    shard: Shard = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    overwrite: Overwrite = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Compute the DNS ensemble and the closure targets: RUN/data.

    Under MPI (`mpirun -n 4 hpc-closure generate x.yaml`) the members are divided among the ranks;
    with cluster.domain_ranks=k each field is divided among k ranks. The results are the same.
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
    overwrite: Overwrite = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Train the closure model: RUN/train/model.safetensors.

    Runs in one process or several (`mpirun -n 4 hpc-closure train x.yaml`), with DeepSpeed if it
    is installed, else plain torch. Resumes from the newest complete checkpoint.
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
    shard: Shard = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    overwrite: Overwrite = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Run the solver with the closure: RUN/rollout.

    With --executor slurm the missing units are submitted through submitit and the command
    returns; run it again to submit units that were lost.
    """
    from hpc_closure.rollout import verb

    _run(verb.run, context, (f"cluster.executor={executor}",) if executor else ())


@app.command()
def evaluate(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Score an incomplete rollout; the report says so.")
    ] = False,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    overwrite: Overwrite = False,
    yes: Yes = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Score the closure against exact laws and other references: RUN/evaluate/report.html."""
    from hpc_closure.evaluate import verb

    _run(verb.run, context)


@app.command()
def submit(
    experiment: Experiment,
    overrides: Overrides = None,
    stages: Annotated[
        str, typer.Option(help="Verbs to submit; they run in order.", metavar="VERB,...")
    ] = "generate,train,rollout,evaluate",
    dependency: Annotated[
        str, typer.Option(help="Start after this job has succeeded.", metavar="JOB")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cost and batch scripts; write nothing.")
    ] = False,
):
    """Submit the verbs as Slurm jobs; each starts after the previous one.

    Account, partition, modules and sizes are defined in the profile that the experiment names
    (cluster.profile; `config profile template mine.yaml` copies one to fill in). A job that is
    stopped early requeues itself. Repeat the command to submit what is missing.
    """
    from hpc_closure.tools import submit

    typed = (experiment, *(overrides or []))
    try:
        submit.run(_experiment(*typed), stages, dependency, dry_run, typed)
    except ValueError as error:  # an invalid request is a usage error (exit code 2)
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
    """Show what is done, failed and missing, and the next command."""
    from hpc_closure.tools import status

    typed = (experiment, *(overrides or []))
    _end(status.run(_experiment(*typed), typed, json=json, failed=failed, watch=watch))


@app.command()
def doctor(json: Json = False):
    """Check this installation and this machine; say how to mend what is missing or broken.

    Each line is a thing: packages, MPI and a start of two ranks, DeepSpeed, GPU, Slurm, compilers,
    caches, limits. Exit code 1 if a verb cannot run.
    """
    from hpc_closure.tools import doctor

    _end(doctor.run(json))


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
    """Show content and provenance of a file of a run."""
    from hpc_closure.tools import inspect

    _end(inspect.run(path, deep=deep, json=json))


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A model file, a run folder or a shipped model's name; with --here an exported "
            "folder."
        ),
    ],
    to: Annotated[Optional[Path], typer.Option("--to", help="Folder to write.")] = None,
    members: Annotated[
        Optional[int], typer.Option(help="Number of members that a call draws.")
    ] = None,
    points: Annotated[
        Optional[int], typer.Option(help="Points per side of your grid; default: of the training.")
    ] = None,
    interval: Annotated[
        Optional[int],
        typer.Option(help="Solver steps from one call to the next; default: as trained."),
    ] = None,
    evaluations: Annotated[
        Optional[int], typer.Option(help="Evaluations of the sampler; default: the model's.")
    ] = None,
    march: Annotated[
        Optional[str],
        typer.Option(
            help="Processor: native, x86-64-v3 (AVX2) or x86-64-v4 (AVX-512); default x86-64-v3 "
            "where it runs."
        ),
    ] = None,
    torchscript: Annotated[
        bool, typer.Option("--torchscript", help="Also write closure.ts, for FTorch.")
    ] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Compile an exported folder for this machine and torch.")
    ] = False,
):
    """Export a trained closure to a solver in C, C++ or Fortran, which then needs no Python.

    \b
        hpc-closure export two_regimes --to closure --members 20
        cmake -S closure -B build -DCMAKE_PREFIX_PATH=...   # of torch, see docs/export.md
        cmake --build build

    The folder holds the compiled draw, its description, a self-test, hpc_closure.h, .cpp and .f90
    and a CMakeLists.txt. Your solver links the library and calls hc_open, hc_draw for the states
    of all members once an interval, hc_save and hc_close. Draws equal those of
    `closure.process(members, seed=...)` in Python to 2e-6, with the same random bits, and either
    language continues a process that the other one saved.

    A folder is for one number of members, one grid and one torch (2.13.x, say); on another machine
    or torch, `hpc-closure export FOLDER --here` compiles it again. It needs g++.
    """
    from hpc_closure.tools import export as tool

    if here:
        asked = {"--to": to, "--members": members, "--points": points, "--interval": interval}
        asked |= {"--evaluations": evaluations, "--torchscript": torchscript or None}
        for option, value in asked.items():
            if value is not None:
                raise UsageError(
                    f"{option} is fixed in an exported folder: export the model again"
                )
        _end(tool.here(Path(model), march))
        return
    if to is None or members is None:
        missing = "--to FOLDER" if to is None else "--members NUMBER"
        raise UsageError(f"{missing} is missing, e.g. --to closure --members 20")
    _end(tool.run(model, to, members, points, interval, evaluations, march, torchscript))


@app.command()
def movie(
    experiment: Experiment,
    overrides: Overrides = None,
    out: Annotated[
        Optional[Path],
        typer.Option(help="File to write, .mp4 or .gif; default RUN/evaluate/movie.mp4."),
    ] = None,
    start: Annotated[int, typer.Option(help="Number of the start, from 0.")] = 0,
    channel: Annotated[str, typer.Option(help="Field of a state of several fields.")] = "",
    seconds: Annotated[float, typer.Option(help="Length of the film.")] = 10.0,
):
    """Film a coupled run: truth, three members, spread, rank of the truth, spectra.

    Needs a finished rollout. Writes MP4 where ffmpeg is installed, else GIF. Frames are the stored
    times: a smaller rollout.every gives a smoother film.
    """
    from hpc_closure.tools import movie

    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: expected a positive number")
    _end(movie.run(_experiment(experiment, *(overrides or [])), out, start, channel, seconds))


@app.command()
def advise(
    context: typer.Context,
    experiment: Experiment,
    overrides: Overrides = None,
    grids: Annotated[
        str, typer.Option(help="Grids of the ladder, e.g. 48,64,80.", metavar="LIST")
    ] = "",
    within: Annotated[
        float, typer.Option(help="Acceptable error, relative to that of the true ensemble.")
    ] = 1.3,
    dry_run: DryRun = False,
    max_elapsed: MaxElapsed = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
):
    """Estimate whether a subgrid closure is worth its cost, before one is trained.

    Runs the pilot, DNS outside the data set. It shows how fast unresolved scales forget their
    initial state, and error and cost of solvers without closure on finer grids, each with its
    best step and start.
    """
    from hpc_closure.tools import advise

    known = {key: context.params[key] for key in ("dry_run", "max_elapsed")}
    typed = (experiment, *(overrides or []))
    options = Options(**known, verbosity=verbose - quiet, typed=typed)
    _end(advise.run(_experiment(*typed), options, _numbers("--grids", grids), within))


def _numbers(option: str, text: str) -> list[int]:
    """Parse a comma-separated list of whole numbers; UsageError if it is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise UsageError(f"{option} {text}: expected whole numbers, for example 48,64,80")
    return [int(part) for part in parts]


@config.command("list")
def config_list():
    """List the shipped presets."""
    from hpc_closure.tools import config

    config.list_presets()


@config.command("show")
def config_show(
    experiment: Experiment,
    overrides: Overrides = None,
    doc: Annotated[bool, typer.Option("--doc", help="Add descriptions and ranges.")] = False,
):
    """Print the resolved experiment."""
    from hpc_closure.tools import config

    config.show(_experiment(experiment, *(overrides or [])), doc)


@config.command("check")
def config_check(experiment: Experiment, overrides: Overrides = None):
    """Check an experiment file; exit code 0 if it is valid."""
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
    """Copy a preset to a file, with its comments."""
    from hpc_closure.tools import config

    config.copy(preset, target)


@config.command("profile")
def config_profile(
    name: Annotated[
        str, typer.Argument(help="A site profile: template, cpu, gpu, ... or one of yours.")
    ],
    target: Annotated[
        Path, typer.Argument(help="File to write, e.g. slurm/profiles/mysite.yaml.")
    ],
):
    """Copy a site profile of a Slurm cluster to a file, with its comments."""
    from hpc_closure.tools import config

    config.copy_profile(name, target)


@solver.command("check")
def solver_check(
    python: Annotated[str, typer.Argument(metavar="SOLVER", help="file.py:Name or module:Name.")],
    grid: Annotated[int, typer.Option(help="Points per side of the reduced grid.")] = 32,
    fields: Annotated[int, typer.Option(help="Fields of the state.")] = 1,
    sides: Annotated[int, typer.Option(help="Sides of the box: 1, 2 or 3.")] = 2,
    length: Annotated[float, typer.Option(help="Side of the box.")] = 1.0,
    size: Annotated[float, typer.Option(help="Root mean square of the test states.")] = 1.0,
):
    """Check that a solver keeps the rules of reduced.python, one line each.

    A solver has dt and step(v, n), in numpy, torch or JAX: n steps from fields v (members, n, n)
    or (members, C, n, n). Exit code 1 if a rule fails.
    """
    from hpc_closure.tools import solver_check

    try:
        _end(solver_check.run(python, grid, fields, sides, length, size))
    except ValueError as error:  # an invalid solver is a usage error (exit code 2)
        raise UsageError(str(error)) from None


@data.command("check")
def data_check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT-or-FILE",
            help="An experiment with a section `data`, or a file, folder or 'pattern' of data.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    json: Json = False,
):
    """Show what files of others hold, and what is wrong with them.

    HDF5, NetCDF, Zarr and The Well's layout are read where they are. For a FILE a section for an
    experiment is proposed; with an EXPERIMENT, train and generate make the same check:

    \b
        data:
          path: runs/*.nc              # members along files or along a dimension
          state: {q: q_filtered}       # name of the field: variable
          closure: {q: forcing}        # U in dV/dt = M~(V) + U; without it, see docs/your_data.md
          length: 6.283                # of the periodic box
          interval: 0.2                # time for which one closure stands

    Each fault is one line: code, what was read, what was expected, the way out. A sample of the
    values is read, at most about 200 MB. With a built-in equation in `physics` the reduced solver
    checks sign and factor of the closure, the direction of time and the length of the box.
    Errors are refused by train and generate unless data.accept names their codes; exit code 1 if
    there are any.
    """
    from hpc_closure.tools import data_check

    _end(data_check.run(target, overrides or [], json=json))


app.add_typer(config, name="config")
app.add_typer(solver, name="solver")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench", cls=RenamedGroup)


def _run(verb: Callable[..., int], context: typer.Context, more: tuple[str, ...] = ()) -> None:
    """Run a verb on its experiment; ``more`` are overrides that follow from options."""
    params, stage = context.params, str(context.info_name)
    typed = (params["experiment"], *(params["overrides"] or []), *more)
    experiment = _experiment(*typed)
    if stage not in experiment.stages:
        reason = f"generate.closure={experiment.generate.closure} makes data but no closure"
        if experiment.generate.closure != "none":
            reason = (
                f"train.split={list(experiment.train.split)} makes a test set for other runs "
                "(use.test)"
            )
        raise UsageError(f"{typed[0]}: {reason}: there is nothing to {stage}")
    known = {key: params[key] for key in Options.__dataclass_fields__ if key in params}
    _end(
        verb(
            experiment,
            Options(**known, verbosity=params["verbose"] - params["quiet"], typed=typed),
        )
    )


def _experiment(name: str, *overrides: str):
    """Load the experiment; an invalid one is a usage error (exit code 2)."""
    from hpc_closure.experiment import reading

    try:
        return reading.load(name, list(overrides), warn=_is_first())
    except ValueError as error:
        raise UsageError(str(error)) from None


def _is_first() -> bool:
    """Return whether this is the first process of its launcher, which warns for all."""
    from hpc_closure.work.launch import launch, worker

    try:
        return launch().rank == 0 and worker()[0] == 0
    except ValueError:  # the verb raises it
        return True


def _end(code: int) -> None:
    """Exit with a code unless it is 0."""
    if code:
        raise typer.Exit(code)
