"""``hpc-closure train``: fit the closure model to the data of ``generate``."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_closure.closure.compatibility import check_fits, is_made_by
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.folder import Run, model_at
from hpc_closure.experiment.models import kind_of
from hpc_closure.experiment.opponents import opponents_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import atomic, launch, log
from hpc_closure.work.options import Options
from hpc_closure.work.session import Session
from hpc_closure.work.units import Ledger

if TYPE_CHECKING:
    from hpc_closure.closure.model import ClosureModel
    from hpc_closure.data.reader import DataSet
    from hpc_closure.data.samples import TrainingSet


def run(experiment: Experiment, options: Options = Options()) -> int:
    """Train, or continue training, and write RUN/train/model.safetensors; returns exit code."""
    if options.dry_run:
        return print_plan(experiment)
    check_data(experiment)
    with Session(experiment, "train", options) as session:
        if is_trained(experiment, session.run.model):
            log.get().info(f"{session.run.model} is there already; nothing to do")
        else:
            check_outside(session)
            fit(experiment, session)
            log.get().info(f"wrote {session.run.model}")
        left = session.options_left()
    for opponent in opponents_of(experiment).values():
        run(opponent, left)
    return 0


def fit(experiment: Experiment, session: Session) -> None:
    """Build the model, read the data, train and export the model."""
    import torch

    from hpc_closure.closure import artifact
    from hpc_closure.data.divergence import check_divergence
    from hpc_closure.data.opening import open_data
    from hpc_closure.train import processes, trainer

    section = experiment.train
    model_kind = kind_of(experiment.model.preset)
    if model_kind is not None and model_kind.tuned:
        return tune(experiment, session)
    joined = processes.join(session.device, session.world.bcast)
    store = open_data(experiment)
    check_divergence(experiment, store)
    data = trainer.TrainData(*samples(experiment, store))
    torch.manual_seed(seed_of(experiment))
    model = build_model(experiment)
    if experiment.use.mean:
        take_mean(model, experiment)
    share = section.batch // (joined.size * section.accumulate)
    values = share * math.prod(data.train.points) * model.config.get("width", 1)
    threads = launch.set_threads(experiment.cluster.threads, values)
    session.record["threads"] = launch.num_threads()
    log.get().info(f"training on {threads}")
    recipe = experiment.stage_hash("train")
    plan = trainer.Plan(section, seed_of(experiment), session.run, recipe)

    def export(trained, path: Path) -> None:
        artifact.save(trained, path, target=target_of(experiment), provenance=session.record)

    try:
        trainer.fit(model, data, plan, export, processes=joined, stop=session.stop)
    finally:
        processes.leave()
        store.close()


def seed_of(experiment: Experiment) -> int:
    """Return the seed of a training's draws: weights, order of samples, noise."""
    section = experiment.train
    return experiment.seed if section.seed is None else section.seed


def take_mean(model: "ClosureModel", experiment: Experiment) -> None:
    """Use the mean of another model (``use.mean``) if that model has a network."""
    import hpc_closure
    from hpc_closure.closure.composed.model import CompositeClosure
    from hpc_closure.closure.fitting import phases

    key = f"use.mean={experiment.use.mean}"
    path = model_at(experiment.folder, str(experiment.use.mean))
    check_fits(path, experiment, key)
    other = hpc_closure.load(path).model
    if not isinstance(model, CompositeClosure) or not isinstance(other, CompositeClosure):
        raise ValueError(
            f"{key}: model.preset={experiment.model.preset} cannot use the mean of another model: "
            "remove use.mean"
        )
    if phases.take_mean(model, other):
        log.get().info(f"using the mean of {path}")
    else:
        log.get().info(f"{path} has no mean to use: training one")


