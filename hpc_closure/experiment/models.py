"""Resolve the section ``model``: presets of composed parts, or a complete model by name."""

from typing import Any

from hpc_closure.experiment.kinds import (
    BARE,
    Kind,
    ModelKind,
    NetworkKind,
    ResidualKind,
    find,
    is_path,
    names,
)

__all__ = [
    "PRESETS",
    "RETIRED",
    "RIVALS",
    "closed_mean",
    "draws",
    "is_composite",
    "kind_of",
    "kinds_of",
    "network_of",
    "preset_names",
    "resolve",
]

DEFAULT: dict[str, Any] = {
    "preset": "default",
    "conditions": {"sensors": "optional", "previous_states": 0, "physics_estimate": False},
    "mean": ["regression", "fno"],
    "regression_terms": "quadratic",
    "amplitude": "fno",
    "amplitude_score": "likelihood",
    "residual": "score",
    "generator": "fno",
    "sensors": "kriging",
    "validate_parts": "on",
    "width": 24,
    "modes": 8,
    "layers": 3,
    "mean_layers": 3,
    "noise_memory": "on",
    "method": "euler",
    "function_evaluations": 4,
    "shares": [0.4, 0.6],
    "spectral_convolution": "auto",
    "adjusted": False,  # whether closed forms were tuned by training through the solver
    "dimensions": 2,  # dimensions of the flow
    "equation": None,  # parameters of an equation of several fields
}

# opponents of a generator, around the best mean and fitted by likelihood
RIVALS = (
    "gaussian_modes",
    "gaussian_state",
    "mixture",
    "gaussian_amplitude",
    "point_mixture",
    "resampled",
)
RIVAL = {"mean": ["regression", "numbers", "fno"], "amplitude": "none"}
# for events at points: mean, amplitude and mixture are local
LOCAL_MEAN = {"mean": ["regression", "cnn"]}
AMPLIFIED = {**LOCAL_MEAN, "amplitude": "cnn", "amplitude_score": "crps"}
POINTS = {**LOCAL_MEAN, "residual": "point_mixture", "function_evaluations": 1}
# centred: the components have zero mean; None = true if the mean is learned
MIXED = {"residual": "mixture", "function_evaluations": 1, "centred": None}


def _rival(name: str, **parts: Any) -> dict[str, Any]:
    conditions = {**DEFAULT["conditions"], "sensors": "none"}
    return {**DEFAULT, "preset": name, "conditions": conditions, **RIVAL, **parts}


# the generator alone: no mean, no kriging, no validation of its gain
ALONE = {"mean": [], "amplitude": "none", "sensors": "learned", "validate_parts": "off"}
CLOSED = {"mean": ["regression"], "amplitude": "none", "residual": "gaussian"}
LOCAL = {**CLOSED, "mean": ["regression", "cnn"], "width": 16, "mean_layers": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "default": DEFAULT,
    "fno_score": {**DEFAULT, "preset": "fno_score", **ALONE, "modes": 12},
    "one_pass": {**DEFAULT, "preset": "one_pass", "residual": "crps", "function_evaluations": 1},
    "gaussian": {**DEFAULT, "preset": "gaussian", **CLOSED},
    "gaussian_modes": _rival("gaussian_modes", residual="modes"),
    "gaussian_state": _rival("gaussian_state", **MIXED, components=1),
    "mixture": _rival("mixture", **MIXED, components=2),
    "point_mixture": _rival("point_mixture", **POINTS),
    "gaussian_amplitude": _rival("gaussian_amplitude", **AMPLIFIED, residual="gaussian"),
    "resampled": _rival("resampled", **AMPLIFIED, residual="resampled"),
    "convolutional": {**DEFAULT, "preset": "convolutional", **LOCAL},
}
CHOICES = {
    "amplitude_score": ("likelihood", "crps"),
    "generator": ("fno", "cnn"),
    "noise_memory": ("on", "off"),
    "sensors": ("kriging", "learned"),
    "validate_parts": ("on", "off"),
    "regression_terms": ("none", "linear", "quadratic"),
}
# Keys with one remaining value, which older experiments and model files may contain. Stage hashes
# include them if they are stated.
RETIRED = {"schedule": "trigonometric", "base_noise": "matched"}
CLOSED_MEANS = ("regression", "numbers")  # parts of the mean that are fitted in closed form


