"""The solver: ensembles of periodic, forced-dissipative flows on retained spectra.

Read the modules in this order: :mod:`grid` (modes and wavenumbers), :mod:`transform` (line FFTs,
MPI slabs), :mod:`counters` and :mod:`noise` (draws), :mod:`equations`, :mod:`stepping`,
:mod:`problem` (the recipe that names a member) and :mod:`simulate` (members, run).
"""
