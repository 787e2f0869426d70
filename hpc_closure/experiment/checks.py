"""Check the sections of an experiment against each other; an error is one line."""

from hpc_closure.experiment.kinds import Kind, ModelKind, NetworkKind, ResidualKind, find, names
from hpc_closure.experiment.models import PRESETS, kind_of, kinds_of, network_of, resolve
from hpc_closure.spectral.modes.resolution import pencils, per_side, retained_modes, smallest_grid
from hpc_closure.spectral.problem import REMOVABLE, Problem, check_sides

# keys of a model that only some of its parts read
MAY_BE_READ = (
    "schedule",
    "function_evaluations",
    "generator",
    "layers",
    "base_noise",
    "mean_layers",
)


def check(experiment) -> None:
    """Raise ValueError if two sections of the experiment contradict each other."""
    for path in experiment.use.classes:
        find(Kind, path, "use.classes")
    _check_reduced_grid(experiment)
    if experiment.data:
        _check_data_of_others(experiment)
    _check_fields(experiment)
    _check_equal_sides(experiment)
    _check_data(experiment)
    _check_problem(experiment)
    _check_dimensions(experiment)
    _check_outputs(experiment)
    if experiment.generate.closure == "none":
        return
    _check_intervals(experiment)
    _check_training(experiment)
    _check_model(experiment)
    _check_memory(experiment)
    _check_rollout(experiment)
    _check_event(experiment)
    _check_reduced(experiment)
    _check_replicas(experiment)
    _check_after_release(experiment)
    _check_sensors(experiment)


def _check_data_of_others(experiment) -> None:
    """Check section ``data`` against the sections that its files determine."""
    data, physics, generate = experiment.data, experiment.physics, experiment.generate
    if data.found is None:
        raise ValueError(
            "data: its files have not been looked at; read the experiment from a file "
            "(hpc_closure.experiment.reading.load)"
        )
    names = [channel.name for channel in physics.channels]
    if set(names) != set(data.state) and max(len(names), len(data.state)) > 1:
        raise ValueError(
            f"data.state has the fields {', '.join(data.state)}, physics.equation="
            f"{physics.equation} has {', '.join(names)}: name the same"
        )
    if physics.dimensions != data.found.sides:
        raise ValueError(
            f"physics.equation={physics.equation} has {physics.dimensions} side(s), the files "
            f"of data.path {data.found.sides}"
        )
    record = generate.record
    if not data.in_place:
        most = retained_modes(experiment.data_grid)
        if data.filter and (data.filter.modes or 0) > most:
            raise ValueError(
                f"data.filter.modes={data.filter.modes}: a solver on {experiment.data_grid} "
                f"points per side (reduced.grid) retains at most {most}"
            )
    for key, value, expected in (
        ("generate.closure", generate.closure, "subgrid"),
        ("generate.record.fields", list(record.fields), []),
        ("generate.record.filters", list(record.filters), []),
        ("generate.record.series_every", record.series_every, None),
        ("generate.record.burst", record.burst, 1),
        ("generate.cfl", generate.cfl, None),
        ("replicas.members", experiment.replicas.members, 0),
        ("reduced.step", experiment.reduced.step, 1),
        ("rollout.rungs", len(experiment.rollout.rungs), 0),
        ("rollout.baselines", "oracle" in experiment.rollout.baselines, False),
    ):
        if value != expected:
            raise ValueError(
                f"{key}={value} needs the DNS of this package, and data names files of others: "
                f"remove it"
            )


def _check_fields(experiment) -> None:
    """Refuse what is only for a state of one field, if the equation has several."""
    physics, generate, record = experiment.physics, experiment.generate, experiment.generate.record
    if len(physics.channels) == 1:
        return
    if generate.closure not in ("none", "subgrid"):
        names = ", ".join(channel.name for channel in physics.channels)
        raise ValueError(
            f"generate.closure={generate.closure} is for equations of one field, but "
            f"{physics.equation} has the fields {names}: set generate.closure to subgrid, or to "
            "none (data only)"
        )
    if generate.closure != "none":
        _check_closure_of_fields(experiment)
    spectra = () if physics.dimensions == 3 else ("spectra",)  # those of the velocities
    for key in ("fields", "filters", *spectra):
        if _beyond_state(experiment) if key == "fields" else getattr(record, key):
            raise ValueError(
                f"generate.record.{key} is for equations of one field; remove it: the fields of "
                f"{physics.equation} are stored in any case"
            )


