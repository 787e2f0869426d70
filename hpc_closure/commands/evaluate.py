"""``hpc-closure evaluate``: score rows, figures and the report."""

import csv
from pathlib import Path

from hpc_closure import log
from hpc_closure.commands import generate, rollout
from hpc_closure.commands.session import Session
from hpc_closure.experiment import Experiment, SensorLayout
from hpc_closure.run import Run
from hpc_closure.stop import Stopped


def run(
    experiment: Experiment,
    *,
    partial: bool = False,
    dry_run: bool = False,
    max_elapsed: str | None = None,
    redo: bool = False,
    yes: bool = False,
    verbosity: int = 0,
) -> int:
    """Write RUN/evaluate: scores.csv, scores.json, figures, report.html. Returns the exit code."""
    if dry_run:
        return print_plan(experiment)
    rollout.check_model(Run(experiment.folder))
    notes = check_complete(experiment, partial)
    with Session(
        experiment, "evaluate", max_elapsed=max_elapsed, redo=redo, yes=yes, verbosity=verbosity
    ) as session, session.alone():
        evaluation = Evaluation(experiment, session)
        generated = evaluation.generated()
        coupled = evaluation.coupled()
        evaluation.look()
        evaluation.write(generated, coupled, notes)
        log.get().info(f"report: {session.run.report}")
    return 0


def check_complete(experiment: Experiment, partial: bool) -> list[str]:
    """Notes for the report; raises ValueError when rollouts are missing and that was not said."""
    books = rollout.ledger(experiment)
    survey = books.survey(rollout.num_rows(experiment), experiment.cluster.members_per_block)
    counts = survey.counts()
    if counts["done"] == counts["units"]:
        return []
    if not partial or not counts["done"]:
        raise ValueError(
            f"{books.run.rollout}: {counts['done']} of {counts['units']} units are done; run "
            "`hpc-closure rollout` first, or score what there is with --partial"
        )
    return [f"Partial: {counts['done']} of {counts['units']} rollout units were done."]


