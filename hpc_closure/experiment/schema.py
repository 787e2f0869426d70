"""The schema of an experiment, and what its stages' hashes cover.

Every field carries its description, unit and range here, once; ``hpc-closure config show --doc``
prints them. What an experiment *is* lives in ``physics generate model train rollout evaluate``;
how it is run lives in ``cluster`` and is part of no hash.
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

from hpc_closure.experiment.checks import check
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
from hpc_closure.spectral.modes.resolution import points_for, retained_modes
from hpc_closure.spectral.problem import Numerics, Problem
from hpc_closure.spectral.recipe import (
    Count,
    EvenGrid,
    Finite,
    NonNegative,
    Positive,
    Section,
)

# what may change without touching the trajectories that are there
GROWS_GENERATE = ("members", "t_end", "certificate")
# what is written besides: changes no trajectory, so it is in no hash; one list for a run
OUTPUTS = ("fields", "filters", "series_every", "spectra")
# how a training is run, not what it learns
TRANSIENT_TRAIN = (
    "engine",
    "zero_stage",
    "deepspeed",
    "memory",
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
        """Name of its data sets."""
        return f"{self.kind}_{self.width!r}"

    def modes(self, length: float) -> int:
        """Highest integer wavenumber that it passes in a box (gaussian: at least 1e-3 of it)."""
        cut = math.pi if self.kind == "sharp" else math.sqrt(24 * math.log(1e3))
        return int(cut * length / (2 * math.pi * self.width) + 1e-9)

    def points(self, length: float, grid: int) -> int:
        """Points per side of the smallest even grid that retains what it passes (2/3 rule)."""
        modes = self.modes(length)
        return grid if modes >= retained_modes(grid) else points_for(modes)


class Record(Section):
    start: NonNegative = Field(20.0, description="time of the first snapshot")
    every: Positive = Field(0.1, description="time between snapshots; a multiple of dt")
    burst: Count = Field(
        1,
        description="snapshots one closure interval apart that end at each of these times; a "
        "model of the previous closures needs at least one more than it reads",
    )
    grid: EvenGrid | None = Field(
        None, description="grid of the stored fields; none = the grid of the DNS"
    )
    precision: Literal["float32", "float64"] = "float32"
    fields: tuple[Literal["vorticity", "velocity", "streamfunction"], ...] = Field(
        (), description="stored beside the vorticity (on a line: the state), which always is"
    )
    filters: tuple[Filter, ...] = Field(
        (), description="filtered vorticity stored at each {kind, width}, on its own small grid"
    )
    series_every: Positive | None = Field(
        None,
        description="time between entries of the diagnostics from t = 0; none = no such series",
    )
    spectra: tuple[
        Literal["energy", "enstrophy", "energy_transfer", "enstrophy_transfer"], ...
    ] = Field((), description="shell spectra in the series (series_every)")

    @field_validator("fields", "spectra")
    @classmethod
    def _once(cls, names):
        return tuple(sorted({*names} - {"vorticity"}))  # which always is stored

    @field_validator("filters")
    @classmethod
    def _filters_once(cls, filters):
        return tuple(sorted(set(filters), key=lambda item: (item.kind, item.width)))


class Generate(Numerics):
    """The DNS ensemble and the closure target taken from it."""

    members: Annotated[int, Field(ge=1, le=10_000_000)] = Field(100, description="trajectories")
    t_end: Positive = 40.0
    record: Record = Record()
    closure: Literal["diffusion", "convection", "subgrid", "none"] = Field(
        "diffusion",
        description="what the reduced solver lacks: the published G, H, or the unresolved scales; "
        "none = data only, nothing to train",
    )
    interval: Count = Field(1, description="solver steps that one closure target stands for")
    certificate: Literal["required", "reported"] = Field(
        "required", description="a block that fails its checks is failed, or kept with the reasons"
    )

    def bytes_per_member(self, physics: Equation) -> float:
        """Size of the fields of one member on the disk."""
        record, sides = self.record, physics.dimensions
        grid = record.grid or self.grid
        further = {"velocity": 2, "streamfunction": 1}
        number = 1 + (self.closure != "none") + sum(further.get(name, 0) for name in record.fields)
        points = number * grid**sides
        points += sum(item.points(physics.length, self.grid) ** sides for item in record.filters)
        snapshots = record.burst * (1 + round((self.t_end - record.start) / record.every))
        return points * snapshots * (4 if record.precision == "float32" else 8)

    @property
    def spacing(self) -> float:
        """Time from a stored snapshot to the next, within a burst where there are any."""
        return self.interval * self.dt if self.record.burst > 1 else self.record.every

    @property
    def consecutive(self) -> bool:
        """Whether snapshots follow each other by one closure interval."""
        return abs(self.spacing - self.interval * self.dt) < 1e-6 * self.dt

    @property
    def holds(self) -> dict:
        """What a block must hold to be done, in the form that the ledger compares."""
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
    history: Annotated[int, Field(ge=0, le=8)] = Field(
        0, description="earlier states used as conditions"
    )
    previous: Annotated[int, Field(ge=0, le=8)] = Field(
        0,
        description="the last closures used as conditions: U_n is drawn given U_(n-1), ..., for "
        "closures that one call leaves with memory",
    )
    physics: bool = Field(
        False,
        description="grant an estimate of the closure as an input: the removed term, for subgrid "
        "a Leith model; the rows of such a model are named model+physics",
    )


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _one_of(known: tuple[str, ...]) -> Any:
    """Type of a name among some, or of a class outside the package by its path."""

    def check_name(value: str) -> str:
        if value not in known and not is_path(value):
            *most, last = map(repr, known)
            expected = f"{', '.join(most)} or {last}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return value

    return Annotated[str, AfterValidator(check_name)]


def _own_keys() -> dict[str, Any]:
    """Collect the keys that networks, residuals and models of the package have of their own."""
    kinds: list[type[Kind]] = [
        family.known[name]
        for family in (NetworkKind, ResidualKind, ModelKind)
        for name in names(family)
    ]
    fields: dict[str, Any] = {}
    for kind in kinds:
        own = kind.Options.model_fields if kind.Options else {}
        fields |= {key: (field.annotation, field) for key, field in own.items()}
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
    """Keys of every model."""

    preset: PresetName = Field(
        "default",
        description="default: all parts, gated; fno_score: the score network alone, with learned "
        "sensors; one_pass: a generator trained by CRPS; gaussian: closed forms only; "
        "gaussian_modes, gaussian_state, mixture: no generator, what one is compared with: about "
        "a learned mean a Gaussian law with a covariance for each wavevector, one whose spread "
        "follows the state, two of these with weights that do; "
        "convolutional: these, and 3 x 3 convolutions for what they leave of the mean; published: "
        "the network of Dong, Chen, Wu 2025; the others: eddy viscosities",
    )
    conditions: Conditions = Conditions()
    mean: Literal["none"] | tuple[MeanName, ...] | None = Field(
        None,
        description="m: a regression; numbers: for the largest modes also smooth functions of "
        "single numbers of the state, few coefficients; and a network for what they leave: fno, "
        "a Fourier neural operator, or cnn, 3 x 3 convolutions; or none",
    )
    library: Literal["none", "linear", "quadratic"] | None = Field(
        None, description="terms of the regression"
    )
    amplitude: NetworkName | None = Field(None, description="D: learned by such a network, or 1")
    residual: ResidualName | None = Field(
        None,
        description="how q is drawn: by a score; in one pass; from a mixture of Gaussian laws "
        "that follow the state; from a Gaussian law with a covariance for each wavevector, or "
        "with one variance for all of equal |k|; none: the mean alone, the same for every member",
    )
    sensors: Literal["kriging", "learned"] | None = Field(
        None, description="how sensors enter: kriged under the Gaussian law, or learned"
    )
    base_noise: Literal["matched"] | None = Field(
        None, description="retired: older files may say matched, the only value left"
    )
    memory: Annotated[Literal["on", "off"], BeforeValidator(_switch)] | None = Field(
        None,
        description="on: noise as correlated from call to call as the residual is, where no "
        "previous closures carry that; snapshots of a subgrid closure must show it: "
        "generate.record.burst, or record.every of one interval; off: white",
    )
    gate: Annotated[Literal["on", "off"], BeforeValidator(_switch)] | None = Field(
        None,
        description="on: a trained part acts as far as it helps on unseen members, of which it "
        "takes 8; off: always",
    )
    modes: Annotated[int, Field(ge=2, le=256)] | None = Field(
        None, description="kept modes per side; none = preset"
    )
    width: Annotated[int, Field(ge=4, le=1024)] | None = Field(
        None, description="channels; none = preset"
    )
    layers: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="blocks of the generator"
    )
    mean_layers: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None, description="blocks of the networks of mean and amplitude"
    )
    schedule: Literal["trigonometric"] | None = Field(
        None, description="retired: older files may say trigonometric, the only value left"
    )
    evaluations: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="of the generator for a sample"
    )
    form: Literal["auto", "fft", "matrix"] | None = Field(
        None, description="how spectral convolutions are computed"
    )
    options: dict[str, Any] | None = Field(
        None, description="keys of classes outside the package, package.module:Class"
    )


#: with the keys that single networks, residuals and models have of their own
ModelOfAll: Any = create_model("ModelOfAll", __base__=ModelKeys, **_own_keys())


class Model(ModelOfAll):
    """Parts in a row, U = m(V) + D(V) q; what is none here is as the preset has it."""

    @property
    def gated(self) -> bool:
        """Whether unseen members decide what acts."""
        config = resolve(self.model_dump(exclude_none=True))
        residual = config.get("residual")
        if residual is None or config.get("gate") != "on":
            return False
        return find(ResidualKind, residual, "model.residual").trained


class Trajectory(Section):
    """Training through the solver: coupled ensembles from stored states, scored by the CRPS."""

    steps: Count = Field(600, description="optimiser steps, after all others")
    batch: Count = Field(12, description="starts per step over all processes")
    members: Annotated[int, Field(ge=2, le=64)] = Field(2, description="of each ensemble")
    calls: tuple[Count, Count] = Field(
        (4, 12),
        description="closure calls of a run, in the first step and from half of the steps on",
    )
    lr: Positive = Field(3e-3, description="peak learning rate")
    energy: NonNegative = Field(
        0.5,
        description="weight of the square error of each shell's mean energy, over the energy's "
        "square, beside the relative CRPS",
    )

    @model_validator(mode="after")
    def _rises(self):
        if self.calls[0] > self.calls[1]:
            raise ValueError(f"calls={list(self.calls)}: the first is larger than the last")
        return self


class Steady(Section):
    """Long coupled runs of validation trajectories, in which a closure that reads its own draws
    must neither leave the training's range more often than the DNS's closures nor gain enstrophy.
    """

    calls: Annotated[int, Field(ge=2)] = Field(
        400, description="closure calls of a run; its second half counts"
    )
    members: Count = Field(2, description="trajectories from each start")


class Train(Section):
    """Batches are global: the processes share them."""

    grid: EvenGrid | None = Field(
        None, description="train on fields strided to this grid; none = stored grid"
    )
    window: tuple[float, float] | None = Field(
        None, description="train on snapshots in [from, to]; none = all"
    )
    split: tuple[NonNegative, NonNegative, NonNegative] = Field(
        (0.8, 0.1, 0.1),
        description="shares of train, valid, test by trajectory; stable under growth",
    )
    steps: Count = Field(20000, description="optimiser steps, all phases together")
    batch: Count = Field(
        80, description="samples per step over all processes; a multiple of processes x accumulate"
    )
    lr: Positive = Field(1e-3, description="peak learning rate")
    schedule: Literal["constant", "cosine", "published"] = Field(
        "cosine",
        description="learning rate of a phase; cosine: to zero, after a short linear rise; "
        "published: halved every fifth of the steps",
    )
    weight_decay: NonNegative = Field(
        0.0, description="decoupled (AdamW), beyond what the mean's network has"
    )
    clip: NonNegative = Field(1.0, description="largest norm of the whole gradient; 0 = off")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999,
        description="decay of the averaged weights, which are validated and exported; 0 = off",
    )
    engine: Literal["auto", "deepspeed", "torch"] = Field(
        "auto", description="auto: DeepSpeed where it is installed, else plain torch"
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        0,
        description="DeepSpeed shards: 0 nothing, 1 optimiser, 2 and gradients, 3 and weights",
    )
    deepspeed: str | None = Field(
        None, description="JSON file whose keys replace the built-in DeepSpeed configuration's"
    )
    memory: Positive = Field(4.0, description="GiB of fields held; larger data are streamed")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast for pointwise parts; weights stay float32"
    )
    accumulate: Count = Field(1, description="micro-batches per step and process")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None,
        description="of weights, batches and noise of the training; none = the experiment's seed, "
        "which makes the data, too",
    )
    recompute: bool = Field(
        False,
        description="keep what goes into the networks' layers alone and compute their inside "
        "again in the backward pass: the same gradients, less memory, more time",
    )
    augment: bool = Field(
        False,
        description="use the symmetries that equation, forcing and noise leave; for samples of "
        "closure subgrid, which sees no forcing, those of equation and noise",
    )
    validate_every: Count = Field(500, description="steps between held-out losses")
    checkpoint_every: Count = Field(500, description="steps between restart points")
    patience: Annotated[int, Field(ge=0)] = Field(
        0,
        description="end a phase after this many validations without improvement and keep its "
        "best weights; 0 = off",
    )
    steady: Steady | None = Field(
        None,
        description="take of the mean's network as much as long coupled runs bear, where it reads "
        "the last closures; none = all of it",
    )
    trajectory: Trajectory | None = Field(
        None, description="a last phase of training, through the reduced solver; none = off"
    )
    opponents: tuple[RivalName, ...] = Field(
        (),
        description="closures without a generator (model.preset) that are trained after the "
        "model, on the same data, coupled from the same starts, and stand in every table",
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
        "preset", description="preset = the model's own"
    )
    evaluations: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="none = the model's own"
    )

    def options(self) -> dict:
        """Keyword arguments for ``closure.sample``; None = the model's own."""
        method = None if self.method == "preset" else self.method
        return {"method": method, "evaluations": self.evaluations}


