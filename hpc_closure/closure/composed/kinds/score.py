"""A residual drawn by a score."""

from hpc_closure.experiment.kinds import ResidualKind


class Score(ResidualKind):
    """Transform base noise along the velocity of a trigonometric flow."""

    name = "score"
    flow_dimensions = (1, 2, 3)
    several_fields = True
    reads = (
        "generator",
        "width",
        "modes",
        "layers",
        "spectral_convolution",
        "base_noise",
        "schedule",
        "function_evaluations",
    )
    learns_sensors = True

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed import generators, learned_score

        if config["sensors"] == "learned":
            return learned_score.PosteriorScore(channels, config, band)
        return generators.Score(channels, config)
