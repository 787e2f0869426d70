"""A closure in time: an object that a solver calls once an interval.

A draw may read earlier states and the last closures, and its noise is keyed by the number of the
call. :class:`Process` keeps these for an ensemble, so that a solver passes its states and nothing
else::

    process = closure.process(members=20, seed=1)
    for interval in range(100):
        if process.reads_forecast:       # the closure reads the state to which it is added
            state = advance(state)
            state = state + span * process(state)
        else:
            tendency = process(state)    # U of the coming interval
            ...

The state of a process is explicit: :meth:`Process.state_dict` returns it, :meth:`Process.save`
writes it to a small file, and a process that loads it continues bit for bit.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.model import Request
from hpc_closure.closure.request import fields as checked_fields
from hpc_closure.spectral.modes.grid import to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import points_of, retained_modes
from hpc_closure.work import atomic

__all__ = ["Memory", "Process"]

FORMAT = "hpc_closure process 1"
WAY_OUT = "its file is damaged: save it again, or start it anew"
PARTS = ("states", "closures")  # what a process keeps, by the names in its file


@dataclass(frozen=True)
class Memory:
    """Numbers of earlier states and closures that a closure reads.

    Attributes:
        frames: earlier states.
        lag: closure calls from one of these states to the next.
        previous: last closures.
    """

    frames: int = 0
    lag: int = 0
    previous: int = 0

    @classmethod
    def of(cls, closure: Any, interval: int) -> "Memory":
        """Return the memory of a trained closure that is called every ``interval`` solver steps.

        Raises:
            ValueError: the states that it reads are not a whole number of calls apart.
        """
        conditions = closure.config["conditions"]
        frames = conditions.get("previous_states", 0)
        previous = conditions.get("previous_closures", 0)
        if not frames:
            return cls(previous=previous)
        every, span = closure.target["every"], interval * closure.target["dt"]
        lag = every / span
        if abs(lag - round(lag)) > 1e-6 or round(lag) < 1:
            raise ValueError(
                f"interval={interval}: the model reads states {every:g} apart, not a whole number "
                f"of closure intervals of {span:g}"
            )
        return cls(frames, round(lag), previous)


class Draws(Protocol):
    """What a process needs of a closure; :class:`~hpc_closure.closure.artifact.Closure` has it."""

    def sample_hat(self, request: Request) -> Tensor:
        """Draw spectra of U for a request."""

    def interval_ratio(self, interval: int) -> float:
        """Return the averaging time of a draw for ``interval`` steps, in trained intervals."""


class Process:
    """Draw closures for an ensemble, one call per interval, and keep what later draws read.

    Args:
        closure: a trained closure.
        ids: id of each of the M members in the keys of its draws.
        seed: seed of the draws.
        interval: solver steps from one call to the next.
        memory: earlier states and closures that the closure reads.
        sampler: keywords of :class:`Request` for the sampler: ``method``, ``evaluations``.
        stage: part of the key; draws of different stages are independent.
        grid: points per side of the caller's grid, of spectra; None = the smallest that retains
            their modes.
        model_hash: hash of the closure's training, stored in files of the process.

    Attributes:
        calls: number of calls so far.
        states: states that were read, newest last; spectra (M, ...).
        closures: last closures, newest first; spectra (M, ...).
        failed: (M,) bool, members whose last draw is not finite.
        beyond: (shells,) share of the members whose last state was outside the range of the
            training, in each shell of wavenumbers. Only calls with fields set it; None before the
            first, and if the model file does not hold the range.
    """

    def __init__(  # noqa: PLR0913 - the settings of a closure in a solver
        self,
        closure: Draws,
        ids: Sequence[int],
        seed: int,
        interval: int,
        *,
        memory: Memory = Memory(),
        sampler: dict[str, Any] | None = None,
        stage: str = "sample",
        grid: Any = None,
        model_hash: str = "",
    ):
        self.closure, self.ids, self.seed, self.interval = closure, list(ids), seed, interval
        self.memory, self.sampler, self.stage, self.grid = memory, sampler or {}, stage, grid
        self.model_hash, self.calls = model_hash, 0
        self.states: deque[Tensor] = deque(maxlen=memory.frames * memory.lag)
        self.closures: deque[Tensor] = deque(maxlen=memory.previous)
        self.failed = torch.zeros(len(self.ids), dtype=torch.bool)
        self.beyond: Tensor | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Return what a stored state must have in common with the process that continues it."""
        return {
            "members": list(self.ids),
            "seed": self.seed,
            "interval": self.interval,
            "model": self.model_hash,
        }

    @property
    def reads_forecast(self) -> bool:
        """Whether the closure reads the state after the interval, to which it is added."""
        config = getattr(self.closure, "config", {})
        return bool(config.get("conditions", {}).get("forecast"))

    @property
    def _form(self) -> tuple[int, int, bool]:
        """Number of fields of a state and of sides of a field; whether these are equal."""
        closure = self.closure
        counts = getattr(closure, "channels", 1), getattr(closure, "dimensions", 2)
        return *counts, getattr(closure, "equal_sides", True)

    # -- draws -----------------------------------------------------------------------------------

    def __call__(self, state: Any, sensors: Sensors | None = None) -> Any:
        """Draw U of the coming interval, (M, n, n), and count the call.

        Args:
            state: fields (M, n, n), one row per member, of C fields (M, C, n, n): a numpy array,
                a tensor on any device, or an array of a library with DLPack (JAX, CuPy).
            sensors: point values of the true closure, or None.

        Returns:
            U in the library, device and precision of ``state``.

        Raises:
            ValueError: the states do not fit the members or the closure, or earlier states or
                closures are missing (:meth:`begin`).
        """
        tensor = checked_fields("state", as_tensor(state), *self._form)
        if len(tensor) != len(self.ids):
            raise ValueError(
                f"state has shape {tuple(tensor.shape)}: expected a row for each of the "
                f"{len(self.ids)} members of this process"
            )
        sides = self._form[1]
        size = points_of(tensor.shape, sides)
        spectra = to_spectra(tensor, retained_modes(size), sides)
        marks = getattr(self.closure, "beyond_training", lambda _: None)(spectra)
        self.beyond = None if marks is None else marks.double().mean(0)
        return as_given(to_fields(self.draw_hat(spectra, sensors, size), size, sides), state)

    def draw_hat(
        self,
        state: Tensor,
        sensors: Sensors | None = None,
        grid: Any = None,
        on_rescaled: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Draw spectra (M, ...) of U for retained spectra (M, ...), and count the call.

        A draw that is not finite is returned, but the process keeps zeros in its place, so that
        one member's failure stays its own.
        """
        self._check_begun()
        request = Request(
            state,
            self.ids,
            self.seed,
            self.calls,
            sensors,
            self._history(),
            torch.stack(list(self.closures), 1) if self.memory.previous else None,
            self.closure.interval_ratio(self.interval),
            **self.sampler,
            grid=grid or self.grid,
            stage=self.stage,
            on_rescaled=on_rescaled,
        )
        drawn = self.closure.sample_hat(request)
        if self.memory.frames:
            self.states.append(state)
        self.failed = ~drawn.abs().flatten(1).sum(1).isfinite()
        if self.memory.previous:
            rows = self.failed.view(-1, *[1] * (drawn.ndim - 1))
            self.closures.appendleft(torch.where(rows, 0.0, drawn))
        self.calls += 1
        return drawn

    def _history(self) -> Tensor | None:
        """Return earlier states (M, frames, ...), newest first; None if none are read."""
        memory = self.memory
        if not memory.frames:
            return None
        frames = [self.states[-number * memory.lag] for number in range(1, memory.frames + 1)]
        return torch.stack(frames, dim=1)

    # -- state -----------------------------------------------------------------------------------

    def begin(self, states: Sequence[Any] = (), closures: Sequence[Any] = ()) -> "Process":
        """Start at call 0 with the past that the closure reads; returns self.

        Args:
            states: ``frames x lag`` fields (M, n, n) before the start, one interval apart, oldest
                first.
            closures: the ``previous`` closures (M, n, n) before the start, newest first.

        Raises:
            ValueError: another number of fields.
        """
        past = ((self.states, "states", states), (self.closures, "closures", closures))
        for kept, name, fields in past:
            if len(fields) not in (kept.maxlen, 0):
                raise ValueError(
                    f"begin({name}=...) has {len(fields)} fields, expected {kept.maxlen}"
                )
        self.clear()
        for kept, _, fields in past:
            for one in fields:
                tensor = checked_fields("state", as_tensor(one), *self._form)
                sides = self._form[1]
                modes = retained_modes(points_of(tensor.shape, sides))
                kept.append(to_spectra(tensor, modes, sides))
        return self

    def clear(self) -> None:
        """Forget the past and set the number of calls to 0."""
        self.calls = 0
        self.states.clear()
        self.closures.clear()

    def _check_begun(self) -> None:
        """Raise ValueError if states or closures that the next draw reads are missing."""
        for name in PARTS:
            kept = getattr(self, name)
            if len(kept) < kept.maxlen:
                raise ValueError(
                    f"this closure reads {kept.maxlen} earlier {name}, the process has "
                    f"{len(kept)}: call begin({name}=...) first"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-exact continuation needs, as numpy arrays and numbers.

        Keys: ``calls``, ``members``, ``seed``, ``interval``, ``model`` (hash of the training),
        ``states`` (frames x lag, M, ...) oldest first, ``closures`` (previous, M, ...) newest
        first. Fields are retained spectra.
        """
        kept = {name: getattr(self, name) for name in PARTS}
        spectra = {
            name: torch.stack(list(value)).cpu().numpy() for name, value in kept.items() if value
        }
        return {"calls": self.calls, **self.identity, **spectra}

    def load_state_dict(self, state: dict[str, Any], device: str | torch.device = "cpu") -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of other members, another seed, interval or model, or damaged.
        """
        for name, own in self.identity.items():
            if name not in state:
                raise ValueError(f"the stored process lacks {name!r}; {WAY_OUT}")
            if state[name] != own:
                raise ValueError(
                    f"the stored process has {name}={_brief(state[name])}, this one "
                    f"{name}={_brief(own)}"
                )
        calls = state.get("calls")
        if not isinstance(calls, int) or calls < 0:
            raise ValueError(f"the stored process has calls={calls!r}, not a number; {WAY_OUT}")
        self.calls = calls
        for name in PARTS:
            kept = getattr(self, name)
            kept.clear()
            if name in state:
                kept.extend(torch.as_tensor(np.asarray(state[name]), device=device))

    def save(self, path: str | Path) -> None:
        """Write the state to a file in the safetensors format, at once or not at all."""
        state = self.state_dict()
        tensors = {
            name: torch.view_as_real(torch.as_tensor(state.pop(name))).contiguous()
            for name in PARTS
            if name in state
        }
        metadata = {"format": FORMAT, **{name: json.dumps(state[name]) for name in state}}
        with atomic.publish(Path(path)) as part:
            part.write_bytes(serialize(tensors, metadata=metadata))

    def load(self, path: str | Path, device: str | torch.device = "cpu") -> "Process":
        """Continue from a file that :meth:`save` wrote; returns self.

        Raises:
            ValueError: the file is not a whole file of a process, or of another process.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole file of a process ({error})") from None
        if metadata.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a file of a process (expected {FORMAT!r})")
        try:
            self.load_state_dict(_from_file(metadata, tensors), device)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return self


def _from_file(metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state of a process from the header and the tensors of its file.

    Raises:
        ValueError: an entry of the header or a tensor is damaged.
    """
    state: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            state[name] = json.loads(text)
        except ValueError:
            raise ValueError(
                f"its header has {name}={_brief(text)}, expected JSON; {WAY_OUT}"
            ) from None
    for name, pairs in tensors.items():
        if name not in PARTS or pairs.shape[-1:] != (2,) or not pairs.is_floating_point():
            raise ValueError(f"its tensor {name!r} is not of a process; {WAY_OUT}")
        state[name] = torch.view_as_complex(pairs).numpy()
    return state


def as_tensor(array: Any) -> Any:
    """Return an array of a library with DLPack as a tensor on the same memory; else unchanged."""
    if isinstance(array, (Tensor, np.ndarray)) or not hasattr(array, "__dlpack__"):
        return array
    return torch.from_dlpack(array)


def as_given(tensor: Tensor, like: Any) -> Any:
    """Return a tensor in the library, device and precision of ``like``."""
    if isinstance(like, Tensor):
        return tensor.to(like)
    if isinstance(like, np.ndarray):
        return tensor.cpu().numpy().astype(like.dtype.newbyteorder("="))
    if hasattr(like, "__dlpack__") and hasattr(like, "__array_namespace__"):
        space = like.__array_namespace__()
        return space.from_dlpack(tensor.to(torch.from_dlpack(like)).contiguous())
    return tensor.cpu().numpy()


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
