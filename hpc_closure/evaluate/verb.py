"""``hpc-closure evaluate``: score rows, figures and the report."""

import itertools

from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment, sha256_json
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import metrics
from hpc_closure.work import atomic, log
from hpc_closure.work.options import Options
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger


def run(experiment: Experiment, options: Options = Options()) -> int:
    """Write RUN/evaluate: scores.csv, scores.json, figures, report.html. Returns the exit code."""
    if options.dry_run:
        return print_plan(experiment)
    rollout.check_model(experiment)
    notes = check_complete(experiment, options.partial)
    with Session(experiment, "evaluate", options) as session:
        session.record["inputs"] = fingerprint(session.run)
        if made_from(session.run, session.record) and session.run.report.exists():
            log.get().info(f"{session.run.report} is there already; --redo makes it again")
            return 0
        evaluation = Evaluation(experiment, session)
        generated = evaluation.generated()
        coupled = evaluation.coupled()
        evaluation.write(generated, coupled, notes)
        log.get().info(f"report: {session.run.report}")
    return 0


def fingerprint(run: Run) -> str:
    """Hash of names, sizes and times of change of all files that the scores are made from."""
    stamps = []
    paths = [run.model, *run.data.glob("block_*.h5"), *run.rollout.glob("block_*.h5")]
    for path in sorted(paths):
        stat = path.stat()
        stamps.append([path.name, stat.st_size, stat.st_mtime_ns])
    return sha256_json(stamps)


