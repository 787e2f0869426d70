"""A draw of a closure as a function of real arrays, which other languages can call.

Everything that a draw reads is an argument: states, earlier states and closures, and normal
numbers. Everything that it returns is real. So the function has no state, and a caller in another
language only has to draw normals by the same counters and to keep the arrays of
:class:`~hpc_closure.closure.process.Process`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.composed.generators import Resampled, SamplerSettings
from hpc_closure.closure.composed.mixture import Mixture
from hpc_closure.closure.composed.model import CompositeClosure, Drawing
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.persistence import position
from hpc_closure.closure.process import Memory
from hpc_closure.spectral.modes.grid import to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes

__all__ = ["Inputs", "Once", "Program", "Settings", "noise_of_call"]


class Settings(NamedTuple):
    """What a program is made for; another choice needs another program.

    Attributes:
        members: number M of members.
        points: points n per side of the caller's grid.
        interval: solver steps from one call to the next.
        method, evaluations: settings of the sampler; None = the model's.
    """

    members: int
    points: int
    interval: int
    method: str | None = None
    evaluations: int | None = None


class Inputs(NamedTuple):
    """Arguments of a program, float64; (M, C, n, n) in place of (M, n, n) if there are C fields.

    Attributes:
        state: (M, n, n) fields.
        history: (M, H, 2K + 1, K + 1, 2) real pairs of earlier states, newest first.
        previous: (M, P, 2K + 1, K + 1, 2) real pairs of previous closures, newest first.
        normals: (D, M, C W, 2) normal numbers of D draws of white noise, of W wavevectors: the
            draw of the call, and two for each spacing of knots of noise with memory.
        choice: (D, M) normal numbers by which a mixture chooses, or (0, M).
        turns: (T, 2) cos and sin of the call's place between knots, for each spacing.
    """

    state: Tensor
    history: Tensor
    previous: Tensor
    normals: Tensor
    choice: Tensor
    turns: Tensor


class Program(nn.Module):
    """Draw closures from real arrays; see the module's docstring.

    Args:
        closure: a trained closure, on the CPU.
        settings: what the program is made for.

    Raises:
        ValueError: this closure has no such program; one line with the reason.
    """

    source: Tensor
    signs: Tensor

    def __init__(self, closure: Closure, settings: Settings):
        super().__init__()
        model = closure.model
        check(closure)
        assert isinstance(model, CompositeClosure)
        self.model, self.settings = model, settings
        self.memory = Memory.of(closure, settings.interval)
        self.sides, self.channel_shape = model.dimensions, model.channel_shape
        self.modes = retained_modes(settings.points)
        model.band.check_grid(*model.band.points(settings.points))
        self.caller = band(self.modes, model.length, model.dimensions)
        self.how = Drawing(
            closure.interval_ratio(settings.interval),
            settings.members,
            False,
            SamplerSettings(settings.method, settings.evaluations),
        )
        self.is_random = model.config["residual"] != "none"
        spacings = model.knot_spacings if self.is_random else []
        self.spacings = [int(knots) for knots in spacings]
        self.draws = 1 + 2 * len(self.spacings) if self.is_random else 0
        self.chooses = self.is_random and isinstance(model.residual, Mixture)
        if self.is_random:
            source, sign = model.frame.kept.half_plane.assignment()
            self.register_buffer("source", torch.from_numpy(source).long(), persistent=False)
            conjugate = torch.where(torch.from_numpy(sign) == -1, -1.0, 1.0).double()
            signs = torch.stack([torch.ones_like(conjugate), conjugate], -1)
            signs[torch.from_numpy(sign) == 0] = torch.tensor([2.0**0.5, 0.0]).double()
            self.register_buffer("signs", signs * 0.5**0.5, persistent=False)

    @property
    def noise(self) -> dict[str, Any]:
        """Numbers of the normals that a call reads, for :func:`noise_of_call`."""
        return {
            "draws": self.draws,
            "width": self.width,
            "chooses": self.chooses,
            "spacings": self.spacings,
        }

    @property
    def width(self) -> int:
        """Number of complex normals of a draw of white noise, of all fields."""
        if not self.is_random:
            return 0
        count = self.model.frame.kept.half_plane.num_drawn
        return count * (self.channel_shape or (1,))[0]

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the arguments, in the order of :class:`Inputs`."""
        members, model = self.settings.members, self.model
        spectrum = (*self.channel_shape, *self.caller.shape, 2)
        points = self.caller.points(self.settings.points)
        return [
            (members, *self.channel_shape, *points),
            (members, model.history, *spectrum),
            (members, model.previous, *spectrum),
            (self.draws, members, self.width, 2),
            (self.draws if self.chooses else 0, members),
            (len(self.spacings), 2),
        ]

    def example(self, seed: int = 0) -> Inputs:
        """Return arguments of the right shapes, normal numbers of a seed."""
        generator = torch.Generator().manual_seed(seed)
        return Inputs(
            *(
                torch.randn(shape, generator=generator, dtype=torch.float64)
                for shape in self.shapes()
            )
        )

    def forward(
        self,
        state: Tensor,
        history: Tensor,
        previous: Tensor,
        normals: Tensor,
        choice: Tensor,
        turns: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw closures; arguments as in :class:`Inputs`.

        Returns:
            fields U (M, n, n), real pairs (M, 2K + 1, K + 1, 2) of the state and of U, and
            (M, shells) 1.0 where the state is beyond the range of the training, (M, 0) if unknown.
        """
        model = self.model
        state_hat = to_spectra(state, self.modes, self.sides)
        past = [
            torch.view_as_complex(frames) if count else None
            for frames, count in ((history, model.history), (previous, model.previous))
        ]
        frames_hat = model.frames_hat(state_hat, *past)
        inputs = [frames_hat]
        if self.is_random:
            law = model.frame.law
            # by index: an export cannot store an unbind of no rows
            draws = [
                model.coloured(law, self.white(normals[i]), choice[i] if self.chooses else None)
                for i in range(self.draws)
            ]
            places = [(turns[i, 0], turns[i, 1]) for i in range(len(self.spacings))]
            inputs.append(model.noise_of_draws(law, draws, places))
        u_hat, _ = model.draw_without_sensors(self.how, *inputs)
        u_hat = self.caller.hermitian(self.caller.resized(u_hat))
        fields = to_fields(u_hat, self.settings.points, self.sides)
        marks = model.beyond_training(state_hat)
        beyond = state.new_zeros(len(state), 0) if marks is None else marks.double()
        return fields, torch.view_as_real(state_hat), torch.view_as_real(u_hat), beyond

    def white(self, normals: Tensor) -> Tensor:
        """Place normals (M, C H, 2) in spectra (M, C, 2K + 1, K + 1) of white noise."""
        kept = self.model.frame.kept
        each = normals.unflatten(1, (*self.channel_shape, -1)) if self.channel_shape else normals
        placed = each.index_select(-2, self.source) * self.signs
        return torch.view_as_complex(placed.unflatten(-2, kept.shape))


def noise_of_call(
    noise: dict[str, Any], key: keyed_noise.Key, place: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the normal numbers of a call; returns ``normals``, ``choice``, ``turns`` of Inputs.

    Args:
        noise: ``draws``, ``width``, ``chooses`` and ``spacings`` of a :class:`Program`.
        key: key of the call.
        place: the call in trained intervals.
    """
    at = [(keyed_noise.STREAM_BASE, key.item)] if noise["draws"] else []
    turns = []
    for knots in noise["spacings"]:
        first, *turn = position(place, knots)
        stream = keyed_noise.STREAM_MEMORY + round(math.log2(knots))
        at += [(stream, first), (stream, first + 1)]
        turns.append(turn)
    count, width = len(key.ids), noise["width"]
    normals = torch.zeros(len(at), count, width, 2, dtype=torch.float64)
    choice = normals.new_zeros(len(at) if noise["chooses"] else 0, count)
    for number, (stream, item) in enumerate(at):
        of_item = key._replace(item=item)
        normals[number] = keyed_noise.normals(*of_item, 2 * width, stream).unflatten(1, (-1, 2))
        if noise["chooses"]:
            choice[number] = keyed_noise.normals(*of_item, 1, keyed_noise.STREAM_COMPONENT)[:, 0]
    return normals, choice, normals.new_tensor(turns).view(-1, 2)


class Once:
    """Compute once what depends on weights alone, so that an export finds it computed."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, function: Callable, key: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``."""
        return function(*inputs)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of ``make()`` at the first call with this name."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def check(closure: Closure) -> None:
    """Raise ValueError, one line, if a closure cannot be exported."""
    model = closure.model
    if not isinstance(model, CompositeClosure):
        preset = closure.config.get("preset")
        raise ValueError(
            f"model.preset={preset!r} cannot be exported: expected a model of mean and residual"
        )
    if model.sensors_allowed == "required":
        raise ValueError(
            "this model was trained with conditions.sensors=required: an exported closure reads "
            "no sensors"
        )
    if isinstance(model.residual, Resampled):
        raise ValueError(
            "model.residual=resampled cannot be exported: its draws are an archive; train "
            "model.residual=gaussian or a generator"
        )
