"""Define the schema of an experiment and the settings that the hashes of its stages cover.

Description, unit and range of every key are defined only here; ``hpc-closure config show --doc``
prints them. The sections ``physics generate model train rollout evaluate`` determine the results.
The section ``cluster`` determines how they are computed and is part of no hash.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from hpc_closure.experiment import renames, user_modules
from hpc_closure.experiment.checks import check
from hpc_closure.experiment.data_section import Data
from hpc_closure.experiment.duration import check_lead
from hpc_closure.experiment.kinds import (
    Kind,
    ModelKind,
    NetworkKind,
    ResidualKind,
    find,
    is_path,
    names,
)
from hpc_closure.experiment.method_names import RESERVED, TRUTH
from hpc_closure.experiment.models import CLOSED_MEANS, RIVALS, preset_names, resolve
from hpc_closure.spectral.equations import Equation, Vorticity2D
from hpc_closure.spectral.modes.resolution import alike, per_side, points_for, retained_modes
from hpc_closure.spectral.problem import Numerics, Problem
from hpc_closure.spectral.recipe import (
    Count,
    EvenGrid,
    Finite,
    NonNegative,
    Positive,
    Section,
    SideGrid,
)

# keys of generate that may change without invalidating existing trajectories
GROWS_GENERATE = ("members", "t_end", "certificate")
# further outputs: they change no trajectory and are in no hash, but are equal in a run
OUTPUTS = ("fields", "filters", "series_every", "spectra")
# keys of train that do not change what is learned
TRANSIENT_TRAIN = (
    "engine",
    "zero_stage",
    "deepspeed",
    "memory_gib",
    "accumulate",
    "recompute",
    "validate_every",
    "checkpoint_every",
    "opponents",
)


class Filter(Section):
    """A homogeneous filter; the width is that of large-eddy simulation (Pope 2000, sec. 13.2)."""

    kind: Literal["sharp", "gaussian"] = Field(
        description="sharp: |kx|, |ky| <= pi / width; gaussian: exp(-k^2 width^2 / 24)"
    )
    width: Positive = Field(description="length")

    @property
    def name(self) -> str:
        """Name of the data sets of the filtered fields."""
        return f"{self.kind}_{self.width!r}"

    def modes(self, length: float) -> int:
        """Return the highest integer wavenumber that passes (gaussian: transfer above 1e-3)."""
        cut = math.pi if self.kind == "sharp" else math.sqrt(24 * math.log(1e3))
        return int(cut * length / (2 * math.pi * self.width) + 1e-9)

    def points(self, length: float, grid: int) -> int:
        """Return points per side of the smallest even grid that retains these modes (2/3 rule)."""
        modes = self.modes(length)
        return grid if modes >= retained_modes(grid) else points_for(modes)


class Record(Section):
    start: NonNegative = Field(20.0, description="time of the first snapshot")
    every: Positive = Field(0.1, description="time between snapshots; a multiple of dt")
    burst: Count = Field(
        1,
        description="number of snapshots, one closure interval apart, that end at each of these "
        "times; a model needs at least one more than the previous closures that it reads",
    )
    grid: SideGrid | None = Field(
        None,
        description="points per side of the stored fields, or a list with those of each side; "
        "none = the grid of the DNS",
    )
    precision: Literal["float32", "float64"] = "float32"
    fields: tuple[Literal["vorticity", "velocity", "streamfunction"], ...] = Field(
        (),
        description="fields stored besides the vorticity (in 1-D: besides the state); in 3-D "
        "velocity is one vector, a view of u, v and w that takes no room",
    )
    filters: tuple[Filter, ...] = Field(
        (), description="filtered vorticity stored at each {kind, width}, on its own small grid"
    )
    series_every: Positive | None = Field(
        None,
        description="time between entries of the diagnostics from t = 0; none = no time series",
    )
    spectra: tuple[
        Literal["energy", "enstrophy", "energy_transfer", "enstrophy_transfer"], ...
    ] = Field((), description="shell spectra in the time series (series_every)")

    @field_validator("fields", "spectra")
    @classmethod
    def _once(cls, names):
        return tuple(sorted({*names} - {"vorticity"}))  # vorticity is always stored

    @field_validator("filters")
    @classmethod
    def _filters_once(cls, filters):
        return tuple(sorted(set(filters), key=lambda item: (item.kind, item.width)))


class Generate(Numerics):
    """The DNS ensemble and the closure target computed from it."""

    members: Annotated[int, Field(ge=1, le=10_000_000)] = Field(100, description="trajectories")
    t_end: Positive = 40.0
    record: Record = Record()
    closure: Literal["diffusion", "convection", "subgrid", "none"] = Field(
        "diffusion",
        description="term missing in the reduced solver: diffusion (the published G), convection "
        "(the published H), or subgrid (the effect of unresolved scales); none = data only",
    )
    interval: Count = Field(1, description="solver steps over which a closure target is averaged")
    certificate: Literal["required", "reported"] = Field(
        "required",
        description="required: a block that fails its checks counts as failed; reported: it is "
        "kept and the failed checks are recorded",
    )

    def bytes_per_member(self, physics: Equation) -> float:
        """Compute the size in bytes of the stored fields of one member."""
        record, sides = self.record, physics.dimensions
        grid = record.grid or self.grid
        further = {"velocity": 2, "streamfunction": 1}
        number = len(physics.channels) * (1 + (self.closure != "none"))
        if not physics.is_velocity:
            number += sum(further.get(name, 0) for name in record.fields)
        points = number * math.prod(per_side(grid, sides, "generate.record.grid"))
        points += sum(item.points(physics.length, self.grid) ** sides for item in record.filters)
        snapshots = record.burst * (1 + round((self.t_end - record.start) / record.every))
        return points * snapshots * (4 if record.precision == "float32" else 8)

    @property
    def spacing(self) -> float:
        """Time between stored snapshots; with bursts the time between snapshots of a burst."""
        return self.closure_interval if self.record.burst > 1 else self.record.every

    @property
    def closure_interval(self) -> float:
        """Time of a closure interval."""
        return self.interval * self.dt

    @property
    def consecutive(self) -> bool:
        """Whether stored snapshots are one closure interval apart."""
        return abs(self.spacing - self.interval * self.dt) < 1e-6 * self.dt

    @property
    def holds(self) -> dict:
        """Content that a finished block must have, as the ledger compares it."""
        record = self.record
        holds: dict = {"t_end": self.t_end}
        outputs = [*record.fields, *(item.name for item in record.filters)]
        if outputs:
            holds["outputs"] = outputs
        if record.series_every is not None:
            holds["series_every"] = repr(record.series_every)
        if record.spectra:
            holds["spectra"] = list(record.spectra)
        return holds


def sha256_json(value: Any) -> str:
    """Hash of plain data, independent of key order."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


