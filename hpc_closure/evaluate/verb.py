"""``hpc-closure evaluate``: score rows, figures and the report."""

from collections.abc import Sequence
from pathlib import Path

from hpc_closure.closure.compatibility import check_model
from hpc_closure.data import held_out
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment, sha256_json
from hpc_closure.work import atomic, extras, log
from hpc_closure.work.options import Options
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger


def run(experiment: Experiment, options: Options = Options()) -> int:
    """Write scores.csv, scores.json, figures and report.html; return the exit code."""
    if options.dry_run:
        return print_plan(experiment)
    extras.need("evaluate", *extras.EVALUATE)
    test_set = held_out.check(experiment)
    check_model(experiment)
    from hpc_closure.evaluate import compare
    from hpc_closure.evaluate.scores import registry

    registry.load(experiment.evaluate.scores)
    compared = compare.chosen(experiment)
    notes = check_complete(experiment, options.partial)
    if names := compare.missing(experiment):
        notes.append(
            f"The opponents {', '.join(names)} are not trained: run `hpc-closure train` and "
            "`rollout` again; finished work is not repeated."
        )
    with Session(experiment, "evaluate", options) as session:
        session.record["inputs"] = fingerprint(
            session.run,
            [path for closure in compared for path in closure.paths]
            + [*test_set.paths, *registry.files(experiment.evaluate.scores)],
        )
        if made_from(session.run, session.record) and session.run.report.exists():
            log.get().info(f"{session.run.report} exists already; --overwrite writes it again")
            return 0
        score(experiment, session, notes)
        log.get().info(f"report: {session.run.report}")
    return 0


def score(experiment: Experiment, session: Session, notes: list[str]) -> None:
    """Score the run, draw the figures, and write the report and the score files."""
    from hpc_closure.evaluate import compare, rows
    from hpc_closure.evaluate.context import Inputs
    from hpc_closure.evaluate.report import gallery, slider
    from hpc_closure.evaluate.report.page import Report
    from hpc_closure.evaluate.report.summary import dataset, facts, headline
    from hpc_closure.evaluate.stages import coupled, generated, innovations

    inputs = Inputs(experiment, session)
    sampling = inputs.closure.describe_interval(experiment.rollout.interval)
    if "not rescaled" in sampling:
        notes = [*notes, f"In the coupled run samples of the closure are {sampling}."]
    if inputs.data.loss:
        notes = [*notes, f"Of the data {inputs.data.loss}."]
    by_layout, ensembles = generated.score_run(inputs), coupled.score_run(inputs)
    laws = innovations.score_run(inputs)
    scored = [*by_layout.values(), laws, *ensembles.values()]
    for part in scored:
        compare.join(part, experiment.evaluate.seeds)
    table = rows.frame(record for part in scored for record in part.records)
    notes = [*notes, *coupled.readings(inputs), *coupled.losses(table)]
    absent = list(dict.fromkeys(note for part in scored for note in part.absent))
    by_layout = {key: compare.shown(part) for key, part in by_layout.items()}
    ensembles = {channel: compare.shown(part) for channel, part in ensembles.items()}
    shown = [*by_layout.values(), compare.shown(laws), *ensembles.values()]
    shown_table = rows.frame(record for part in shown for record in part.records)
    drawn = []
    for picture in gallery.draw(
        inputs, by_layout, ensembles, shown_table, session.record["device"]
    ):
        drawn.append(picture)
        session.stop.check()
    first = headline(inputs.closure.parts(), table, dataset(inputs))
    Report(
        title=f"hpc_closure: {experiment.name}",
        rows=shown_table,
        absent=list(dict.fromkeys(note for part in shown for note in part.absent)),
        facts=facts(inputs),
        pictures=drawn,
        slider=slider.of_run(experiment) if ensembles else None,
        notes=notes,
        headline=first,
        closed=inputs.closed,
        dimensions=inputs.dimensions,
        replicas=inputs.replicas is not None,
        provenance={"evaluate": session.record, "model": inputs.closure.provenance},
        start=experiment.rollout.t_start,
        lead_times=experiment.evaluate.lead_times,
        against=inputs.against,
        further=inputs.scores,
    ).write(session.run.report)
    # last, because scores.json marks the evaluation as complete
    rows.write(session.run.evaluate, table, absent, session.record)
    for line in first:
        log.get().info(line)


def fingerprint(run: Run, compared: Sequence[Path] = ()) -> str:
    """Hash name, size and modification time of all files from which the scores are computed."""
    stamps = []
    blocks = [*run.data.glob("block_*.h5"), *run.rollout.glob("block_*.h5")]
    paths = [run.model, *blocks, *compared]
    for path in sorted(paths):
        stat = path.stat()
        stamps.append([path.name, stat.st_size, stat.st_mtime_ns])
    return sha256_json(stamps)


def made_from(run: Run, record: dict) -> bool:
    """Return whether the stored scores were computed from these settings and these files."""
    try:
        made = atomic.read_json(run.scores_json)["provenance"]
        keys = ("inputs", "version", "git")
        return made["hashes"]["evaluate"] == record["hashes"]["evaluate"] and all(
            made[key] == record[key] for key in keys
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def check_complete(experiment: Experiment, partial: bool) -> list[str]:
    """Return notes for the report on missing rollouts; raise ValueError without ``--partial``."""
    books = Ledger.of(experiment, "rollout")
    survey = books.survey()
    counts, reason = survey.counts(), books.incomplete(survey)
    if not reason:
        return []
    if not partial:
        raise ValueError(f"{reason}; or score what there is with --partial")
    if not counts["done"]:
        return ["Partial: no rollout unit was done, so only the generated closure is scored."]
    return [f"Partial: {counts['done']} of {counts['units']} rollout units were done."]


def print_plan(experiment: Experiment) -> int:
    """Print what would be scored; write nothing. Return the exit code."""
    settings, run_folder = experiment.evaluate, Run.of(experiment)
    runs = Ledger.of(experiment, "rollout").survey().counts()
    print(f"run folder {run_folder}")
    if experiment.data is not None and experiment.data.in_place:
        print(f"data: {', '.join(experiment.data.patterns)}")
    else:
        data = Ledger.of(experiment, "generate").survey().counts()
        print(f"data: {data['done']} of {data['units']} units")
    print(f"scored on {held_out.HeldOut.of(experiment).in_words()}")
    print(f"model: {'there' if run_folder.model.exists() else 'missing'}")
    print(f"rollout: {runs['done']} of {runs['units']} units")
    grids = ", ".join(f"{grid}^{experiment.physics.dimensions}" for grid in experiment.score_grids)
    print(
        f"to score: {settings.samples} snapshots x {settings.members} members on {grids}, "
        f"{1 + len(settings.sensors)} sensor layout(s); lead times {list(settings.lead_times)}"
    )
    beside = [f"{name} ({value})" for name, value in settings.compare.items()]
    beside += [f"{name} ({', '.join(runs)})" for name, runs in settings.seeds.items()]
    if settings.scores:
        from hpc_closure.evaluate.scores import registry

        names = [score.name for score in registry.load(settings.scores)]
        print(f"further scores: {', '.join(names)}")
    if beside:
        print(f"beside the model: {', '.join(beside)}")
    return 0
