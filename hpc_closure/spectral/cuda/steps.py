"""Solver steps for a CUDA device with few launches, which are the cost of a small batch.

There are two kinds of step. :class:`FusedStep`, for the published scheme in the Basdevant form,
takes two transforms and two Triton kernels (switch ``fused``). :class:`PlainStep`, for all other
schemes with a fixed step, uses the torch operations of the CPU. Both read their noise from a block
of steps on the device, at a step counter that is on the device too. So a CUDA graph (switch
``graphs``) can replay them without the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpc_closure.spectral import switches
from hpc_closure.spectral.cuda.draws import DeviceDraws, keys_on
from hpc_closure.spectral.cuda.graph import record
from hpc_closure.spectral.equations.advection import Basdevant
from hpc_closure.spectral.noise.counters import STREAM_PATH
from hpc_closure.spectral.noise.rates import NOISE_BYTES, Rates
from hpc_closure.spectral.schemes import Explicit, Scheme, Term

# Steps of the longer of the two graphs, and bytes of noise drawn ahead.
GRAPH_STEPS = 16
DEVICE_NOISE_BYTES = 16 * NOISE_BYTES


class DeviceNoise:
    """Hold the rates of a block of steps on the device, ``rates[step - first]``.

    The uniforms have the same bits, whether host or device draws them.

    Args:
        source: the white forcing and its members.
        like: the state, which sets precision and device of the rates.
        fused: whether the device draws; the host always draws a refined path.
    """

    def __init__(self, source: Rates, like: Tensor, fused: bool):
        assert source.noise is not None
        self.noise, self.members = source.noise, source.members
        rows, columns = self.noise.box
        per_step = len(self.members) * rows * columns * 2 * like.element_size()
        self.steps = max(1, min(256, DEVICE_NOISE_BYTES // per_step))
        self.rates = like.new_zeros(self.steps, len(self.members), rows, columns, 2)
        self.on_device = fused and self.noise.level == 0
        if not self.on_device:
            return
        self.keys = keys_on(like.device, [self.noise.key(member) for member in self.members])
        std = self.noise.draws.place_std(self.noise.std)
        self.draws = DeviceDraws(self.noise.draws, std, like.device)

    def draw(self, first: int, count: int) -> None:
        """Fill the first ``count`` rows with the rates of steps ``first ...``."""
        if self.on_device:
            self.draws.fill(self.rates[:count], self.keys, STREAM_PATH, first)
        else:
            draws = self.noise.draw(self.members, first, count)
            self.rates[:count].copy_(torch.view_as_real(torch.from_numpy(draws)))


class PlainStep:
    """Step of any scheme with a fixed time step, by the operations of the CPU on static arrays.

    Args:
        w: the state, real pairs; changed in place by every step.
        nonlinear: the explicit term of the equation.
        scheme: scheme of the step.
        rates: adds a rate to the constant tendency.
        noise: rates of the coming steps, or None.
        row: row of ``noise`` for the next step, on the device.
    """

    def __init__(
        self,
        w: Tensor,
        nonlinear: Term,
        scheme: Scheme,
        rates: Rates,
        noise: DeviceNoise | None,
        row: Tensor,
    ):
        self.w, self.scheme, self.rates, self.noise, self.row = w, scheme, rates, noise, row
        self.base, self.held = torch.empty_like(w), torch.empty_like(w)
        self.explicit, self.registers = Explicit(nonlinear, self.held), scheme.make_registers(w)

    def prepare(self, base: Tensor) -> None:
        """Set steady forcing and closure for the coming steps."""
        self.base.copy_(base)
        self.held.copy_(base)

    def step(self, offset: int) -> None:
        """Advance one step with the noise of row ``row + offset``."""
        if self.noise is not None:
            rate = self.noise.rates.index_select(0, self.row + offset)[0]
            self.rates.add(self.base, rate, self.held, slice(0, self.w.shape[2]))
        self.scheme.step(self.w, self.explicit, self.registers)


class FusedStep:
    """Step of the published scheme in the Basdevant form: two transforms and two kernels.

    Args:
        w: the state, real pairs; changed in place by every step.
        advection: provides the symbols of velocity and tendency.
        euler: result of :meth:`Scheme.real_euler`.
        noise: rates of the coming steps, or None.
        row: row of ``noise`` for the next step, on the device.
    """

    def __init__(
        self,
        w: Tensor,
        advection: Basdevant,
        euler: tuple[Tensor, Tensor],
        noise: DeviceNoise | None,
        row: Tensor,
    ):
        self.w, self.noise, self.row = w, noise, row
        self.n, self.members = advection.transform.grid.size, len(w)
        # includes the 1 / n^2 of the unnormalised forward transform, which saves a pass
        s_uv, s_difference = advection.to_tendency[:, 0, ..., 0] / self.n**2
        f_u, f_v = advection.to_velocity[:, 0, ..., 0]
        self.symbols = torch.stack([*euler, s_uv, s_difference, f_u, f_v]).contiguous()
        width = self.n // 2 + 1
        self.velocity = w.new_zeros(2, self.members, self.n, width, 2)
        self.base = torch.empty_like(w)

    def prepare(self, base: Tensor) -> None:
        """Set steady forcing and closure for the coming steps; computes the present velocity."""
        self.base.copy_(base)
        self._update(self.velocity, 0, advance=False)

    def step(self, offset: int) -> None:
        """Advance one step with the noise of row ``row + offset``."""
        from hpc_closure.spectral.cuda.kernels import product_kernel

        spectra = torch.view_as_complex(self.velocity)
        fields = torch.fft.irfft2(spectra, s=(self.n, self.n), norm="forward")
        size, block = fields[0].numel(), 1024
        product_kernel[(-(-size // block),)](fields, size, BLOCK=block)
        products = torch.view_as_real(torch.fft.rfft2(fields))
        self._update(products, offset, advance=True)

    def _update(self, products: Tensor, offset: int, advance: bool) -> None:
        from hpc_closure.spectral.cuda.kernels import update_kernel

        rows, columns = self.w.shape[1:3]
        rates, (box_rows, box_columns) = self.w, (1, 1)
        if self.noise is not None:
            rates, (box_rows, box_columns) = self.noise.rates, self.noise.noise.box
        block = 256
        update_kernel[(self.members, -(-rows * columns // block))](
            self.w,
            products,
            self.velocity,
            self.symbols,
            self.base,
            rates,
            self.row,
            offset,
            self.members,
            self.n,
            self.n // 2 + 1,
            rows,
            columns,
            box_rows,
            box_columns,
            ADVANCE=advance,
            NOISE=self.noise is not None,
            BLOCK=block,
        )


class DeviceSteps:
    """Advance all members on a CUDA device, with graphs and fused kernels if they are switched on.

    The time step must be fixed and the noise white or none, because an adaptive step and a
    coloured forcing need the host between steps.

    Args:
        w: the state, real pairs; changed in place.
        equation: provides the symbols of the fused kernels.
        nonlinear: its explicit term, or the term that replaces it if a closure supplies it.
        scheme: scheme of the step, with memory for ``w``.
        rates: the stochastic forcing.
    """

    def __init__(self, w: Tensor, equation, nonlinear: Term, scheme: Scheme, rates: Rates):
        self.w, self.equation, self.nonlinear = w, equation, nonlinear
        self.scheme, self.rates = scheme, rates
        #: number of steps -> function that advances by them
        self._advances: dict[int, Callable[[], None]] = {}
        self._step: FusedStep | PlainStep | None = None
        self.noise: DeviceNoise | None = None
        self.graphs = switches.is_on(switches.GRAPHS)
        self.fused = switches.is_on(switches.FUSED)
        self._row = torch.zeros(1, dtype=torch.int64, device=w.device)

    def advance(self, first: int, num_steps: int, base: Tensor) -> None:
        """Advance all members; the scheme must have its history.

        Args:
            first: number of steps taken before.
            num_steps: number of steps to take.
            base: steady forcing and closure, constant over these steps.
        """
        with torch.cuda.device(self.w.device):
            step = self._step or self._make_step(base)
            step.prepare(base)
            block = num_steps if self.noise is None else self.noise.steps
            for start in range(0, num_steps, block):
                count = min(block, num_steps - start)
                self._row.zero_()
                if self.noise is not None:
                    self.noise.draw(first + start, count)
                for steps in [GRAPH_STEPS] * (count // GRAPH_STEPS) + [1] * (count % GRAPH_STEPS):
                    self._advances[steps]()

    def choose_step(self) -> FusedStep | PlainStep:
        """Choose the fused step if it is on and supports the problem, else the plain one."""
        if self.rates.noise is not None:
            self.noise = DeviceNoise(self.rates, self.w, self.fused)
        advection, euler = self.equation.advection, self.scheme.real_euler()
        # the kernels cannot use a nonlinear term that a closure replaces
        known = self.fused and self.nonlinear == self.equation.nonlinear
        if known and isinstance(advection, Basdevant) and euler is not None:
            return FusedStep(self.w, advection, euler, self.noise, self._row)
        return PlainStep(self.w, self.nonlinear, self.scheme, self.rates, self.noise, self._row)

    def _make_step(self, base: Tensor) -> FusedStep | PlainStep:
        """Choose a step and, with graphs on, record it; undo the warm-up steps."""
        step = self.choose_step()
        w, memory = self.w.clone(), {name: x.clone() for name, x in self.scheme.save().items()}
        step.prepare(base)
        for steps in (1, GRAPH_STEPS):
            self._advances[steps] = self._make_advance(step, steps)
        self.w.copy_(w)
        self.scheme.load(self.w, memory)
        self._step = step
        return step

    def _make_advance(self, step: FusedStep | PlainStep, steps: int) -> Callable[[], None]:
        """Create the function that advances ``steps`` steps, by one replay if graphs are on."""

        def run() -> None:
            for offset in range(steps):
                step.step(offset)
            self._row.add_(steps)

        if not self.graphs:
            return run
        self._row.zero_()
        return record(run, lambda: step.step(0), self.w.device)