def _check_closure_of_fields(experiment) -> None:
    """Refuse closures that are only for a state of one field."""
    model, train = experiment.model, experiment.train
    config, conditions = resolve(model.model_dump(exclude_none=True)), model.conditions
    whole = kind_of(model.preset)
    refused = [kind.name for kind in kinds_of(config) if not kind.several_fields]
    parts = {"numbers", *refused} & {*config.get("mean", ()), config.get("residual"), *refused}
    rivals = [
        name
        for name in train.opponents
        if not all(kind.several_fields for kind in kinds_of(resolve({"preset": name})))
    ]
    read = conditions.sensors != "none" and _trains_residual(config)
    learned = config.get("sensors") == "learned"
    is_velocity = experiment.physics.is_velocity
    sensors = f"model.conditions.sensors={conditions.sensors} with a trained residual"
    if learned:
        sensors = f"model.preset={model.preset} with model.sensors=learned"
    for key, used, expected in (
        (
            f"model.preset={model.preset}",
            whole is not None and not whole.several_fields,
            "gaussian, convolutional or default",
        ),
        (f"a model with {', '.join(sorted(parts))}", bool(parts), "other parts (model.mean, ...)"),
        (
            sensors,
            (read or learned) and whole is None,
            (
                "model.sensors=kriging"
                if learned and conditions.sensors == "none"
                else "model.conditions.sensors=none and model.sensors=kriging, or model.residual="
                "gaussian"
            ),
        ),
        ("model.conditions.physics_estimate", conditions.physics_estimate, "false"),
        ("train.rollout_training", train.rollout_training and not is_velocity, "null"),
        ("train.stability_test", train.stability_test and not is_velocity, "null"),
        (f"train.opponents={rivals}", rivals, "gaussian_amplitude, point_mixture or resampled"),
    ):
        if used:
            raise ValueError(
                f"{key} is for equations of one field, but {experiment.physics.equation} has "
                f"{len(experiment.physics.channels)}: use {expected}"
            )


def _check_data(experiment) -> None:
    """Check times and grids of the stored data."""
    generate = experiment.generate
    _check_steps("generate.t_end", generate.t_end, generate.dt)
    _check_steps("generate.record.start", generate.record.start, generate.dt)
    _check_steps("generate.record.every", generate.record.every, generate.dt)
    if generate.record.start > generate.t_end:
        raise ValueError(
            f"generate.record.start={generate.record.start} is after generate.t_end="
            f"{generate.t_end}: nothing would be stored"
        )
    stored, solved = (
        per_side(grid, experiment.physics.dimensions, key)
        for key, grid in (
            ("generate.record.grid", experiment.data_grid),
            ("generate.grid", generate.grid),
        )
    )
    if any(coarse > fine for coarse, fine in zip(stored, solved)):
        raise ValueError(
            f"generate.record.grid={_written(experiment.data_grid)} is finer than generate.grid="
            f"{_written(generate.grid)}, the grid of the full system"
        )
    of_others = bool(experiment.data)  # a stored closure is that of a solver on its grid
    if generate.closure == "subgrid" and experiment.data_grid == generate.grid and not of_others:
        raise ValueError(
            "generate.closure=subgrid needs generate.record.grid smaller than generate.grid="
            f"{generate.grid}: the reduced solver runs on the stored grid"
        )
    if experiment.physics.dimensions == 3:
        try:
            _, columns, halves = map(retained_modes, solved)
            pencils(experiment.cluster.domain_ranks, 2 * columns + 1, halves + 1)
        except ValueError as error:
            raise ValueError(f"cluster.domain_ranks: {error}") from None
    elif experiment.cluster.domain_ranks > min(solved) // 3:
        raise ValueError(
            f"cluster.domain_ranks={experiment.cluster.domain_ranks} is more than the number of "
            f"retained rows of a {generate.grid}^2 field; at most {min(solved) // 3}"
        )


def _check_problem(experiment) -> None:
    """Build the full system and, for a closure, the forcing of the reduced one."""
    physics, generate = experiment.physics, experiment.generate
    removed = generate.closure if generate.closure in REMOVABLE else "none"
    Problem.of(physics, generate, removed)
    if generate.closure != "none":
        points, lengths = (
            per_side(value, physics.dimensions) for value in (experiment.data_grid, physics.length)
        )
        physics.forcing.retained(min(points), max(lengths))


def _beyond_state(experiment) -> list[str]:
    """List the fields to store that are not the state; velocities as one vector are the state."""
    state = "velocity" if experiment.physics.is_velocity else "vorticity"
    return [name for name in experiment.generate.record.fields if name != state]


def _check_dimensions(experiment) -> None:
    """Refuse settings that exist only in two dimensions if the equation has another number.

    These are domain split, velocity, enstrophy, learned sensors and some complete models.
    """
    physics, generate, record = experiment.physics, experiment.generate, experiment.generate.record
    if physics.dimensions == 2:
        return
    wrong: list[tuple] = [  # key, value, allowed values
        ("generate.closure", generate.closure, "subgrid", "none"),
        ("generate.record.fields", _beyond_state(experiment), []),
    ]
    if physics.dimensions == 1:
        enstrophy = [name for name in record.spectra if "enst" in name]
        wrong.append(("cluster.domain_ranks", experiment.cluster.domain_ranks, 1))
        wrong.append(("generate.record.spectra", enstrophy, []))
    if generate.closure == "subgrid":
        wrong += _model_settings_off_the_plane(experiment)
    for key, value, *expected in wrong:
        if value not in expected:
            raise ValueError(
                f"{key}={value} is for flows in two dimensions; {physics.equation} needs "
                f"{' or '.join(map(str, expected))}"
            )