class SensorLayout(Section):
    layout: Literal["regular", "scattered"] = "regular"
    number: Count = Field(16, description="regular: per side; scattered: in all")
    noise: NonNegative = Field(
        0.0, description="standard deviation of the sensor error / rms of the closure"
    )


class Reduced(Section):
    """The reduced solver of closure subgrid."""

    step: Literal["auto"] | Count = Field(
        1,
        description="steps of the DNS that one step of the reduced solver takes; it divides "
        "generate.interval; auto: the most with which the bare solver errs as at the DNS's step, "
        "to 1 %, on the pilot's starts (generate finds it)",
    )
    known: EvenGrid | None = Field(
        None,
        description="grid whose modes a start knows, and on which coupled runs are scored; none = "
        "the reduced solver's. On a finer reduced solver (generate.record.grid) the closure of a "
        "rung is trained, and begins with no more than one on the coarse grid",
    )
    start: Literal["empty", "moved", "synchronised"] = Field(
        "synchronised",
        description="with known: further modes of the reduced solver at a start, as of "
        "rollout.rungs; synchronised: they follow the resolved past under the closure",
    )


class Pilot(Section):
    """Trajectories in no data set, on which steps, drains and the need of a closure are judged."""

    cases: Annotated[int, Field(ge=2, le=1000)] = Field(8, description="starts")
    members: Annotated[int, Field(ge=3, le=1000)] = Field(
        4, description="DNS from every start, of which the first stands for the truth"
    )
    watched: Positive | None = Field(
        None,
        description="time before the start for which twins are pinned to one flow, to see how "
        "fast they come together; a multiple of the closure interval; none = replicas.pinned, at "
        "least 12 intervals",
    )


