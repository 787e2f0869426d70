"""The schema of the DNS: the flow, how it is computed, and what is recorded of it."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
EvenGrid = Annotated[int, Field(ge=8, le=65536, multiple_of=2)]


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Law(Section):
    """A law chosen by ``kind``; each other key belongs to the kinds that it names."""

    KEYS: ClassVar[dict]
    kind: str

    def parameters(self) -> dict:
        """``kind`` and the keys that belong to it."""
        keys = self.KEYS[self.kind]
        return {"kind": self.kind, **{key: getattr(self, key) for key in keys}}


class Forcing(Law):
    KEYS: ClassVar[dict] = {
        "none": (),
        "published": ("amplitude",),
        "kolmogorov": ("amplitude", "wavenumber"),
        "ring": ("amplitude", "wavenumber", "width"),
    }

    kind: Literal["none", "published", "kolmogorov", "ring"] = Field(
        "published", description="steady forcing; published = amplitude (sin + cos)(2 pi (x + y))"
    )
    amplitude: Finite = Field(0.1, description="published, kolmogorov, ring: 1/time^2")
    wavenumber: Count = Field(4, description="kolmogorov, ring: integer wavenumber")
    width: Positive = Field(0.5, description="ring: half width, integer wavenumbers")


class Noise(Law):
    KEYS: ClassVar[dict] = {
        "none": (),
        "q_wiener": ("amplitude", "draws", "correlation"),
        "ring": ("wavenumber", "width", "energy_rate"),
        "ornstein_uhlenbeck": ("wavenumber", "width", "rms", "correlation_time"),
    }

    kind: Literal["none", "q_wiener", "ring", "ornstein_uhlenbeck"] = Field(
        "q_wiener", description="stochastic forcing; q_wiener is the published one"
    )
    amplitude: NonNegative = Field(5e-5, description="q_wiener: beta")
    draws: Count = Field(
        10, description="q_wiener: the law is that of this many summed draws (one is drawn)"
    )
    correlation: Positive = Field(
        5e-3, description="q_wiener: a in the spectrum exp(-a |2 pi k|^2)"
    )
    wavenumber: Positive = Field(8.0, description="ring, ornstein_uhlenbeck: integer wavenumber")
    width: Positive = Field(1.0, description="ring, ornstein_uhlenbeck: half width")
    energy_rate: NonNegative = Field(1e-3, description="ring: exact mean energy injection rate")
    rms: NonNegative = Field(0.1, description="ornstein_uhlenbeck: pointwise rms, 1/time^2")
    correlation_time: Positive = Field(0.1, description="ornstein_uhlenbeck: memory, time units")


class Initial(Law):
    KEYS: ClassVar[dict] = {
        "gaussian_field": ("alpha", "tau"),
        "band": ("wavenumber", "width", "energy"),
        "zero": (),
        "line": ("amplitude", "wavenumber"),
    }

    kind: Literal["gaussian_field", "band", "zero", "line"] = Field(
        "gaussian_field", description="initial law; gaussian_field is the published one"
    )
    alpha: Positive = Field(
        2.5, description="gaussian_field: weights (4 pi^2 k^2 + tau^2)^(-alpha/2)"
    )
    tau: Positive = Field(7.0, description="gaussian_field: inverse length")
    wavenumber: Positive = Field(
        6.0, description="band: centre, integer wavenumber; line: the highest one"
    )
    amplitude: Positive = Field(1.0, description="line (on a line): rms of the state")
    width: Positive = Field(2.0, description="band: half width")
    energy: Positive = Field(0.5, description="band: kinetic energy")


class Physics(Section):
    """The full system dv/dt = M(v)."""

    # which keys belong to an equation besides its length and its laws
    KEYS: ClassVar[dict] = {
        "vorticity2d": ("viscosity", "hyperviscosity", "hyperviscosity_order", "drag", "beta"),
        "kuramoto_sivashinsky1d": (),
    }

    equation: Literal["vorticity2d", "kuramoto_sivashinsky1d"] = "vorticity2d"
    length: Positive = Field(1.0, description="side of the periodic box")
    viscosity: NonNegative = Field(1e-3, description="nu, length^2/time")
    hyperviscosity: NonNegative = Field(0.0, description="coefficient of (-Lap)^order")
    hyperviscosity_order: Annotated[int, Field(ge=2, le=8)] = 4
    drag: NonNegative = Field(0.0, description="linear drag, 1/time")
    beta: Finite = Field(0.0, description="gradient of the planetary vorticity")
    forcing: Forcing = Forcing()
    noise: Noise = Noise()
    initial: Initial = Initial()

    def parameters(self) -> dict:
        """Plain values: the equation's keys, each law with the keys of its kind."""
        keys = ("equation", "length", *self.KEYS[self.equation])
        plain = self.model_dump(mode="json", include=set(keys))
        laws = {name: getattr(self, name).parameters() for name in ("forcing", "noise", "initial")}
        return {**plain, **laws}


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
        return grid if modes >= (grid - 1) // 3 else 2 * -(-(3 * modes + 1) // 2)


