"""A solver of a user: ``dt`` and ``step(v, n)``, in numpy, torch or JAX.

::

    class Reduced:
        dt = 0.01
        def step(self, v, n): ...        # (members, *sides) or (members, C, *sides) -> the same

Optional: ``vjp(v, n, g)``, the gradient of a product with g; ``vectorized = False``, step takes
one member; ``dtype = "float32"``; ``library``, of the arrays that it takes; ``start(v)`` and
``fields(state)`` for a state that holds more than fields, with ``with_fields(state, v)`` if it
outlives a change of the fields; ``coarse(fine)``, the map from fields of the full system.
"""

from __future__ import annotations

import math
import sys
import traceback
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hpc_closure.spectral.outside.arrays import LIBRARIES, library_of, to_library, to_torch

EXPECTED = "a class without arguments, an object or a module with dt and step(v, n)"
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


def is_solver(value: Any) -> bool:
    """Return whether a class, an object or a module has ``dt`` and ``step``."""
    return hasattr(value, "dt") and callable(getattr(value, "step", None))


class OutsideSolver:
    """A user's solver as a map of fields.

    Args:
        solver: class without arguments, object or module, with ``dt`` and ``step(v, n)``.
        name: what error messages call it, such as ``reduced.python=my.py:Reduced``.

    Attributes:
        dt: its time step.
        dtype: precision of the fields that it takes and returns.
        library: library of its arrays; "" until its first step, unless it states it.

    Raises:
        ValueError: the solver does not fit.
    """

    def __init__(self, solver: Any, name: str):
        if isinstance(solver, type):
            try:
                solver = solver()
            except Exception as error:
                raise ValueError(
                    f"{name}: {_in_words(error)} when it was made; expected {EXPECTED}"
                ) from None
        self.solver, self.name = solver, name
        if not is_solver(solver):
            raise ValueError(f"{name}: it has no dt or no step; expected {EXPECTED}")
        try:
            self.dt = float(solver.dt)
        except (TypeError, ValueError):
            self.dt = math.nan
        if not 0 < self.dt < math.inf:
            raise ValueError(f"{name}: dt={solver.dt!r}, expected a positive number")
        precision = getattr(solver, "dtype", "float64")
        if precision not in ("float32", "float64"):
            raise ValueError(f'{name}: dtype={precision!r}, expected "float32" or "float64"')
        self.dtype = PRECISIONS[precision]
        self.library = getattr(solver, "library", "")
        if self.library and self.library not in LIBRARIES:
            raise ValueError(
                f"{name}: library={self.library!r}, expected one of {', '.join(LIBRARIES)}"
            )
        self.vectorized = bool(getattr(solver, "vectorized", True))
        self.starts = hasattr(solver, "start")
        if self.starts != hasattr(solver, "fields"):
            raise ValueError(
                f"{name}: a state that holds more than fields needs start(v) and fields(state)"
            )
        self.continues = self.starts and hasattr(solver, "with_fields")
        self._pullbacks: dict[int, Any] = {}

    # -- steps -----------------------------------------------------------------------------------

    def advance(self, fields: Tensor, steps: int, hidden: Any = None) -> tuple[Tensor, Any]:
        """Take steps; returns fields (members, ...), and the state that outlives them or None.

        The result may share memory with arrays of the solver: copy it before the next call.

        Args:
            fields: (members, *sides) or (members, C, *sides) in the precision :attr:`dtype`; they
                are not changed.
            steps: number of steps.
            hidden: state that an earlier call returned; None starts anew.

        Raises:
            ValueError: the solver returns something else than such fields.
            RuntimeError: it raises an error.
        """
        if not self.library:
            return self._first(fields, steps, hidden)
        try:
            ends, hidden = self._run(fields, steps, hidden, self.library)
        except Exception as error:
            raise RuntimeError(f"{self.name}: step failed: {_in_words(error)}") from error
        return self._checked(ends, fields), hidden

    def _first(self, fields: Tensor, steps: int, hidden: Any) -> tuple[Tensor, Any]:
        """Take the first steps, and find out by what they return which library the solver uses.

        Numpy arrays are tried first, which JAX takes as well; if the solver's module imports
        torch, tensors are.
        """
        home = self.solver
        if not isinstance(home, ModuleType):
            home = sys.modules.get(type(home).__module__)
        imported = {
            one.__name__.partition(".")[0]
            for one in vars(home).values()
            if isinstance(one, ModuleType)
        }
        order = ["torch", "numpy"] if "torch" in imported else ["numpy", "torch"]
        first_error: Exception | None = None
        for library in order:
            copy = fields.clone()
            try:
                ends, state = self._run(copy, steps, hidden, library)
            except Exception as error:
                first_error = first_error or error
                continue
            try:
                self.library = library_of(ends[0])
            except TypeError as error:
                raise ValueError(f"{self.name}: step returned {error}") from None
            return self._checked(ends, fields), state
        assert first_error is not None
        raise RuntimeError(f"{self.name}: step failed: {_in_words(first_error)}") from first_error

    def _run(self, fields: Tensor, steps: int, hidden: Any, library: str) -> tuple[list, Any]:
        """Return the ends in the solver's arrays, one of all members or one each, and states."""
        if self.vectorized:
            end, state = self._step(to_library(fields, library), steps, hidden)
            return [end], state if self.continues else None
        hidden = hidden or [None] * len(fields)
        pairs = [
            self._step(to_library(one, library), steps, state)
            for one, state in zip(fields, hidden)
        ]
        return [end for end, _ in pairs], [one for _, one in pairs] if self.continues else None

    def _step(self, v: Any, steps: int, state: Any) -> tuple[Any, Any]:
        solver = self.solver
        if not self.starts:
            return solver.step(v, steps), None
        state = solver.start(v) if state is None else solver.with_fields(state, v)
        state = solver.step(state, steps)
        return solver.fields(state), state

    def _checked(self, ends: list, fields: Tensor) -> Tensor:
        """Return the ends as one tensor, if they are fields like those at the start."""
        try:
            tensors = [to_torch(one) for one in ends]
        except TypeError as error:
            raise ValueError(f"{self.name}: step returned {error}") from None
        out = tensors[0] if self.vectorized else torch.stack(tensors)
        if out.shape != fields.shape:
            raise ValueError(
                f"{self.name}: step returned shape {tuple(out.shape)} for {tuple(fields.shape)}; "
                "expected the same"
            )
        if out.dtype != fields.dtype:
            raise ValueError(f"{self.name}: {self._lost(out.dtype, fields.dtype)}")
        return out.to(fields.device)

    def _lost(self, read: torch.dtype, expected: torch.dtype) -> str:
        """Describe a result in another precision than the fields, and the way out."""
        names = [str(one).removeprefix("torch.") for one in (read, expected)]
        way_out = f"return {names[1]}"
        if names == ["float32", "float64"]:
            way_out = 'keep float64, or state dtype = "float32" beside dt'
            if self.library == "jax":
                way_out = (
                    'set jax.config.update("jax_enable_x64", True) above, or state dtype = '
                    '"float32" beside dt'
                )
        return f"step returned {names[0]} for {names[1]}: {way_out}"

    # -- gradients -------------------------------------------------------------------------------

    def check_gradient(self, fields: Tensor, steps: int = 1) -> None:
        """Raise ValueError unless the map has a gradient; runs it once if its library is unknown.

        Args:
            fields: fields (members, ...) at which the map may be run.
            steps: number of steps.
        """
        if hasattr(self.solver, "vjp"):
            return
        if not self.library:
            self.advance(fields, steps)
        if self.library == "numpy":
            raise ValueError(
                f"train.rollout_training needs gradients: {self.name} is numpy without vjp(v, n, "
                "g); write it, or set train.rollout_training to null"
            )

    def pullback(self, fields: Tensor, steps: int, gradient: Tensor) -> Tensor:
        """Return the gradient (members, ...) with respect to fields of sum(map(fields) gradient).

        By the solver's own ``vjp``, else by autograd of torch or JAX.

        Raises:
            ValueError: the solver has no gradient.
        """
        self.check_gradient(fields, steps)
        gradient = gradient.to(fields.dtype)
        if hasattr(self.solver, "vjp"):
            library = self.library or "numpy"
            found = self._own_pullback(fields, steps, gradient, library)
        elif self.library == "jax":
            found = self._jax_pullback(fields, steps, gradient)
        else:
            with torch.enable_grad():
                start = fields.detach().requires_grad_()
                ends, _ = self._run(start, steps, None, "torch")
                end = ends[0] if self.vectorized else torch.stack(ends)
                if not end.requires_grad:
                    raise ValueError(
                        f"{self.name}: step returns a tensor without a gradient; remove "
                        "torch.no_grad and .detach() from it"
                    )
                found = torch.autograd.grad(end, start, gradient)[0]
        return found.to(fields)

    def _own_pullback(self, fields: Tensor, steps: int, gradient: Tensor, library: str) -> Tensor:
        vjp = self.solver.vjp
        v, g = (to_library(one, library) for one in (fields, gradient))
        if self.vectorized:
            return to_torch(vjp(v, steps, g))
        return torch.stack([to_torch(vjp(one, steps, other)) for one, other in zip(v, g)])

    def _jax_pullback(self, fields: Tensor, steps: int, gradient: Tensor) -> Tensor:
        v, g = (to_library(one, "jax") for one in (fields, gradient))
        pull = self._pullbacks.get(steps) or self._jitted(steps, v, g)
        if self.vectorized:
            return to_torch(pull(v, g))
        return torch.stack([to_torch(pull(one, other)) for one, other in zip(v, g)])

    def _jitted(self, steps: int, v: Any, g: Any) -> Any:
        """Return the gradient as a compiled function; uncompiled if the solver reads values."""
        jax = sys.modules["jax"]

        def pull(v, g):
            return jax.vjp(lambda one: self._step(one, steps, None)[0], v)[1](g)[0]

        compiled = jax.jit(pull)
        try:
            compiled.lower(*((v, g) if self.vectorized else (v[0], g[0])))
        except jax.errors.JAXTypeError:  # a value decides which way the program goes
            compiled = pull
        self._pullbacks[steps] = compiled
        return compiled


class Through(torch.autograd.Function):
    """Steps of a user's solver, as a function that torch differentiates."""

    @staticmethod
    def forward(ctx, fields: Tensor, solver: OutsideSolver, steps: int) -> Tensor:
        ctx.solver, ctx.steps = solver, steps
        ctx.save_for_backward(fields)
        return solver.advance(fields, steps)[0].clone()

    @staticmethod
    def backward(ctx, gradient):
        (fields,) = ctx.saved_tensors
        return ctx.solver.pullback(fields, ctx.steps, gradient), None, None


def _in_words(error: Exception) -> str:
    """Describe an error of a user's code in one line, with the line where it arose."""
    text = str(error).partition("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = next((one for one in reversed(frames) if "site-packages" not in one.filename), None)
    place = f" ({where.filename}, line {where.lineno})" if where else ""
    return f"{type(error).__name__}: {text}{place}"
