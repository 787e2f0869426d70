"""DNS blocks: trajectories of the full system with closure targets and diagnostics."""

from collections.abc import Sequence

import numpy as np

from hpc_closure.closure.targets import Target, reduced_problem
from hpc_closure.data.layout import STATE, Layout, SeriesLayout, by_data_set, data_sets
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment.schema import Experiment
from hpc_closure.generate.certificate import certify
from hpc_closure.generate.filters import Filtered
from hpc_closure.spectral.diagnostics import diagnostics_of, series_names
from hpc_closure.spectral.modes.grid import Grid, resize
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work import log
from hpc_closure.work.block import Block, record_steps, times_of

NUMBERS = ("viscosity", "drag", "length")  # physical parameters written as file attributes


def stored_steps(experiment: Experiment) -> Sequence[int]:
    """List the steps of all snapshots.

    Snapshots of a burst are one closure interval apart; the last one lies at the record time.
    """
    generate, record = experiment.generate, experiment.generate.record
    ends = record_steps(record.start, generate.t_end, record.every, generate.dt)
    if record.burst == 1:
        return ends
    back = range((record.burst - 1) * generate.interval, -1, -generate.interval)
    return [end - steps for end in ends for steps in back]


def series_steps(experiment: Experiment) -> range:
    """List the steps of the running series of diagnostics; empty if no series is recorded."""
    generate = experiment.generate
    every = generate.record.series_every
    return range(0) if every is None else record_steps(0.0, generate.t_end, every, generate.dt)