class Rung(Section):
    """A bare solver on a grid of its own, without closure: what a closure has to beat.

    Of a start it knows the modes that the reduced solver retains, and how they came about.
    """

    grid: EvenGrid = Field(description="points per side, at most those of the DNS")
    start: Literal["empty", "moved", "synchronised", "mismatched"] = Field(
        "empty",
        description="its further modes at the start: none; the start's own, moved in space by a "
        "random distance; these, after they have followed the resolved past for a while; the same "
        "with the past of another start (a control)",
    )
    past: Positive | None = Field(
        None,
        description="resolved past that synchronised modes have followed; a multiple of the time "
        "between snapshots; none = replicas.pinned, at least 10 closure intervals",
    )
    drain: bool = Field(
        False,
        description="with one damping rate per shell, fitted to the pilot's trajectories",
    )
    step: Literal["auto"] | Count = Field(
        "auto",
        description="steps of the DNS that one of its steps takes; auto: the most with which it "
        "errs no more than at the DNS's step, to 2 %, on the pilot's starts",
    )

    @property
    def name(self) -> str:
        """Of its method in the tables, such as ``rung_64_moved_drain``."""
        return f"rung_{self.grid}_{self.start}{'_drain' if self.drain else ''}"

    @property
    def key(self) -> str:
        """The name, and what else decides its run."""
        more = {"step": self.step, "past": self.past}
        return " ".join([self.name, *(f"{key}={value}" for key, value in more.items())])


