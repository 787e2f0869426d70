"""GPU code of the closure, not yet run on a GPU; see :mod:`hpc_closure.spectral.switches`."""
