"""The presets of the model: which parts, and their sizes; plain data."""

from typing import Any

__all__ = ["FUNCTIONAL", "NETWORKS", "PRESETS", "RETIRED", "RIVALS", "UNTRAINED", "resolve"]

DEFAULT: dict[str, Any] = {
    "preset": "default",
    "conditions": {"sensors": "optional", "history": 0, "physics": False},
    "mean": ["regression", "fno"],
    "library": "quadratic",
    "amplitude": "fno",
    "residual": "score",
    "sensors": "kriging",
    "gate": "on",
    "width": 24,
    "modes": 8,
    "layers": 3,
    "mean_layers": 3,
    "memory": "on",
    "method": "euler",
    "evaluations": 4,
    "shares": [0.4, 0.6],
    "form": "auto",
    "adjusted": False,  # closed forms by training through the solver
    "dimensions": 2,  # of the flow
}

PUBLISHED: dict[str, Any] = {
    "preset": "published",
    "conditions": {"sensors": "required", "history": 0, "physics": False},
    "width": 20,
    "modes": 8,
    "layers": 4,
    "upscaling": "interp",
    "target_factor": 1.0,
    "method": "euler_maruyama",
    "evaluations": 10,
    "form": "fft",
}

# eddy viscosities, and their constants: None = tuned
FUNCTIONAL = ("smagorinsky", "leith", "dynamic_smagorinsky", "dynamic_leith", "jansen_held")
BARE = {"sensors": "none", "history": 0, "physics": False}
# what a generator is compared with: about the best mean, fitted by likelihood
RIVALS = ("gaussian_modes", "gaussian_state", "mixture")
RIVAL = {"mean": ["regression", "numbers", "fno"], "amplitude": "none"}
# centred: its components are about the mean, where that was learned; None = as the mean has it
MIXED = {"residual": "mixture", "evaluations": 1, "centred": None}


def _rival(name: str, **parts: Any) -> dict[str, Any]:
    conditions = {**DEFAULT["conditions"], "sensors": "none"}
    return {**DEFAULT, "preset": name, "conditions": conditions, **RIVAL, **parts}


def _functional(name: str) -> dict[str, Any]:
    tuned = () if name.startswith("dynamic_") else ("constant",)
    open_ = (*tuned, "returned") if name == "jansen_held" else tuned
    return {"preset": name, "conditions": BARE, **dict.fromkeys(open_)}


# the method alone: nothing is granted, nothing is judged away
ALONE = {"mean": [], "amplitude": "none", "sensors": "learned", "gate": "off"}
CLOSED = {"mean": ["regression"], "amplitude": "none", "residual": "gaussian"}
LOCAL = {**CLOSED, "mean": ["regression", "cnn"], "width": 16, "mean_layers": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "default": DEFAULT,
    "fno_score": {**DEFAULT, "preset": "fno_score", **ALONE, "modes": 12},
    "one_pass": {**DEFAULT, "preset": "one_pass", "residual": "crps", "evaluations": 1},
    "gaussian": {**DEFAULT, "preset": "gaussian", **CLOSED},
    "gaussian_modes": _rival("gaussian_modes", residual="modes"),
    "gaussian_state": _rival("gaussian_state", **MIXED, components=1),
    "mixture": _rival("mixture", **MIXED, components=2),
    "convolutional": {**DEFAULT, "preset": "convolutional", **LOCAL},
    "published": PUBLISHED,
    **{name: _functional(name) for name in FUNCTIONAL},
}
CHOICES = {
    "amplitude": ("fno", "cnn", "none"),
    "residual": ("score", "crps", "mixture", "modes", "gaussian", "none"),
    "memory": ("on", "off"),
    "sensors": ("kriging", "learned"),
    "gate": ("on", "off"),
    "library": ("none", "linear", "quadratic"),
}
NETWORKS = ("fno", "cnn")  # of the mean and of the amplitude
MEANS = ("regression", "numbers", *NETWORKS)
UNTRAINED = ("gaussian", "modes", "none")  # residuals
# Settings with one value left, which older experiments and model files may state. Stage hashes
# cover them as they stand there.
RETIRED = {"schedule": "trigonometric", "base_noise": "matched"}


def resolve(model: dict[str, Any]) -> dict[str, Any]:
    """Return a preset with the differences of ``model``; None means the preset's value.

    Raises:
        ValueError: unknown preset or key, or a value that was removed.
    """
    name = model.get("preset", "default")
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}, expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {key: value for key, value in model.items() if value is not None}
    for key, value in RETIRED.items():
        if given.get(key, value) != value:
            raise ValueError(
                f"model.{key}={given[key]!r} was removed, {value} is the only value left: remove "
                "the key"
            )
        if "mean" in preset:  # the others never had it
            given.pop(key, None)
    unknown = sorted(set(given) - set(preset))
    if unknown:
        raise ValueError(
            f"model.{unknown[0]} is no setting of model.preset={name}: remove it; valid: "
            f"{', '.join(preset)}"
        )
    conditions = {**preset["conditions"], **(given.pop("conditions", None) or {})}
    resolved = {**preset, **given, "conditions": conditions}
    if resolved.get("sensors") == "learned" and "method" not in given:
        resolved["method"] = "gaussian"  # steps that are exact for the spread that it tells
    if "mean" in resolved:
        resolved["mean"] = [] if resolved["mean"] == "none" else list(resolved["mean"])
        _check_parts(resolved)
    return resolved


def _check_parts(config: dict[str, Any]) -> None:
    """Raise ValueError unless parts are known and fit together."""
    for name in config["mean"]:
        if name not in MEANS:
            raise ValueError(f"model.mean={config['mean']}: expected {', '.join(MEANS)} or none")
    if len(set(config["mean"]) & set(NETWORKS)) > 1:
        raise ValueError(f"model.mean={config['mean']}: one network, fno or cnn")
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise ValueError(f"model.{key}={config[key]!r}, expected one of {', '.join(known)}")
    if config["residual"] == "none" and config["conditions"]["sensors"] != "none":
        raise ValueError(
            "model.residual=none has one answer, with nothing in it for sensors to tell: set "
            "model.conditions.sensors to none"
        )
    if config["residual"] == "mixture" and "components" not in config:
        raise ValueError(
            "model.residual=mixture is of the presets gaussian_state and mixture: set model.preset"
        )
    if "numbers" in config["mean"] and config["dimensions"] != 2:
        raise ValueError("model.mean=numbers reads a flow in two dimensions: remove it")
    if config["residual"] in ("modes", "mixture") and config["conditions"]["sensors"] != "none":
        raise ValueError(
            f"model.residual={config['residual']} is drawn without sensors: set "
            "model.conditions.sensors to none"
        )
    if config["residual"] in ("gaussian", "modes", "mixture") and config["sensors"] == "learned":
        raise ValueError(
            "model.sensors=learned needs a residual that learns: set model.residual to score or "
            "crps, or model.sensors to kriging"
        )