class Conditions(Section):
    sensors: Literal["none", "optional", "required"] = Field(
        "optional", description="point values of the true closure as a condition"
    )
    previous_states: Annotated[int, Field(ge=0, le=8)] = Field(
        0, description="number of earlier states used as conditions"
    )
    previous_closures: Annotated[int, Field(ge=0, le=8)] = Field(
        0,
        description="number of previous closures used as conditions: U_n depends on U_(n-1), ...; "
        "for closures with memory from call to call",
    )
    physics_estimate: bool = Field(
        False,
        description="use an estimate of the closure as an input: the removed term, for subgrid "
        "a Leith model; the method of such a model is named model+physics",
    )
    forecast: bool = Field(
        False,
        description="read the state after the reduced solver's interval, to which a subgrid "
        "closure is added, in place of the state before it",
    )


def _switch(value: Any) -> Any:
    """Convert booleans, as which YAML 1.1 reads on and off, back to these words."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _one_of(known: tuple[str, ...]) -> Any:
    """Return the type of a name that is one of ``known`` or the path of an outside class."""

    def check_name(value: str) -> str:
        if value not in known and not is_path(value):
            *most, last = map(repr, known)
            expected = f"{', '.join(most)} or {last}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return value

    return Annotated[str, AfterValidator(check_name)]


def _own_keys() -> dict[str, Any]:
    """Collect the additional keys of the package's networks, residuals and models."""
    kinds: list[type[Kind]] = [
        family.known[name]
        for family in (NetworkKind, ResidualKind, ModelKind)
        for name in names(family)
    ]
    fields: dict[str, Any] = {}
    for kind in kinds:
        options = kind.Options.model_fields if kind.Options else {}
        fields |= {key: (field.annotation, field) for key, field in options.items()}
    return fields


if TYPE_CHECKING:
    PresetName: TypeAlias = str
    MeanName: TypeAlias = str
    NetworkName: TypeAlias = str
    ResidualName: TypeAlias = str
    RivalName: TypeAlias = str
else:
    PresetName = _one_of(preset_names())
    MeanName = _one_of((*CLOSED_MEANS, *names(NetworkKind)))
    NetworkName = _one_of((*names(NetworkKind), "none"))
    ResidualName = _one_of(names(ResidualKind))
    RivalName = Literal[RIVALS]


