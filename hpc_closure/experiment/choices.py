"""Store and read the steps and drains that ``generate`` fits to the pilot's trajectories."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment, Rung

STAGE = "pilot"


@dataclass(frozen=True)
class Choice:
    """Step and drain of a bare solver.

    Attributes:
        stride: number of DNS steps in one of its steps.
        cfl: largest (|u| + |v|) dt / dx at the starts; NaN if not measured.
        drain: damping rate of each shell, 1/time.
        strength: factor of the drain over the rates of the regression.
        errors: fair CRPS by lead time, mean over the pilot's starts.
    """

    stride: int
    cfl: float
    drain: list[float] = field(default_factory=list)
    strength: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)


class Choices:
    """Choices of a run, in a file beside its pilot.

    Args:
        experiment: experiment of the run.

    Attributes:
        path: file of the choices.
        known: solver -> fields of a :class:`Choice`, for the present pilot settings.
        outdated: whether the file holds choices for other settings.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, experiment: Experiment):
        self.experiment, self.path = experiment, Run.of(experiment).choices
        self.recipe, self.outdated = experiment.stage_hash(STAGE), False
        self.known: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.path.read_text())
            self.outdated = stored["recipe"] != self.recipe
            return {} if self.outdated else stored["choices"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path}: not a file of pilot choices; remove it and run `hpc-closure "
                "generate` again"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"recipe": self.recipe, "choices": self.known}

    @property
    def stride(self) -> int:
        """Number of DNS steps in one step of the reduced solver.

        Raises:
            ValueError: it is ``auto`` and not yet chosen.
        """
        step = self.experiment.reduced.step
        return step if step != "auto" else self._of("reduced").stride

    def rung(self, rung: Rung) -> Choice:
        """Return step and drain of a rung.

        Raises:
            ValueError: they are chosen on the pilot, and not yet chosen.
        """
        if rung.step != "auto" and not rung.drain:
            return Choice(rung.step, math.nan)
        return self._of(rung.key)

    def check(self) -> None:
        """Raise ValueError unless all that has to be chosen is chosen."""
        for key in self.missing():
            self._of(key)

    def missing(self) -> dict[str, Rung | None]:
        """Return the solvers without a choice: rungs by key; None is the reduced solver."""
        fitted: dict[str, Rung | None] = {}
        if self.experiment.reduced.step == "auto":
            fitted["reduced"] = None
        for rung in self.experiment.rollout.rungs:
            if rung.step == "auto" or rung.drain:
                fitted[rung.key] = rung
        return {key: rung for key, rung in fitted.items() if key not in self.known}

    def _of(self, key: str) -> Choice:
        if key not in self.known:
            others = " for these settings of the pilot" if self.outdated else ""
            raise ValueError(
                f"{self.path}: no step for {key.split()[0]} yet{others}; run `hpc-closure "
                "generate` first (with use.data: in the run of the data, with the same rungs and "
                "pilot)"
            )
        return Choice(**self.known[key])
