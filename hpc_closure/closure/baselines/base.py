"""A baseline without chance: one formula of the resolved state, with constants that are tuned."""

from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar

from hpc_closure.experiment.kinds import BARE, ModelKind, own_options

__all__ = ["Baseline"]


class Baseline(ModelKind):
    """Give U of the state alone; derive from it, in a file of the package or outside.

    Attributes:
        constants: of :meth:`tendency`, in the order of its arguments, each with the values from
            which coupled runs of validation trajectories choose. One that stands in ``Options``
            may be set in the experiment; it is not tuned then.
        note: in the list of parts, where there are no constants.
    """

    tuned = True
    draws = False
    constants: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    note: ClassVar[str] = ""

    @classmethod
    def tendency(cls, w_hat: Any, band: Any, delta: float, *constants: Any) -> Any:
        """Compute spectra of U, (B, 2K + 1, K + 1), of those of the vorticity.

        Args:
            w_hat: (B, 2K + 1, K + 1) in the model's band.
            band: :class:`hpc_closure.closure.fields.modes.Band`.
            delta: spacing of the reduced solver's grid.
            constants: numbers, or one for each row (B, 1, 1).
        """
        raise NotImplementedError

    @classmethod
    def candidates(cls, config: dict[str, Any]) -> list[tuple[float, ...]]:
        """List the constants to choose from; one of each that the configuration sets."""
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
        for key, none in {"previous": 0, **BARE}.items():
            if getattr(conditions, key) != none:
                raise ValueError(
                    f"model.preset={experiment.model.preset} reads the resolved state alone: set "
                    f"model.conditions.{key} to {none}"
                )