class ModelKeys(Section):
    """Settings that every kind of model has."""

    preset: PresetName = Field(
        "default",
        description="default: all parts, validated on unseen members; fno_score: the score "
        "network alone, with learned sensors; one_pass: a generator trained by CRPS; gaussian: "
        "closed forms only; convolutional: closed forms, and 3 x 3 convolutions for the rest of "
        "the mean; gaussian_modes: a learned mean and a Gaussian law with a covariance per "
        "wavevector; "
        "gaussian_state: the same law with a spread that depends on the state; mixture: two such "
        "laws with weights that depend on the state; point_mixture: a mixture of two normal laws "
        "at every point, joined by a Gaussian copula; gaussian_amplitude: a Gaussian process "
        "with a spread that depends on place and state; resampled: residuals of the training in "
        "its place; published: the network of Dong, Chen, Wu "
        "2025; the others: eddy viscosities",
    )
    conditions: Conditions = Conditions()
    mean: Literal["none"] | tuple[MeanName, ...] | None = Field(
        None,
        description="parts of the mean m: regression; numbers: smooth functions of scalar "
        "features of the state for the largest modes; and one network for the rest: fno, a "
        "Fourier neural operator, or cnn, 3 x 3 convolutions; or none",
    )
    regression_terms: Literal["none", "linear", "quadratic"] | None = Field(
        None, description="terms of the regression"
    )
    amplitude: NetworkName | None = Field(
        None, description="network of the amplitude D; none: D = 1"
    )
    amplitude_score: Literal["likelihood", "crps"] | None = Field(
        None, description="score of points by which the network of D is fitted"
    )
    residual: ResidualName | None = Field(
        None,
        description="law of the residual q; score: a diffusion model; crps: a generator in one "
        "pass; mixture: Gaussian laws that depend on the state; point_mixture: two normal laws at "
        "every point; modes: a Gaussian law with a covariance per wavevector; gaussian: with one "
        "variance per |k|; resampled: residuals of the training, moved at random; none: q = 0, "
        "the mean alone",
    )
    sensors: Literal["kriging", "learned"] | None = Field(
        None,
        description="kriging: sensors are kriged under the Gaussian law; learned: by training",
    )
    base_noise: Literal["matched"] | None = Field(
        None, description="retired: older files may state matched, the only remaining value"
    )
    noise_memory: Annotated[Literal["on", "off"], BeforeValidator(_switch)] | None = Field(
        None,
        description="on: noise with the residual's correlation from call to call, unless previous "
        "closures are conditions; a subgrid closure needs generate.record.burst or record.every "
        "of one closure interval to estimate it; off: white noise",
    )
    generator: Literal["fno", "cnn"] | None = Field(
        None,
        description="network of the generator; fno: Fourier blocks; cnn: 3 x 3 convolutions, for "
        "laws that depend on the neighbourhood alone",
    )
    validate_parts: Annotated[Literal["on", "off"], BeforeValidator(_switch)] | None = Field(
        None,
        description="on: a trained part is scaled by its gain on 8 members that are not trained "
        "on; off: it always acts in full",
    )
    modes: Annotated[int, Field(ge=2, le=256)] | None = Field(
        None, description="retained modes per side; none = preset"
    )
    width: Annotated[int, Field(ge=4, le=1024)] | None = Field(
        None, description="channels of the networks; none = preset"
    )
    layers: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="blocks of the generator; none = preset"
    )
    mean_layers: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="blocks of the networks of mean and amplitude; none = preset"
    )
    schedule: Literal["trigonometric"] | None = Field(
        None, description="retired: older files may state trigonometric, the only remaining value"
    )
    function_evaluations: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="evaluations of the generator per sample; none = preset"
    )
    spectral_convolution: Literal["auto", "fft", "matrix"] | None = Field(
        None,
        description="algorithm of spectral convolutions; auto: matrix for few modes, else fft",
    )
    options: dict[str, Any] | None = Field(
        None, description="keys of the classes outside the package that this section names"
    )


#: with the additional keys of single networks, residuals and models
ModelOfAll: Any = create_model("ModelOfAll", __base__=ModelKeys, **_own_keys())


class Model(ModelOfAll):
    """The closure U = m(V) + D(V) q; a key that is none has the preset's value."""

    @property
    def gated(self) -> bool:
        """Whether trained parts are scaled by their gain on unseen members."""
        config = resolve(self.model_dump(exclude_none=True))
        residual = config.get("residual")
        if residual is None or config.get("validate_parts") != "on":
            return False
        return find(ResidualKind, residual, "model.residual").trained


class RolloutTraining(Section):
    """Training through the solver: coupled ensembles from stored states, with the CRPS as loss."""

    steps: Count = Field(600, description="optimiser steps, after all others")
    batch: Count = Field(12, description="starts per step over all processes")
    members: Annotated[int, Field(ge=2, le=64)] = Field(2, description="members of each ensemble")
    horizon: tuple[Count, Count] = Field(
        (4, 12),
        description="closure calls of a run: in the first step, and from half of the steps on",
    )
    lr: Positive = Field(3e-3, description="peak learning rate")
    energy_weight: NonNegative = Field(
        0.5,
        description="weight, beside the relative CRPS, of the relative squared error of each "
        "shell's mean energy",
    )

    @model_validator(mode="after")
    def _rises(self):
        if self.horizon[0] > self.horizon[1]:
            raise ValueError(f"horizon={list(self.horizon)}: the first is larger than the last")
        return self


class StabilityTest(Section):
    """Stability test of a closure that reads its own draws, by long coupled runs.

    The runs start from validation trajectories. The closure must not leave the training's range
    more often than the DNS's closures, and enstrophy must not grow.
    """

    horizon: Annotated[int, Field(ge=2)] = Field(
        400, description="closure calls of a run, of which the second half is tested"
    )
    members: Count = Field(2, description="trajectories from each start")
    balance: bool = Field(
        False,
        description="change noise and damping of each shell until these runs have the DNS's "
        "energy in it",
    )


