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
    #: whether it can be applied to layers, each with its own flow
    layered: ClassVar[bool] = False
    #: constants that are chosen after the others, which are chosen with the first values of these
    later: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def tendency(cls, w_hat: Any, band: Any, delta: float, *constants: Any) -> Any:
        """Compute spectra of U, (B, 2K + 1, K + 1), from those of the vorticity.

        If it is ``layered``, it is also applied to the relative vorticity of each layer. In three
        dimensions U and the velocity are (B, 3, ...).

        Args:
            w_hat: (B, 2K + 1, K + 1) in the model's band.
            band: :class:`hpc_closure.closure.fields.modes.Band`.
            delta: spacing of the reduced solver's grid.
            constants: numbers, or tensors (B, 1, 1) with one value per row.
        """
        raise NotImplementedError

    @classmethod
    def noise(cls, w_hat: Any, white: Any, band: Any, delta: float, *constants: Any) -> Any:
        """Compute spectra (M, ...) of the random part of U, if ``draws`` is true.

        Args:
            w_hat: (M, ...) states, one per member.
            white: (M, ...) spectra of noise with unit variance per mode, correlated in time as
                :meth:`memory` says.
            band, delta, constants: as of :meth:`tendency`.
        """
        raise NotImplementedError

    @classmethod
    def memory(cls, *constants: float) -> float:
        """Return the calls after which the noise is another, a power of two; 0 = white in time."""
        return 0.0

    @classmethod
    def candidates(
        cls, config: dict[str, Any], best: tuple[float, ...] | None = None
    ) -> list[tuple[float, ...]]:
        """List the tuples of constants to choose from; a constant that is set has one value.

        Args:
            config: configuration of the model.
            best: constants of the first choice; then the constants of ``later`` vary, and the
                others are those.
        """
        fixed, choices = own_options(cls, config), []
        for place, (name, values) in enumerate(cls.constants.items()):
            if fixed.get(name) is not None:
                values = (float(fixed[name]),)
            elif best is None and name in cls.later:
                values = values[:1]
            elif best is not None and name not in cls.later:
                values = (best[place],)
            choices.append(values)
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
        if physics.velocity_channels:
            if len(physics.velocity_channels) < len(physics.channels):
                raise ValueError(
                    f"model.preset={experiment.model.preset} is for a velocity alone, but "
                    f"{physics.equation} has further fields: use gaussian"
                )
            return
        if physics.channel_shape and not cls.layered:
            raise ValueError(
                f"model.preset={experiment.model.preset} is for equations of one field or of a "
                f"velocity, but {physics.equation} has {len(physics.channels)} fields: use "
                "gaussian or leith"
            )
        if physics.carriers != tuple(range(len(physics.channels))):
            raise ValueError(
                f"model.preset={experiment.model.preset} is for fields that are layers, each with "
                f"its own flow; the fields of {physics.equation} share one: use gaussian"
            )