def _model_settings_off_the_plane(experiment) -> list[tuple]:
    """List (key, value, allowed values) of the model settings that planes have and others not."""
    model, sides = experiment.model, experiment.physics.dimensions
    kind = kind_of(model.preset)
    composites = [name for name, preset in PRESETS.items() if preset["sensors"] != "learned"]
    others = [name for name in names(ModelKind) if _fits(ModelKind.known[name], sides)]
    presets = [*composites, *others]
    if kind is not None and _fits(kind, sides):
        presets.append(model.preset)
    wrong: list[tuple] = [
        ("model.preset", model.preset, *presets),
        ("model.conditions.physics_estimate", model.conditions.physics_estimate, False),
    ]
    if model.preset in composites:
        config = resolve(model.model_dump(exclude_none=True))
        wrong.append(("model.sensors", config["sensors"], "kriging"))
        for key, name, family in (
            ("mean", network_of(config), NetworkKind),
            ("amplitude", config["amplitude"], NetworkKind),
            ("residual", config["residual"], ResidualKind),
        ):
            known = [one for one in names(family) if _fits(family.known[one], sides)]
            if name and name != "none" and not _fits(find(family, name, f"model.{key}"), sides):
                wrong.append((f"model.{key}", name, *known))
    return wrong


def _fits(kind, sides: int) -> bool:
    """Return whether a class can be used for flows in so many dimensions."""
    return sides in kind.flow_dimensions


def _check_outputs(experiment) -> None:
    """Check series, filters and bursts of ``generate.record``."""
    generate, record = experiment.generate, experiment.generate.record
    if record.series_every is not None:
        _check_steps("generate.record.series_every", record.series_every, generate.dt)
    elif record.spectra:
        raise ValueError(
            f"generate.record.spectra={list(record.spectra)} are part of the series: set "
            "generate.record.series_every"
        )
    for item in record.filters:
        modes = item.modes(experiment.physics.length)
        most = retained_modes(generate.grid)
        if item.kind == "sharp" and not 1 <= modes < most:
            raise ValueError(
                f"generate.record.filters: sharp, width={item.width:g} keeps {modes} modes of the "
                f"{most} of the DNS; expected 1 to {most - 1}"
            )
        if modes < 1:
            raise ValueError(
                f"generate.record.filters: {item.kind}, width={item.width:g} removes all modes of "
                f"a box of side {experiment.physics.length:g}; reduce the width"
            )
    ahead = generate.interval * generate.dt
    if generate.closure != "none" and record.burst * ahead > record.every * (1 + 1e-9):
        number = "one closure target stands" if record.burst == 1 else "a burst stands"
        raise ValueError(
            f"generate.record.every={record.every:g} is shorter than the {record.burst * ahead:g} "
            f"that {number} for (generate.interval={generate.interval} steps"
            f"{'' if record.burst == 1 else f', record.burst={record.burst}'})"
        )
    if (record.burst - 1) * ahead > record.start * (1 + 1e-9):
        raise ValueError(
            f"generate.record.start={record.start:g}: a burst of {record.burst} intervals of "
            f"{ahead:g} would begin before t = 0"
        )


def _written(grid) -> str:
    """Write points per side as a file has them: a number or a list."""
    return str(list(grid) if isinstance(grid, tuple) else grid)


def _check_equal_sides(experiment) -> None:
    """Refuse what needs sides of equal lengths and numbers of points, if these are lists."""
    physics, generate = experiment.physics, experiment.generate
    lists = {
        "generate.record.grid": generate.record.grid,
        "generate.grid": generate.grid,
        "physics.length": physics.length,
    }
    lists = {key: value for key, value in lists.items() if isinstance(value, tuple)}
    for key, value in lists.items():
        check_sides(key, value, physics)
    if not lists:
        return
    for key, value, fits, expected in (
        *_of_closures_on_unequal_sides(experiment),
        (
            "generate.record.filters",
            [item.name for item in generate.record.filters],
            not generate.record.filters,
            "no filters",
        ),
    ):
        if not fits:
            raise ValueError(
                f"{key}={value} needs one number for all sides, not lists in generate.grid, "
                f"generate.record.grid or physics.length: use {expected}"
            )


def _of_closures_on_unequal_sides(experiment) -> list[tuple[str, object, bool, str]]:
    """List settings of closures: key, value, whether unequal sides have it, and what they have."""
    generate, model = experiment.generate, experiment.model
    if generate.closure == "none":
        return []
    closures = "none (data only) or subgrid"
    equation, plane = experiment.physics.equation, experiment.physics.dimensions == 2
    rows: list[tuple[str, object, bool, str]] = [
        ("generate.closure", generate.closure, generate.closure == "subgrid", closures),
        ("physics.equation", equation, plane, "a flow of the plane, or generate.closure=none"),
    ]
    if not experiment.use.model:
        config = resolve(model.model_dump(exclude_none=True))
        layered = kind_of(model.preset) is not None and model.preset != "published"
        mean, residual = list(config.get("mean", ())), config.get("residual")
        rows += [
            ("model.preset", model.preset, layered or residual is not None, "gaussian"),
            ("model.mean", mean, "fno" not in mean, "regression, cnn or none"),
            ("model.amplitude", config.get("amplitude"), config.get("amplitude") != "fno", "cnn"),
            ("model.residual", residual, residual in ("gaussian", "none", None), "gaussian"),
        ]
    sensors = model.conditions.sensors
    rows += [
        ("model.conditions.sensors", sensors, sensors == "none", "none"),
        ("train.grid", experiment.train.grid, not experiment.train.grid, "null"),
        ("train.rollout_training", "on", not experiment.train.rollout_training, "null"),
        ("train.stability_test", "on", not experiment.train.stability_test, "null"),
        ("train.opponents", "on", not experiment.train.opponents, "none"),
        ("reduced.known", experiment.reduced.known, not experiment.reduced.known, "null"),
        ("reduced.step", "auto", experiment.reduced.step != "auto", "a number"),
        ("rollout.rungs", "on", not experiment.rollout.rungs, "none"),
        ("rollout.sensors", "on", not experiment.rollout.sensors, "null"),
        ("evaluate.grids", "on", not experiment.evaluate.grids, "null"),
        ("evaluate.sensors", "on", not experiment.evaluate.sensors, "[]"),
    ]
    return rows