class Train(Section):
    """Training; batch sizes are totals over all processes."""

    grid: EvenGrid | None = Field(
        None, description="train on fields strided to this grid; none = stored grid"
    )
    window: tuple[float, float] | None = Field(
        None, description="train on snapshots in [from, to]; none = all"
    )
    split: tuple[NonNegative, NonNegative, NonNegative] = Field(
        (0.8, 0.1, 0.1),
        description="shares of train, valid, test, by trajectory; a trajectory keeps its part if "
        "members are added",
    )
    steps: Count = Field(20000, description="optimiser steps of all phases together")
    batch: Count = Field(
        80, description="samples per step over all processes; a multiple of processes x accumulate"
    )
    lr: Positive = Field(1e-3, description="peak learning rate")
    schedule: Literal["constant", "cosine", "published"] = Field(
        "cosine",
        description="learning rate within a phase; cosine: a short linear rise, then decay to "
        "zero; published: halved after every fifth of the steps",
    )
    weight_decay: NonNegative = Field(
        0.0, description="decoupled weight decay (AdamW), added to that of the mean's network"
    )
    clip: NonNegative = Field(1.0, description="largest norm of the gradient; 0 = no clipping")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999,
        description="decay of the averaged weights, which are validated and exported; 0 = off",
    )
    engine: Literal["auto", "deepspeed", "torch"] = Field(
        "auto", description="auto: DeepSpeed if it is installed, else plain torch"
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        0,
        description="what DeepSpeed shards; 0: nothing, 1: optimiser, 2: also gradients, 3: also "
        "weights",
    )
    deepspeed: str | None = Field(
        None, description="JSON file whose keys replace those of the built-in DeepSpeed settings"
    )
    memory_gib: Positive = Field(
        4.0, description="GiB of fields kept in memory; larger data are streamed"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast of pointwise parts; weights remain float32"
    )
    accumulate: Count = Field(1, description="micro-batches per step and process")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None,
        description="seed of weights, batches and noise in training; none = the experiment's "
        "seed, which also determines the data",
    )
    recompute: bool = Field(
        False,
        description="store only the inputs of the networks' layers and recompute activations in "
        "the backward pass: equal gradients, less memory, more time",
    )
    augment: bool = Field(
        False,
        description="augment samples by the common symmetries of equation, forcing and noise; for "
        "closure subgrid, which does not depend on the forcing, of equation and noise",
    )
    validate_every: Count = Field(
        500, description="steps between evaluations of the held-out loss"
    )
    checkpoint_every: Count = Field(500, description="steps between restart points")
    patience: Annotated[int, Field(ge=0)] = Field(
        0,
        description="number of validations without improvement after which a phase ends with its "
        "best weights; 0 = off",
    )
    stability_test: StabilityTest | None = Field(
        None,
        description="reduce the share of the mean's network until long coupled runs are stable, "
        "and balance energies, for a model that reads previous closures; none = off",
    )
    rollout_training: RolloutTraining | None = Field(
        None, description="last phase of training, through the reduced solver; none = off"
    )
    opponents: tuple[RivalName, ...] = Field(
        (),
        description="closures without a generator (model.preset) to compare with the model: they "
        "are trained on the same data, coupled from the same starts, and listed in every table",
    )

    @field_validator("opponents")
    @classmethod
    def _known_order(cls, names):
        return tuple(name for name in RIVALS if name in names)

    @model_validator(mode="after")
    def _engine_shards(self):
        if self.engine == "torch" and self.zero_stage:
            raise ValueError(
                f"zero_stage={self.zero_stage} needs DeepSpeed, but engine=torch: "
                "set engine=deepspeed or zero_stage=0"
            )
        return self


class Sampling(Section):
    method: Literal["preset", "euler", "heun", "dpmpp_2m"] = Field(
        "preset", description="integrator of the generator; preset = the model's default"
    )
    function_evaluations: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="evaluations of the generator per sample; none = the model's default"
    )

    def options(self) -> dict:
        """Return keyword arguments for ``closure.sample``; None selects the model's default."""
        method = None if self.method == "preset" else self.method
        return {"method": method, "evaluations": self.function_evaluations}


class SensorLayout(Section):
    layout: Literal["regular", "scattered"] = "regular"
    number: Count = Field(16, description="sensors; regular: per side; scattered: in total")
    noise: NonNegative = Field(
        0.0,
        description="standard deviation of the sensor error / rms of the closure, of each field",
    )


class Reduced(Section):
    """The reduced solver of closure subgrid."""

    python: Annotated[str, Field(pattern=r"^[^:]+(:[A-Za-z_][\w.]*)?$")] | None = Field(
        None,
        description="a reduced solver of yours, file.py:Name or module:Name, with dt and step(v, "
        "n) (docs/your_solver.md); a file is searched beside the experiment's, then in the "
        "working folder; none = the solver of this package on the grid of the data",
    )
    grid: EvenGrid | None = Field(
        None,
        description="points per side of the reduced solver, for the closure of a stored DNS of "
        "others (data); none = those of the files",
    )
    step: Literal["auto"] | Count = Field(
        1,
        description="number of DNS steps in one step of the reduced solver, a divisor of "
        "generate.interval; auto: the largest for which the bare solver's error exceeds that at "
        "the DNS's step by at most 1 % on the pilot's starts (chosen by generate)",
    )
    known: EvenGrid | None = Field(
        None,
        description="grid whose modes are known at a start, and on which coupled runs are scored; "
        "none = grid of the reduced solver. With a coarser grid the closure of a finer reduced "
        "solver (generate.record.grid) is trained, which starts from the same information as a "
        "closure on the coarse grid",
    )
    start: Literal["empty", "moved", "synchronised"] = Field(
        "synchronised",
        description="with known: further modes of the reduced solver at a start, as in "
        "rollout.rungs; synchronised: they have followed the resolved past under the closure",
    )

    @property
    def of_user(self) -> dict[str, str]:
        """Return name and hash of the source of the user's solver; with it targets change.

        Raises:
            ValueError: there is no such file or module.
        """
        assert self.python is not None
        source = user_modules.source_of("reduced.python", self.python)
        name = self.python.partition(":")[2]
        return {"python": name, "source": hashlib.sha256(source.encode()).hexdigest()}