class Replicas(Section):
    """The true ensemble of a subgrid closure: DNS that share the resolved past of a start.

    A replica begins with the retained modes of its start, and unresolved modes and forcing of its
    own. For ``pinned`` the retained modes are imposed on it at every step, at ``rollout.t_start``
    it is released. Starts and times are those of ``rollout``.
    """

    members: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="replicas of every start; 0 = none"
    )
    pinned: NonNegative = Field(
        0.0,
        description="time before the release for which the resolved modes are imposed: unresolved "
        "scales that follow them forget how they began; those with a forcing of their own gather "
        "what they cannot hand up, so there leave it at 0",
    )
    start: Literal["moved", "empty"] = Field(
        "moved",
        description="unresolved modes at the beginning: those of the start, moved in space by a "
        "random distance, or none",
    )


class Rollout(Section):
    """The closure-coupled ensemble, started from test trajectories."""

    members: Annotated[int, Field(ge=1, le=10_000_000)] = 20
    cases: Count = Field(1, description="test trajectories to start from")
    t_start: NonNegative = 30.0
    t_end: Positive = 50.0
    after_release: NonNegative = Field(
        0.0,
        description="time after t_start, at which replicas are released, until member m begins, "
        "in the state of replica 1 + m and with that replica's own last closures; a multiple of "
        "every; 0 = all members begin at t_start in the start's own state. Lead times count from "
        "the release",
    )
    every: Positive = Field(1.0, description="time between stored states; a multiple of dt")
    interval: Count = Field(5, description="solver steps between closure calls")
    last_closures: Literal["own", "moved"] = Field(
        "own",
        description="of a start, for a model of the previous closures: those that its own past "
        "tells, or these moved in space by a random distance, for members that know no more than "
        "the resolved state, as replicas do",
    )
    sampler: Sampling = Sampling()
    sensors: SensorLayout | None = None
    references: tuple[Literal["none", "oracle", "mean_gp"], ...] = Field(
        ("none", "oracle"),
        description="ensembles run beside the model's; mean_gp: the model's own mean and Gaussian "
        "law, no generator",
    )
    rungs: tuple[Rung, ...] = Field(
        (),
        description="bare solvers on finer grids beside the model's, with the stochastic forcing "
        "that they resolve (closure subgrid)",
    )

    @field_validator("references")
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
                raise ValueError(f"{name} stands there twice: one of each grid, start and drain")
        return tuple(ordered)

    @property
    def beside(self) -> tuple[str, ...]:
        """All ensembles run beside the model's, with what decides them."""
        return (*self.references, *(rung.key for rung in self.rungs))

    @property
    def begin(self) -> float:
        """Time at which coupled runs begin."""
        return self.t_start + self.after_release

    @property
    def trajectories(self) -> int:
        """Number of coupled trajectories: every member from every case."""
        return self.members * self.cases

    @property
    def holds(self) -> dict:
        """What a block must hold to be done, in the form that the ledger compares."""
        return {"t_end": self.t_end, "references": list(self.beside)}