def _check_intervals(experiment) -> None:
    """Check that the closure interval equals the time for which the noise holds its regime."""
    physics, generate = experiment.physics, experiment.generate
    hold = getattr(physics.noise, "hold", None)
    if hold is None or generate.closure not in REMOVABLE:
        return
    steps = physics.noise.steps(generate.dt)
    for section in ("generate", "rollout"):
        interval = getattr(experiment, section).interval
        if interval != steps:
            raise ValueError(
                f"{section}.interval={interval} steps of {generate.dt:g} are not "
                f"physics.noise.hold={hold:g}, the time that a regime lasts: set "
                f"{section}.interval to {steps}, or hold to {interval * generate.dt:g}"
            )
    _check_steps("generate.record.start", generate.record.start, hold)
    _check_steps("generate.record.every", generate.record.every, hold)


def _check_training(experiment) -> None:
    """Check grids, split, batch and window of ``train``."""
    generate, train = experiment.generate, experiment.train
    _check_divides("train.grid", experiment.train_grid, experiment.data_grid)
    for grid in experiment.score_grids:
        _check_divides("evaluate.grids", grid, experiment.data_grid)
    least = smallest_grid(experiment.train_grid)
    for grid in experiment.evaluate.grids or ():
        if grid < least:
            raise ValueError(
                f"evaluate.grids: {grid} has too few modes for a model trained at "
                f"{experiment.train_grid}; at least {least}"
            )
    if abs(sum(train.split) - 1) > 1e-6:
        raise ValueError(
            f"train.split={list(train.split)} sums to {sum(train.split):g}, expected 1"
        )
    if not train.split[0] and train.split[2] < 1:
        raise ValueError(
            f"train.split={list(train.split)} has no training members; a run that only "
            "generates a test set has [0, 0, 1]"
        )
    if train.batch % train.accumulate:
        raise ValueError(
            f"train.batch={train.batch} cannot be divided into train.accumulate="
            f"{train.accumulate} equal parts"
        )
    if (
        train.window
        and not generate.record.start <= train.window[0] < train.window[1] <= generate.t_end
    ):
        raise ValueError(
            f"train.window={list(train.window)} must lie in [record.start, t_end] = "
            f"[{generate.record.start:g}, {generate.t_end:g}]"
        )


def _check_model(experiment) -> None:
    """Refuse settings that the chosen model does not read, instead of ignoring them."""
    model, conditions = experiment.model, experiment.model.conditions
    if experiment.use.model:
        return
    kind_of_model = kind_of(model.preset)
    if experiment.train.rollout_training:
        _check_trajectory(experiment)
    settings = model.model_dump(exclude_none=True)
    config = resolve(settings)
    if conditions.forecast:
        _check_forecast(experiment)
    test = experiment.train.stability_test
    regressed = kind_of_model is None and "regression" in config["mean"]
    if test and test.balance and not (regressed and conditions.previous_closures):
        raise ValueError(
            "train.stability_test.balance=true changes the regression of a closure that reads "
            "previous closures: set model.conditions.previous_closures and a model.mean with "
            "regression, or train.stability_test.balance=false"
        )
    if kind_of_model is not None:
        sides = experiment.physics.dimensions
        if not _fits(kind_of_model, sides):
            fitting = " or ".join(map(str, kind_of_model.flow_dimensions))
            raise ValueError(
                f"model.preset={model.preset} is for flows in {fitting} dimensions, "
                f"{experiment.physics.equation} has {sides}: use gaussian"
            )
        return kind_of_model.check(experiment)
    if conditions.previous_closures:
        check_previous(experiment, conditions.previous_closures)
    residual = config["residual"]
    read = {key for kind in kinds_of(config) for key in kind.reads}
    for key, used in (
        ("noise_memory", not conditions.previous_closures and residual != "none"),
        ("regression_terms", "regression" in config["mean"]),
        ("amplitude_score", config["amplitude"] != "none"),
        *((key, key in read) for key in MAY_BE_READ),
    ):
        if key in settings and not used:
            raise ValueError(
                f"model.{key} is no setting of model.preset={model.preset} with mean "
                f"{config['mean'] or 'none'}, residual {residual}: remove it"
            )
    if experiment.train.opponents and experiment.physics.dimensions != 2:
        raise ValueError(
            f"train.opponents={list(experiment.train.opponents)} are for flows in two dimensions; "
            f"{experiment.physics.equation} has another number: remove them"
        )
    if find(ResidualKind, residual, "model.residual").one_evaluation:
        for stage in ("rollout", "evaluate"):
            sampler = getattr(experiment, stage).sampler
            if (sampler.method, sampler.function_evaluations or 1) != ("preset", 1):
                raise ValueError(
                    f"{stage}.sampler: model.residual={residual} needs one evaluation and no "
                    f"method: remove {stage}.sampler"
                )


