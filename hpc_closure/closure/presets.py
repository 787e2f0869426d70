"""A model from the experiment: the presets, and the classes that they choose."""

from typing import Any

from hpc_closure.closure.default import DefaultModel
from hpc_closure.closure.interface import ClosureModel
from hpc_closure.closure.published import PublishedModel

__all__ = ["PRESETS", "build", "resolve"]

DEFAULT: dict[str, Any] = {
    "preset": "default",
    "conditions": {"sensors": "optional", "history": 0, "physics": False},
    "library": "quadratic",
    "generator": "score",
    "width": 24,
    "modes": 8,
    "layers": 3,
    "mean_layers": 3,
    "amplitude": True,
    "base_noise": "matched",
    "schedule": "trigonometric",
    "method": "euler",
    "evaluations": 4,
    "shares": [0.4, 0.6],
    "form": "auto",
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

ONE_PASS: dict[str, Any] = {**DEFAULT, "preset": "one_pass", "generator": "crps", "evaluations": 1}
PRESETS = {"default": DEFAULT, "one_pass": ONE_PASS, "published": PUBLISHED}


def resolve(model: dict[str, Any]) -> dict[str, Any]:
    """A preset with the differences of ``model``; None means the preset's value.

    Raises:
        ValueError: unknown preset or key.
    """
    name = model.get("preset", "default")
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}, expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {key: value for key, value in model.items() if value is not None}
    unknown = sorted(set(given) - set(preset))
    if unknown:
        raise ValueError(
            f"model.{unknown[0]}: unknown key for preset {name}; valid: {', '.join(preset)}"
        )
    conditions = {**preset["conditions"], **(given.pop("conditions", None) or {})}
    return {**preset, **given, "conditions": conditions}


def build(model: dict[str, Any], grid: int, length: float = 1.0) -> ClosureModel:
    """A fresh model.

    Args:
        model: the experiment's ``model`` section; keys left out or None come from the preset.
        grid: points per side of the training fields; sets the band, |k| <= (grid - 1) // 3.
        length: side of the periodic square.
    """
    config = resolve(model)
    chosen = PublishedModel if config["preset"] == "published" else DefaultModel
    built = chosen(config, grid, length)
    built.num_parameters()  # refuses complex ones
    return built
