"""Stochastic closures: DNS ensembles, score-based closure models, coupled ensembles."""

__version__ = "0.1.0"


def load(path):
    """Load a trained closure: a path to ``model.safetensors`` or the name of a shipped model."""
    from hpc_closure.closure.artifact import load as load_artifact

    return load_artifact(path)