def _check_forecast(experiment) -> None:
    """Check that a closure can read the state after the reduced solver's interval."""
    train, model, conditions = experiment.train, experiment.model, experiment.model.conditions
    for setting, used in (
        (
            f"generate.closure={experiment.generate.closure}",
            experiment.generate.closure != "subgrid",
        ),
        (
            f"model.conditions.previous_states={conditions.previous_states}",
            conditions.previous_states,
        ),
        (f"model.preset={model.preset}", kind_of(model.preset) is not None),
        ("train.rollout_training", train.rollout_training),
        ("train.stability_test", train.stability_test),
        (f"train.grid={train.grid}", train.grid not in (None, experiment.data_grid)),
    ):
        if used:
            raise ValueError(
                f"model.conditions.forecast=true is for a closure that is added after the reduced "
                f"solver's interval; it cannot be used with {setting}: remove one of them"
            )


def _check_memory(experiment) -> None:
    """Check that a subgrid closure's noise memory can be estimated from neighbouring snapshots."""
    generate, model, train = experiment.generate, experiment.model, experiment.train
    config = resolve(model.model_dump(exclude_none=True))
    if experiment.use.model or generate.closure != "subgrid" or model.conditions.previous_closures:
        return
    if (
        config.get("noise_memory") != "on"
        or config["residual"] == "none"
        or generate.record.burst > 1
    ):
        return
    first, last = train.window or (generate.record.start, generate.t_end)
    if last - first < generate.record.every * (1 - 1e-9):
        raise ValueError(
            f"generate.record.every={generate.record.every:g} leaves one snapshot of a trajectory "
            f"in [{first:g}, {last:g}]: the memory of the closure's noise needs neighbours; set "
            "generate.record.burst to at least 2, or model.noise_memory=off for noise that is "
            "white from call to call"
        )


def _check_trajectory(experiment) -> None:
    """Check the requirements of training through the solver (``train.rollout_training``)."""
    model, generate = experiment.model, experiment.generate
    residual = resolve(model.model_dump(exclude_none=True)).get("residual")
    if residual is None or find(ResidualKind, residual, "model.residual").trained:
        raise ValueError(
            f"train.rollout_training needs a closure with a mean and a Gaussian law, or a mean "
            f"only; model.preset={model.preset} is not: set model.preset to gaussian or "
            "convolutional, or remove train.rollout_training"
        )
    if model.conditions.sensors != "none":
        raise ValueError(
            f"train.rollout_training runs without sensors: set model.conditions.sensors to none, "
            f"it is {model.conditions.sensors}"
        )
    if not generate.consecutive:
        raise ValueError(
            "train.rollout_training is scored after every closure call: set generate.record.every "
            f"to {generate.interval * generate.dt:g}, or generate.record.burst"
        )
    if generate.cfl:
        raise ValueError(
            f"generate.cfl={generate.cfl:g}: train.rollout_training needs steps of one length; "
            "remove one of them"
        )


def check_previous(experiment, number: int) -> None:
    """Check that previous closures are stored one interval apart and called as in training."""
    generate, rollout = experiment.generate, experiment.rollout
    if generate.closure != "subgrid":
        raise ValueError(
            f"model.conditions.previous_closures={number}: the noise of closure "
            f"{generate.closure} has no memory; remove model.conditions.previous_closures"
        )
    if not generate.consecutive or 1 < generate.record.burst <= number:
        raise ValueError(
            f"model.conditions.previous_closures={number} learns from snapshots one closure "
            f"interval apart: set generate.record.burst to at least {number + 1}, or record.every "
            f"to {generate.interval * generate.dt:g}"
        )
    if rollout.interval != generate.interval:
        raise ValueError(
            f"rollout.interval={rollout.interval}: a model of the previous closures is called as "
            f"it was trained, every generate.interval={generate.interval} steps"
        )
    check_past(experiment, number)
    least = number * generate.interval * generate.dt
    if generate.record.burst == 1:
        least += generate.record.start
    if rollout.t_start < least - 1e-9:
        raise ValueError(
            f"rollout.t_start={rollout.t_start:g}: the last {number} closures before it are not "
            f"stored; at least {least:g}"
        )


def check_past(experiment, number: int) -> None:
    """Check that replicas store the earlier states or closures that a model reads at its start."""
    generate, rollout = experiment.generate, experiment.rollout
    if not rollout.after_release:
        return
    key, spacing = f"rollout.after_release={rollout.after_release:g}", generate.spacing
    _check_steps(f"{key}: the spacing of what the model reads of the past", spacing, rollout.every)
    if rollout.after_release < number * spacing - 1e-9:
        raise ValueError(
            f"{key}: the model reads {number} earlier states or closures, and replicas store only "
            f"those after their release; at least {number * spacing:g}"
        )


