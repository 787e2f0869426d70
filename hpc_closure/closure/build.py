"""A model from the experiment."""

from typing import Any

from hpc_closure.closure.composed import ComposedModel
from hpc_closure.closure.functional import FunctionalModel
from hpc_closure.closure.interface import ClosureModel
from hpc_closure.closure.published import PublishedModel
from hpc_closure.experiment.models import FUNCTIONAL, resolve

__all__ = ["build"]


def build(model: dict[str, Any], grid: int, length: float = 1.0) -> ClosureModel:
    """A fresh model.

    Args:
        model: the experiment's ``model`` section; keys left out or None come from the preset.
        grid: points per side of the training fields; sets the band, |k| <= (grid - 1) // 3.
        length: side of the periodic square.
    """
    config = resolve(model)
    kinds = {"published": PublishedModel, **dict.fromkeys(FUNCTIONAL, FunctionalModel)}
    built = kinds.get(config["preset"], ComposedModel)(config, grid, length)
    built.num_parameters()  # refuses complex ones
    return built
