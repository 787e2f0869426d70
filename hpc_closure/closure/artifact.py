"""A trained closure: the model file, and the object that a solver calls.

``model.safetensors`` holds float32 weights and float64 statistics. Its header
(:mod:`hpc_closure.closure.header`) holds the configuration, the definition of the closure and the
provenance. Reading the file runs no code from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.fitting.phases import compose
from hpc_closure.closure.header import Header, read_header, shipped
from hpc_closure.closure.model import ClosureModel, Request
from hpc_closure.closure.part_report import PartReport
from hpc_closure.closure.process import Memory, Process
from hpc_closure.closure.request import (
    PAST,
    check,
    fields,
    interval_of,
    lists,
    member_ids,
    spectra,
)
from hpc_closure.experiment import renames
from hpc_closure.experiment.folder import shipped_model
from hpc_closure.experiment.kinds import check_loaded, fields_of
from hpc_closure.experiment.models import kind_of, resolve
from hpc_closure.spectral import switches
from hpc_closure.spectral.modes.grid import mode_counts
from hpc_closure.spectral.modes.line_fft import keep_freed_memory
from hpc_closure.work import atomic, log

__all__ = ["Closure", "build", "load", "save"]

STATISTICS = "statistics/"
SHARE_BEYOND = 1e-6  # largest share of a state's variance outside the band without a warning
ROWS_CHECKED = 8  # of many states, unless the call is strict


def save(
    model: ClosureModel, path: str | Path, *, target: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """Write a model file.

    Args:
        model: trained model, on any device.
        path: path of the ``.safetensors`` file. It is published at once, never in part.
        target, provenance: see :class:`~hpc_closure.closure.header.Header`.
    """
    parts = tuple(model.parts())
    model = model.compact()
    tensors = {
        key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()
    }
    spacing = None
    if target.get("every"):
        spacing = target["every"] / (target.get("interval", 1) * target["dt"])
    for key, value in model.saved_statistics(spacing).items():
        tensors[STATISTICS + key] = value.contiguous().clone()
    header = Header(model.config, model.grid, model.length, target, provenance, parts)
    with atomic.publish(path) as part:
        # not save_file, which makes the file readable by its owner only
        part.write_bytes(serialize(tensors, metadata=header.metadata))


def model_file(path: str | Path) -> Path:
    """Return the path of a model file, or that of a shipped model by its name.

    Raises:
        FileNotFoundError: there is none; one line.
    """
    if str(path) in shipped():
        path = shipped_model(str(path))
    path = Path(path)
    if not path.exists() and not path.suffix:
        raise FileNotFoundError(
            f"{path}: neither a file nor a shipped model ({', '.join(shipped()) or 'none'})"
        )
    return path


def load(path: str | Path) -> "Closure":
    """Load a closure from a model file, or a shipped model by its name.

    This also sets the C library to keep freed memory
    (:mod:`hpc_closure.spectral.modes.line_fft`); otherwise draws of many members take twice the
    time.

    Raises:
        FileNotFoundError, ValueError: one line that names the file.
    """
    path = model_file(path)
    header = read_header(path)
    try:
        check_loaded(header.config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole model file ({error}); train again or fetch it again"
        ) from None
    statistics = {
        key.removeprefix(STATISTICS): value
        for key, value in tensors.items()
        if key.startswith(STATISTICS)
    }
    weights = {key: value for key, value in tensors.items() if not key.startswith(STATISTICS)}
    try:
        model = build(header.config, header.size, header.length)
        model.load_state_dict(weights)
        model.load_statistics(statistics)
    except (KeyError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: weights and configuration do not fit ({reason})") from None
    keep_freed_memory()
    return Closure(model.eval(), header)


class Closure:
    """A trained closure: draws U in dV/dt = M~(V) + U.

    A draw changes no state of the object, so calls may overlap.

    Outside the band of its training (``|kx|, |ky| <= (grid - 1) // 3`` of the training grid) a
    closure is zero. If more than a millionth of a state's variance is outside, the first such call
    logs a warning; a ``strict`` call raises ValueError. Of many states, 8 are checked.

    Attributes:
        model: the closure model.
        header: header of its file.
        channels: number of fields of a state.
        dimensions: number of sides of a field.
        equal_sides: whether the sides of a field have equally many points.
    """

    def __init__(self, model: ClosureModel, header: Header):
        self.model, self.header = model, header
        self.channels = fields_of(model.config)
        self.dimensions: int = model.config.get("dimensions", 2)
        self.equal_sides = not isinstance(model.grid, tuple)
        self.model.replayed = _replays()
        self._warned = False

    @property
    def target(self) -> dict:
        """Definition of U: ``kind``, ``interval`` (solver steps), ``dt``."""
        return self.header.target

    @property
    def provenance(self) -> dict:
        """Record of how the model was made."""
        return self.header.provenance

    def parts(self) -> tuple[PartReport, ...]:
        """List the parts and whether they act, with those that training has dropped."""
        return self.header.parts

    @property
    def config(self) -> dict:
        """Configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Device on which the model computes."""
        return self.model.device

    @property
    def guarded(self) -> int:
        """Number of shells of a draw that may be rescaled (``Request.on_rescaled``); 0 = none."""
        return self.model.guarded

    def beyond_training(self, state_hat: Tensor) -> Tensor | None:
        """Mark shells (M, shells) in which states are outside the range of the training.

        The range of a shell of wavenumbers reaches from the least to the largest power that it has
        in a training state.

        Args:
            state_hat: (M, 2K + 1, K + 1) retained spectra.

        Returns:
            bool, or None if the model file does not hold the range; older files do not.
        """
        with torch.no_grad():
            return self.model.beyond_training(state_hat.to(self.device))

    def evaluations(self, requested: int | None = None) -> int:
        """Return the evaluations of the generator per sample; 0 if it does not act."""
        if not self.model.score_active:
            return 0
        return requested or int(self.config.get("function_evaluations", 1))

    def to(self, device: str | torch.device) -> "Closure":
        """Move the model to a device; returns self."""
        self.model.to(device)
        self.model.replayed = _replays()
        return self

    def averaging_steps(self, interval: int) -> int:
        """Return the number of solver steps whose mean a draw is, if held for ``interval`` steps.

        This is ``interval``, because draws are rescaled to it. Only the published network's draws
        are not rescaled, as published: they remain means over the trained interval.

        Raises:
            ValueError: the published network is to be held for less than its trained interval, or
                a model that reads previous closures for another interval than the trained one.
        """
        trained = self.target.get("interval", 1)
        if self.config["conditions"].get("previous_closures") and interval != trained:
            raise ValueError(
                f"interval={interval}: this model draws a closure given the last ones, each of "
                f"{trained} steps as in its training; call it every {trained} steps"
            )
        if self.model.rescaled:
            return interval
        if interval < trained:
            raise ValueError(
                f"interval={interval}: the published network was trained at {trained} steps and "
                "is not rescaled; hold its draws at least as long"
            )
        return trained

    def interval_ratio(self, interval: int | None) -> float:
        """Return the averaging time of a draw for ``interval`` steps, in trained intervals."""
        return (
            1.0
            if interval is None
            else self.averaging_steps(interval) / self.target.get("interval", 1)
        )

    def describe_interval(self, interval: int) -> str:
        """Describe how a draw is held, in the words of every report of a coupled run."""
        words = f"held {interval} step{'' if interval == 1 else 's'}"
        return (
            words
            if self.averaging_steps(interval) == interval
            else words + " as published, not rescaled"
        )

    def process(
        self,
        members: int | Sequence[int],
        *,
        seed: int = 0,
        interval: int | None = None,
        evaluations: int | None = None,
        method: str | None = None,
    ) -> Process:
        """Return the closure as a process in time, which a solver calls once an interval.

        It counts the calls and keeps the earlier states and closures that draws read.

        Args:
            members: number of members, or their ids.
            seed: seed of the draws.
            interval: solver steps from one call to the next; None = the trained interval.
            evaluations, method: settings of the sampler; None = the model's.

        Raises:
            ValueError: the closure cannot be called at this interval, or members are invalid.
        """
        steps = interval_of(interval) or self.target.get("interval", 1)
        return Process(
            self,
            member_ids(members),
            seed,
            steps,
            memory=Memory.of(self, steps),
            sampler={"evaluations": evaluations, "method": method},
            model_hash=self.header.train_hash,
        )

    def sample(  # noqa: PLR0913 - as wide as what users can ask for
        self,
        state: Any,
        *,
        sensors: Sensors | None = None,
        history: Any = None,
        previous: Any = None,
        members: int | Sequence[int] | Sequence[Sequence[int]] = 64,
        seed: int = 0,
        call: int = 0,
        interval: int | None = None,
        evaluations: int | None = None,
        method: str | None = None,
        strict: bool = False,
    ) -> Any:
        """Draw closures U for one or several resolved states; returns (M, n, n) or (B, M, n, n).

        Args:
            state: vorticity, numpy or torch: (n, n), or (M, n, n) with one row per member, or
                (B, n, n) with one row per list of members. A state of C fields is (C, n, n), a
                field on a line (n,), one of three sides (n, n, n), here and below. If
                ``config["conditions"]`` has a true ``forecast``, it is the state after the reduced
                solver's interval, to which U is added.
            sensors: point values of the true closure, or None.
            history: earlier states (H, n, n) or (M, H, n, n), newest first, if the model was
                trained with them.
            previous: previous closures, in the form of ``history``.
            members: number of members, or their ids, or B lists of M ids. With lists, results that
                depend on the state alone are computed once per list. A member's draw depends on
                (seed, member, call) only.
            seed, call: key of the draws; equal keys give equal draws.
            interval: solver steps for which the draw is held; None = the trained interval. For
                another interval each shell is rescaled by its memory: a mean of white noise over m
                steps has 1/m of its variance. Draws of the published network are not rescaled.
            evaluations, method: settings of the sampler; None = the model's.
            strict: raise ValueError for a state with variance outside the model's band.

        Returns:
            U, (M, n, n), or (B, M, n, n) for B lists, in the type and precision of ``state``.

        Raises:
            ValueError: one line with the value and what was expected.
        """
        form = self.channels, self.dimensions, self.equal_sides
        tensor = fields("state", state, *form)
        ids, states = lists(members)
        request = Request(
            tensor,
            ids,
            seed,
            call,
            sensors,
            None if history is None else fields("history", history, *form),
            None if previous is None else fields("previous", previous, *form),
            self.interval_ratio(interval_of(interval)),
            evaluations,
            method,
        )
        request = check(request, states, *form)
        self._check_band(tensor, strict)
        out = self._draw(self.model.sample_batch, request)
        if states is not None:
            out = out.unflatten(0, (states, -1))
        if isinstance(state, np.ndarray):
            precision = state.dtype if state.dtype in (np.float32, np.float64) else np.float64
            return out.cpu().numpy().astype(precision)
        return out.to(device=tensor.device, dtype=tensor.dtype)

    def sample_hat(self, request: Request, *, strict: bool = False) -> Tensor:
        """Draw closures as :meth:`sample`, from and to retained spectra, without a transform.

        Args:
            request: ``state`` (2K + 1, K + 1) or (M, 2K + 1, K + 1), with the solver's K modes in
                the forward norm (:mod:`hpc_closure.spectral.modes.grid`); ``history`` and
                ``previous`` likewise.
            strict: see :meth:`sample`.

        Returns:
            Spectra of U, (M, 2K + 1, K + 1), on the device and in the precision of ``state``.

        Raises:
            ValueError: one line with the value and what was expected.
        """
        form = self.channels, self.dimensions, self.equal_sides
        w_hat = spectra("state", request.state, *form)
        for name in PAST:
            if getattr(request, name) is not None:
                spectra(name, getattr(request, name), *form)
        request = check(request, None, *form)
        self._check_band(w_hat, strict)
        out = self._draw(self.model.sample_hat, request)
        return out.to(device=w_hat.device, dtype=w_hat.dtype)

    def _draw(self, draw: Callable[[Request], Tensor], request: Request) -> Tensor:
        """Move a request to the model's device, add its batch axis, and draw without gradients."""
        past = {name: getattr(request, name) for name in PAST}
        axes = self.dimensions + (self.channels > 1)
        for name, frames in past.items():
            if frames is not None:
                past[name] = frames.to(self.device).reshape(-1, *frames.shape[-axes - 1 :])
        state = request.state.reshape(-1, *request.state.shape[-axes:]).to(self.device)
        with torch.no_grad():
            return draw(replace(request, state=state, **past))

    def _check_band(self, state: Tensor, strict: bool) -> None:
        """Log once, or raise if ``strict``, that a state has variance outside the model's band."""
        band = getattr(self.model, "band", None)  # a model without a band uses the caller's grid
        if band is None or (self._warned and not strict):
            return
        # a few members of a flow show it at little cost
        if state.ndim > self.dimensions + (self.channels > 1) and not strict:
            state = state[:: -(-len(state) // ROWS_CHECKED)]
        if state.is_complex():
            own = zip(mode_counts(state, self.dimensions), band.mode_counts)
            if all(there <= here for there, here in own):
                return
            share = band.share_beyond(state)
        else:
            sides = tuple(range(-self.dimensions, 0))
            band.check_grid(*state.shape[-self.dimensions :])
            single = state if state.dtype == torch.float64 else state.float()
            share = band.share_beyond(torch.fft.rfftn(single, dim=sides), state.shape[-1])
        most = float(share.max())
        if most <= SHARE_BEYOND:
            return
        line = (
            f"{most:.2g} of the state's variance is outside the model's band of {band.modes} "
            f"modes (training grid {self.model.grid}), where the closure is zero: train on a "
            "finer train.grid, or filter the state to the band"
        )
        if strict:
            raise ValueError(line)
        self._warned = True
        log.get().warning(line)


def _replays() -> Any:
    """Create the CUDA graphs of a closure's draws if the switch ``replays`` is on, else None."""
    if not switches.is_on(switches.REPLAYS):
        return None
    from hpc_closure.closure.cuda.replays import Replayed

    return Replayed()


def build(model: dict[str, Any], grid: int, length: float = 1.0) -> ClosureModel:
    """Build a model with fresh weights.

    Args:
        model: the experiment's ``model`` section; missing keys and None come from the preset.
        grid: points per side of the training fields; sets the band, ``|k| <= (grid - 1) // 3``.
        length: side of the periodic square.
    """
    config = resolve(renames.updated(model, "model", source="model"))
    kind = kind_of(config["preset"])
    build_model = compose if kind is None else kind.build
    built: ClosureModel = build_model(config, grid, length)
    built.num_parameters()  # raises ValueError for complex parameters
    return built