def check_members(experiment, replicas: int) -> None:
    """Check that there is a replica for each member, besides the one that is the truth."""
    rollout = experiment.rollout
    if rollout.after_release and rollout.members >= replicas:
        raise ValueError(
            f"rollout.members={rollout.members}: with rollout.after_release each begins in a "
            f"different replica, and one of the {replicas} is the truth; at most "
            f"{replicas - 1}"
        )


def _check_after_release(experiment) -> None:
    """Check coupled runs that begin in the states of replicas (``rollout.after_release``)."""
    rollout, evaluate = experiment.rollout, experiment.evaluate
    if not rollout.after_release:
        return
    key = f"rollout.after_release={rollout.after_release:g}"
    if not experiment.replicas.members:
        raise ValueError(f"{key} begins in the states of replicas: set replicas.members")
    if not experiment.use.test:  # else the second data set's number of replicas counts
        check_members(experiment, experiment.replicas.members)
    _check_steps("rollout.after_release", rollout.after_release, rollout.every)
    if rollout.begin > rollout.t_end - 1e-9:
        raise ValueError(
            f"{key} begins at {rollout.begin:g}, not before rollout.t_end={rollout.t_end:g}"
        )
    leads = [*evaluate.lead_times, *([evaluate.event.lead_time] if evaluate.event else [])]
    if min(leads) < rollout.after_release + 1e-9:
        raise ValueError(
            f"evaluate.lead_times: {min(leads):g} is not after {key}; they count from the release"
        )
    opponents = () if experiment.use.model else experiment.train.opponents
    for name, there, why in (
        ("rollout.rungs", rollout.rungs, "replicas store no unresolved modes to begin with"),
        ("reduced.known", experiment.reduced.known, "replicas store no past to follow"),
        ("train.opponents", opponents, "opponents are run without replicas"),
    ):
        if there:
            raise ValueError(f"{key} excludes {name}: {why}; remove one of them")


def _check_rollout(experiment) -> None:
    """Check times of the coupled run and its lead times."""
    generate, rollout = experiment.generate, experiment.rollout
    _check_steps("rollout.every", rollout.every, rollout.interval * generate.dt)
    _check_steps("rollout.t_start", rollout.t_start, generate.dt)
    if generate.closure == "subgrid" and rollout.t_end > generate.t_end:
        raise ValueError(
            f"rollout.t_end={rollout.t_end:g} is after generate.t_end={generate.t_end:g}, but "
            "the truth of closure subgrid is the stored DNS: lower it or generate longer"
        )
    if rollout.t_end <= rollout.t_start:
        raise ValueError(
            f"rollout.t_end={rollout.t_end} must be after rollout.t_start={rollout.t_start}"
        )
    if not generate.record.start <= rollout.t_start <= generate.t_end:
        raise ValueError(
            f"rollout.t_start={rollout.t_start} must be a stored time of generate, in "
            f"[{generate.record.start:g}, {generate.t_end:g}]"
        )
    _check_steps("rollout.t_start", rollout.t_start - generate.record.start, generate.record.every)
    horizon = rollout.t_end - rollout.t_start
    event = experiment.evaluate.event
    for lead in (*experiment.evaluate.lead_times, *([event.lead_time] if event else [])):
        if lead > horizon + 1e-9:
            raise ValueError(
                f"evaluate.lead_times: {lead:g} is beyond the horizon {horizon:g} of rollout"
            )
        _check_steps("evaluate.lead_times", lead, rollout.every)


def _check_event(experiment) -> None:
    """Check that ``evaluate.event`` names a field of the state if there are several."""
    event, physics = experiment.evaluate.event, experiment.physics
    if event is None:
        return
    key, names = "evaluate.event.channel", [channel.name for channel in physics.channels]
    if len(names) == 1:
        if event.channel is not None:
            raise ValueError(
                f"{key}={event.channel} is for a state of several fields, but {physics.equation} "
                "has one: remove it"
            )
    elif event.channel not in names:
        raise ValueError(
            f"{key}={'none' if event.channel is None else event.channel}, expected a field of "
            f"{physics.equation}: {', '.join(names)}"
        )


