"""``hpc-closure status``: print which units are done, running, queued, failed and missing.

It reads files only, and calls ``squeue`` once if the run folder records a submission.
"""

import json as json_format
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_closure.closure.header import read_header
from hpc_closure.data import held_out
from hpc_closure.data.held_out import HeldOut
from hpc_closure.experiment.folder import BLOCKS, STAGES, Run, verb_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.train import metrics
from hpc_closure.work import atomic, claims, log, units
from hpc_closure.work.header import Header
from hpc_closure.work.loop import SINGLE
from hpc_closure.work.units import STATES

RECENT = 20  # last finished units from which the rate is computed
TEST = "test set"  # name of the stage that belongs to another run (use.test)
QUICKEST = 1.0  # shortest period of --watch, seconds
QUICKEST_QUEUE = 30.0  # shortest period if every survey calls the scheduler, seconds


@dataclass
class Stage:
    """State of one stage.

    Attributes:
        counts: ``{units, done, running, queued, failed, missing}``.
        failures: contents of the error files, by unit.
        running: contents of the claims, by unit.
        changed: time of the last product, seconds since the epoch; 0 = no product.
        per_hour: units finished per hour; None if nothing runs or too few are finished.
        note: a remark on the stage (step and loss of a training, ...).
        problems: damaged products and other problems, a line each.
        config: experiment file of the other run that owns the stage; "" for this run.
    """

    counts: dict[str, int]
    failures: dict[str, dict] = field(default_factory=dict)
    running: dict[str, dict] = field(default_factory=dict)
    changed: float = 0.0
    per_hour: float | None = None
    note: str = ""
    problems: list[str] = field(default_factory=list)
    config: str = ""

    @property
    def done(self) -> bool:
        return self.counts["done"] == self.counts["units"]

    @property
    def seconds_left(self) -> float | None:
        left = self.counts["units"] - self.counts["done"]
        return 3600 * left / self.per_hour if self.per_hour and left else None


def run(
    experiment: Experiment,
    typed: Sequence[str] = (),
    *,
    json: bool = False,
    failed: bool = False,
    watch: float | None = None,
) -> int:
    """Print the state of a run. Returns the exit code.

    Args:
        experiment: the experiment.
        typed: experiment and overrides as typed by the user, for the suggested next command.
        json: print JSON.
        failed: print every failure, with the last line of its log.
        watch: repeat every ``watch`` seconds; None = print once.

    Raises:
        ValueError: ``watch`` is too short.
    """
    folder = Run.of(experiment)
    if watch is not None:
        queue = any(folder.submissions(stage).exists() for stage in STAGES)
        least = QUICKEST_QUEUE if queue else QUICKEST
        if not watch >= least:
            reason = ", each look asks the scheduler" if queue else ""
            raise ValueError(f"--watch {watch:g}: expected at least {least:g} seconds{reason}")
    command = " ".join(["{verb}", *map(shlex.quote, typed)])
    while True:
        stages = survey(experiment)
        if json:
            text = json_format.dumps(as_json(experiment, stages, command), indent=1)
        else:
            text = as_text(experiment, stages, command, failed)
        if watch is not None and sys.stdout.isatty():
            text = "\033[H\033[2J" + text
        print(text, flush=True)
        if watch is None or all(stage.done for stage in stages.values()):
            return 0
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return 0


# survey


def survey(experiment: Experiment) -> dict[str, Stage]:
    """Determine the state of all stages, in their order."""
    folder = Run.of(experiment)
    found, queue = {}, _queued(folder)
    for stage in experiment.stages:
        if stage == "generate" and experiment.data is not None and experiment.data.in_place:
            found[stage] = _in_place(experiment)
        elif stage in BLOCKS:
            books = units.Ledger.of(experiment, stage)
            found[stage] = _of_blocks(books, units.members_of(queue.get(stage, {})))
        else:
            found[stage] = _of_one(experiment, folder, stage, bool(queue[stage]))
        if stage == "generate" and experiment.use.test and not experiment.only_generates:
            found |= _of_the_test_set(experiment)
    _check_order(folder, found)
    return found


def _of_the_test_set(experiment: Experiment) -> dict[str, Stage]:
    """Determine the state of data and replicas of the run that ``use.test`` names."""
    try:
        held = HeldOut.of(experiment)
    except ValueError as error:
        counts = {"units": 1, **dict.fromkeys(STATES, 0), "missing": 1}
        return {TEST: Stage(counts, problems=[str(error)])}
    found = {TEST: _of_blocks(held.books("generate"), set())}
    if held.replicas.members:
        found[f"{TEST} replicas"] = _of_blocks(held.books("replicas"), set())
    for stage in found.values():
        stage.config = str(held.run.config)
        uses = f"uses {held.run} (seed {held.seed})"
        stage.note = f"{uses}, {stage.note}" if stage.note else uses
    try:
        held_out.check(experiment)
    except ValueError as error:
        if all(stage.done for stage in found.values()):  # else the suggested command covers it
            found[TEST].problems.append(str(error))
    return found


