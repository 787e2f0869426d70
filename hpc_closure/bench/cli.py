"""``hpc-closure bench``: options, tables and records of measurements on this machine.

The only input of a bench is its options, so an invalid value is a usage error: one line, exit
code 2.
"""

import contextlib
import json as json_format
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hpc_closure.work import mpi
from hpc_closure.work.mpi import World
from hpc_closure.work.options import UsageError

SMALL = {"width": 16, "modes": 6, "layers": 2}  # as in the presets on 64^2

app = typer.Typer(no_args_is_help=True, help="Measure speed and calibration on this machine.")

# options of several commands
TrainedRun = Annotated[str, typer.Argument(help="Preset or file of a trained run.")]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(help="Changed settings of the run.", metavar="[KEY=VALUE]..."),
]
Threads = Annotated[int, typer.Option(help="Total threads; 0 = torch's default.", metavar="N")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Steps = Annotated[
    int, typer.Option(help="Steps per timed block; 0 = as many as fill --seconds.", metavar="N")
]
Repeats = Annotated[int, typer.Option(help="Timed blocks; results are medians.", metavar="N")]
Seconds = Annotated[float, typer.Option(help="Length of a timed block in seconds.")]
Grids = Annotated[str, typer.Option(help="Points per side.", metavar="N,...")]
Ensembles = Annotated[str, typer.Option(help="Ensemble sizes of the solver.", metavar="N,...")]
Draws = Annotated[str, typer.Option(help="Numbers of members drawn at once.", metavar="N,...")]
Batch = Annotated[int, typer.Option(help="Batch of the training step.")]
NetworkSize = Annotated[
    str,
    typer.Option(help="Width, layers and modes of `default`'s networks.", metavar="WxLxM"),
]
Case = Annotated[str, typer.Option(help="Law of the data: diffusion, amplitude or regimes.")]
Grid = Annotated[int, typer.Option(help="Points per side.")]
States = Annotated[int, typer.Option(help="Unseen states.")]
Members = Annotated[int, typer.Option(help="Members per state.")]
Samples = Annotated[int, typer.Option(help="Number of training states.")]
Json = Annotated[
    Optional[Path], typer.Option("--json", help="Also write the records to FILE.", metavar="FILE")
]


@app.command()
def dns(
    grid: Grids = "64,256",
    members: Ensembles = "20",
    precision: Annotated[
        str, typer.Option(help="float64, float32 or both.", metavar="WORD,...")
    ] = "float64",
    domain_ranks: Annotated[
        int, typer.Option(help="Ranks that share a field; groups of them share the members.")
    ] = 1,
    against: Annotated[
        str,
        typer.Option(
            help="Other methods: published (ten draws), published-1 (one), one-rank, exponax, "
            "jax-cfd, fluidsim, pyqg (two layers; its interpreter: PYQG_PYTHON); separate "
            "several by commas.",
            metavar="METHOD,...",
            show_default=False,
        ),
    ] = "",
    steps: Steps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 0.5,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Measure the speed of the DNS, beside other methods in the same run.

    A ratio is our speed over the method's speed. It is a median over blocks timed in turns,
    without the first ones. Other solvers are measured if installed, without stochastic forcing,
    which they lack. Several ranks: `mpirun -n 2 hpc-closure bench dns`.
    """
    world = mpi.world()  # before torch
    from hpc_closure.bench.measure import Timing
    from hpc_closure.bench.solver import dns as bench

    with _usage(), world.guard(), _recording(json, device, threads, world) as records:
        cases = [
            case
            for size in _numbers("--grid", grid)
            for count in _numbers("--members", members)
            for word in _words(precision)
            for case in bench.split(
                bench.Case(
                    grid=size,
                    members=count,
                    precision=word,
                    against=_words(against),
                    ranks=world.size,
                    domain_ranks=domain_ranks,
                    timing=Timing(steps, repeats, seconds, device),
                )
            )
        ]
        for case in cases:
            rows, remarks = bench.run(case, world)
            if world.root:
                _print(rows, bench.COLUMNS, remarks, header=not records)
            records += rows


@app.command()
def flow(
    grid: Grids = "64",
    members: Ensembles = "1",
    precision: Annotated[
        str, typer.Option(help="float64, float32 or both.", metavar="WORD,...")
    ] = "float64",
    against: Annotated[
        str,
        typer.Option(
            help="Other methods: scipy (rotational form), exponax.",
            show_default=False,
            metavar="NAME,...",
        ),
    ] = "",
    steps: Steps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 0.5,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Measure the speed of three-dimensional flow, beside plain SciPy or exponax in the same run.

    Times are those of whole steps of four right-hand sides, per point and right-hand side: of rk4
    at constant power, or, beside exponax, of etdrk4 of decaying flow.
    """
    from hpc_closure.bench.measure import Timing
    from hpc_closure.bench.solver import flow as bench

    with _usage(), _recording(json, device, threads) as records:
        timing = Timing(steps, repeats, seconds, device)
        for size in _numbers("--grid", grid):
            for count in _numbers("--members", members):
                for word in _words(precision):
                    case = bench.Case(size, count, word, _words(against), timing)
                    rows, remarks = bench.run(case)
                    _print(rows, bench.COLUMNS, remarks, header=not records)
                    records += rows


@app.command()
def turbulence(
    grid: Grid = 64,
    viscosity: Annotated[float, typer.Option(help="Viscosity; the power is 1.")] = 0.017,
    dt: Annotated[float, typer.Option(help="Step of rk4.")] = 1 / 60,
    spin_up: Annotated[float, typer.Option(help="Time before the statistics.")] = 10.0,
    span: Annotated[float, typer.Option(help="Time of the statistics.")] = 20.0,
    members: Annotated[int, typer.Option(help="Number of trajectories.", metavar="N")] = 1,
    precision: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    threads: Threads = 1,
    json: Json = None,
):
    """Measure what is known of forced turbulence: Re_lambda, C_epsilon, skewness of derivatives.

    Three dimensions, a box of side 2 pi, power 1 in the modes |k| <= 1.5.
    """
    from hpc_closure.bench.physics import turbulence as bench

    with _usage(), _recording(json, "cpu", threads) as records:
        settings: dict[str, Any] = {"viscosity": viscosity, "dt": dt, "members": members}
        case = bench.Case(grid, spin_up=spin_up, span=span, precision=precision, **settings)
        records.append(bench.run(case, lambda line: print(line, flush=True)))
        _print(records, bench.COLUMNS)


@app.command()
def training(
    grid: Grid = 64,
    batch: Batch = 80,
    samples: Draws = "1,20",
    ranks: Annotated[
        str,
        typer.Option(
            help="Measure instead the scaling of the training step from one to N processes.",
            metavar="N,...",
            show_default=False,
        ),
    ] = "",
    size: NetworkSize = "24x3x8",
    steps: Steps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 1.0,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Measure the speed of training and sampling, beside the published network in eager PyTorch.

    `--ranks` starts the processes itself, each with its share of the threads or its GPU. In strong
    scaling they share `--batch`; in weak scaling each has a batch of this size.
    """
    from hpc_closure.bench.measure import Timing
    from hpc_closure.bench.model import training as bench

    with _usage(), _recording(json, device, threads) as records:
        timing = Timing(steps, repeats, seconds, device)
        case: dict[str, Any] = {"grid": grid, "batch": batch, "config": _size(size)._asdict()}
        if ranks:
            records += _scaling(_numbers("--ranks", ranks), timing, **case)
        else:
            numbers = _numbers("--samples", samples)
            records += bench.run(samples=numbers, timing=timing, **case)
            _print(records, bench.COLUMNS)


@app.command()
def sampling(
    case: Case = "diffusion",
    grid: Grid = 64,
    model: Annotated[
        Optional[str],
        typer.Option(help="A trained model; default: train one first.", metavar="FILE"),
    ] = None,
    methods: Annotated[
        Optional[str], typer.Option(help="Samplers; default: all.", metavar="NAME,...")
    ] = None,
    evaluations: Annotated[
        str, typer.Option(help="Evaluations per sample.", metavar="N,...")
    ] = "1,2,4,8,16,32",
    states: States = 32,
    members: Members = 32,
    steps: Annotated[int, typer.Option(help="Training steps; 0 = closed forms only.")] = 2000,
    samples: Samples = 2000,
    crps_generator: Annotated[
        bool,
        typer.Option(
            "--crps-generator", help="Also train and measure a one-pass generator trained by CRPS."
        ),
    ] = False,
    calibrate_spread: Annotated[
        bool,
        typer.Option(
            "--calibrate-spread",
            help="Calibrate the spread of each setting (of the CRPS generator as well) on unseen "
            "states, as training does for a model's default setting.",
        ),
    ] = False,
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Measure error, spread per shell and cost of every sampler on data with a known law.

    The ratios to the law have 95 % intervals over the states.
    """
    from hpc_closure.bench.model import sampling as bench
    from hpc_closure.bench.model.known import Known, fit
    from hpc_closure.closure import artifact

    with _usage():
        machine = _machine(device, threads)
        known = Known(case, grid)

        def train(preset: str):
            return fit(known, samples=samples, steps=steps, config={**SMALL, "preset": preset})

        trained = artifact.load(model).model if model else train("default")
        if not trained.score_active:
            print("the score network does not act, so the samplers do not differ")
        plan = bench.Plan(
            methods=_words(methods) if methods else bench.METHODS,
            evaluations=_numbers("--evaluations", evaluations),
            states=states,
            members=members,
            device=device,
        )
        records = bench.run(
            known,
            trained,
            plan,
            crps_generator=train(bench.ONE_PASS) if crps_generator else None,
            unseen=known.batches("valid", max(samples // 4, 1)) if calibrate_spread else (),
        )
        _print(records, bench.COLUMNS)
        _save(json, machine, records)


@app.command()
def network_size(
    case: Case = "regimes",
    grid: Grid = 32,
    full_band: Annotated[
        bool, typer.Option("--full-band", help="Noise with all modes of the grid.")
    ] = False,
    size: Annotated[
        str, typer.Option(help="Width, layers and modes of each network.", metavar="WxLxM,...")
    ] = "12x2x6,16x2x6,16x3x8,24x3x8",
    states: States = 200,
    members: Members = 32,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    samples: Samples = 6000,
    threads: Threads = 0,
    json: Json = None,
):
    """Measure CRPS, spread and cost of networks of several sizes on data with a known law."""
    from hpc_closure.bench.model import network_size as bench
    from hpc_closure.bench.model.known import WHITE, Known
    from hpc_closure.bench.model.sampling import Plan

    with _usage():
        machine = _machine("cpu", threads)
        known = Known(case, grid, correlation=WHITE) if full_band else Known(case, grid)
        chosen = [_size(word) for word in _words(size)]
        plan = Plan(states=states, members=members)

        def report(row: dict) -> None:
            size = "x".join(str(row[key]) for key in bench.Size._fields)
            print(f"{size}: crps_ratio {row['crps_ratio']:.4f}", flush=True)

        records = bench.run(known, chosen, plan, samples=samples, steps=steps, report=report)
        _print(records, bench.COLUMNS)
        _save(json, machine, records)


def _size(word: str):
    """Parse a network size of the option ``--size``."""
    from hpc_closure.bench.model.network_size import Size

    try:
        width, layers, modes = (int(number) for number in word.split("x"))
    except ValueError:
        raise ValueError(
            f"--size {word}: expected width x layers x modes, for example 16x2x6"
        ) from None
    return Size(width, layers, modes)


@app.command()
def gradient(
    grid: Grids = "32,64,128",
    members: Annotated[int, typer.Option(help="Members.")] = 24,
    steps: Steps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 0.5,
    threads: Threads = 1,
    device: Device = "cpu",
    json: Json = None,
):
    """Measure the time of a gradient through the solver, relative to a solver step."""
    from hpc_closure.bench.measure import Timing
    from hpc_closure.bench.solver import gradient as bench

    with _usage(), _recording(json, device, threads) as records:
        timing = Timing(steps, repeats, seconds, device)
        records += bench.run(_numbers("--grid", grid), members, timing)
        _print(records, bench.COLUMNS)


@app.command()
def solver(
    python: Annotated[
        str,
        typer.Argument(metavar="SOLVER", help="A reduced solver, file.py:Name or module:Name."),
    ],
    grid: Grid = 64,
    members: Annotated[int, typer.Option(help="Members.")] = 8,
    interval: Annotated[
        str, typer.Option(help="Steps between two closures.", metavar="N,...")
    ] = "1,4,16",
    steps: Steps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 0.5,
    threads: Threads = 1,
    json: Json = None,
):
    """Measure what the package adds to the steps of a user's solver of one field on a plane."""
    from hpc_closure.bench.measure import Timing
    from hpc_closure.bench.solver import bridge as bench

    with _usage(), _recording(json, "cpu", threads) as records:
        timing = Timing(steps, repeats, seconds)
        intervals = _numbers("--interval", interval)
        records += bench.run(python, grid, members, intervals, timing)
        _print(records, bench.COLUMNS)


@app.command()
def switches(
    grid: Grid = 64,
    members: Ensembles = "1,100",
    samples: Draws = "1,20",
    batch: Batch = 80,
    size: NetworkSize = "24x3x8",
    steps: Steps = 0,
    repeats: Repeats = 5,
    seconds: Seconds = 0.5,
    device: Device = "cuda",
    json: Json = None,
):
    """Decide which switches of HPC_CLOSURE_CUDA to keep: each against none and torch.compile.

    Times are in milliseconds, of a solver step, a draw and a training step. On a CPU the switches
    have no effect; such a run only tests the bench.
    """
    from hpc_closure.bench import switches as bench
    from hpc_closure.bench.measure import Timing

    with _usage(), _recording(json, device) as records:
        rows, remarks = bench.run(
            Timing(steps, repeats, seconds, device),
            grid=grid,
            members=_numbers("--members", members),
            samples=_numbers("--samples", samples),
            batch=batch,
            config=_size(size)._asdict(),
        )
        records += rows
        _print(rows, bench.COLUMNS, remarks)


@app.command()
def claims(
    workers: Annotated[
        str, typer.Option(help="Processes that share the units.", metavar="N,...")
    ] = "8",
    units: Annotated[int, typer.Option(help="Number of units.", metavar="N")] = 2000,
    seconds: Annotated[float, typer.Option(help="Time of a unit, which only waits.")] = 0.0,
    simulate: Annotated[
        bool,
        typer.Option(help="Workers have a core each, on a simulated clock; needs `--seconds`."),
    ] = False,
    json: Json = None,
):
    """Measure the bookkeeping of units: units per second, and calls to the file system per unit.

    Calls are counted where strace is installed. With `--seconds`, `share` is the part of the
    workers' time that is spent in units; the rest is `start_s`, `between_ms` times units per
    worker, and `end_s`, the wait for the last worker.
    """
    from hpc_closure.bench import claims as bench

    with _usage(), _recording(json, "cpu") as records:
        numbers = _numbers("--workers", workers)
        if units < 1 or seconds < 0:
            raise ValueError(
                f"--units {units} --seconds {seconds:g}: expected at least 1, and 0 or more"
            )
        if simulate and not seconds:
            raise ValueError("--simulate: expected --seconds, the time of a unit, above 0")
        rows = bench.run(numbers, units, seconds, simulate)
        records += rows
        _print(rows, bench.COLUMNS)


@app.command("two-layer")
def two_layer(
    experiment: TrainedRun,
    overrides: Overrides = None,
    members: Annotated[int, typer.Option(help="Trajectories of each solver.", metavar="N")] = 4,
    duration: Annotated[
        float, typer.Option(help="Time of each run; a quarter is spin-up.", metavar="TIME")
    ] = 1825.0,
    rungs: Annotated[
        str, typer.Option(help="Bare solvers, points per side:DNS steps per step.", metavar="N:S")
    ] = "48:2,64:2,96:1",
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Compare years of two-layer flow: laws at a point and spectra, over those of the DNS.

    The two errors are the online ones of Perezhogin, Zanna, Fernandez-Granda (JAMES 2023). Bare
    solvers have pyqg's filter; `step` counts steps of the DNS.
    """
    from hpc_closure.bench.physics import two_layer as bench
    from hpc_closure.experiment import reading

    with _usage(), _recording(json, device, threads) as records:
        try:
            pairs = [rung.split(":") for rung in rungs.split(",") if rung]
            solvers = {int(grid): int(stride) for grid, stride in pairs}
        except ValueError:
            raise ValueError(f"--rungs {rungs}: expected N:S,N:S, such as 48:2,96:1") from None
        settings = reading.load(experiment, overrides or [])
        rows = bench.run(settings, members, duration, solvers, device, print)
        records += rows
        _print(rows, bench.COLUMNS)


@app.command()
def synchronisation(
    experiment: Annotated[str, typer.Argument(help="Preset or file of a subgrid problem.")],
    overrides: Overrides = None,
    cuts: Annotated[
        str, typer.Option(help="Largest retained wavenumbers per side.", metavar="K,...")
    ] = "2,3,5,7",
    members: Annotated[int, typer.Option(help="Number of trajectories.", metavar="N")] = 4,
    spin_up: Annotated[float, typer.Option(help="Time before twins begin.", metavar="TIME")] = 8.0,
    span: Annotated[
        float, typer.Option(help="Time for which twins follow.", metavar="TIME")
    ] = 8.0,
    figure: Annotated[
        Optional[Path],
        typer.Option(help="Draw the rows to FILE.png, and FILE.csv.", metavar="FILE"),
    ] = None,
    threads: Threads = 1,
    json: Json = None,
):
    """Measure from which cut-off on unresolved scales follow the resolved ones.

    For each cut-off: growth rate of a small difference of unresolved modes under the same
    resolved flow, and the share of the closure's variance that the resolved past leaves open.
    """
    from hpc_closure.bench.physics import synchronisation as bench
    from hpc_closure.experiment import reading

    with _usage(), _recording(json, "cpu", threads) as records:
        if members < 1:
            raise ValueError(f"--members {members}: expected at least 1")
        settings = reading.load(experiment, overrides or [])
        case = bench.Case(_numbers("--cuts", cuts), members, spin_up, span)
        records += bench.run(settings, case, print)
        _print(records, bench.COLUMNS)
        if figure is not None:
            bench.draw(records, figure)


@app.command()
def stability(
    experiment: TrainedRun,
    overrides: Overrides = None,
    members: Annotated[int, typer.Option(help="Number of trajectories.", metavar="N")] = 100,
    steps: Annotated[
        int, typer.Option(help="Solver steps per trajectory.", metavar="N")
    ] = 100_000,
    part: Annotated[
        str,
        typer.Option(help="Trajectories to start from: test, or valid if settings are chosen."),
    ] = "test",
    threads: Threads = 0,
    device: Device = "cpu",
    json: Json = None,
):
    """Measure long coupled runs: lost members, and spectra over those of the DNS.

    The spectra are enstrophy per shell, energy of velocities, or the square of every other field.
    The bare solver runs beside the closure. Columns `_error` are standard errors over
    trajectories.
    """
    from hpc_closure.bench.physics import stability as bench
    from hpc_closure.experiment import reading

    with _usage(), _recording(json, device, threads) as records:
        for option, number in (("--members", members), ("--steps", steps)):
            if number < 1:
                raise ValueError(f"{option} {number}: expected at least 1")
        if part not in ("test", "valid"):
            raise ValueError(f"--part {part}: expected test or valid")
        settings = reading.load(experiment, overrides or [])

        num_calls, tenths = max(1, steps // settings.rollout.interval), 0

        def report(call: int, lost: int) -> None:
            nonlocal tenths
            if 10 * call // num_calls > tenths:
                tenths = 10 * call // num_calls
                print(f"{tenths} tenths done, {lost} lost", flush=True)

        rows, remarks = bench.run(settings, members, steps, device, report, part)
        records += rows
        columns = {key: form for key, form in bench.COLUMNS.items() if key in rows[0]}
        _print(rows, columns, remarks)


@app.command()
def gpu(
    folder: Annotated[Path, typer.Argument(help="Folder of the output; the same call continues.")],
    part: Annotated[
        str,
        typer.Option(help="Parts to run; default: all.", metavar="NAME,...", show_default=False),
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time limit of this call in minutes.")] = 9.0,
    tests: Annotated[
        Optional[Path], typer.Option(help="Folder of the package's tests.", metavar="FOLDER")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Problems of seconds, to test the command itself.")
    ] = False,
    device: Device = "cuda",
):
    """Run all measurements on a GPU: tests, speed, trained models; in pieces.

    Parts: tests, dns, networks, gradient, switches, default, fno_score, published. Finished
    commands are not run again. FOLDER/gpu.json and gpu.txt have the results so far. Exit code 75:
    the time limit is reached, and the same call continues; 1: a command failed, and its log has
    the reason.
    """
    from hpc_closure.bench import gpu as bench

    with _usage():
        _machine(device, 0)
        if minutes <= 0:
            raise ValueError(f"--minutes {minutes:g}: expected more than 0")
        place = bench.Place(folder.resolve(), device, small, tests and tests.resolve())
        folder.mkdir(parents=True, exist_ok=True)
        code = bench.Measurements(place, 60 * minutes).run(_words(part))
    print(f"wrote {folder / 'gpu.txt'}")
    raise typer.Exit(code)


def _scaling(ranks: list[int], timing, **case: Any) -> list[dict[str, Any]]:
    """Run ``bench training --ranks`` and print its table."""
    import torch

    from hpc_closure.bench import measure
    from hpc_closure.bench.model import scaling as bench

    threads = max(1, torch.get_num_threads() // max(ranks))
    settings = {"engines": bench.engines(), "threads": threads, "device": timing.device}
    plan, cores = bench.Plan(ranks, **settings, **case), measure.cores()
    records = bench.run(plan, timing, cores)
    _print(records, bench.COLUMNS, bench.remarks(plan, cores))
    return records


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def _recording(
    path: Path | None, device: str, threads: int = 0, world: World = World()
) -> Iterator[list[dict[str, Any]]]:
    """Print the machine, collect the records of a command, and write them to ``path``."""
    machine = _machine(device, threads, world)
    records: list[dict[str, Any]] = []
    yield records
    if world.root:
        _save(path, machine, records)


def _machine(device: str, threads: int, world: World = World()) -> dict[str, object]:
    """Split the threads among the ranks and print a description of the machine."""
    import torch

    from hpc_closure.bench import measure

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to use the CPU")
    torch.set_num_threads(max(1, (threads or torch.get_num_threads()) // world.size))
    machine = measure.machine(device)
    if world.root:
        print(measure.one_line(machine), flush=True)
    return machine


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in _words(text)]
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers, for example 64,256") from None
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option} {text}: expected positive numbers, for example 64,256")
    return numbers


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _print(
    rows: list[dict], columns: dict[str, str], remarks: Sequence[str] = (), header: bool = True
) -> None:
    """Print a table, and remarks below it."""
    from hpc_closure.bench import measure

    lines = measure.table(rows, columns, widths=9).splitlines()
    print(*lines[0 if header else 1 :], *remarks, sep="\n", flush=True)


def _save(path: Path | None, machine: dict, records: list[dict]) -> None:
    from hpc_closure.work import atomic

    if path is not None:
        text = json_format.dumps({"machine": machine, "records": records}, indent=1)
        atomic.write_text(path, text + "\n")
        print(f"wrote {path}")