def tune(experiment: Experiment, session: Session) -> None:
    """Tune the constants of a functional closure on the first process, and export it."""
    from hpc_closure.closure import artifact
    from hpc_closure.closure.baselines.functional import FunctionalModel
    from hpc_closure.data.divergence import check_divergence
    from hpc_closure.data.opening import open_data
    from hpc_closure.train import tuning

    if not session.world.root:
        return
    store = open_data(experiment)
    try:
        check_divergence(experiment, store)
        model = build_model(experiment)
        assert isinstance(model, FunctionalModel)
        log.get().info(tuning.tune(model, experiment, store, session.stop))
        target = target_of(experiment)
        artifact.save(model, session.run.model, target=target, provenance=session.record)
    finally:
        store.close()


def samples(experiment: Experiment, store: "DataSet") -> "tuple[TrainingSet, TrainingSet]":
    """Open the training samples and the validation samples."""
    from hpc_closure.closure.composed.part_selection import LEAST
    from hpc_closure.closure.targets import reduced_problem
    from hpc_closure.data.forecasts import Forecaster, Forecasts
    from hpc_closure.data.reader import DataSet
    from hpc_closure.data.samples import Past, TrainingSet
    from hpc_closure.data.symmetry import Symmetry

    section, grid = experiment.train, experiment.train_grid
    conditions = experiment.model.conditions
    past = Past(conditions.previous_states, conditions.previous_closures)
    window = store.window(*section.window) if section.window else range(len(store.times))
    indices = store.with_past(window, past.lead, experiment.generate.spacing)
    parts = store.split(section.split)
    if store.loss:
        log.get().warning(store.loss)
    for name in ("train", "valid"):
        if not parts[name]:
            raise ValueError(
                f"train.split={list(section.split)} leaves no {name} trajectory among "
                f"{len(store.members)}: raise generate.members or the share"
            )
    source: DataSet | Forecasts = store
    if conditions.forecast:
        stride = Choices(experiment).stride
        reduced = reduced_problem(experiment.problem, grid, "subgrid", stride)
        source = Forecasts(store, Forecaster(reduced, experiment.generate.closure_interval))

    def subset(name: str, budget: int) -> TrainingSet:
        return TrainingSet(
            source,
            parts[name],
            indices,
            grid=grid,
            past=past,
            budget=budget,
            seed=seed_of(experiment),
        )

    budget = round(section.memory_gib * 2**30)
    train = subset("train", budget)
    # what validation adds to a full memory is at most a quarter
    valid = subset("valid", max(budget - train.bytes, budget // 4))
    if experiment.model.gated and len(parts["valid"]) < LEAST:
        log.get().warning(
            f"{len(parts['valid'])} validation trajectories are too few to judge the trained "
            f"parts ({LEAST} are needed), so none will act: raise generate.members or the middle "
            f"share of train.split={list(section.split)}, or set model.validate_parts=off"
        )
    if section.augment:
        # a forecast contains the forcing of the interval
        forced = experiment.generate.closure != "subgrid" or conditions.forecast
        flow = None
        if section.rollout_training and not forced:
            flow = Symmetry.of(experiment.physics, grid)
        train = train.augmented(Symmetry.of(experiment.physics, grid, forced), flow)
    return train, valid


def build_model(experiment: Experiment) -> "ClosureModel":
    """Build the model of the experiment, with fresh weights and its phases."""
    from hpc_closure.closure.artifact import build
    from hpc_closure.closure.composed.model import CompositeClosure
    from hpc_closure.closure.fitting import coupled_phases
    from hpc_closure.closure.fitting.balance import BalanceEnergy
    from hpc_closure.closure.fitting.rollout_training import RolloutLoss
    from hpc_closure.closure.fitting.steady import LongRuns
    from hpc_closure.closure.model import RolloutTraining
    from hpc_closure.closure.targets import reduced_problem

    settings = experiment.model.model_dump(mode="json")
    model_kind = kind_of(experiment.model.preset)
    if model_kind is not None:
        settings |= model_kind.settings(experiment)
    if experiment.model.conditions.physics_estimate:
        known = {"kind": experiment.generate.closure, "viscosity": experiment.problem.viscosity}
        settings["conditions"]["physics_estimate"] = known
    if experiment.physics.dimensions != 2:
        settings["dimensions"] = experiment.physics.dimensions
    if experiment.physics.channel_shape:
        laws = {"forcing", "noise", "initial"}
        settings["equation"] = experiment.physics.model_dump(mode="json", exclude=laws)
    section, grid = experiment.train.rollout_training, experiment.train_grid
    if section is not None:
        settings["adjusted"] = True
    model = build(settings, grid, experiment.physics.length)
    generate = experiment.generate
    if isinstance(model, CompositeClosure) and generate.closure == "subgrid":
        model.recorded_every = generate.spacing / (generate.interval * generate.dt)
    kind, interval = experiment.generate.closure, experiment.generate.interval
    balance = None
    if experiment.train.stability_test is not None and isinstance(model, CompositeClosure):
        long = experiment.train.stability_test
        stride = Choices(experiment).stride
        problem = reduced_problem(experiment.problem, grid, kind, stride)
        span, seed = interval * experiment.generate.dt, experiment.seed
        runs = LongRuns(problem, kind, span, long.horizon, long.members, seed)
        coupled_phases.choose_share(model, runs)
        balance = BalanceEnergy(long_runs=runs) if long.balance else None
    if section is None:
        if balance:
            model.phases = (*model.phases, balance)
        return model
    assert isinstance(model, CompositeClosure)
    members = 1 if model.config["residual"] == "none" else section.members
    coupled_phases.train_through(
        model,
        RolloutLoss(
            experiment.problem,
            experiment.train_grid,
            kind,
            interval,
            members,
            section.energy_weight,
            Choices(experiment).stride,
        ),
        RolloutTraining(section.steps, section.batch, section.lr, section.horizon),
        balance,
    )
    return model


def target_of(experiment: Experiment) -> dict:
    """Return the definition of the closure for the model file."""
    generate = experiment.generate
    target = {
        "kind": generate.closure,
        "interval": generate.interval,
        "dt": generate.dt,
        "every": generate.spacing,
    }
    stride = Choices(experiment).stride
    return target if stride == 1 else {**target, "stride": stride}


def is_trained(experiment: Experiment, path: Path) -> bool:
    """Return whether the experiment's model exists; a damaged one is set aside."""
    try:
        return is_made_by(path, experiment)
    except ValueError as error:
        aside = atomic.set_aside(path)
        log.get().warning(f"not used: {error} (kept as {aside.name})")
        return False


def check_data(experiment: Experiment) -> None:
    """Raise ValueError unless all data exist."""
    if experiment.data is not None and experiment.data.in_place:
        return
    books = Ledger.of(experiment, "generate")
    reason = books.incomplete(books.survey())
    if reason:
        raise ValueError(reason)


def check_outside(session: Session) -> None:
    """Check data of others on the first process, and log their faults.

    Raises:
        ValueError: there is an error that is not accepted.
    """
    if session.experiment.data is None:
        return
    from hpc_closure.generate import outside

    outside.require_in(session)


def print_plan(experiment: Experiment) -> int:
    """Print what a training would do; writes nothing."""
    run_folder, section = Run.of(experiment), experiment.train
    print(f"run folder {run_folder}")
    if run_folder.model_file:
        print(f"model: {run_folder.model}, from use.model; nothing to train")
        return 0
    state = "done" if run_folder.model.exists() else "to train"
    grid = experiment.train_grid
    print(f"model: {state}, {section.steps} steps of batch {section.batch} on {grid}^2 fields")
    if section.rollout_training:
        steps, batch = section.rollout_training.steps, section.rollout_training.batch
        print(f"then {steps} steps through the solver, from {batch} starts each")
    print("settings: " + json.dumps(experiment.model.model_dump(mode="json")))
    for name, opponent in opponents_of(experiment).items():
        has_model = Run.of(opponent).model.exists()
        print(f"opponent {name}: {'done' if has_model else 'to train'}, in {Run.of(opponent)}")
    return 0