class Pilot(Section):
    """Separate trajectories to choose steps and drains and to test whether a closure is needed."""

    initial_conditions: Annotated[int, Field(ge=2, le=1000)] = Field(
        8, description="number of starts"
    )
    members: Annotated[int, Field(ge=3, le=1000)] = Field(
        4, description="number of DNS from every start, of which the first serves as the truth"
    )
    spinup: Positive | None = Field(
        None,
        description="time before the start during which twins are nudged to one flow, to measure "
        "their synchronisation; a multiple of the closure interval; none = replicas.spinup, at "
        "least 12 intervals",
    )


class Rung(Section):
    """A solver on a finer grid without closure: the baseline that a closure has to beat.

    It knows the modes that the reduced solver retains, at the start and in the past.
    """

    grid: EvenGrid = Field(description="points per side, at most those of the DNS")
    start: Literal["empty", "moved", "synchronised", "mismatched"] = Field(
        "empty",
        description="further modes at the start; empty: zero; moved: those of the DNS, translated "
        "by a random distance; synchronised: the same after following the resolved past; "
        "mismatched: after following the past of another start (a control)",
    )
    past: Positive | None = Field(
        None,
        description="length of the resolved past that synchronised modes follow; a multiple of "
        "the time between snapshots; none = replicas.spinup, at least 10 closure intervals",
    )
    drain: bool = Field(
        False,
        description="add a damping rate per shell, fitted to the pilot's trajectories",
    )
    step: Literal["auto"] | Count = Field(
        "auto",
        description="number of DNS steps in one step; auto: the largest for which the error "
        "exceeds that at the DNS's step by at most 2 % on the pilot's starts",
    )

    @property
    def name(self) -> str:
        """Name of its method in the tables, e.g. ``rung_64_moved_drain``."""
        return f"rung_{self.grid}_{self.start}{'_drain' if self.drain else ''}"

    @property
    def key(self) -> str:
        """Name and the further settings that determine its run."""
        more = {"step": self.step, "past": self.past}
        return " ".join([self.name, *(f"{key}={value}" for key, value in more.items())])


class Replicas(Section):
    """The true ensemble of a subgrid closure: DNS that share the resolved past of a start.

    A replica has the retained modes of its start, and independent unresolved modes and forcing.
    For the time ``spinup`` the retained modes are imposed at every step; at ``rollout.t_start``
    it is released. Starts and times are those of ``rollout``.
    """

    members: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="number of replicas of every start; 0 = none"
    )
    spinup: NonNegative = Field(
        0.0,
        description="time before the release during which the resolved modes are imposed, so that "
        "unresolved modes forget their initialisation; leave it at 0 if unresolved modes are "
        "forced, for they would accumulate energy that they cannot transfer",
    )
    start: Literal["moved", "empty"] = Field(
        "moved",
        description="initial unresolved modes; moved: those of the start, translated by a random "
        "distance; empty: zero",
    )


class Rollout(Section):
    """The closure-coupled ensemble, started from test trajectories."""

    members: Annotated[int, Field(ge=1, le=10_000_000)] = 20
    initial_conditions: Count = Field(1, description="number of test trajectories to start from")
    t_start: NonNegative = 30.0
    t_end: Positive = 50.0
    after_release: NonNegative = Field(
        0.0,
        description="time from t_start, when replicas are released, to the start of the members; "
        "member m starts from state and last closures of replica 1 + m; a multiple of every; 0 = "
        "all members start at t_start from the state of the test trajectory. Lead times count "
        "from the release",
    )
    every: Positive = Field(1.0, description="time between stored states; a multiple of dt")
    interval: Count = Field(5, description="solver steps between closure calls")
    last_closures: Literal["own", "moved"] = Field(
        "own",
        description="initial previous closures; own: those of the test trajectory; moved: these "
        "translated by a random distance, so that members know only the resolved state, as "
        "replicas do",
    )
    sampler: Sampling = Sampling()
    sensors: SensorLayout | None = Field(
        None,
        description="sensors that read the closure of the start's own trajectory over each coming "
        "interval; for subgrid from the stored data, and that trajectory, not a replica, is the "
        "truth",
    )
    baselines: tuple[Literal["none", "oracle", "mean_gp"], ...] = Field(
        ("none", "oracle"),
        description="baseline ensembles; none: no closure; oracle: the exact law; mean_gp: the "
        "model's mean and Gaussian law without generator",
    )
    rungs: tuple[Rung, ...] = Field(
        (),
        description="solvers without closure on finer grids, with the stochastic forcing that "
        "they resolve (closure subgrid)",
    )

    @field_validator("baselines")
    @classmethod
    def _once(cls, names):
        return tuple(sorted(set(names)))

    @field_validator("rungs")
    @classmethod
    def _rungs_once(cls, rungs):
        ordered = sorted(rungs, key=lambda rung: (rung.grid, rung.name))
        names = [rung.name for rung in ordered]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{name} is listed twice; list each combination of grid, start and drain once"
                )
        return tuple(ordered)

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the ensembles besides the model's, with the settings that determine them."""
        return (*self.baselines, *(rung.key for rung in self.rungs))

    @property
    def begin(self) -> float:
        """Time at which coupled runs begin."""
        return self.t_start + self.after_release

    @property
    def trajectories(self) -> int:
        """Number of coupled trajectories: every member from every initial condition."""
        return self.members * self.initial_conditions

    @property
    def holds(self) -> dict:
        """Content that a finished block must have, as the ledger compares it."""
        return {"t_end": self.t_end, "references": list(self.beside)}


