"""Section ``data``: stored trajectories of others in place of the DNS of this package."""

import hashlib
import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hpc_closure.experiment import user_modules
from hpc_closure.experiment.sources.faults import CODES, STRUCTURAL
from hpc_closure.experiment.sources.reference import Reference
from hpc_closure.spectral.recipe import Count, NonNegative, Positive, Section, SideLengths

# keys that say where the data are, how they are read, or which faults are accepted, and not what
# they are
WHERE = ("path", "accept", "found", "unpack")


def _by_channel(value: Any) -> Any:
    """Convert a name or a list of names to {channel: variable}; the last word is the channel."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return {one.rpartition("/")[2]: one for one in value}
    return value


Variables = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], str],
    BeforeValidator(_by_channel),
]


def _expanded(path: str) -> str:
    """Return a path without variables of the environment and ~, absolute."""
    return os.path.abspath(os.path.expandvars(os.path.expanduser(path)))


class DataFilter(Section):
    """The map K from a stored DNS to the state of the reduced solver."""

    kind: Literal["sharp", "gaussian", "python"] = Field(
        "sharp",
        description="sharp: |kx|, |ky| <= modes; gaussian: exp(-k^2 width^2 / 24), then the modes "
        "of the reduced grid; python: a function of yours",
    )
    modes: Count | None = Field(
        None, description="highest wavenumber that passes; none = those of the reduced grid"
    )
    width: Positive | None = Field(None, description="width of the gaussian, a length")
    python: str | None = Field(
        None,
        description="file.py:K or module:K; K(fields (B, C, *sides)) returns the filtered fields "
        "on the reduced grid",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_python(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("python") and "kind" not in values:
            return {**values, "kind": "python"}
        return values

    @model_validator(mode="after")
    def _has_its_key(self):
        for kind, key in (("gaussian", "width"), ("python", "python")):
            if (self.kind == kind) != (getattr(self, key) is not None):
                stated = "is stated" if self.kind != kind else "is missing"
                raise ValueError(f"kind={self.kind}, but {key} {stated}")
        if self.kind == "python" and self.modes is not None:
            raise ValueError("kind=python filters on its own: remove modes")
        return self


class Found(Section):
    """What the files hold; the first verb stores it, so that later verbs notice other files."""

    sha256: str = Field(description="hash of names, sizes, shapes and times of the files")
    members: Count = Field(description="trajectories in the files")
    times: Count = Field(description="stored times that are used")
    start: float = Field(description="first of them, as stored times data.time_factor")
    spacing: Positive = Field(description="time between them")
    points: Count = Field(description="points per side")
    sides: Annotated[int, Field(ge=1, le=3)] = Field(description="sides of the box")
    length: Positive = Field(description="length of a side")
    parts: Count = Field(1, description="parts into which each trajectory is divided")
    gap: Annotated[int, Field(ge=0)] = Field(0, description="stored times between two parts")


class Data(Section):
    """Stored trajectories of others, read where they are.

    With ``closure`` the closure is stored; without, it is computed from ``state`` by ``filter``
    and a reduced solver.
    """

    path: str | tuple[str, ...] = Field(
        description="file, folder or pattern (runs/*.nc), or a list of them; HDF5, NetCDF, Zarr, "
        "The Well; searched beside the experiment's file, then in the working folder"
    )
    state: Variables = Field(
        description="fields of the state, {name: variable} or [variable, ...]; a component of a "
        "variable is NAME[0]"
    )
    closure: Variables = Field(
        {},
        description="U in dV/dt = M~(V) + U for each field, {name: variable}; none = computed",
    )
    dims: tuple[str, ...] | None = Field(
        None,
        description="names of the dimensions in the order of the file, [member, time, y, x]; none "
        "= those of the file",
    )
    files: Literal["auto", "members", "times"] = Field(
        "auto",
        description="what several files are; members: each holds members; times: pieces of one "
        "run; auto: by their times",
    )
    time: str | None = Field(None, description="variable with the times; none = by its name")
    spacing: Positive | None = Field(
        None, description="time between stored states, if the files hold no times"
    )
    time_factor: Positive = Field(1.0, description="factor of the stored times, for their unit")
    stride: Count = Field(1, description="use every stride-th stored time")
    skip: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="members that are left out, e.g. diverged ones"
    )
    length: SideLengths | None = Field(
        None, description="side of the periodic box; none = by the coordinates"
    )
    interval: Positive | None = Field(
        None,
        description="time for which one closure stands; none = spacing of the stored times",
    )
    closure_sign: Literal[1, -1] = Field(1, description="-1 if dV/dt = M~(V) - U is stored")
    closure_factor: Positive = Field(
        1.0, description="factor of the stored closure, 1/dt if it is an increment"
    )
    filter: DataFilter | None = Field(
        None, description="map from the stored DNS to the state of the reduced solver"
    )
    parts: Count | None = Field(
        None,
        description="parts into which each trajectory is divided for train.split; none = 1 with "
        "8 or more members, else as many as are long enough",
    )
    gap: NonNegative | None = Field(
        None, description="time left out between two parts; none = the correlation time"
    )
    unpack: str | None = Field(
        None,
        description="folder on a local disk, such as $TMPDIR: values that are read are unpacked "
        "once, to a nameless file there, for compressed files; none = in every epoch",
    )
    accept: tuple[str, ...] = Field(
        (), description="codes of faults that are accepted (docs/your_data.md)"
    )
    found: Found | None = Field(None, description="what the files hold; written by the verbs")

    @model_validator(mode="after")
    def _consistent(self):
        for key, names in (("state", self.state), ("closure", self.closure)):
            for channel, text in names.items():
                try:
                    Reference.of(text)
                except ValueError as error:
                    raise ValueError(f"{key}.{channel}={error}") from None
        if not self.state:
            raise ValueError("state names no field; expected {name: variable}")
        if self.closure and set(self.closure) != set(self.state):
            raise ValueError(
                f"closure has the fields {', '.join(self.closure)}, expected those of state: "
                f"{', '.join(self.state)}"
            )
        if self.closure and self.filter:
            raise ValueError("filter is for a stored DNS; remove it, or closure")
        for key in ("closure_sign", "closure_factor"):
            if not self.closure and getattr(self, key) != 1:
                raise ValueError(f"{key} is for a stored closure; name it in closure")
        for code in self.accept:
            if code not in CODES:
                raise ValueError(
                    f"accept: {code} is no code; `hpc-closure data check` prints them"
                )
            if code in STRUCTURAL:
                raise ValueError(f"accept: with {code} nothing can be read; repair it")
        return self

    @property
    def in_place(self) -> bool:
        """Whether state and closure are stored, so that nothing has to be computed."""
        return bool(self.closure)

    @property
    def patterns(self) -> list[str]:
        """Return the paths and patterns, absolute."""
        texts = [self.path] if isinstance(self.path, str) else self.path
        return [_expanded(one) for one in texts]

    @property
    def unpack_folder(self) -> str:
        """Return the folder for unpacked values, absolute; "" if there is none."""
        return _expanded(self.unpack) if self.unpack else ""

    def channels(self, physics: Any) -> list[str]:
        """Return the names of the fields in the order of the equation."""
        names = list(self.state)
        return names if len(names) == 1 else [one.name for one in physics.channels]

    def parameters(self) -> dict[str, Any]:
        """Return the settings that decide the data, with the hash of the files."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        settings = {key: value for key, value in plain.items() if key not in WHERE}
        if self.filter and self.filter.python:  # a file may move, and change
            source = user_modules.source_of("data.filter.python", self.filter.python)
            settings["filter"] = {
                "python": self.filter.python.partition(":")[2],
                "source": hashlib.sha256(source.encode()).hexdigest(),
            }
        return {**settings, "sha256": self.found.sha256 if self.found else ""}
