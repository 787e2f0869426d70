"""GPU code of the solver that no GPU has run yet; see :mod:`hpc_closure.spectral.switches`.

The folder may be deleted with ``closure/cuda`` and ``train/cuda``: without switches nothing
imports them.
"""