def preset_names() -> tuple[str, ...]:
    """List the presets: composed models, then complete models."""
    return (*PRESETS, *names(ModelKind))


def is_composite(config: dict[str, Any]) -> bool:
    """Return whether a preset describes a model composed of a mean and a residual."""
    return config["preset"] in PRESETS


def kind_of(preset: str) -> type[ModelKind] | None:
    """Find the class of a complete model by its preset; None for a composed model."""
    return None if preset in PRESETS else find(ModelKind, preset, "model.preset")


def network_of(config: dict[str, Any]) -> str | None:
    """Return the name of the mean's network, or None."""
    return next((name for name in config["mean"] if name not in CLOSED_MEANS), None)


def closed_mean(config: dict[str, Any]) -> list[str]:
    """List the parts of the mean that are fitted in closed form."""
    return [name for name in config["mean"] if name in CLOSED_MEANS]


def kinds_of(config: dict[str, Any]) -> list[type[Kind]]:
    """List the classes that a configuration names."""
    complete = kind_of(config["preset"])
    if complete is not None:
        return [complete]
    parts: list[type[Kind]] = [
        find(NetworkKind, name, "model.mean")
        for name in config["mean"]
        if name not in CLOSED_MEANS
    ]
    if config["amplitude"] != "none":
        parts.append(find(NetworkKind, config["amplitude"], "model.amplitude"))
    return [*parts, find(ResidualKind, config["residual"], "model.residual")]


def draws(config: dict[str, Any]) -> bool:
    """Return whether a model of this configuration is stochastic."""
    complete = kind_of(config["preset"])
    return config.get("residual") != "none" if complete is None else complete.draws


def resolve(model: dict[str, Any]) -> dict[str, Any]:
    """Resolve a model: values of its preset, replaced by those of ``model`` that are not None.

    Raises:
        ValueError: unknown preset, key or class, or a value that was removed.
    """
    name = model.get("preset", "default")
    if name in PRESETS:
        preset = PRESETS[name]
    elif is_path(name) or name in names(ModelKind):
        preset = _whole(find(ModelKind, name, "model.preset"), name)
    else:
        known = ", ".join(preset_names())
        raise ValueError(f"model.preset={name!r}, expected one of {known}")
    chosen = {key: value for key, value in model.items() if value is not None}
    for key, value in RETIRED.items():
        if chosen.get(key, value) != value:
            raise ValueError(
                f"model.{key}={chosen[key]!r} was removed, {value} is the only value left: remove "
                "the key"
            )
        if "mean" in preset:  # complete models never had these keys
            chosen.pop(key, None)
    conditions = {**preset["conditions"], **(chosen.pop("conditions", None) or {})}
    resolved = {**preset, **chosen, "conditions": conditions}
    if resolved.get("sensors") == "learned" and "method" not in chosen:
        resolved["method"] = "gaussian"  # its steps are exact for the spread that is learned
    if "mean" in preset:
        resolved["mean"] = [] if resolved["mean"] == "none" else list(resolved["mean"])
        _check_choices(resolved)
    kinds = kinds_of(resolved)
    inside = {key for kind in kinds if _is_inside(kind) for key in _own(kind)}
    unknown = sorted(set(chosen) - set(preset) - inside - {"options"})
    if unknown:
        valid = ", ".join([*preset, *sorted(inside - set(preset))])
        raise ValueError(
            f"model.{unknown[0]} is no setting of model.preset={name}: remove it; valid: {valid}"
        )
    _fill_options(resolved, kinds)
    if "mean" in preset:
        _check_parts(resolved)
    return resolved


