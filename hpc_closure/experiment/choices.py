"""Steps and drains that were found on the pilot's trajectories, as a run keeps them."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment, Rung

STAGE = "pilot"


@dataclass(frozen=True)
class Choice:
    """How a bare solver is run.

    Attributes:
        stride: steps of the DNS in one of its own.
        cfl: largest (|u| + |v|) dt / dx at the starts; NaN where it was not measured.
        drain: damping rate of each shell, 1/time.
        strength: of the drain, over what the regression has found.
        errors: fair CRPS by lead time, mean over the pilot's starts.
    """

    stride: int
    cfl: float
    drain: list[float] = field(default_factory=list)
    strength: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)


class Choices:
    """Choices of a run, kept beside its pilot.

    Args:
        experiment: whose run it is.

    Attributes:
        path: of the file.
        known: what it holds for the present pilot, plain values of a :class:`Choice` each.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, experiment: Experiment):
        self.experiment, self.path = experiment, Run.of(experiment).choices
        self.recipe = experiment.stage_hash(STAGE)
        self.known: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.path.read_text())
            return stored["choices"] if stored["recipe"] == self.recipe else {}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path}: not the choices of a pilot; remove it, and run `hpc-closure "
                "generate` again"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        return {"recipe": self.recipe, "choices": self.known}

    @property
    def stride(self) -> int:
        """Steps of the DNS in one of the reduced solver's.

        Raises:
            ValueError: it is to be found, and was not yet.
        """
        step = self.experiment.reduced.step
        return step if step != "auto" else self._of("reduced").stride

    def rung(self, rung: Rung) -> Choice:
        """How a rung is run.

        Raises:
            ValueError: it is to be found, and was not yet.
        """
        if rung.step != "auto" and not rung.drain:
            return Choice(rung.step, math.nan)
        return self._of(rung.key)

    def missing(self) -> dict[str, Rung | None]:
        """What is to be found and was not: rungs by key; None is the reduced solver."""
        wanted: dict[str, Rung | None] = {}
        if self.experiment.reduced.step == "auto":
            wanted["reduced"] = None
        for rung in self.experiment.rollout.rungs:
            if rung.step == "auto" or rung.drain:
                wanted[rung.key] = rung
        return {key: rung for key, rung in wanted.items() if key not in self.known}

    def _of(self, key: str) -> Choice:
        if key not in self.known:
            raise ValueError(
                f"{self.path}: no step for {key.split()[0]} yet; run `hpc-closure generate` first "
                "(with use.data: in the run of the data, with the same rungs)"
            )
        return Choice(**self.known[key])