class Event(Section):
    """Event of an uncertainty study: observable > threshold at a lead time."""

    observable: Literal["enstrophy", "peak", "large_scale"] = "enstrophy"
    threshold: Finite = Field(description="in units of the observable")
    lead_time: Positive = Field(description="a stored lead time")
    tolerance: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.02, description="half width of the interval for which the ensemble size is computed"
    )
    channel: str | None = Field(
        None, description="field of a state of several, e.g. rain; none for a state of one field"
    )


class Evaluate(Section):
    lead_times: Annotated[tuple[Positive, ...], Field(min_length=1)] = (5.0, 10.0, 15.0, 20.0)
    grids: Annotated[tuple[EvenGrid, ...], Field(min_length=1)] | None = Field(
        None, description="grids on which samples are scored (strided data); none = training grid"
    )
    sensors: tuple[SensorLayout, ...] = Field(
        (), description="sensor layouts that are scored besides no sensors"
    )
    samples: Count = Field(200, description="number of held-out snapshots that are scored")
    members: Annotated[int, Field(ge=2)] = Field(32, description="closure samples per snapshot")
    sampler: Sampling = Sampling()
    compare: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")],
        Annotated[str, Field(min_length=1)],
    ] = Field(
        {},
        description="further closures in the tables, {name: model}; a model is a run, a "
        ".safetensors file, or a shipped model",
    )
    seeds: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")],
        Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)],
    ] = Field(
        {},
        description="runs that differ only in train.seed, {name: [run, run, ...]}; they are shown "
        "as one row with mean and range",
    )
    against: str = Field(
        "model",
        description="reference method with which all others are compared start by start",
    )
    event: Event | None = Field(None, description="event whose probability is estimated")
    scores: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")], ...] = Field(
        (),
        description="modules with further scores, [package.module]; they are imported, and their "
        "SCORES are added to the tables",
    )
    formats: tuple[Literal["png", "pdf", "csv"], ...] = Field(
        ("png", "pdf", "csv"),
        description="formats of the figures; png is always among them, for the report; csv is a "
        "table of what is drawn; [] = no "
        "figures, which take most of the time of a small evaluation",
    )
    seed: int = 0

    @field_validator("compare", "seeds")
    @classmethod
    def _names_of_their_own(cls, compare):
        for name in compare:
            taken = (*RESERVED, TRUTH)
            if name in taken or name.startswith(("oracle", "rung_")):
                raise ValueError(
                    f"{name} is the name of a built-in method ({', '.join(taken)}): choose another"
                )
        return compare

    @model_validator(mode="after")
    def _knows_its_methods(self):
        for name in self.seeds:
            if name in self.compare:
                raise ValueError(f"{name} is in compare and in seeds: choose another name")
        known = [*RESERVED, *self.compare, *self.seeds]
        if self.against not in known:
            raise ValueError(
                f"against={self.against} is no method of the tables; expected one of "
                f"{', '.join(known)}"
            )
        return self


class Allocation(Section):
    """One Slurm job whose workers share the units of a rollout, in place of an array of tasks."""

    nodes: Count = 1
    workers_per_node: Count = Field(description="single processes without MPI, per node")
    join: bool = Field(
        False,
        description="submit even if other jobs have the units of this run: all workers share them",
    )

    @property
    def workers(self) -> int:
        return self.nodes * self.workers_per_node


