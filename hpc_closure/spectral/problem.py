"""The recipe of a member: everything that decides its bits, and the hash that names it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hpc_closure.spectral.advection import FORMS
from hpc_closure.spectral.equations import EQUATIONS
from hpc_closure.spectral.forcing import FORCINGS, steady_forcing
from hpc_closure.spectral.grid import Grid
from hpc_closure.spectral.initial import INITIAL
from hpc_closure.spectral.noise import NoiseModel, ou_law, q_wiener_law, ring_law
from hpc_closure.spectral.schemes import SCHEMES, Scheme
from hpc_closure.spectral.transform import PRECISIONS, Transform

NOISES = {"none": None, "q_wiener": q_wiener_law, "ring": ring_law, "ornstein_uhlenbeck": ou_law}
REMOVED = ("none", "diffusion", "convection")
# Keys of the experiment's physics and generate sections that are part of the recipe.
GENERATE_KEYS = ("grid", "dt", "scheme", "form", "precision", "cfl", "max_level")


def _none() -> dict:
    return {"kind": "none"}


@dataclass(frozen=True)
class Problem:
    """One periodic flow and how it is discretised.

    Attributes:
        equation: a key of ``equations.EQUATIONS``.
        grid: points per side.
        length: side of the domain.
        viscosity: nu, length^2 / time.
        hyperviscosity: nu_h in ``-nu_h k^(2p)``.
        hyperviscosity_order: p.
        drag: linear drag, 1 / time.
        beta: planetary vorticity gradient, 1 / (length time).
        forcing: steady forcing, ``kind`` and its parameters (:mod:`forcing`).
        noise: stochastic forcing, ``kind`` and its parameters (:mod:`noise`).
        initial: initial law, ``kind`` and its parameters (:mod:`initial`).
        scheme: a key of ``schemes.SCHEMES``.
        dt: step; with ``cfl`` the longest one.
        form: form of the nonlinear term (:mod:`advection`).
        precision: ``float64`` or ``float32``.
        cfl: when positive, a member takes ``2^j`` steps of ``dt / 2^j`` per step, j the least that
            keeps ``max(|u| + |v|) dt / 2^j <= cfl dx``.
        max_level: largest j; a member that needs more has failed.
        removed: term that a closure must supply, ``none``, ``diffusion`` or ``convection``.
    """

    equation: str = "vorticity2d"
    grid: int = 64
    length: float = 1.0
    viscosity: float = 1e-3
    hyperviscosity: float = 0.0
    hyperviscosity_order: int = 4
    drag: float = 0.0
    beta: float = 0.0
    forcing: dict = field(default_factory=_none)
    noise: dict = field(default_factory=_none)
    initial: dict = field(default_factory=lambda: {"kind": "gaussian_field"})
    scheme: str = "cn_euler"
    dt: float = 1e-3
    form: str = "basdevant"
    precision: str = "float64"
    cfl: float = 0.0
    max_level: int = 6
    removed: str = "none"

    def __post_init__(self):
        for name, allowed in (
            ("equation", EQUATIONS),
            ("scheme", SCHEMES),
            ("form", FORMS),
            ("precision", PRECISIONS),
            ("removed", REMOVED),
        ):
            _choice(name, getattr(self, name), allowed)
        for name in ("viscosity", "hyperviscosity", "drag", "cfl"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.dt > 0:
            raise ValueError(f"dt must be positive, got {self.dt}")
        if self.dimensions == 1 and self.initial["kind"] == "gaussian_field":
            object.__setattr__(self, "initial", {"kind": "line"})
        for name, laws in (("forcing", FORCINGS), ("noise", NOISES), ("initial", INITIAL)):
            object.__setattr__(self, name, _complete(name, getattr(self, name), laws))
        for item in fields(self):
            if item.type in ("float", "int"):
                kind = float if item.type == "float" else int
                object.__setattr__(self, item.name, kind(getattr(self, item.name)))
        if self.cfl and SCHEMES[self.scheme].has_memory:
            raise ValueError(f"{self.scheme} needs a fixed step: take another scheme, or cfl: 0")
        if self.removed == "diffusion":
            if not SCHEMES[self.scheme].has_explicit_half:
                raise ValueError("removed: diffusion is defined for cn_euler and cn_ab2 only")
            if self.drag or self.hyperviscosity or self.beta:
                raise ValueError("removed: diffusion allows viscosity as the only linear term")
        steady_forcing(self.make_grid(), **self.forcing)

    @classmethod
    def from_dict(cls, physics: Mapping[str, Any], generate: Mapping[str, Any] | None = None):
        """Build from the ``physics`` and ``generate`` sections of an experiment.

        Keys of ``generate`` that do not decide a member's bits (members, t_end, ...) are ignored.

        Raises:
            ValueError: unknown physics key or value.
        """
        known = {item.name for item in fields(cls)} - set(GENERATE_KEYS) - {"removed"}
        unknown = set(physics) - known
        if unknown:
            raise ValueError(f"unknown physics keys {sorted(unknown)}; known: {sorted(known)}")
        chosen = {k: v for k, v in (generate or {}).items() if k in GENERATE_KEYS}
        if chosen.get("cfl", 0.0) is None:  # a fixed step
            del chosen["cfl"]
        return cls(**dict(physics), **chosen)

    def recipe(self) -> dict[str, Any]:
        """All settings, defaults included, as plain JSON-able values: ``Problem(**recipe)``."""
        return asdict(self)

    def member_hash(self) -> str:
        """SHA-256 of the recipe: with seed and index it names a member."""
        text = json.dumps(self.recipe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    # -- parts -----------------------------------------------------------------------------------

    @property
    def dimensions(self) -> int:
        """Dimensions of the flow, 1 or 2."""
        return EQUATIONS[self.equation].dimensions

    def make_grid(self) -> Grid:
        """The grid."""
        return Grid(self.grid, self.length, self.dimensions)

    def make_equation(self, transform: Transform):
        """The equation on a transform."""
        equation = EQUATIONS[self.equation]
        return equation(transform, **{name: getattr(self, name) for name in equation.parameters})

    def make_noise(self, seed: int, stage: str = "generate") -> NoiseModel | None:
        """The stochastic forcing, or None."""
        parameters = dict(self.noise)
        if parameters.pop("kind") == "none":
            return None
        return NoiseModel(self.noise["kind"], self.make_grid(), self.dt, seed, stage, **parameters)

    def make_scheme(self, linear, transform: Transform, level: int = 0) -> Scheme:
        """The time scheme at step ``dt / 2**level``."""
        implicit_only = self.removed == "diffusion"
        return SCHEMES[self.scheme](linear, self.dt * 2.0**-level, transform, implicit_only)


def _choice(name: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {sorted(allowed)}, got {value!r}")


def _complete(name: str, given: Mapping[str, Any], laws: Mapping[str, Callable | None]) -> dict:
    """Parameters of a law with its defaults filled in, so that equal laws have equal hashes."""
    given = dict(given)
    kind = given.pop("kind", None)
    _choice(f"{name} kind", kind, laws)
    law = laws[kind]
    signature = inspect.signature(law).parameters if law else {}
    known = {k: p for k, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    if name == "noise" and law:
        path = given.pop("path_dt", None)
    unknown = set(given) - set(known)
    if unknown:
        raise ValueError(
            f"unknown {name} keys {sorted(unknown)} for {kind!r}; known: {sorted(known)}"
        )
    out: dict[str, Any] = {"kind": kind}
    for key, parameter in known.items():
        value = given.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise ValueError(f"{name} kind {kind!r} needs {key}")
        whole = parameter.annotation == "int"
        out[key] = None if value is None else int(value) if whole else float(value)
    if name == "noise" and law:
        out["path_dt"] = None if path is None else float(path)
    return out