def _check_reduced(experiment) -> None:
    """Check the reduced solver's step and the bare solvers of ``rollout.rungs``."""
    generate, rollout, step = experiment.generate, experiment.rollout, experiment.reduced.step
    if generate.closure != "subgrid":
        known = experiment.reduced.known is not None
        foreign = {"reduced.step": step != 1, "reduced.known": known}
        foreign["reduced.python"] = experiment.reduced.python is not None
        for key, there in {**foreign, "rollout.rungs": bool(rollout.rungs)}.items():
            if there:
                raise ValueError(
                    f"{key} is for closure subgrid, generate.closure is {generate.closure}: "
                    "remove it"
                )
        return
    if experiment.reduced.python or experiment.physics.equation == "external":
        _check_users_solver(experiment)
    steps = {"reduced.step": step, **{f"step of {one.name}": one.step for one in rollout.rungs}}
    for key, value in steps.items():
        if value != "auto" and generate.interval % value:
            divisors = [n for n in range(1, generate.interval + 1) if generate.interval % n == 0]
            raise ValueError(
                f"{key}={value} does not divide generate.interval={generate.interval}: one of "
                f"{', '.join(map(str, divisors))}, or auto"
            )
    if generate.cfl and (experiment.needs_pilot or step != 1):
        raise ValueError(
            f"generate.cfl={generate.cfl:g}: other solvers' steps are multiples of a fixed step; "
            "remove it, or set reduced.step to 1 and the steps of rollout.rungs"
        )
    _check_steps("pilot.spinup", experiment.pilot_spinup, generate.interval * generate.dt)
    if experiment.needs_pilot and experiment.pilot_spinup > rollout.t_start + 1e-9:
        raise ValueError(
            f"pilot.spinup={experiment.pilot_spinup:g} begins before t = 0: at most "
            f"rollout.t_start={rollout.t_start:g}"
        )
    for rung in rollout.rungs:
        _check_rung(experiment, rung)
    if experiment.reduced.known:
        _check_known(experiment)


def _check_reduced_grid(experiment) -> None:
    """Check the grid of a reduced solver of others' data (``reduced.grid``)."""
    grid, data = experiment.reduced.grid, experiment.data
    if grid is None:
        return
    if data is None:
        raise ValueError(
            f"reduced.grid={grid} is for data of others (data): set generate.record.grid, or "
            "remove it"
        )
    if grid != experiment.data_grid:
        raise ValueError(
            f"reduced.grid={grid}: the closure in data.closure is on {experiment.data_grid} "
            "points per side: remove it"
        )


def _check_users_solver(experiment) -> None:
    """Refuse what needs the solver of this package, if the reduced solver is the user's."""
    reduced, rungs = experiment.reduced, experiment.rollout.rungs
    foreign = experiment.physics.equation == "external"
    why = "physics.equation=external" if foreign else f"reduced.python={reduced.python}"
    fitted = any(rung.drain or rung.step == "auto" for rung in rungs)
    for key, there, way_out in (
        ("reduced.step", reduced.step != 1, "the step of your solver is its dt: remove it"),
        ("reduced.known", reduced.known is not None, "remove it"),
        ("rollout.rungs", foreign and bool(rungs), "remove them"),
        ("rollout.rungs", fitted, "state their step, without drain, or remove them"),
        (
            "replicas.members",
            foreign and experiment.replicas.members > 0,
            "set it to 0; the truth is the trajectory of each start",
        ),
    ):
        if there:
            raise ValueError(f"{key} needs the solver of this package, but {why}: {way_out}")


def _check_known(experiment) -> None:
    """Check a reduced solver that is finer than the grid of the starts (``reduced.known``)."""
    generate, known = experiment.generate, experiment.reduced.known
    if known >= experiment.train_grid:
        raise ValueError(
            f"reduced.known={known}: expected fewer points a side than the reduced solver's "
            f"{experiment.train_grid} (generate.record.grid)"
        )
    if experiment.train_grid != experiment.data_grid:
        raise ValueError(
            f"reduced.known={known}: set generate.record.grid to train.grid="
            f"{experiment.train_grid}, the grid of the reduced solver"
        )
    if experiment.physics.dimensions == 1:
        raise ValueError(f"reduced.known={known} is for flows in two dimensions: remove it")
    _check_rung(experiment, experiment.solver)
    if experiment.solver.start == "synchronised" and not generate.consecutive:
        raise ValueError(
            "reduced.start=synchronised needs the past at every closure interval: set "
            f"generate.record.every to {generate.interval * generate.dt:g}, or reduced.start to "
            "moved"
        )


def _check_rung(experiment, rung) -> None:
    """Check grid, start and past of a bare solver."""
    generate, rollout, past = (
        experiment.generate,
        experiment.rollout,
        experiment.past_of(rung),
    )
    if not experiment.known_grid <= rung.grid <= generate.grid:
        raise ValueError(
            f"rollout.rungs: {rung.name} has {rung.grid} points a side; expected at least the "
            f"reduced solver's {experiment.known_grid} and at most the DNS's {generate.grid}"
        )
    if rung.start != "empty" and not experiment.replicas.members:
        raise ValueError(
            f"rollout.rungs: {rung.name} needs the starts' unresolved modes, which the replicas "
            "store: set replicas.members, or its start to empty"
        )
    if past:
        if generate.record.burst > 1:
            raise ValueError(
                f"rollout.rungs: {rung.name} follows consecutive snapshots: set "
                "generate.record.burst to 1, or its start to moved"
            )
        _check_steps(f"past of {rung.name}", past, generate.record.every)
        if rollout.t_start - past < generate.record.start - 1e-9:
            raise ValueError(
                f"rollout.rungs: {rung.name} follows {past:g} of the past before rollout.t_start="
                f"{rollout.t_start:g}, snapshots begin at {generate.record.start:g}: lower its "
                "past, or generate.record.start"
            )
    if past > experiment.pilot_spinup + 1e-9 and (rung.drain or rung.step == "auto"):
        raise ValueError(
            f"rollout.rungs: {rung.name} follows {past:g} of the past, the pilot stores "
            f"{experiment.pilot_spinup:g}: raise pilot.spinup"
        )