class Event(Section):
    """The question of an uncertainty study: P(observable > above) at a lead time."""

    observable: Literal["enstrophy", "peak", "large_scale"] = "enstrophy"
    above: Finite = Field(description="threshold, in units of the observable")
    lead_time: Positive = Field(description="a stored lead time")
    tolerance: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.02, description="half width for which the ensemble size is worked out"
    )


class Evaluate(Section):
    lead_times: Annotated[tuple[Positive, ...], Field(min_length=1)] = (5.0, 10.0, 15.0, 20.0)
    grids: Annotated[tuple[EvenGrid, ...], Field(min_length=1)] | None = Field(
        None, description="grids scored (strided data); none = training grid"
    )
    sensors: tuple[SensorLayout, ...] = Field((), description="layouts scored beside 'no sensors'")
    samples: Count = Field(200, description="held-out snapshots scored")
    members: Annotated[int, Field(ge=2)] = Field(32, description="closure samples per snapshot")
    sampler: Sampling = Sampling()
    compare: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")],
        Annotated[str, Field(min_length=1)],
    ] = Field(
        {},
        description="further closures in the same tables, {name: model}: a run, a .safetensors "
        "file, or a shipped model",
    )
    seeds: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")],
        Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)],
    ] = Field(
        {},
        description="runs that differ in train.seed alone, {name: [run, run, ...]}: one row, the "
        "mean over them with its range",
    )
    against: str = Field(
        "model",
        description="method of the tables with which every other one is compared start by start",
    )
    event: Event | None = Field(None, description="probability asked of the coupled ensemble")
    scores: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")], ...] = Field(
        (),
        description="modules of your own whose SCORES stand beside the built-in ones, "
        "[package.module]; they are imported",
    )
    formats: tuple[Literal["png", "pdf"], ...] = Field(
        ("png", "pdf"),
        description="of the figures; the report shows the png, which is written for any; with [] "
        "none are drawn, which is most of the time of a small evaluation",
    )
    seed: int = 0

    @field_validator("compare", "seeds")
    @classmethod
    def _names_of_their_own(cls, compare):
        for name in compare:
            taken = (*RESERVED, TRUTH)
            if name in taken or name.startswith(("oracle", "rung_")):
                raise ValueError(
                    f"{name} names a method of every table ({', '.join(taken)}): choose another"
                )
        return compare

    @model_validator(mode="after")
    def _knows_its_methods(self):
        for name in self.seeds:
            if name in self.compare:
                raise ValueError(f"{name} stands in compare and in seeds: choose another name")
        known = [*RESERVED, *self.compare, *self.seeds]
        if self.against not in known:
            raise ValueError(
                f"against={self.against} names no method of the tables; known are "
                f"{', '.join(known)}"
            )
        return self