def _whole(kind: type[ModelKind], name: str) -> dict[str, Any]:
    """Return the preset values of a complete model; keys of an outside class are options."""
    additional = [] if is_path(name) else [key for key in _own(kind) if key not in kind.defaults]
    equation = ["equation"] if kind.several_fields else []
    keys = dict.fromkeys([*equation, *additional])
    sides = {"dimensions": 2} if tuple(kind.flow_dimensions) != (2,) else {}
    return {"preset": name, "conditions": BARE, **keys, **sides, **kind.defaults}


def _own(kind: type[Kind]) -> list[str]:
    """List the additional keys of a class."""
    return [] if kind.Options is None else list(kind.Options.model_fields)


def _is_inside(kind: type[Kind]) -> bool:
    """Return whether a class belongs to the package, so that its keys belong to ``model``."""
    return bool(kind.name) and kind.known.get(kind.name) is kind


def _fill_options(config: dict[str, Any], kinds: list[type[Kind]]) -> None:
    """Validate ``options`` for the classes outside the package and add defaults, in place."""
    rest, read = dict(config.pop("options", None) or {}), {}
    outside = [kind for kind in kinds if not _is_inside(kind)]
    for kind in outside:
        options = {key: rest[key] for key in _own(kind) if key in rest}
        read.update(_read(kind, options))
    unknown = sorted(set(rest) - set(read))
    if unknown:
        valid = ", ".join(read) or "none"
        raise ValueError(f"model.options.{unknown[0]}: unknown key; valid: {valid}")
    if read or outside:
        config["options"] = read
    for kind in kinds:
        if kind not in outside and kind.Options is not None:
            values = _read(kind, {key: config[key] for key in _own(kind) if key in config})
            config.update({key: values[key] for key in values if values[key] is not None})


def _read(kind: type[Kind], values: dict[str, Any]) -> dict[str, Any]:
    """Validate the additional keys of a class; return all of them with plain values.

    Raises:
        ValueError: a key has an invalid value.
    """
    if kind.Options is None:
        return {}
    try:
        return kind.Options.model_validate(values).model_dump(mode="json")
    except ValueError as error:
        first, *_ = error.errors()  # type: ignore[attr-defined]
        key = ".".join(map(str, first["loc"]))
        section = "model" if _is_inside(kind) else "model.options"
        raise ValueError(f"{section}.{key}={first.get('input')!r}: {first['msg']}") from None


def _check_choices(config: dict[str, Any]) -> None:
    """Raise ValueError unless the named parts and choices exist."""
    means = [*CLOSED_MEANS, *names(NetworkKind)]
    for name in config["mean"]:
        if name not in means and not is_path(name):
            raise ValueError(
                f"model.mean={config['mean']}: expected {', '.join(means)}, "
                "package.module:Class or none"
            )
    if len(set(config["mean"]) - set(CLOSED_MEANS)) > 1:
        raise ValueError(f"model.mean={config['mean']}: more than one network; name one")
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise ValueError(f"model.{key}={config[key]!r}, expected one of {', '.join(known)}")


def _check_parts(config: dict[str, Any]) -> None:
    """Raise ValueError unless the parts are compatible."""
    residual = find(ResidualKind, config["residual"], "model.residual")
    residual.check(config)
    if not residual.reads_sensors and config["conditions"]["sensors"] != "none":
        raise ValueError(
            f"model.residual={config['residual']} cannot be conditioned on sensors: set "
            "model.conditions.sensors to none"
        )
    learned = config["sensors"] == "learned" and config["residual"] != "none"
    if learned and config["dimensions"] != 2:
        raise ValueError(
            "model.sensors=learned is for flows in two dimensions, this one has "
            f"{config['dimensions']}: use kriging"
        )
    if learned and not residual.learns_sensors:
        raise ValueError(
            "model.sensors=learned needs a residual that learns: set model.residual to "
            f"{_either(ResidualKind, 'learns_sensors')}, or model.sensors to kriging"
        )


def _either(family: type[Kind], attribute: str) -> str:
    """List the names of a family whose attribute is true, joined by "or"."""
    return " or ".join(name for name in names(family) if getattr(family.known[name], attribute))