class Evaluation:
    """Everything that is scored, for one experiment."""

    def __init__(self, experiment: Experiment, session: Session):
        import hpc_closure
        from hpc_closure.data.store import DataSet, split_members

        self.experiment, self.session, self.run = experiment, session, session.run
        self.closure = hpc_closure.load(self.run.model)
        if session.device != "cpu":
            self.closure.to(session.device)
        self.kind = experiment.generate.closure
        self.data = DataSet(self.run.data)
        self.parts = split_members(self.data.members, experiment.train.split)
        self.conditions = experiment.model.conditions

    def look(self) -> None:
        """Leave when asked to stop; scores are quick to make again."""
        if self.session.stop.requested:
            raise Stopped(self.session.stop.reason)

    # generated: samples of U for held-out states

    def generated(self) -> dict:
        """{(grid, sensors): Scored}, sensors in words."""
        layouts: list[SensorLayout | None] = list(self.experiment.evaluate.sensors)
        if self.conditions.sensors != "required":
            layouts.insert(0, None)
        scored = {}
        for grid in self.experiment.score_grids:
            snapshots = self.snapshots(grid)
            for layout in layouts:
                name, result = self.score(grid, snapshots, layout)
                scored[grid, name] = result
        return scored

    def snapshots(self, grid: int):
        """(states, closures, trajectories) of up to ``evaluate.samples`` held-out snapshots."""
        import numpy as np
        import torch

        indices = self.window()
        test = self.parts["test"]
        total = len(test) * len(indices)
        count = min(self.experiment.evaluate.samples, total)
        chosen = [divmod(number * total // count, len(indices)) for number in range(count)]
        read = self.data.read
        states = [read(test[m], indices[t], "vorticity", grid) for m, t in chosen]
        closures = [read(test[m], indices[t], "closure", grid) for m, t in chosen]
        return (
            torch.from_numpy(np.stack(states)),
            torch.from_numpy(np.stack(closures)),
            torch.tensor([test[m] for m, _ in chosen]),
        )

    def window(self) -> range:
        window = self.experiment.train.window
        return self.data.window(*window) if window else range(len(self.data.times))

    def score(self, grid: int, snapshots, layout: SensorLayout | None):
        """Score one grid and one sensor layout; returns the layout's name and the Scored."""
        import torch

        from hpc_closure.closure.conditions import Sensors
        from hpc_closure.data.sensors import describe, observe
        from hpc_closure.evaluate.generated import score_generated

        experiment, settings = self.experiment, self.experiment.evaluate
        states, closures, trajectories = snapshots
        name = describe(layout)
        log.get().info(f"scoring {len(states)} snapshots at {grid}^2, sensors: {name}")
        readings = None
        if layout is not None:
            length = experiment.physics.length
            rows = range(len(states))
            readings = observe(closures, layout, experiment.seed, rows, 0, length)

        def sensors(index) -> Sensors | None:
            if readings is None:
                return None
            values, positions, noise_std = readings
            return Sensors(values[index], positions, noise_std)

        def model(indices, members):
            drawn = []
            for index in indices.tolist():
                self.look()
                ids = [member * 1_000_003 + index for member in range(members)]
                drawn.append(
                    self.closure.sample(
                        states[index],
                        sensors=sensors(index),
                        members=ids,
                        seed=settings.seed,
                        **self.sampler(settings.sampler),
                    )
                )
            return torch.stack(drawn, dim=1)

        samplers = {"model": model}
        samplers["none"] = lambda indices, members: torch.zeros_like(closures[indices])[None]
        samplers["climatology"] = self.climatology(grid)
        law = self.exact(samplers, grid, states, sensors, layout)
        if layout is not None and layout.layout == "regular":
            from hpc_closure.closure.baselines import fourier

            samplers["fourier"] = lambda indices, members: fourier(sensors(indices), grid)[None]
        evaluations = settings.sampler.evaluations or self.closure.config.get("evaluations")
        result = score_generated(
            closures,
            samplers,
            {"closure": self.kind, "sensors": name, "interval": experiment.generate.interval},
            members=settings.members,
            trajectories=trajectories,
            law=law,
            method_labels={"model": {"evaluations": evaluations}},
            seed=settings.seed,
        )
        if layout is None:
            result.rows.leave_out("generated", self.kind, "fourier", "there are no sensors")
        elif layout.layout != "regular":
            result.rows.leave_out("generated", self.kind, "fourier", "the layout is scattered")
        if law is None:
            reason = "no exact law is known for this closure"
            for method in ("oracle", "physics"):
                result.rows.leave_out("generated", self.kind, method, reason)
        return name, result

    def exact(self, samplers: dict, grid: int, states, sensors, layout):
        """The exact law, where one is known; adds ``oracle`` and ``physics`` to the samplers."""
        from dataclasses import replace

        from hpc_closure.closure.baselines import physics
        from hpc_closure.closure.exact import ExactLaw
        from hpc_closure.data.dns import full_problem
        from hpc_closure.evaluate.generated import Law
        from hpc_closure.evaluate.ranks import fourier_coordinates

        problem = replace(full_problem(self.experiment), grid=grid)
        try:
            law = ExactLaw(problem, self.kind, self.experiment.generate.interval)
        except ValueError:
            return None
        seed = self.experiment.evaluate.seed

        def oracle(indices, members):
            # draws are keyed by member, row and call: each block of snapshots has its own call
            return law.sample(
                states[indices],
                members=range(members),
                seed=seed,
                call=int(indices[0]),
                sensors=sensors(indices),
            )

        def granted(indices, members):
            regular = sensors(indices) if layout and layout.layout == "regular" else None
            return physics(law, states[indices], regular)[None]

        samplers["oracle"] = oracle
        samplers["physics"] = granted
        shell = 8 if layout is None else layout.number // 2 - 1
        whiten = None
        if layout is None or (layout.layout == "regular" and not layout.noise):
            shell = min(shell, 8, grid // 2 - 1)

            def whiten(fields):
                return fourier_coordinates(fields, max(shell, 0))

        return Law(
            mean=lambda indices: law.mean(states[indices], sensors(indices)),
            variance=law.variance if layout is None else None,
            whiten=whiten,
        )

    def climatology(self, grid: int):
        """Random closures of the training members."""
        import numpy as np
        import torch

        window, train = self.window(), self.parts["train"]

        def sample(indices, members):
            rng = np.random.default_rng(self.experiment.evaluate.seed)
            picks = [(rng.choice(train), int(rng.choice(window))) for _ in range(members)]
            fields = np.stack([self.data.read(int(m), t, "closure", grid) for m, t in picks])
            return torch.from_numpy(fields)[:, None].expand(-1, len(indices), -1, -1)

        return sample

    @staticmethod
    def sampler(settings) -> dict:
        method = None if settings.method == "preset" else settings.method
        return {"method": method, "evaluations": settings.evaluations}

    # coupled: the closure in the solver

    def coupled(self):
        """Scored of the coupled runs."""
        import numpy as np
        import torch

        from hpc_closure.data.ensemble import CoupledEnsemble
        from hpc_closure.data.sensors import describe
        from hpc_closure.evaluate.coupled import score_coupled

        experiment = self.experiment
        products = rollout.ledger(experiment).products()
        ensemble = CoupledEnsemble([product.path for product in products])
        leads = [time for time in experiment.evaluate.lead_times]
        indices = [ensemble.index(lead) for lead in leads]
        log.get().info(
            f"scoring the coupled ensemble: {len(ensemble.members)} members, "
            f"{len(ensemble.cases)} start(s), {len(leads)} lead times"
        )
        truth = np.stack([ensemble.read("truth", index)[0] for index in indices], axis=1)

        def reader(name):
            return lambda number: torch.from_numpy(ensemble.read(name, indices[number]))

        ensembles = {"model": reader("model")}
        for name in ("none", "oracle"):
            if name in ensemble.names:
                ensembles[name] = reader(name)
        train, cases = self.parts["train"], len(ensemble.cases)

        def climatology(number):
            time = min(ensemble.times[indices[number]], self.data.times[-1])
            index = int(np.argmin(np.abs(self.data.times - time)))
            grid = experiment.train_grid
            states = [self.data.read(member, index, "vorticity", grid) for member in train]
            return torch.from_numpy(np.stack(states))[:, None].expand(-1, cases, -1, -1)

        ensembles["climatology"] = climatology
        steps = max(ensemble.member_steps, 1.0)
        bare = 1e3 * ensemble.seconds.get("solver", 0.0) / steps
        closure = 1e3 * ensemble.seconds.get("closure", 0.0) / steps
        evaluations = experiment.rollout.sampler.evaluations
        evaluations = evaluations or self.closure.config.get("evaluations")
        scored = score_coupled(
            truth,
            ensembles,
            leads,
            {
                "closure": self.kind,
                "sensors": describe(experiment.rollout.sensors),
                "interval": experiment.rollout.interval,
            },
            costs={"none": bare, "model": bare + closure},
            method_labels={"model": {"evaluations": evaluations}},
            seed=experiment.evaluate.seed,
        )
        if experiment.evaluate.event:
            self.event(scored.rows, ensemble)
        for method in ("fourier", "physics"):
            scored.rows.leave_out("coupled", self.kind, method, "scored as generated closure only")
        if "oracle" not in ensembles:
            reason = "no exact law is known for this closure, or rollout.references leaves it out"
            scored.rows.leave_out("coupled", self.kind, "oracle", reason)
        return scored

    def event(self, rows, ensemble) -> None:
        """Append the probability that the experiment asks for."""
        import torch

        from hpc_closure.evaluate.event import score_event

        event = self.experiment.evaluate.event
        index = ensemble.index(event.lead_time)
        names = [name for name in ("model", "oracle", "none", "truth") if name in ensemble.names]
        fields = {name: torch.from_numpy(ensemble.read(name, index)) for name in names}
        labels = {
            "stage": "coupled",
            "closure": self.kind,
            "grid": self.experiment.train_grid,
            "interval": self.experiment.rollout.interval,
        }
        score_event(rows, fields, event, labels)

    # products

    def write(self, generated: dict, coupled, notes: list[str]) -> None:
        """Rows, figures and the report."""
        from hpc_closure.evaluate.report import write_report
        from hpc_closure.evaluate.tables import Rows

        rows = Rows()
        for scored in generated.values():
            rows.extend(scored.rows)
        rows.extend(coupled.rows)
        rows.write(self.run.evaluate)
        pictures = self.figures(generated, coupled, rows)
        write_report(
            self.run.report,
            rows,
            title=f"hpc_closure: {self.experiment.name}",
            summary=self.summary(),
            pictures=pictures,
            provenance={"evaluate": self.session.record, "model": self.closure.provenance},
            notes=notes,
            start=self.experiment.rollout.t_start,
            lead_times=self.experiment.evaluate.lead_times,
        )

    def figures(self, generated: dict, coupled, rows) -> list:
        from hpc_closure.evaluate import figures
        from hpc_closure.evaluate.report import Picture

        folder = self.run.figures
        folder.mkdir(parents=True, exist_ok=True)
        pictures = []

        def keep(section, name, figure, caption):
            png, _ = figures.save(figure, folder / name)
            pictures.append(Picture(section, png, caption))

        for (grid, sensors), scored in generated.items():
            label = f"{grid}_{sensors.replace(' ', '_').replace(',', '')}"
            words = f"grid {grid}², sensors: {sensors}"
            methods = [m for m in ("model", "oracle") if m in scored.examples]
            keep(
                "generated", f"fields_{label}", figures.fields(scored.examples, methods),
                f"One held-out snapshot of the closure: truth, one sample, mean, spread; {words}.",
            )
            keep(
                "generated", f"spectra_{label}",
                figures.spectra(scored.spectra, scored.spread_spectra),
                f"Power and spread of the closure per wavenumber shell; {words}.",
            )
            ranked = {m: c for m, c in scored.ranks.items() if m != "climatology"}
            if ranked:
                keep(
                    "generated", f"ranks_{label}", figures.rank_histograms(ranked),
                    f"Rank histograms; the shrunk oracle must fail; {words}.",
                )
        keep(
            "coupled", "error_growth", figures.error_growth(coupled.rows),
            "Error of the ensemble mean (with its spread) against lead time.",
        )
        keep(
            "coupled", "fields_coupled",
            figures.fields(
                coupled.examples, [m for m in ("model", "none") if m in coupled.examples],
                quantity="ω", unit=r"s$^{-1}$",
            ),
            "Vorticity at the last lead time: truth, one member, mean, spread.",
        )
        history = self.history()
        if history:
            keep("training", "loss", figures.loss_curve(history), "Training and held-out loss.")
        keep("cost", "cost", figures.cost(rows), "Cost on this machine.")
        return pictures

    def history(self) -> list[dict]:
        """Rows of train/metrics.csv as numbers."""
        if not self.run.metrics.exists():
            return []
        return read_metrics(self.run.metrics)

    def summary(self) -> dict:
        experiment = self.experiment
        generate_, model, run_ = experiment.generate, self.closure.config, experiment.rollout
        return {
            "Problem": {
                "equation": experiment.physics.equation,
                "viscosity": experiment.physics.viscosity,
                "forcing, noise": f"{experiment.physics.forcing.kind}, "
                f"{experiment.physics.noise.kind}",
                "closure": f"{self.kind}, mean of {generate_.interval} step(s)",
            },
            "Data": {
                "DNS": f"{generate_.grid}², dt {generate_.dt:g}, {generate_.scheme}",
                "trajectories": ", ".join(f"{len(v)} {k}" for k, v in self.parts.items()),
                "stored": f"t = {self.data.times[0]:g} to {self.data.times[-1]:g}, "
                f"{len(self.data.times)} times on {self.data.grid}²",
            },
            "Model": {
                "preset": model["preset"],
                "conditions": ", ".join(
                    f"{key}: {value}" for key, value in model["conditions"].items()
                ),
                "weights": f"{sum(p.numel() for p in self.closure.model.parameters())}",
                "steps": experiment.train.steps,
            },
            "Coupled run": {
                "members, starts": f"{run_.members}, {run_.cases}",
                "time": f"{run_.t_start:g} to {run_.t_end:g}",
                "closure called": f"every {run_.interval} step(s)",
            },
        }


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics file; empty cells are left out."""
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            parsed = {}
            for key, value in row.items():
                if value in ("", None):
                    continue
                try:
                    parsed[key] = float(value)
                except ValueError:
                    parsed[key] = value
            rows.append(parsed)
    return rows


def print_plan(experiment: Experiment) -> int:
    """What would be scored; writes nothing."""
    settings, run_folder = experiment.evaluate, Run(experiment.folder)
    data = generate.ledger(experiment).survey(
        experiment.generate.members, experiment.cluster.members_per_block
    )
    runs = rollout.ledger(experiment).survey(
        rollout.num_rows(experiment), experiment.cluster.members_per_block
    )
    print(f"run folder {run_folder}")
    print(f"data: {data.counts()['done']} of {data.counts()['units']} units")
    print(f"model: {'there' if run_folder.model.exists() else 'missing'}")
    print(f"rollout: {runs.counts()['done']} of {runs.counts()['units']} units")
    grids = ", ".join(f"{grid}^2" for grid in experiment.score_grids)
    print(
        f"to score: {settings.samples} snapshots x {settings.members} members on {grids}, "
        f"{1 + len(settings.sensors)} sensor layout(s); lead times {list(settings.lead_times)}"
    )
    return 0