class Cluster(Section):
    """How, never what: part of no hash (docs/design.md says what equal means)."""

    members_per_block: Count = 20
    domain_ranks: Count = Field(1, description="MPI ranks that share one field")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = Field(
        0,
        description="CPU threads per process; 0 = its share of the cores, in training no more "
        "than a batch has work for",
    )
    checkpoint_every: Positive = Field(60.0, description="seconds between restart files of a unit")
    stale_after: Positive = Field(
        600.0, description="seconds after which a silent claim may be taken over"
    )
    give_up: Annotated[int, Field(ge=0)] = Field(
        3,
        description="a verb stops when its first so many units all fail for one cause, or lose "
        "every member; 0 = never",
    )
    executor: Literal["inline", "local", "slurm"] = "inline"
    profile: str | None = Field(
        None, description="site profile: a name in slurm/profiles or a path"
    )
    walltime: str = Field("1h", description="per task, e.g. 90m, 3h50m")
    signal_lead: str = Field("5m", description="warning before the wall-time limit")
    throttle: Count = Field(64, description="array tasks that run at once")
    max_requeues: Annotated[int, Field(ge=0)] = 20
    units_per_task: Count = Field(1, description="blocks that one array task works through")
    devices_per_task: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _times(self):
        check_lead(self.signal_lead, self.walltime)
        return self


