"""The solver: ensembles of periodic, forced and damped flows, held as retained spectra.

Read the modules in this order.

1. The recipe, which needs no torch: :mod:`recipe` (strict sections of keys), :mod:`forcing`,
   :mod:`noise.laws` (laws of stochastic forcings), :mod:`initial`, :mod:`equations` (one class
   per equation) and :mod:`problem` (the recipe that names a member).
2. Spectra: :mod:`modes.grid` (modes, wavenumbers, shells), :mod:`modes.transform` (fields to
   retained spectra and back, by :mod:`modes.line_fft` and :mod:`modes.slabs`) and
   :mod:`modes.half_plane` (which modes are drawn).
3. Noise: :mod:`noise.counters` (random bits), :mod:`noise.draws` (draws of a forcing),
   :mod:`noise.state_dependent` and :mod:`noise.rates` (the noise of each step).
4. Time: :mod:`equations.advection` and, in three dimensions, :mod:`equations.convection` (on the
   CPU compiled, in :mod:`cpu`), :mod:`schemes` and :mod:`simulation` (members and the step loop).
   Behind switches :mod:`cuda` replays whole steps on a GPU.
5. :mod:`diagnostics` measures a run, and :mod:`differentiable` is the solver with gradients.
"""
