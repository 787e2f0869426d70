"""GPU code of the training that no GPU has run yet; see :mod:`hpc_closure.spectral.switches`."""
