"""The coupled ensemble on disk, read by lead time."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpc_closure.data.layout import check_layout
from hpc_closure.work.hdf5 import open_hdf5


class CoupledEnsemble:
    """Blocks of the rollout as one ensemble.

    Attributes:
        cases: test trajectories that the runs started from.
        members: members that every case has.
        times: stored times, (T,); the first is the start.
        names: what can be read: ``model``, ``truth`` and, where they ran, ``oracle``, ``none``.
        seconds: wall seconds by part, summed over the blocks.
        member_steps: solver steps times trajectories.
    """

    FIELDS = {"model": "t0_fields/vorticity", "oracle": "t0_fields/oracle"}
    REFERENCES = ("truth", "none")

    def __init__(self, paths: Sequence[Path]):
        if not paths:
            raise ValueError("no rollout files; run `hpc-closure rollout` first")
        self._rows: dict[tuple[int, int], tuple[Path, int]] = {}
        self._cases: dict[int, tuple[Path, int]] = {}
        self.seconds: dict[str, float] = {}
        self.member_steps = 0.0
        times: list[np.ndarray] = []
        names: set[str] | None = None
        for path in paths:
            with open_hdf5(path) as file:
                check_layout(file, path)
                for row, key in enumerate(zip(file.attrs["row_case"], file.attrs["row_member"])):
                    self._rows[int(key[0]), int(key[1])] = (path, row)
                for row, case in enumerate(file.attrs["cases"]):
                    self._cases.setdefault(int(case), (path, row))
                times.append(file["dimensions/time"][:])
                own = {name for name, where in self.FIELDS.items() if where in file}
                own |= {name for name in self.REFERENCES if f"references/{name}" in file}
                names = own if names is None else names & own
                self._add_cost(file)
        self.times, self.names = min(times, key=len), names or set()
        self.cases = sorted(self._cases)
        counts = [{m for c, m in self._rows if c == case} for case in self.cases]
        self.members = sorted(set.intersection(*counts))

    def _add_cost(self, file) -> None:
        record = json.loads(file.attrs["provenance"])
        for part, seconds in record.get("seconds", {}).items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        stored = file["dimensions/time"]
        steps = round(float(stored[-1] - stored[0]) / float(file.attrs["dt"]))
        self.member_steps += steps * len(file.attrs["members"])

    def read(self, name: str, index: int) -> np.ndarray:
        """Vorticity at time ``index``: ensembles (M, C, n, n), references (1, C, n, n)."""
        if name in self.REFERENCES:
            where, keys = f"references/{name}", [[self._cases[case] for case in self.cases]]
        else:
            where = self.FIELDS[name]
            keys = [[self._rows[case, member] for case in self.cases] for member in self.members]
        wanted: dict[Path, list[tuple[int, int, int]]] = {}
        for m, line in enumerate(keys):
            for c, (path, row) in enumerate(line):
                wanted.setdefault(path, []).append((m, c, row))
        found: dict[tuple[int, int], np.ndarray] = {}
        for path, places in wanted.items():
            with open_hdf5(path) as file:
                dataset = file[where]
                found |= {(m, c): dataset[row, index] for m, c, row in places}
        return np.array([[found[m, c] for c in range(len(self.cases))] for m in range(len(keys))])

    def index(self, lead_time: float) -> int:
        """Index of a lead time. Raises ValueError when it was not stored."""
        wanted = self.times[0] + lead_time
        index = int(np.argmin(np.abs(self.times - wanted)))
        if abs(self.times[index] - wanted) > 1e-6 * max(1.0, abs(wanted)):
            raise ValueError(f"lead time {lead_time:g} was not stored by rollout")
        return index