class Cluster(Section):
    """Resources; they do not change results and are part of no hash (docs/design.md)."""

    members_per_block: Count = 20
    domain_ranks: Count = Field(1, description="MPI ranks per field (domain decomposition)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="CPU threads per process; 0 = its share of the cores, in training at most as "
        "many as a batch can use",
    )
    checkpoint_every: Positive = Field(60.0, description="seconds between restart files of a unit")
    claim_timeout: Positive = Field(
        600.0,
        description="seconds without a sign of life after which another process takes over a unit",
    )
    max_first_failures: Annotated[int, Field(ge=0)] = Field(
        3,
        description="a command stops if its first units, this many, all fail for the same reason "
        "or lose every member; 0 = never",
    )
    executor: Literal["inline", "local", "slurm"] = "inline"
    profile: str | None = Field(
        None, description="site profile: a shipped one, a name in slurm/profiles, or a path"
    )
    walltime: str = Field("1h", description="per task, e.g. 90m, 3h50m")
    signal_before_end: str = Field("5m", description="warning before the wall-time limit")
    max_running_tasks: Count = Field(
        64, description="largest number of array tasks that run at once"
    )
    max_requeues: Annotated[int, Field(ge=0)] = 20
    units_per_task: Count = Field(1, description="number of blocks per array task")
    allocation: Allocation | None = Field(
        None,
        description="run a rollout as one job of many workers: nodes, workers_per_node; none = as "
        "job arrays",
    )
    devices_per_task: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _times(self):
        check_lead(self.signal_before_end, self.walltime)
        return self


class Use(Section):
    """Products of other runs that are reused."""

    data: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="run whose data are used: its name under root, or its folder"
    )
    model: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="trained model to use: a run, a .safetensors file, or a shipped model "
        "(diffusion, convection, two_regimes)",
    )
    test: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="run with another seed whose data are the test set: its name under root, or "
        "its folder; all its members serve as starts, truth, replicas and snapshots of rollout "
        "and evaluate; none = the test members of train.split",
    )
    mean: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="trained model whose mean is reused: a run, a .safetensors file, or a shipped "
        "model; all training steps are spent on the other parts",
    )
    classes: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = Field(
        (),
        description="classes outside the package, package.module:Class, that model files of other "
        "runs need; those named in section model are imported in any case",
    )


