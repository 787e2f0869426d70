"""Two-layer quasi-geostrophic flow by pyqg, as a peer of our solver of the same scheme.

pyqg 0.7.2 needs numpy 1, so it runs in a process of its own, by the interpreter of the environment
variable ``PYQG_PYTHON`` (default: this one); ``docs/benchmarks.md`` says how to install it::

    PYQG_PYTHON=pyqg/bin/python hpc-closure bench dns --against pyqg --members 1 --threads 1

The flow is pyqg's eddy configuration (Perezhogin, Zanna, Fernandez-Granda, JAMES 2023).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_closure.bench.solver.peers import NotInstalled
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

VARIABLE = "PYQG_PYTHON"
STEPS = 100  # of the comparison of trajectories
SIZES = (5e-6, 1e-6)  # rms potential vorticity of the layers at the start, 1/s
ROUGHEST = 6  # largest wavenumber at the start

# reads lines from its standard input, answers each: a number of steps, or a file to write
PROGRAM = """
import sys
import numpy as np
import pyqg
starts, dt, threads = np.load(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
models = []
for q in starts:
    model = pyqg.QGModel(
        nx=q.shape[-1], dt=dt, L=1e6, beta=1.5e-11, rek=5.787e-7, rd=15000.0, delta=0.25, U1=0.025,
        U2=0.0, tmax=1e20, tavestart=1e30, twrite=10**9, log_level=0, ntd=threads,
    )
    model.q = q
    model._invert()
    models.append(model)
print("ready", flush=True)
for line in sys.stdin:
    word, value = line.strip().split(" ", 1)
    if word == "advance":
        for model in models:
            for _ in range(int(value)):
                model._step_forward()
    else:
        np.save(value, np.array([model.q for model in models]))
    print("done", flush=True)
"""


def problem_of(grid: int, precision: str = "float64") -> Problem:
    """Return the eddy configuration on ``grid`` points per side, in metres and seconds."""
    return Problem(
        equation="two_layer_qg",
        grid=grid,
        length=1e6,
        dt=3600.0 * min(1.0, 256 / grid),
        beta=1.5e-11,
        drag=5.787e-7,
        deformation_radius=15000.0,
        depth_ratio=0.25,
        mean_flow=(0.025, 0.0),
        scheme="ab3",
        forcing={"kind": "none"},
        noise={"kind": "none"},
        precision=precision,
    )


def initial_fields(problem: Problem, members: Sequence[int]) -> torch.Tensor:
    """Draw large eddies of both layers, potential vorticity (members, 2, n, n) float64."""
    grid = problem.make_grid()
    transform, fields = Transform(grid), []
    for member in members:
        generator = torch.Generator().manual_seed(member)
        white = torch.randn(2, grid.size, grid.size, generator=generator, dtype=torch.float64)
        spectra = transform.to_spectral(white) * (grid.integer_k2 <= ROUGHEST**2)
        fields.append(transform.to_physical(spectra))
    smooth = torch.stack(fields)
    return smooth * torch.tensor(SIZES)[:, None, None] / smooth.std((-2, -1), keepdim=True)


def started(
    problem: Problem, fields: torch.Tensor, device: str = "cpu", comm: Any = None
) -> Simulation:
    """Return our solver at potential vorticity ``fields`` (members, 2, n, n)."""
    simulation = Simulation(problem, range(len(fields)), 0, device=device, comm=comm)
    return simulation.load_state(0, Transform(problem.make_grid()).to_spectral(fields))


class Pyqg:
    """Members of pyqg's model in another process, advanced one after another.

    Args:
        fields: potential vorticity (members, 2, n, n) at t = 0; the first axis of the grid is x.
        dt: time step, seconds.
        threads: threads of its Fourier transforms.

    Raises:
        NotInstalled: the interpreter is missing, or cannot import pyqg.
    """

    def __init__(self, fields: np.ndarray, dt: float, threads: int = 1):
        self.folder = tempfile.TemporaryDirectory()
        start = Path(self.folder.name) / "start.npy"
        np.save(start, np.ascontiguousarray(fields.swapaxes(-1, -2)))  # x is its last axis
        self.python = os.environ.get(VARIABLE, sys.executable)
        command = [self.python, "-c", PROGRAM, str(start), repr(dt), str(threads)]
        self.errors = open(Path(self.folder.name) / "errors.txt", "w+")
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if VARIABLE in os.environ:
            variables.pop("PYTHONPATH", None)  # it is that of this interpreter
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                env=variables,
            )
        except OSError as error:
            self.close()
            raise NotInstalled(f"pyqg: {VARIABLE}={self.python}: {error.strerror}") from None
        self._expect("ready")

    def _expect(self, word: str) -> None:
        """Wait for an answer; other lines, as of a library that speaks, are passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["it ended without a message"])[-1]
        self.close()
        raise NotInstalled(
            f"pyqg: {self.python} says {last}; set {VARIABLE} to an interpreter that has pyqg"
        )

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._expect("done")

    def advance(self, num_steps: int) -> None:
        self._send(f"advance {num_steps}")

    def field(self) -> np.ndarray:
        """Return potential vorticity (members, 2, n, n)."""
        path = Path(self.folder.name) / "end.npy"
        self._send(f"write {path}")
        return np.load(path).swapaxes(-1, -2)

    def close(self) -> None:
        """End the process and remove its files."""
        process = getattr(self, "process", None)
        if process is not None:
            process.stdin.close()
            process.stdout.close()
            process.wait()
        self.errors.close()
        self.folder.cleanup()
