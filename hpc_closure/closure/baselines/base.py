"""Base class of deterministic baselines: a formula of the resolved state with tuned constants."""

from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar

from hpc_closure.experiment.kinds import BARE, ModelKind, own_options

__all__ = ["Baseline"]


class Baseline(ModelKind):
    """Base class of closures that are a function of the state, for use also outside the package.

    Attributes:
        constants: names of the constants, in the order of :meth:`tendency`'s arguments, with
            candidate values, among which coupled runs of validation trajectories choose. A
            constant in ``Options`` can be set in the experiment and is then not tuned.
        note: text in the list of parts if there are no constants.
    """

    tuned = True
    draws = False
    constants: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    note: ClassVar[str] = ""

    @classmethod
    def tendency(cls, w_hat: Any, band: Any, delta: float, *constants: Any) -> Any:
        """Compute spectra of U, (B, 2K + 1, K + 1), from those of the vorticity.

        With ``several_fields`` it is also applied to the relative vorticity of each layer.

        Args:
            w_hat: (B, 2K + 1, K + 1) in the model's band.
            band: :class:`hpc_closure.closure.fields.modes.Band`.
            delta: spacing of the reduced solver's grid.
            constants: numbers, or tensors (B, 1, 1) with one value per row.
        """
        raise NotImplementedError

    @classmethod
    def candidates(cls, config: dict[str, Any]) -> list[tuple[float, ...]]:
        """List the tuples of constants to choose from; a constant that is set has one value."""
        fixed = own_options(cls, config)
        choices = (
            values if fixed.get(name) is None else (float(fixed[name]),)
            for name, values in cls.constants.items()
        )
        return list(product(*choices))

    @classmethod
    def build(cls, config, grid, length):
        from hpc_closure.closure.baselines.functional import FunctionalModel

        return FunctionalModel(cls, config, grid, length)

    @classmethod
    def check(cls, experiment):
        conditions = experiment.model.conditions
        for key, none in {"previous_closures": 0, **BARE}.items():
            if getattr(conditions, key) != none:
                raise ValueError(
                    f"model.preset={experiment.model.preset} reads the resolved state alone: set "
                    f"model.conditions.{key} to {none}"
                )
        physics = experiment.physics
        if physics.carriers != tuple(range(len(physics.channels))):
            raise ValueError(
                f"model.preset={experiment.model.preset} is for fields that are layers, each with "
                f"its own flow; the fields of {physics.equation} share one: use gaussian"
            )