class Experiment(Section):
    base: str | None = Field(None, description="preset that this file starts from")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    root: str = Field("runs", description="folder of runs; environment variables are expanded")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    use: Use = Use()
    data: Data | None = Field(
        None, description="trajectories of others in place of the DNS of generate; none = DNS"
    )
    physics: SerializeAsAny[Equation] = Vorticity2D()
    generate: Generate = Generate()
    model: Model = Model()
    train: Train = Train()
    reduced: Reduced = Reduced()
    pilot: Pilot = Pilot()
    replicas: Replicas = Replicas()
    rollout: Rollout = Rollout()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()

    @field_validator("root")
    @classmethod
    def _expands(cls, root: str) -> str:
        unset = re.search(r"\$\{?\w+\}?", os.path.expandvars(root))
        if unset:
            raise ValueError(f"environment variable {unset.group()} of root={root} is not set")
        return root

    @property
    def folder(self) -> Path:
        return Path(os.path.expandvars(os.path.expanduser(self.root))) / self.name

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of this experiment, in order."""
        later = () if self.only_generates else ("train", "rollout", "evaluate")
        pilot = ("pilot",) if self.needs_pilot else ()
        replicas = ("replicas",) if self.own_replicas else ()
        return (*pilot, "generate", *replicas, *later)

    @property
    def needs_pilot(self) -> bool:
        """Whether settings must be chosen on the pilot's trajectories."""
        if self.generate.closure != "subgrid":
            return False
        rungs = () if self.only_generates else self.rollout.rungs
        fitted = [rung.drain or rung.step == "auto" for rung in rungs]
        return self.reduced.step == "auto" or any(fitted)

    @property
    def pilot_spinup(self) -> float:
        """Time before the start during which the pilot's twins are nudged."""
        least = 12 * self.generate.interval * self.generate.dt
        return self.pilot.spinup or max(self.replicas.spinup, least)

    def past_of(self, rung: Rung) -> float:
        """Return the length of the past that a rung's unresolved modes follow before the start."""
        if rung.start not in ("synchronised", "mismatched"):
            return 0.0
        least = 10 * self.generate.interval * self.generate.dt
        return rung.past or max(self.replicas.spinup, least)

    @property
    def only_generates(self) -> bool:
        """Whether the run only generates data: no closure, or no training members."""
        return self.generate.closure == "none" or not self.train.split[0]

    @property
    def own_replicas(self) -> int:
        """Number of replicas per start that this run computes; 0 with ``use.test``."""
        return 0 if self.use.test else self.replicas.members

    @property
    def problem(self) -> Problem:
        """The full system on the grid of the DNS."""
        problem = Problem.of(self.physics, self.generate)
        python = self.reduced.python
        return problem.replace(reduced_python=python) if python else problem

    @property
    def data_grid(self) -> Any:
        """Points per side of the stored fields; a tuple if sides have different numbers."""
        return alike(self.generate.record.grid or self.generate.grid)

    @property
    def train_grid(self) -> Any:
        """Points per side of the reduced solver's grid, as :attr:`data_grid`."""
        return self.train.grid or self.data_grid

    @property
    def known_grid(self) -> Any:
        """Points per side of the grid whose modes are known at the start of a coupled run."""
        return self.reduced.known or self.train_grid

    @property
    def solver(self) -> Rung:
        """The reduced solver as a rung, with the start of its further modes.

        Of unequal sides its grid is the largest number of points, because a rung has one number.
        """
        start = self.reduced.start if self.known_grid != self.train_grid else "empty"
        points = per_side(self.train_grid, self.physics.dimensions)
        return Rung(grid=max(points), start=start)

    @property
    def score_grids(self) -> tuple[Any, ...]:
        return self.evaluate.grids or (self.train_grid,)

    @model_validator(mode="after")
    def _consistent(self):
        check(self)
        return self

    def stage_settings(self, stage: str) -> dict:
        """Return the settings that determine the product of ``stage``, with those of its inputs.

        Keys that were added later are left out at their default, so that hashes of older runs
        remain valid.
        """
        plain = self.model_dump(mode="json")
        if not self.rollout.after_release:
            del plain["rollout"]["after_release"]
        generate = {
            key: value for key, value in plain["generate"].items() if key not in GROWS_GENERATE
        }
        record = generate["record"]
        generate["record"] = {key: record[key] for key in record if key not in OUTPUTS}
        if record["burst"] == 1:
            del generate["record"]["burst"]
        if generate["cfl"] is None:  # a fixed step has no refinement levels
            del generate["cfl"], generate["max_refinements"]
        physics = self.physics.parameters()
        settings = {"seed": plain["seed"], "physics": physics, "generate": generate}
        times = {key: plain["rollout"][key] for key in ("t_start", "every")}
        reduced = self.reduced.model_dump(mode="json", exclude_defaults=True)
        known = {key: value for key, value in reduced.items() if key == "known"}
        if self.data:
            settings["data"] = self.data.parameters()
        if stage == "pilot":  # independent of the reduced solver's step
            begin = {"spinup": self.pilot_spinup, "members": self.pilot.members}
            of_replicas = {"replicas_spinup": self.replicas.spinup, "start": self.replicas.start}
            pilot = {**begin, **of_replicas, **known}
            return {**settings, "pilot": pilot, "rollout": times}
        if self.reduced.step != 1:
            settings["reduced"] = {"step": self.reduced.step}
        if self.reduced.python:
            settings["reduced"] = self.reduced.of_user
        if stage == "generate":
            return settings
        if stage == "replicas":
            starts = {"split": plain["train"]["split"], **plain["replicas"]}
            return {**settings, "replicas": {**starts, **known}, "rollout": times}
        train = {key: value for key, value in plain["train"].items() if key not in TRANSIENT_TRAIN}
        for name in ("stability_test", "rollout_training"):
            if train[name] is None:
                del train[name]
            elif not train[name].get("balance", True):  # which hashes of older runs lack
                del train[name]["balance"]
        if train["seed"] in (None, plain["seed"]):
            del train["seed"]
        model = {key: value for key, value in plain["model"].items() if value is not None}
        later = {"previous_closures", "forecast"}  # keys that hashes of older runs lack
        model["conditions"] = {
            key: value for key, value in model["conditions"].items() if value or key not in later
        }
        if self.use.mean:
            model["mean_of"] = self.use.mean
        settings.update(model=model, train=train)
        if self.use.model:  # only the training's choice of snapshots and grid matters
            selection = {key: train[key] for key in ("grid", "window", "split")}
            settings.update(model={"use": self.use.model}, train=selection)
        if stage == "train":
            return settings
        if self.use.test:
            settings["use"] = {"test": self.use.test}
        rollout = {
            key: value
            for key, value in plain["rollout"].items()
            if key not in ("members", "t_end", "baselines", "rungs")
        }
        if rollout["last_closures"] == "own":
            del rollout["last_closures"]
        if known:
            settings["reduced"] = {
                **settings.get("reduced", {}),
                **known,
                "start": self.reduced.start,
            }
        if stage == "rollout":
            return {**settings, "rollout": rollout}
        if stage == "evaluate":
            # later keys, left out at their default
            new = {"seeds": {}, "against": "model", "scores": []}
            evaluate = {
                key: value
                for key, value in plain["evaluate"].items()
                if key != "formats" and not (key in new and value == new[key])
            }
            event = evaluate["event"]
            if event and event["channel"] is None:
                evaluate["event"] = {k: v for k, v in event.items() if k != "channel"}
            return {**settings, "rollout": plain["rollout"], "evaluate": evaluate}
        raise ValueError(f"unknown stage {stage!r}")

    def stage_outputs(self, stage: str) -> dict:
        """Return the outputs of ``stage`` besides its trajectories; they are equal in a run."""
        record = self.generate.record.model_dump(mode="json", include=set(OUTPUTS))
        outputs: dict[str, dict] = {
            "generate": {"generate": {"record": record}},
            "rollout": {"rollout": {"baselines": list(self.rollout.beside)}},
        }
        return outputs.get(stage, {})

    def stage_hash(self, stage: str) -> str:
        """Return the hash of :meth:`stage_settings`; it covers the first names of keys."""
        return sha256_json(renames.as_stored(self.stage_settings(stage)))

    def stage_recipe(self, stage: str) -> str:
        """Return :meth:`stage_settings` as JSON, as the files of ``stage`` store it."""
        return json.dumps(renames.as_stored(self.stage_settings(stage)), sort_keys=True)
