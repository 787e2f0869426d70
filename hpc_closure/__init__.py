"""Stochastic closures: DNS ensembles, score-based closure models, coupled ensembles."""

from hpc_closure.experiment import kinds as _kinds

__all__ = ["load"]
__version__ = "0.1.0"


def load(path):
    """Load a trained closure: a path to ``model.safetensors`` or the name of a shipped model."""
    from hpc_closure.closure.artifact import load as load_artifact

    return load_artifact(path)


def _import_kinds() -> None:
    """Import what an experiment may name: experiments know nothing of closures."""
    import hpc_closure.closure.baselines.kinds
    import hpc_closure.closure.composed.kinds
    import hpc_closure.closure.networks.kinds  # noqa: F401


_kinds.provide(_import_kinds)