class DNSBlock(Block):
    """Integrate full-system members from the initial law to ``generate.t_end``.

    Args:
        unit, books, session, domain: see :class:`~hpc_closure.work.block.Block`.
        stride: DNS steps per step of the reduced solver.
    """

    def __init__(self, unit, books, session, domain, stride: int = 1):
        super().__init__(unit, books, session, domain)
        experiment: Experiment = session.experiment
        self.experiment, generate, self.reduced_stride = (
            experiment,
            experiment.generate,
            stride,
        )
        self.problem = experiment.problem
        self.record_steps = stored_steps(experiment)
        self.series_steps = series_steps(experiment)
        self.grid, self.precision = experiment.data_grid, np.dtype(generate.record.precision)
        self.target = None
        if generate.closure != "none":
            reduced = reduced_problem(self.problem, self.grid, generate.closure, stride)
            if generate.closure == "subgrid":
                reduced.steps_in(generate.closure_interval)  # a whole number, or an error now
            self.target = Target(generate.closure, generate.interval, reduced)
        self.simulation = Simulation(
            self.problem,
            list(unit.members),
            experiment.seed,
            device=session.device,
            comm=domain.comm,
        )
        self.diagnostics = diagnostics_of(self.simulation)
        self.stored = Transform(
            Grid(self.grid, self.problem.length, self.problem.dimensions),
            self.problem.precision,
            session.device,
        )
        self.filters = [
            Filtered(item, self.problem, session.device) for item in generate.record.filters
        ]
        self.lost = np.zeros(len(unit.members), dtype=bool)

    @property
    def step_index(self) -> int:
        return self.simulation.step_index

    def initialise(self) -> None:
        self.simulation.initialise()
        self._write_series()

    def advance(self, steps: int) -> None:
        """Advance by ``steps``; stop at every step of the series to write diagnostics."""
        end = self.step_index + steps
        while self.step_index < end:
            stride = self.series_steps.step
            next_output = (self.step_index // stride + 1) * stride
            stop_step = min(end, next_output) if next_output in self.series_steps else end
            self.simulation.advance(stop_step - self.step_index)
            self._write_series()

    def _write_series(self) -> None:
        """Write the diagnostics of the present step if the series contains this step."""
        if self.step_index not in self.series_steps:
            return
        self._mark_lost()
        entries = self.diagnostics.measure()
        if spectra_names := self.experiment.generate.record.spectra:
            for name, spectrum in self.diagnostics.spectra(spectra_names).items():
                entries[f"{name}_spectrum"] = spectrum
        if self.writer is not None:
            self.writer.write_series(self.series_steps.index(self.step_index), entries)

    def _mark_lost(self) -> None:
        """Mark diverged members as lost (NaN from now on) and log them; the others continue.

        Raises:
            RuntimeError: all members are lost.
        """
        lost_before, self.lost = self.lost, self.simulation.mark_lost()
        advice = "lower generate.dt"
        if self.problem.cfl:
            advice += " or raise generate.max_refinements"
        when = f"at step {self.step_index} (t = {self.simulation.time:g})"
        if self.lost.all():
            raise RuntimeError(f"all members of the block are lost {when}: {advice}")
        for member in np.asarray(self.unit.members)[self.lost & ~lost_before]:
            if self.domain.root:
                log.get().warning(
                    f"member {member} is lost {when}, the others go on without it: {advice}"
                )

    def record(self):
        simulation, names = self.simulation, self.further_fields
        self._mark_lost()
        series = self.diagnostics.measure()
        fields = {
            name: self._at_grid(simulation.field_spectra(name))
            for name in (*self.state_names, *names)
        }
        w_hat = simulation.transform.gather(simulation.state)
        for item in self.filters:
            fields[item.name] = self._plain(item.field(w_hat))
        if self.target is not None:  # must be last, because it may advance the members
            closure = self.target.compute(simulation, self.advance)
            if self.target.kind == "subgrid":  # spectra of the reduced solver, on every rank
                values = self.stored.to_physical(closure).cpu().numpy().astype(self.precision)
            else:
                values = self._at_grid(closure)
            fields |= by_data_set("closure", values, self.channels)
        return fields, series, {}

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the fields of the state; empty if it has one."""
        return self.problem.physics.channel_names

    @property
    def state_names(self) -> list[str]:
        """Return the names of the data sets of the state."""
        return data_sets(STATE, self.channels, self.problem.dimensions)

    @property
    def further_fields(self) -> tuple[str, ...]:
        """Return the names of stored fields besides the state that are computed from it."""
        # a velocity that is the state is a view of its components
        fields = self.experiment.generate.record.fields
        return () if self.problem.physics.is_velocity else fields

    def _at_grid(self, spectrum) -> np.ndarray:
        """Gather this rank's spectra and return fields (B, n, n) on the data grid."""
        transform, stored = self.simulation.transform, self.stored
        if stored.grid == self.simulation.grid:
            field = transform.to_physical(spectrum)
            return self._plain(transform.gather_field(field))
        resized = resize(transform.gather(spectrum), stored.grid.mode_counts)
        return self._plain(stored.to_physical(resized))

    def _plain(self, field) -> np.ndarray:
        """Convert to numpy (B, n, n); vectors to (B, n, n, 2), components last as in The Well."""
        values = field.cpu().numpy().astype(self.precision)
        return np.moveaxis(values, 1, -1) if values.ndim > 1 + self.problem.dimensions else values

    def save_state(self) -> dict:
        return self.simulation.save_state()

    def load_state(self, state: dict) -> None:
        self.simulation.load_state(**state)
        self.lost = self.simulation.mark_lost()

    def certificate(self) -> dict:
        certificate = certify(self.simulation)
        if self.experiment.generate.certificate == "required":
            certificate.check()
        elif certificate.reasons and self.domain.root:
            log.get().warning(f"members {self.unit}: " + "; ".join(certificate.reasons))
        return certificate.as_dict()

    def open_writer(self, path) -> BlockWriter:
        experiment = self.experiment
        physics, generate = experiment.physics, experiment.generate
        record = generate.record
        closure = data_sets("closure", self.channels) if self.target is not None else ()
        layout = Layout(
            self.unit.members,
            times_of(self.record_steps, generate.dt),
            self.grid,
            self.problem.dimensions,
            record.precision,
            fields=(
                *self.state_names,
                *closure,
                *(name for name in self.further_fields if name != "velocity"),
            ),
            channels=self.channels,
            vectors=[name for name in self.further_fields if name == "velocity"],
            views={name: self.channels for name in record.fields if physics.is_velocity},
            filtered={item.name: item.grid for item in self.filters},
            scalars=series_names(self.problem),
            series=self._series_layout(),
        )
        attributes = {
            "dataset_name": experiment.name,
            "stage": "generate",
            "closure_kind": generate.closure,
            "interval": generate.interval,
            **{key: value for key, value in physics.parameters().items() if key in NUMBERS},
            "dt": generate.dt,
            "stride": self.reduced_stride,
            "seed": experiment.seed,
            "member_hash": self.problem.member_hash(),
            "recipe": experiment.stage_recipe("generate"),
        }
        return BlockWriter(path, layout, attributes)

    def _series_layout(self) -> SeriesLayout | None:
        if not self.series_steps:
            return None
        shells = self.simulation.grid.num_shells
        spectra = self.experiment.generate.record.spectra
        return SeriesLayout(
            times_of(self.series_steps, self.experiment.generate.dt),
            {
                **dict.fromkeys(series_names(self.problem), 0),
                **{f"{name}_spectrum": shells for name in spectra},
            },
        )
