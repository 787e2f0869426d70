"""GPU code of the solver, not yet run on a GPU; see :mod:`hpc_closure.spectral.switches`.

This folder may be deleted together with ``closure/cuda`` and ``train/cuda``: it is imported only
if a switch is on.
"""
