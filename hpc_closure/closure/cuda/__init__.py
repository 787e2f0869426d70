"""GPU code of the closure that no GPU has run yet; see :mod:`hpc_closure.spectral.switches`."""