class Record(Section):
    start: NonNegative = Field(20.0, description="time of the first snapshot")
    every: Positive = Field(0.1, description="time between snapshots; a multiple of dt")
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
        return tuple(sorted(set(names)))

    @field_validator("filters")
    @classmethod
    def _filters_once(cls, filters):
        return tuple(sorted(set(filters), key=lambda item: (item.kind, item.width)))


class Generate(Section):
    """The DNS ensemble and the closure target taken from it."""

    grid: EvenGrid = 64
    members: Annotated[int, Field(ge=1, le=10_000_000)] = Field(100, description="trajectories")
    dt: Positive = Field(1e-3, description="time step; with cfl the longest one")
    cfl: Positive | None = Field(
        None,
        description="a member takes 2^j steps of dt / 2^j, with the least j that keeps "
        "max(|u| + |v|) dt / 2^j <= cfl dx; none = all steps are dt",
    )
    max_level: Annotated[int, Field(ge=1, le=20)] = Field(
        6, description="with cfl: largest j; a block with a member that needs more is failed"
    )
    scheme: Literal["cn_euler", "cn_ab2", "etdrk4", "imex_rk3"] = "cn_euler"
    form: Literal["advective", "flux", "basdevant", "packed"] = Field(
        "basdevant", description="algebraic form of the nonlinear term"
    )
    precision: Literal["float32", "float64"] = Field("float64", description="of the computation")
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

    def bytes_per_member(self, physics: Physics) -> float:
        """Size of the fields of one member on the disk."""
        record, plane = self.record, physics.equation == "vorticity2d"
        grid, sides = record.grid or self.grid, 2 if plane else 1
        further = {"velocity": 2, "streamfunction": 1}
        number = 1 + (self.closure != "none") + sum(further.get(name, 0) for name in record.fields)
        points = number * grid**sides
        points += sum(item.points(physics.length, self.grid) ** sides for item in record.filters)
        snapshots = 1 + round((self.t_end - record.start) / record.every)
        return points * snapshots * (4 if record.precision == "float32" else 8)

    @property
    def holds(self) -> dict:
        """What a block must hold to be done, in the form that the ledger compares."""
        record = self.record
        holds: dict = {"t_end": self.t_end}
        outputs: list[str] = [name for name in record.fields if name != "vorticity"]
        outputs += [item.name for item in record.filters]
        if outputs:
            holds["outputs"] = outputs
        if record.series_every is not None:
            holds["series_every"] = repr(record.series_every)
        if record.spectra:
            holds["spectra"] = list(record.spectra)
        return holds

    def keeping(self, holds: dict) -> "Generate":
        """These settings with the end time and the outputs that an older block ``holds``, too."""
        record, filters = self.record, {item.name: item for item in self.record.filters}
        fields = set(record.fields)
        for name in holds.get("outputs", ()):
            kind, found, width = name.partition("_")
            if found:
                filters.setdefault(name, Filter(kind=kind, width=float(width)))
            else:
                fields.add(name)
        every = record.series_every
        if every is None and "series_every" in holds:
            every = float(holds["series_every"])
        update = {
            "fields": sorted(fields),
            "filters": list(filters.values()),
            "series_every": every,
            "spectra": [*record.spectra, *holds.get("spectra", ())],
        }
        return self.model_copy(
            update={
                "t_end": max(self.t_end, holds.get("t_end", 0.0)),
                "record": Record(**{**record.model_dump(), **update}),
            }
        )
