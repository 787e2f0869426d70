"""All measurements on a machine that is available for a short time, in pieces.

The work has parts, and a part is a list of commands of this package. Each command runs in its own
process, with its output in ``OUT/PART/STEP.log`` and its result in
``OUT/PART/STEP.json``. So the same call later continues where the time ended: a finished command
is not run again, a verb continues, and an interrupted bench starts again. ``OUT/gpu.json`` and
``OUT/gpu.txt`` summarise all results so far.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hpc_closure
from hpc_closure.bench import measure
from hpc_closure.evaluate.rows import read
from hpc_closure.work import atomic
from hpc_closure.work.stop import EXIT_STOPPED

VERBS = ("generate", "train", "rollout", "evaluate")
SHOWN = ("relative_error", "crps_ratio", "spread_ratio")  # scores of the runs' samples
COLUMNS = {"grid": "d", "sensors": "", "method": ""} | dict.fromkeys(SHOWN, ".4f")
LINES = 60  # lines of a log in the summary
LEAST = 20.0  # least remaining seconds at the start of a command
PATIENCE = 60.0  # seconds for a command to save its progress


@dataclass(frozen=True)
class Step:
    """A command: ``words`` after ``hpc-closure``, or after ``python -m`` MODULE."""

    name: str
    words: Sequence[str]
    module: str = "hpc_closure"
    records: bool = False  # whether it writes records with --json


@dataclass(frozen=True)
class Place:
    """Output and device of the measurements.

    Attributes:
        folder: folder of the output.
        device: ``cuda`` or ``cpu``.
        small: whether problems take seconds, to test the command itself.
        tests: folder of the package's tests; None = run no tests.
    """

    folder: Path
    device: str = "cuda"
    small: bool = False
    tests: Path | None = None


# settings with which a pipeline takes seconds
SMALL = [
    "generate.grid=32",
    "generate.members=8",
    "generate.t_end=0.4",
    "generate.dt=0.005",
    "generate.certificate=reported",
    "generate.record.start=0.2",
    "generate.record.every=0.02",
    "train.grid=32",
    "train.window=[0.2,0.4]",
    "train.split=[0.5,0.25,0.25]",
    "train.steps=4",
    "train.batch=4",
    "train.validate_every=2",
    "train.checkpoint_every=2",
    "rollout.members=4",
    "rollout.initial_conditions=2",
    "rollout.t_start=0.2",
    "rollout.t_end=0.4",
    "rollout.every=0.1",
    "rollout.interval=2",
    "evaluate.lead_times=[0.1,0.2]",
    "evaluate.grids=[32]",
    "evaluate.samples=4",
    "evaluate.members=4",
    "evaluate.sensors=[]",
    "evaluate.formats=[]",
]


def parts(place: Place) -> dict[str, list[Step]]:
    """Return the parts, in order."""
    pipelines = _benches(place) | _runs(place)
    if place.tests is None:
        return pipelines
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", str(place.tests)]
    return {"tests": [Step("gpu", words, "pytest")], **pipelines}


def _benches(place: Place) -> dict[str, list[Step]]:
    brief = ["--steps", "2", "--repeats", "1"] if place.small else []

    def bench(step: str, words: str) -> Step:
        words_of_step = ["bench", *words.split(), "--device", place.device, *brief]
        return Step(step, words_of_step, records=True)

    both = "--precision float32,float64 --against published"
    few = "--batch 2 --size 4x1x4"
    if place.small:
        return {
            "dns": [bench("grid_16", f"dns --grid 16 --members 1,2 {both}")],
            "networks": [bench("speed", "training --grid 32 --batch 2 --samples 1")],
            "gradient": [bench("speed", "gradient --grid 16 --members 2")],
            "switches": [bench("speed", "switches --grid 16 --members 2 --samples 1 " + few)],
        }
    return {
        "dns": [
            bench("grid_64", f"dns --grid 64 --members 1,100,1000 {both}"),
            bench("grid_256", f"dns --grid 256 --members 1,100 {both}"),
            bench("grid_1024", f"dns --grid 1024 --members 1 {both}"),
        ],
        "networks": [bench("speed", "training --batch 80 --samples 1,20,1000")],
        "gradient": [bench("speed", "gradient --grid 32,64,128 --members 240")],
        "switches": [bench("speed", "switches --members 1,100 --samples 1,20 --batch 80")],
    }


def _runs(place: Place) -> dict[str, list[Step]]:
    """Return the pipelines: each trains a model, on the data of the first of its problem."""
    shared = [f"root={place.folder / 'runs'}", f"cluster.device={place.device}"]
    base, full = "diffusion_256", "published_diffusion"
    if place.small:
        base, shared = "diffusion_64", shared + SMALL

    def run(name: str, preset: str, *changes: str) -> list[Step]:
        verbs = VERBS[1:] if "use.data=default" in changes else VERBS
        words = [preset, f"name={name}", *shared, *changes]
        return [Step(verb, [verb, *words]) for verb in verbs]

    return {
        "default": run("default", base),
        "fno_score": run("fno_score", base, "use.data=default", "model.preset=fno_score"),
        "published": run("published", full),
    }


@dataclass
class Measurements:
    """A call of ``bench gpu``, with a time limit.

    Args:
        place: output and device.
        seconds: time limit of the call.
        report: called with a line for each command.
    """

    place: Place
    seconds: float
    report: Callable[[str], None] = print
    began: float = field(init=False, default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def run(self, chosen: Sequence[str] = ()) -> int:
        """Run all parts, or those ``chosen``.

        Returns:
            Exit code: 0 if all are done, 1 if a command failed, EXIT_STOPPED if the time ended.

        Raises:
            ValueError: a part does not exist.
        """
        all_parts, pipelines = parts(self.place), _runs(self.place)
        for name in chosen:
            if name not in all_parts:
                raise ValueError(f"--part {name}: expected one of {', '.join(all_parts)}")
        states = set()
        for name in chosen or all_parts:
            for step in all_parts[name]:
                state = self._run_step(name, step)
                states.add(state)
                if state != "done" and name in pipelines:
                    break  # later steps need its result
        write_summary(self.place.folder)
        return 1 if "failed" in states else EXIT_STOPPED if "stopped" in states else 0

    def _run_step(self, part: str, step: Step) -> str:
        """Run a command unless it is done; returns ``done``, ``failed`` or ``stopped``."""
        stem = self.place.folder / part / step.name
        made = _read_json(stem.with_suffix(".json"))
        command = [sys.executable, "-m", step.module, *step.words]
        if made.get("state") == "done" and made.get("command") == command[1:]:
            return "done"
        if self.left < LEAST:
            return "stopped"
        stem.parent.mkdir(parents=True, exist_ok=True)
        records = stem.with_suffix(".records")
        extra = ["--json", str(records)] if step.records else []
        begin, before = time.monotonic(), float(made.get("seconds", 0.0))
        with stem.with_suffix(".log").open("a", encoding="utf-8") as log:
            code = _run_limited(command + extra, self.left, log)
        state = "done" if code == 0 else "stopped" if code == EXIT_STOPPED else "failed"
        result = {
            "part": part,
            "step": step.name,
            "began": made.get("began", time.time()),
            "state": state,
            "exit": code,
            "seconds": round(before + time.monotonic() - begin, 2),
            "command": command[1:],
            "version": hpc_closure.__version__,
            "records": _read_json(records),
        }
        atomic.write_json(stem.with_suffix(".json"), result)
        self.report(f"{part} {step.name}: {state} after {result['seconds']:g} s")
        return state


def _run_limited(command: Sequence[str], seconds: float, log: Any) -> int:
    """Run a command with a time limit; returns its exit code, or EXIT_STOPPED at the limit."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return EXIT_STOPPED
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; returns {} if it cannot be read."""
    try:
        value = atomic.read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_summary(folder: Path) -> None:
    """Write ``gpu.json`` and ``gpu.txt`` from all results in a folder."""
    results = (_read_json(path) for path in folder.glob("*/*.json"))
    steps = sorted(
        (result for result in results if "state" in result), key=lambda result: result["began"]
    )
    scores = {
        path.parent.parent.name: _scores(path)
        for path in folder.glob("runs/*/evaluate/scores.csv")
    }
    lines = []
    for result in steps:
        lines.append(
            f"{result['part']} {result['step']}: {result['state']}, {result['seconds']:g} s"
        )
        if result["records"] or result["state"] == "failed":
            log = (folder / result["part"] / result["step"]).with_suffix(".log")
            lines += ["", *log.read_text(encoding="utf-8").splitlines()[-LINES:], ""]
    for name, rows in scores.items():
        lines += ["", f"{name}, samples of unseen states", measure.table(rows["samples"], COLUMNS)]
        lines += [f"a member step in bare solvers: {rows['cost']}"]
    atomic.write_json(folder / "gpu.json", {"steps": steps, "scores": scores})
    atomic.write_text(folder / "gpu.txt", "\n".join(lines) + "\n")


def _scores(path: Path) -> dict[str, Any]:
    """Read scores of a run.

    ``samples`` has a row per method, grid and layout of sensors; ``cost`` is by method.
    """
    rows = read(path)
    rows = rows[rows["shell"].isna()]
    samples = rows[(rows["stage"] == "generated") & rows["score"].isin(SHOWN)]
    table = samples.pivot(index=["grid", "sensors", "method"], columns="score", values="value")
    plain = table.reset_index().astype(object)
    costs = rows[(rows["stage"] == "coupled") & (rows["score"] == "cost_ratio")]
    return {
        "samples": plain.where(plain.notna(), None).to_dict("records"),
        "cost": dict(zip(costs["method"], costs["value"].round(3).tolist(), strict=True)),
    }
