"""The solver: ensembles of periodic, forced-dissipative flows on retained spectra.

Read the modules in this order: :mod:`grid` (modes, wavenumbers, shells), :mod:`transform` (fields
and retained spectra, by :mod:`line_fft` and :mod:`slabs`), :mod:`counters` and :mod:`half_plane`
(draws and where they go), :mod:`noise`, :mod:`forcing` and :mod:`initial` (laws), :mod:`equations`
and :mod:`advection`, :mod:`schemes` (time), :mod:`problem` (the recipe that names a member),
:mod:`rates` (noise, step by step) and :mod:`simulation` (members, the step loop). On a GPU
:mod:`graphs` replays whole steps, with :mod:`kernels`. :mod:`diagnostics` measures, and
:mod:`certificate` vouches for a block.
"""
