"""The solver: ensembles of periodic, forced-dissipative flows on retained spectra.

Read the modules in this order: :mod:`recipe` (strict sections of keys), :mod:`forcing`,
:mod:`noise`, :mod:`initial` and :mod:`equation` with :mod:`equations` (one class per kind),
:mod:`problem` (the recipe that names a member); :mod:`grid` (modes, wavenumbers, shells),
:mod:`transform` (fields and retained spectra, by :mod:`line_fft` and :mod:`slabs`),
:mod:`counters` and :mod:`half_plane` (draws and where they go), :mod:`advection` (on the CPU by
:mod:`compiled_advection` and its :mod:`line_kernels`), :mod:`schemes` (time),
:mod:`noise_model` and :mod:`rates` (noise, step by step),
:mod:`simulation` (members, the step loop). The first row needs no torch. On a GPU :mod:`graphs`
replays whole steps, with :mod:`kernels`. :mod:`diagnostics` measures.
"""
