"""Whole steps as CUDA graphs: a small batch is priced by its launches, not by its arithmetic.

Two kinds of step are captured. :class:`FusedStep`, for the published scheme in the Basdevant form:
two transforms and two Triton kernels. :class:`PlainStep`, for everything else with a fixed step:
the same torch operations as on the CPU. Both read their noise from a block of steps drawn on the
device, at a step counter that lives there too, so a replay needs nothing from the host.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.advection import Basdevant
from hpc_closure.spectral.counters import STREAM_PATH, WORDS_PER_COUNTER
from hpc_closure.spectral.device_counters import CONSTANTS, complex_normals_on, keys_on
from hpc_closure.spectral.lanes import NOISE_BYTES, Lane
from hpc_closure.spectral.noise import NoiseModel
from hpc_closure.spectral.schemes import CNAB2, CNEuler

if TYPE_CHECKING:
    from hpc_closure.spectral.simulation import Simulation

# Steps of the longer of the two captured graphs, and bytes of noise drawn ahead.
GRAPH_STEPS = 16
DEVICE_NOISE_BYTES = 16 * NOISE_BYTES


def have_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


class DeviceNoise:
    """Rates of a block of steps on the device, ``rates[step - first]``; same bits as on the CPU.

    Args:
        noise: the forcing.
        simulation: its members are drawn, in its precision, on its device.
    """

    def __init__(self, noise: NoiseModel, simulation: Simulation):
        self.noise, self.members = noise, simulation.members
        like = simulation.pairs
        rows, columns = self.noise.box
        per_step = len(self.members) * rows * columns * 2 * like.element_size()
        self.steps = max(1, min(256, DEVICE_NOISE_BYTES // per_step))
        self.rates = like.new_zeros(self.steps, len(self.members), rows, columns, 2)
        self.on_device = self.noise.level == 0 and not self.noise.correlation_time
        if not self.on_device:
            return
        keys = [self.noise.key(member) for member in self.members]
        self.keys = keys_on(keys, like.device)
        source, sign, std = self.noise.compact_law()
        self.source = torch.from_numpy(source).to(like.device, torch.int32)
        self.sign = torch.from_numpy(sign).to(like.device, torch.int32)
        self.std = torch.from_numpy(std * np.sqrt(0.5)).to(like.device)
        self.first = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.constants = torch.tensor(CONSTANTS, dtype=torch.int64, device=like.device)

    def draw(self, first: int, count: int) -> None:
        """Fill the first ``count`` rows with the rates of steps ``first ...``."""
        target = self.rates[:count]
        if not self.on_device:
            draws = self.noise.draw(self.members, first, count)
            target.copy_(torch.view_as_real(torch.from_numpy(draws)))
        elif have_triton():
            self._launch(first, count)
        else:
            target.copy_(self._draw_with_torch(first, count))

    def _launch(self, first: int, count: int) -> None:
        from hpc_closure.spectral.kernels import draw_kernel

        self.first.fill_(first)
        size, block = len(self.source), 128
        draw_kernel[(count * len(self.members), -(-size // block))](
            self.rates,
            self.keys,
            self.constants,
            self.first,
            self.source,
            self.sign,
            self.std,
            len(self.members),
            size,
            -(-self.noise.num_drawn // WORDS_PER_COUNTER),
            STREAM_PATH,
            BLOCK=block,
        )

    def _draw_with_torch(self, first: int, count: int) -> Tensor:
        drawn = complex_normals_on(self.keys, STREAM_PATH, first, count, self.noise.num_drawn)
        drawn = torch.nn.functional.pad(torch.view_as_real(drawn), (0, 0, 0, 1))
        box = drawn[:, :, self.source.long()] * self.std[:, None]
        real = torch.where(self.sign == 0, box[..., 0] * 2**0.5, box[..., 0])
        return torch.stack([real, box[..., 1] * self.sign], -1).reshape(self.rates[:count].shape)


class PlainStep:
    """Any scheme with a fixed step, by the operations of the CPU lane on static arrays.

    Args:
        lane: the lane whose scheme and equation are used.
        w: the state, real pairs; changed in place by every step.
    """

    def __init__(self, lane: Lane, w: Tensor, noise: DeviceNoise | None, step: Tensor):
        self.lane, self.w, self.noise, self.step_row = lane, w, noise, step
        self.base, self.held = torch.empty_like(w), torch.empty_like(w)

    def prepare(self, base: Tensor) -> None:
        """Take the steady forcing and closure of the coming steps."""
        self.base.copy_(base)
        self.held.copy_(base)

    def step(self, offset: int) -> None:
        """One step with the noise of row ``step_row + offset``."""
        lane, scheme = self.lane, self.lane.scheme()
        if self.noise is not None:
            row = self.noise.rates.index_select(0, self.step_row + offset)[0]
            lane.hold(self.held, self.base, row)
        if isinstance(scheme, CNAB2):
            previous = lane.simulation.previous
            scheme.step_with_memory(self.w, lane.nonlinear, self.held, previous, False)
        else:
            scheme.step(self.w, lane.explicit(self.held))


class FusedStep:
    """The published scheme in the Basdevant form: two transforms and two kernels per step.

    Args:
        lane: the lane whose coefficients are used.
        w: the state, real pairs; changed in place by every step.
    """

    def __init__(self, lane: Lane, w: Tensor, noise: DeviceNoise | None, step: Tensor):
        self.lane, self.w, self.noise, self.step_row = lane, w, noise, step
        grid, scheme = lane.transform.grid, lane.scheme()
        assert isinstance(scheme, CNEuler) and isinstance(lane.equation.advection, Basdevant)
        self.n, self.members = grid.size, len(w)
        # The forward transform is left unnormalised and 1 / n^2 put here: one pass less.
        s_uv, s_difference = lane.equation.advection.to_tendency[:, 0, ..., 0] / self.n**2
        f_u, f_v = lane.equation.advection.to_velocity[:, 0, ..., 0]
        a, b = scheme.a.real[..., 0], scheme.b.real[..., 0]
        self.symbols = torch.stack([a, b, s_uv, s_difference, f_u, f_v]).contiguous()
        width = self.n // 2 + 1
        self.velocity = w.new_zeros(2, self.members, self.n, width, 2)
        self.base = torch.empty_like(w)

    @staticmethod
    def fits(lane: Lane) -> bool:
        """Whether the recipe is one that the kernels know."""
        scheme = lane.scheme()
        return (
            lane.transform.grid.dimensions == 2
            and type(scheme) is CNEuler
            and scheme.a.is_real
            and lane.problem.removed != "convection"
            and isinstance(lane.equation.advection, Basdevant)
        )

    def prepare(self, base: Tensor) -> None:
        """Take the steady forcing and closure of the coming steps, and the present velocity."""
        self.base.copy_(base)
        self._update(self.velocity, 0, advance=False)

    def step(self, offset: int) -> None:
        """One step with the noise of row ``step_row + offset``."""
        from hpc_closure.spectral.kernels import product_kernel

        spectra = torch.view_as_complex(self.velocity)
        fields = torch.fft.irfft2(spectra, s=(self.n, self.n), norm="forward")
        size, block = fields[0].numel(), 1024
        product_kernel[(-(-size // block),)](fields, size, BLOCK=block)
        products = torch.view_as_real(torch.fft.rfft2(fields))
        self._update(products, offset, advance=True)

    def _update(self, products: Tensor, offset: int, advance: bool) -> None:
        from hpc_closure.spectral.kernels import update_kernel

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
            self.step_row,
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


class GraphLane(Lane):
    """The lane of a CUDA device: one chunk, steps replayed from graphs.

    An adaptive step or a coloured forcing needs the host between steps and takes the plain way.
    """

    def __init__(self, simulation: Simulation):
        super().__init__(simulation)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._step: FusedStep | PlainStep | None = None
        self._noise_block: DeviceNoise | None = None
        self._row = torch.zeros(1, dtype=torch.int64, device=simulation.device)

    def advance(self, chunk: slice, num_steps: int, extra: Tensor | None) -> None:
        """Advance all members by ``num_steps``; ``extra`` is held over them."""
        simulation = self.simulation
        noise = simulation.noise
        by_host = self.problem.cfl or (noise is not None and noise.correlation_time)
        if by_host or len(simulation.members) != chunk.stop - chunk.start:
            super().advance(chunk, num_steps, extra)
            return
        with torch.cuda.device(simulation.device):
            self._replay(chunk, num_steps, extra)

    def _replay(self, chunk: slice, num_steps: int, extra: Tensor | None) -> None:
        simulation = self.simulation
        first = simulation.step_index
        if simulation.fresh and isinstance(self.scheme(), CNAB2):
            super().advance(chunk, 1, extra)  # the first step has no history
            first, num_steps = first + 1, num_steps - 1
        step, w = self._step or self._make_step(), simulation.pairs
        step.prepare(self.steady.expand_as(w) if extra is None else self.steady + extra)
        block = num_steps if self._noise_block is None else self._noise_block.steps
        for start in range(0, num_steps, max(block, 1)):
            count = min(block, num_steps - start)
            self._row.zero_()
            if self._noise_block is not None:
                self._noise_block.draw(first + start, count)
            for steps in [GRAPH_STEPS] * (count // GRAPH_STEPS) + [1] * (count % GRAPH_STEPS):
                self._graphs[steps]()

    def _make_step(self) -> FusedStep | PlainStep:
        simulation = self.simulation
        if simulation.noise is not None:
            self._noise_block = DeviceNoise(simulation.noise, simulation)
        kind = FusedStep if have_triton() and FusedStep.fits(self) else PlainStep
        step = self._step = kind(self, simulation.pairs, self._noise_block, self._row)
        saved, previous = simulation.pairs.clone(), simulation.previous.clone()
        step.prepare(self.steady.expand_as(simulation.pairs))
        for steps in (1, GRAPH_STEPS):
            self._graphs[steps] = self._capture(step, steps)
        simulation.pairs.copy_(saved)
        simulation.previous.copy_(previous)
        return step

    def _capture(self, step: FusedStep | PlainStep, steps: int) -> Callable[[], None]:
        """Graph of ``steps`` steps; the steps taken here to warm up are undone by the caller."""

        def run() -> None:
            for offset in range(steps):
                step.step(offset)
            self._row.add_(steps)

        stream = torch.cuda.Stream(self.simulation.device)
        stream.wait_stream(torch.cuda.current_stream(self.simulation.device))
        self._row.zero_()
        with torch.cuda.stream(stream):
            step.step(0)  # compile kernels, make transform plans and work arrays
            step.step(0)
        torch.cuda.current_stream(self.simulation.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