def _check_replicas(experiment) -> None:
    """Check closure and times of the replicas."""
    generate, rollout, replicas = experiment.generate, experiment.rollout, experiment.replicas
    if not replicas.members:
        return
    if generate.closure != "subgrid":
        raise ValueError(
            f"replicas.members={replicas.members}: the law of closure {generate.closure} is known "
            "exactly; replicas are for closure subgrid"
        )
    if generate.cfl:
        raise ValueError(
            f"generate.cfl={generate.cfl:g}: replicas need steps of one length; remove one of them"
        )
    _check_steps("replicas.spinup", replicas.spinup, rollout.every)
    if replicas.spinup > rollout.t_start:
        raise ValueError(
            f"replicas.spinup={replicas.spinup:g} begins before t = 0: at most "
            f"rollout.t_start={rollout.t_start:g}"
        )
    ahead = generate.interval * generate.dt
    if ahead > rollout.every * (1 + 1e-9):
        raise ValueError(
            f"rollout.every={rollout.every:g} is shorter than the closure interval {ahead:g} of "
            "the replicas"
        )


def _check_sensors(experiment) -> None:
    """Check that sensors and the model's conditions agree."""
    generate, rollout = experiment.generate, experiment.rollout
    if experiment.model.conditions.sensors == "required" and not rollout.sensors:
        raise ValueError("model.conditions.sensors=required, but rollout.sensors is not set")
    if rollout.sensors and experiment.model.conditions.sensors == "none":
        raise ValueError(
            "rollout.sensors is set but model.conditions.sensors=none: set it to optional"
        )
    if experiment.evaluate.sensors and experiment.model.conditions.sensors == "none":
        raise ValueError(
            "evaluate.sensors is set but model.conditions.sensors=none: set it to optional"
        )
    if experiment.model.modes and 2 * experiment.model.modes > experiment.train_grid:
        raise ValueError(
            f"model.modes={experiment.model.modes} needs a grid of at least "
            f"{2 * experiment.model.modes}, "
            f"train.grid is {experiment.train_grid}"
        )
    if generate.closure == "subgrid":
        _check_sensors_of_subgrid(experiment)


def _trains_residual(config) -> bool:
    """Return whether a model's residual is a network, which reads what sensors tell."""
    residual = config.get("residual")
    return residual is not None and find(ResidualKind, residual, "model.residual").trained


def _check_sensors_of_subgrid(experiment) -> None:
    """Check sensors of a subgrid closure, which read the stored closures of the starts."""
    generate, rollout, sides = experiment.generate, experiment.rollout, experiment.physics
    layouts = [("rollout.sensors", rollout.sensors)] if rollout.sensors else []
    layouts += [("evaluate.sensors", one) for one in experiment.evaluate.sensors]
    if not layouts:
        return
    config = resolve(experiment.model.model_dump(exclude_none=True))
    if sides.dimensions != 2 and _trains_residual(config):
        raise ValueError(
            f"{layouts[0][0]}: a model with residual {config['residual']} reads sensors only in "
            f"two dimensions, {sides.equation} has {sides.dimensions}: set model.residual to "
            "gaussian"
        )
    for key, layout in layouts:
        if layout.layout == "regular" and experiment.train_grid % layout.number:
            raise ValueError(
                f"{key}: {layout.number} sensors per side do not divide the "
                f"{experiment.train_grid} points of the reduced grid"
            )
    if not rollout.sensors:
        return
    every = generate.interval * generate.dt
    if not generate.consecutive or generate.record.burst > 1:
        raise ValueError(
            f"rollout.sensors reads the stored closure of every interval: set "
            f"generate.record.every to {every:g} and record.burst to 1, they are "
            f"{generate.record.every:g} and {generate.record.burst}"
        )
    if rollout.interval != generate.interval:
        raise ValueError(
            f"rollout.interval={rollout.interval}: rollout.sensors reads closures of "
            f"generate.interval={generate.interval} steps: set rollout.interval to it"
        )
    for key, there, why in (
        (
            f"rollout.after_release={rollout.after_release:g}",
            rollout.after_release,
            "members begin in states of replicas",
        ),
        (
            f"reduced.known={experiment.reduced.known}",
            experiment.reduced.known,
            "the solver has modes that a start does not know",
        ),
    ):
        if there:
            raise ValueError(
                f"rollout.sensors reads the start's own trajectory, but with {key} {why}: remove "
                "one of them"
            )


def _check_divides(key: str, grid: int, of: int) -> None:
    """Raise ValueError unless ``grid`` divides the finer grid ``of``."""
    if grid != of and of % grid:
        raise ValueError(f"{key}={grid} does not divide {of}, the grid it is taken from")


def _check_steps(key: str, time: float, step: float) -> None:
    """Raise ValueError unless ``time`` is a multiple of ``step``."""
    ratio = time / step
    if abs(ratio - round(ratio)) > 1e-6 * max(1.0, abs(ratio)):
        raise ValueError(
            f"{key}={time:g} is not a multiple of {step:g}; nearest: {round(ratio) * step:g}"
        )