def made_from(run: Run, record: dict) -> bool:
    """Whether the scores that are there are of these settings and these files."""
    try:
        made = atomic.read_json(run.scores_json)["provenance"]
        keys = ("inputs", "version", "git")
        return made["hashes"]["evaluate"] == record["hashes"]["evaluate"] and all(
            made[key] == record[key] for key in keys
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def check_complete(experiment: Experiment, partial: bool) -> list[str]:
    """Notes for the report; raises ValueError when rollouts are missing and that was not said."""
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


class Evaluation:
    """Everything that is scored, for one experiment."""

    def __init__(self, experiment: Experiment, session: Session):
        import hpc_closure
        from hpc_closure.data.reader import DataSet, split_members
        from hpc_closure.evaluate.methods import name_of

        self.experiment, self.session, self.run = experiment, session, session.run
        self.closure = hpc_closure.load(self.run.model).to(session.device)
        self.method = name_of(self.closure)
        self.kind = experiment.generate.closure
        self.data = DataSet(self.run.data)
        self.parts = split_members(self.data.members, experiment.train.split)
        window = experiment.train.window
        self.window = self.data.window(*window) if window else range(len(self.data.times))

    def generated(self) -> dict:
        """{(grid, sensors in words): Scored} of samples of U for held-out states."""
        from hpc_closure.evaluate.generated import score_generated
        from hpc_closure.evaluate.methods import Contenders, Snapshots, climatology_pool

        experiment, settings = self.experiment, self.experiment.evaluate
        conditions = self.closure.config["conditions"]
        bare = [None] if conditions["sensors"] != "required" else []
        layouts = [*bare, *settings.sensors]
        evaluations = self.closure.evaluations(settings.sampler.evaluations)
        found = {}
        for grid in experiment.score_grids:
            snapshots = Snapshots.read(
                self.data,
                self.parts["test"],
                self.window,
                grid,
                settings.samples,
                conditions["history"],
            )
            pool = climatology_pool(
                self.data, self.parts["train"], self.window, grid, settings.seed
            )
            for layout in layouts:
                contenders = Contenders(
                    experiment, self.closure, snapshots, layout, pool, self.session.stop
                )
                log.get().info(
                    f"scoring {len(snapshots.states)} snapshots at {grid}^2, "
                    f"sensors: {contenders.name}"
                )
                scored = score_generated(
                    snapshots.closures,
                    contenders.samplers,
                    {
                        "closure": self.kind,
                        "sensors": contenders.name,
                        "interval": experiment.generate.interval,
                    },
                    members=settings.members,
                    trajectories=snapshots.trajectories,
                    law=contenders.reference(),
                    method_labels={self.method: {"evaluations": evaluations}},
                    seed=settings.seed,
                )
                for method, reason in contenders.absent.items():
                    scored.rows.leave_out("generated", self.kind, method, reason)
                found[grid, contenders.name] = scored
        return found

    def coupled(self):
        """Scored of the coupled runs; None when there are none."""
        import numpy as np
        import torch

        from hpc_closure.closure.sensors import describe
        from hpc_closure.data.ensemble import CoupledEnsemble
        from hpc_closure.evaluate.coupled import score_coupled

        experiment = self.experiment
        paths = [product.path for product in Ledger.of(experiment, "rollout").products()]
        if not paths:
            return None
        ensemble = CoupledEnsemble(paths)
        stored = [float(time - ensemble.times[0]) for time in ensemble.times[1:]]
        leads = sorted({round(time, 9) for time in (*stored, *experiment.evaluate.lead_times)})
        indices = [ensemble.index(lead) for lead in leads]
        log.get().info(
            f"scoring the coupled ensemble: {len(ensemble.members)} members, "
            f"{len(ensemble.cases)} start(s), {len(leads)} lead times"
        )
        truth = np.stack([ensemble.read("truth", index)[0] for index in indices], axis=1)
        train, cases, grid = self.parts["train"], len(ensemble.cases), experiment.train_grid

        def reader(name):
            def read(number):
                self.session.stop.check()
                return torch.from_numpy(ensemble.read(name, indices[number]))

            return read

        def climatology(number):
            """States of the training members at that time, or at the last one stored."""
            time = min(ensemble.times[indices[number]], self.data.times[-1])
            index = int(np.argmin(np.abs(self.data.times - time)))
            states = [self.data.read(member, index, "vorticity", grid) for member in train]
            return torch.from_numpy(np.stack(states))[:, None].expand(-1, cases, -1, -1)

        names = [name for name in ("none", "oracle") if name in ensemble.names]
        steps = max(ensemble.member_steps, 1.0)
        bare = 1e3 * ensemble.seconds.get("solver", 0.0) / steps
        closure = 1e3 * ensemble.seconds.get("closure", 0.0) / steps
        sampler = experiment.rollout.sampler
        labels = {
            "closure": self.kind,
            "sensors": describe(experiment.rollout.sensors),
            "interval": experiment.rollout.interval,
        }
        scored = score_coupled(
            truth,
            {
                self.method: reader("model"),
                **{name: reader(name) for name in names},
                "climatology": climatology,
            },
            leads,
            labels,
            costs={"none": bare, self.method: bare + closure},
            method_labels={
                self.method: {"evaluations": self.closure.evaluations(sampler.evaluations)}
            },
            seed=experiment.evaluate.seed,
        )
        if experiment.evaluate.event:
            self.event(scored.rows, ensemble, {"stage": "coupled", "grid": grid, **labels})
        for method in ("fourier", "physics"):
            scored.rows.leave_out("coupled", self.kind, method, "scored as generated closure only")
        if "oracle" not in names:
            reason = "no exact law is known for this closure, or rollout.references leaves it out"
            scored.rows.leave_out("coupled", self.kind, "oracle", reason)
        return scored

    def event(self, rows, ensemble, labels: dict) -> None:
        """Append the probability that the experiment asks for."""
        import torch

        from hpc_closure.evaluate.event import score_event

        event = self.experiment.evaluate.event
        assert event is not None
        index = ensemble.index(event.lead_time)
        names = [name for name in ("oracle", "none", "truth") if name in ensemble.names]
        fields = {name: torch.from_numpy(ensemble.read(name, index)) for name in names}
        fields = {self.method: torch.from_numpy(ensemble.read("model", index)), **fields}
        score_event(rows, fields, event, labels)

    def write(self, generated: dict, coupled, notes: list[str]) -> None:
        """Rows, figures and the report."""
        from hpc_closure.evaluate import pictures
        from hpc_closure.evaluate.report import write_report
        from hpc_closure.evaluate.rows import Rows

        rows, drawn, folder = Rows(), [], self.run.figures
        folder.mkdir(parents=True, exist_ok=True)
        for (grid, sensors), scored in generated.items():
            rows.extend(scored.rows)
            label = f"{self.kind}_{grid}_{sensors.replace(' ', '_').replace(',', '')}"
            words = f"{self.kind}, sensors: {sensors}, {grid}² grid"
            drawn.append(pictures.illustrate_generated(scored, folder, label, words))
        if coupled:
            rows.extend(coupled.rows)
            words = f"{self.kind}, started at t = {self.experiment.rollout.t_start:g}"
            drawn.append(pictures.illustrate_coupled(coupled, folder, self.kind, words))
        drawn.append(pictures.illustrate_training(metrics.read(self.run.metrics), folder))
        drawn.append(pictures.illustrate_cost(rows, folder, self.session.record["device"]))
        made = []
        for picture in itertools.chain.from_iterable(drawn):
            made.append(picture)
            self.session.stop.check()
        write_report(
            self.run.report,
            rows,
            title=f"hpc_closure: {self.experiment.name}",
            summary=self.summary(),
            pictures=made,
            provenance={"evaluate": self.session.record, "model": self.closure.provenance},
            notes=notes,
            start=self.experiment.rollout.t_start,
            lead_times=self.experiment.evaluate.lead_times,
        )
        # last, because they say what all of it was made from
        rows.write(self.run.evaluate, self.session.record)

    def summary(self) -> dict:
        """Heading -> facts on what was run."""
        experiment, model = self.experiment, self.closure.config
        physics, dns, coupled = experiment.physics, experiment.generate, experiment.rollout
        conditions = ", ".join(f"{key}: {value}" for key, value in model["conditions"].items())
        weights = sum(weight.numel() for weight in self.closure.model.parameters())
        times = self.data.times
        return {
            "Problem": {
                "equation": physics.equation,
                "viscosity": physics.viscosity,
                "forcing, noise": f"{physics.forcing.kind}, {physics.noise.kind}",
                "closure": f"{self.kind}, mean of {dns.interval} step(s)",
            },
            "Data": {
                "DNS": f"{dns.grid}², dt {dns.dt:g}, {dns.scheme}",
                "trajectories": ", ".join(f"{len(v)} {k}" for k, v in self.parts.items()),
                "stored": f"t = {times[0]:g} to {times[-1]:g}, {len(times)} times on "
                f"{self.data.grid}²",
            },
            "Model": {
                "preset": model["preset"],
                "conditions": conditions,
                "weights": weights,
                "steps": experiment.train.steps,
            },
            "Coupled run": {
                "members, starts": f"{coupled.members}, {coupled.cases}",
                "time": f"{coupled.t_start:g} to {coupled.t_end:g}",
                "closure called": f"every {coupled.interval} step(s)",
            },
        }


def print_plan(experiment: Experiment) -> int:
    """What would be scored; writes nothing."""
    settings, run_folder = experiment.evaluate, Run.of(experiment)
    data = Ledger.of(experiment, "generate").survey().counts()
    runs = Ledger.of(experiment, "rollout").survey().counts()
    print(f"run folder {run_folder}")
    print(f"data: {data['done']} of {data['units']} units")
    print(f"model: {'there' if run_folder.model.exists() else 'missing'}")
    print(f"rollout: {runs['done']} of {runs['units']} units")
    grids = ", ".join(f"{grid}^2" for grid in experiment.score_grids)
    print(
        f"to score: {settings.samples} snapshots x {settings.members} members on {grids}, "
        f"{1 + len(settings.sensors)} sensor layout(s); lead times {list(settings.lead_times)}"
    )
    return 0