def _in_place(experiment: Experiment) -> Stage:
    """Describe data of others, which no verb computes."""
    data = experiment.data
    assert data is not None and data.found is not None
    counts = {"units": 1, **dict.fromkeys(STATES, 0), "done": 1}
    found = data.found
    note = f"read in place: {found.members} trajectories of {found.times} times"
    return Stage(counts, note=note)


def _queued(folder: Run) -> dict[str, dict[str, str]]:
    """List the units in the scheduler's queue, by stage."""
    if not any(folder.submissions(stage).exists() for stage in STAGES):
        return {stage: {} for stage in STAGES}
    from hpc_closure.batch.squeue import queued

    return queued(folder, STAGES)


def _of_blocks(ledger: units.Ledger, queued: set[int]) -> Stage:
    try:
        found = ledger.survey(queued=queued)
    except ValueError as error:  # products of another experiment
        number = len(units.plan(ledger.cuts.members, ledger.cuts))
        counts = {"units": number, **dict.fromkeys(STATES, 0), "missing": number}
        return Stage(counts, problems=[str(error)])
    broken = {unit.name for unit in found.states["failed"]}
    times = sorted(product.changed for product in found.products)
    return Stage(
        counts=found.counts(),
        failures={name: error for name, error in found.errors.items() if name in broken},
        running=found.claims,
        changed=times[-1] if times else 0.0,
        per_hour=_rate(times, found.claims),
        note=_lost(found.products),
        problems=[f"not used: {message}" for message in found.damaged.values()],
    )


def _lost(products: list[Header]) -> str:
    """Describe how many members diverged, by field; "" if none did."""
    lost: dict[str, int] = {}
    for product in products:
        for name, record in product.lost.items():
            short = name.rpartition("/")[2]
            lost[short] = lost.get(short, 0) + len(record)
    words = ", ".join(f"{name} of {count}" for name, count in lost.items())
    return f"diverged: {words} member(s)" if words else ""


def _rate(times: list[float], running: dict) -> float | None:
    """Estimate units per hour from the times of the last products until now."""
    if not running:
        return None
    recent = times[-RECENT - 1 :]
    if len(recent) < 2:
        return None
    # the time since the last product lowers the rate only once the next product is overdue
    pace = (recent[-1] - recent[0]) / (len(recent) - 1)
    pace = max(pace, (time.time() - recent[0]) / len(recent))
    return 3600 / pace if pace > 0 else None


def _of_one(experiment: Experiment, folder: Run, stage: str, queued: bool) -> Stage:
    """Determine the state of a stage of a single unit (train, evaluate)."""
    product = {"train": folder.model, "evaluate": folder.report}[stage]
    place = folder.units(stage)
    marks = {entry.name for entry in units.listing(place)}
    running = claims.living(place, marks, experiment.cluster.claim_timeout)
    failures = {}
    if folder.error(stage, SINGLE).name in marks:
        try:
            failures = {SINGLE.name: atomic.read_json(folder.error(stage, SINGLE))}
        except (ValueError, OSError):
            pass
    note = ""
    if stage == "train":
        note = f"uses {folder.model}" if folder.model_file else _training(folder)
    problems = []
    present = product.exists()
    if present and not (stage == "train" and folder.model_file):
        try:
            made = _made_by(folder, stage)
            if made != experiment.stage_hash(stage):
                way_out = "change `name`, or run `train --overwrite`"
                way_out = "`evaluate` makes it again" if stage == "evaluate" else way_out
                problems = [f"{product}: made with other settings; {way_out}"]
        except ValueError as error:
            problems = [f"not used: {error}"]
    sound = present and not problems
    state = (
        "running"
        if running
        else "done" if sound else ("queued" if queued else "failed" if failures else "missing")
    )
    counts = {"units": 1, **dict.fromkeys(STATES, 0), state: 1}
    return Stage(
        counts,
        failures if state == "failed" else {},
        running,
        changed=product.stat().st_mtime if present else 0.0,
        note=note,
        problems=problems,
    )


def _made_by(folder: Run, stage: str) -> str:
    """Read the hash of the settings of a model or of scores; ValueError if damaged."""
    if stage == "train":
        return read_header(folder.model).train_hash
    path = folder.scores_json
    record = atomic.read_json(path) if path.exists() else {}
    try:
        return str(record["provenance"]["hashes"][stage])
    except (KeyError, TypeError):
        return ""


