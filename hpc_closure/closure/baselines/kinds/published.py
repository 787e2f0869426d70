"""The published network (Dong, Chen, Wu, J. Comput. Phys. 2025), for comparison."""

from typing import Literal

from pydantic import Field

from hpc_closure.experiment.kinds import ModelKind
from hpc_closure.spectral.recipe import Section


class Published(ModelKind):
    """Draw with the published score network, its loss and its sampler."""

    name = "published"
    reads = ("width", "modes", "layers", "spectral_convolution", "function_evaluations")
    defaults = {
        "conditions": {"sensors": "required", "previous_states": 0, "physics_estimate": False},
        "width": 20,
        "modes": 8,
        "layers": 4,
        "upscaling": "interp",
        "target_factor": 1.0,
        "method": "euler_maruyama",
        "function_evaluations": 10,
        "spectral_convolution": "fft",
    }

    class Options(Section):
        """Keys of this model."""

        upscaling: Literal["interp", "conv"] | None = Field(
            None, description="published: how sensors are carried to the grid"
        )

    @classmethod
    def build(cls, config, grid, length):
        from hpc_closure.closure.baselines.published_model import PublishedModel

        return PublishedModel(config, grid, length)

    @classmethod
    def check(cls, experiment):
        conditions = experiment.model.conditions
        if conditions.sensors == "optional":
            raise ValueError(
                "model.preset=published is trained either with sensors or without: set "
                "model.conditions.sensors to required or none"
            )
        for key in ("previous_states", "previous_closures", "physics_estimate"):
            if getattr(conditions, key):
                raise ValueError(
                    f"model.preset=published has no {key}: remove model.conditions.{key}"
                )
        layouts = [experiment.rollout.sensors, *experiment.evaluate.sensors]
        if any(layout and layout.layout == "scattered" for layout in layouts):
            raise ValueError("model.preset=published reads sensors of layout regular only")
        if experiment.rollout.interval < experiment.generate.interval:
            raise ValueError(
                f"rollout.interval={experiment.rollout.interval}: model.preset=published is never "
                "rescaled and is held at least as long as it was trained at, "
                f"generate.interval={experiment.generate.interval}"
            )

    @classmethod
    def settings(cls, experiment):
        from hpc_closure.closure.targets import QUOTED_FACTOR

        # it learns the closure as published, G = 2U
        return {"target_factor": QUOTED_FACTOR[experiment.generate.closure]}
