"""The solver: ensembles of periodic, forced-dissipative flows on retained spectra.

Read the modules in this order: :mod:`recipe` (strict sections of keys), :mod:`forcing`,
:mod:`noise`, :mod:`initial` and :mod:`equation` with :mod:`equations` (one class per kind),
:mod:`problem` (the recipe that names a member); :mod:`grid` (modes and wavenumbers),
:mod:`transform` (line FFTs, MPI slabs), :mod:`counters` and :mod:`noise_model` (draws),
:mod:`schemes` and :mod:`simulation` (members, run). The first row needs no torch.
"""