def _training(folder: Run) -> str:
    """Describe the step and the losses of the last rows of the metrics."""
    try:
        rows = metrics.read(folder.metrics)
    except OSError:
        return ""
    last: dict = {}
    for row in rows:
        last.update(row)
    words = [f"step {last['step']}"] if "step" in last else []
    words += [
        f"{name.removesuffix('_loss')} {last[name]:.4g}"
        for name in ("train_loss", "loss", "valid_loss")
        if name in last
    ]
    return ", ".join(words)


def _check_order(folder: Run, found: dict[str, Stage]) -> None:
    """Add a problem to each stage whose inputs changed after its last product."""
    orders = (
        ("generate", "train"),
        (TEST, "rollout"),
        (TEST, "evaluate"),
        ("train", "rollout"),
        ("train", "evaluate"),
        ("rollout", "evaluate"),
    )
    for earlier, later in orders:
        if earlier not in found or later not in found:
            continue
        if found[later].counts["done"] and found[earlier].changed > found[later].changed:
            found[later].problems.append(
                f"{earlier} is newer than the last product of {later}: `{later} --overwrite` "
                "makes it again from what is there now"
            )


# output


def next_command(stages: dict[str, Stage], command: str) -> str:
    """Return the command that continues the run, or "wait: ..."; "" if all is done."""
    for name, stage in stages.items():
        counts = stage.counts
        if stage.done:
            continue
        if name == TEST and not stage.config:
            return f"wait: {stage.problems[0]}"
        line = "hpc-closure " + command.format(verb=verb_of(name))
        if stage.config:
            line = f"hpc-closure generate {shlex.quote(stage.config)}"
        if counts["missing"] == 0 and counts["running"] + counts["queued"]:
            return f"wait: {name} is running" if counts["running"] else f"wait: {name} is queued"
        if counts["failed"] and not counts["missing"] and name in BLOCKS:
            return f"{line} --retry-failed"
        return line
    return ""


def as_json(experiment: Experiment, stages: dict[str, Stage], command: str) -> dict:
    return {
        "experiment": experiment.name,
        "run": str(experiment.folder),
        "stages": {name: stage.counts for name, stage in stages.items()},
        "details": {
            name: {
                "changed": stage.changed or None,
                "units_per_hour": stage.per_hour,
                "seconds_left": stage.seconds_left,
                "note": stage.note,
                "problems": stage.problems,
                "failures": list(stage.failures.values()),
                "running": list(stage.running.values()),
            }
            for name, stage in stages.items()
        },
        "next": next_command(stages, command),
    }


def as_text(experiment: Experiment, stages: dict[str, Stage], command: str, failed: bool) -> str:
    folder = Run.of(experiment)
    header = ("stage", "units", *STATES, "last change")
    rows: list[tuple[str, ...]] = [header]
    for name, stage in stages.items():
        change = f"{log.duration(time.time() - stage.changed)} ago" if stage.changed else "-"
        notes = [stage.note] if stage.note else []
        if stage.seconds_left is not None:
            notes.append(f"{stage.per_hour:.3g} units/h, {log.duration(stage.seconds_left)} left")
        rows.append((name, *map(str, stage.counts.values()), ", ".join([change, *notes])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    lines = [f"{experiment.name}   {folder}" + ("" if folder.root.exists() else "   (empty)")]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:-1], widths[1:])]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    for name, stage in stages.items():
        lines += [f"{name}: {problem}" for problem in stage.problems]
        if stage.failures:
            lines += _failures(name, stage.failures, failed, command)
    follow = next_command(stages, command)
    prefix = "" if not follow or follow.startswith("wait:") else "next: "
    lines.append(prefix + (follow or "all done"))
    return "\n".join(lines)


def _failures(name: str, failures: dict[str, dict], long: bool, command: str) -> list[str]:
    number = len(failures)
    lines = []
    shown = sorted(failures.items())[: None if long else 3]
    for unit, error in shown:
        where = "" if name in ("train", "evaluate") else f" {unit}"
        lines.append(f"{name}{where} failed: {error.get('message', '?')}")
        if long:
            job = f", job {error['job']}" if error.get("job") else ""
            lines.append(
                f"    attempt {error.get('attempt', '?')}, {error.get('time', '?')}, host "
                f"{error.get('host', '?')}{job}"
            )
        if error.get("log"):
            lines.append(f"    log {error['log']}")
            if long and (last := last_line(Path(error["log"]))):
                lines.append(f"    last line: {last}")
    if number > len(shown):
        more = "hpc-closure " + command.format(verb="status") + " --failed"
        lines.append(f"{name}: {number - len(shown)} more failed: {more}")
    return lines


def last_line(path: Path) -> str:
    """Return the last non-empty line of a log, from its last 4 KiB; "" if unreadable."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
