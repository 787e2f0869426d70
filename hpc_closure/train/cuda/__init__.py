"""GPU code of the training, not yet run on a GPU; see :mod:`hpc_closure.spectral.switches`."""