class Use(Section):
    """Products of other runs, instead of making them again."""

    data: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="run (its name under root, or its folder) whose data are used"
    )
    model: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="trained model that is used: a run, a .safetensors file, or a shipped model "
        "(diffusion, convection, two_regimes)",
    )
    test: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="run (its name under root, or its folder) whose data, of another seed, are "
        "the test set: rollout and evaluate take starts, truth, replicas and snapshots from it, "
        "and all its members; none = the test members of train.split",
    )
    mean: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="trained model whose mean is taken over instead of being trained: a run, a "
        ".safetensors file, or a shipped model; all steps are for what is about it",
    )
    classes: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = Field(
        (),
        description="classes outside the package, package.module:Class, that model files of other "
        "runs need; those that section model names are imported anyway",
    )


class Experiment(Section):
    base: str | None = Field(None, description="preset that this file starts from")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    root: str = Field("runs", description="folder of runs; environment variables are expanded")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    use: Use = Use()
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
        left = re.search(r"\$\{?\w+\}?", os.path.expandvars(root))
        if left:
            raise ValueError(f"environment variable {left.group()} of root={root} is not set")
        return root

    @property
    def folder(self) -> Path:
        return Path(os.path.expandvars(os.path.expanduser(self.root))) / self.name

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that have something to do."""
        later = () if self.only_generates else ("train", "rollout", "evaluate")
        pilot = ("pilot",) if self.needs_pilot else ()
        replicas = ("replicas",) if self.own_replicas else ()
        return (*pilot, "generate", *replicas, *later)

    @property
    def needs_pilot(self) -> bool:
        """Whether settings are to be found on trajectories of the pilot."""
        if self.generate.closure != "subgrid":
            return False
        rungs = () if self.only_generates else self.rollout.rungs
        found = [rung.drain or rung.step == "auto" for rung in rungs]
        return self.reduced.step == "auto" or any(found)

    @property
    def watched(self) -> float:
        """Time before the start for which the pilot's twins are pinned."""
        least = 12 * self.generate.interval * self.generate.dt
        return self.pilot.watched or max(self.replicas.pinned, least)

    def past_of(self, rung: Rung) -> float:
        """Resolved past that the unresolved modes of a rung follow before the start."""
        if rung.start not in ("synchronised", "mismatched"):
            return 0.0
        least = 10 * self.generate.interval * self.generate.dt
        return rung.past or max(self.replicas.pinned, least)

    @property
    def only_generates(self) -> bool:
        """Whether its data are for other runs alone: without a closure, or all a test set."""
        return self.generate.closure == "none" or not self.train.split[0]

    @property
    def own_replicas(self) -> int:
        """Replicas of every start that ``generate`` makes: those of another test set are there."""
        return 0 if self.use.test else self.replicas.members

    @property
    def problem(self) -> Problem:
        """The full system on the grid of the DNS."""
        return Problem.of(self.physics, self.generate)

    @property
    def data_grid(self) -> int:
        return self.generate.record.grid or self.generate.grid

    @property
    def train_grid(self) -> int:
        return self.train.grid or self.data_grid

    @property
    def known_grid(self) -> int:
        """Points per side of the grid whose modes a start of a coupled run knows."""
        return self.reduced.known or self.train_grid

    @property
    def solver(self) -> Rung:
        """The reduced solver as a rung: where it begins."""
        start = self.reduced.start if self.known_grid < self.train_grid else "empty"
        return Rung(grid=self.train_grid, start=start)

    @property
    def score_grids(self) -> tuple[int, ...]:
        return self.evaluate.grids or (self.train_grid,)

    @model_validator(mode="after")
    def _consistent(self):
        check(self)
        return self

    def stage_settings(self, stage: str) -> dict:
        """What decides the product of ``stage``; each stage includes the stage that it reads."""
        plain = self.model_dump(mode="json")
        if not self.rollout.after_release:  # in no hash without
            del plain["rollout"]["after_release"]
        generate = {
            key: value for key, value in plain["generate"].items() if key not in GROWS_GENERATE
        }
        record = generate["record"]
        generate["record"] = {key: record[key] for key in record if key not in OUTPUTS}
        if record["burst"] == 1:
            del generate["record"]["burst"]
        if generate["cfl"] is None:  # a fixed step has no ladder
            del generate["cfl"], generate["max_level"]
        physics = self.physics.parameters()
        settings = {"seed": plain["seed"], "physics": physics, "generate": generate}
        times = {key: plain["rollout"][key] for key in ("t_start", "every")}
        reduced = self.reduced.model_dump(mode="json", exclude_defaults=True)
        known = {key: value for key, value in reduced.items() if key == "known"}
        if stage == "pilot":  # of the DNS alone
            begin = {"watched": self.watched, "members": self.pilot.members}
            begin |= {key: plain["replicas"][key] for key in ("pinned", "start")}
            return {**settings, "pilot": {**begin, **known}, "rollout": times}
        if self.reduced.step != 1:
            settings["reduced"] = {"step": self.reduced.step}
        if stage == "generate":
            return settings
        if stage == "replicas":
            starts = {"split": plain["train"]["split"], **plain["replicas"]}
            return {**settings, "replicas": {**starts, **known}, "rollout": times}
        train = {key: value for key, value in plain["train"].items() if key not in TRANSIENT_TRAIN}
        for name in ("steady", "trajectory"):
            if train[name] is None:
                del train[name]
        if train["seed"] in (None, plain["seed"]):
            del train["seed"]
        model = {key: value for key, value in plain["model"].items() if value is not None}
        if not model["conditions"]["previous"]:
            model["conditions"] = {**model["conditions"]}
            del model["conditions"]["previous"]
        if self.use.mean:
            model["mean_of"] = self.use.mean
        settings.update(model=model, train=train)
        if self.use.model:  # of the training only what chooses snapshots and grid matters
            kept = {key: train[key] for key in ("grid", "window", "split")}
            settings.update(model={"use": self.use.model}, train=kept)
        if stage == "train":
            return settings
        if self.use.test:
            settings["use"] = {"test": self.use.test}
        rollout = {
            key: value
            for key, value in plain["rollout"].items()
            if key not in ("members", "t_end", "references", "rungs")
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
            # not in the hash of scores without them
            new = {"seeds": {}, "against": "model", "scores": []}
            evaluate = {
                key: value
                for key, value in plain["evaluate"].items()
                if key != "formats" and not (key in new and value == new[key])
            }
            return {**settings, "rollout": plain["rollout"], "evaluate": evaluate}
        raise ValueError(f"unknown stage {stage!r}")

    def stage_outputs(self, stage: str) -> dict:
        """What the blocks of ``stage`` hold beside their trajectories: one list for a run."""
        record = self.generate.record.model_dump(mode="json", include=set(OUTPUTS))
        outputs: dict[str, dict] = {
            "generate": {"generate": {"record": record}},
            "rollout": {"rollout": {"references": list(self.rollout.beside)}},
        }
        return outputs.get(stage, {})

    def stage_hash(self, stage: str) -> str:
        return sha256_json(self.stage_settings(stage))
