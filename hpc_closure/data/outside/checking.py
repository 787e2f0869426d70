"""Check data of others: what was found, on one screen, and the faults, one line each."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from hpc_closure.data.outside import solver_faults, value_faults, vector_faults
from hpc_closure.data.outside.sample import Sample
from hpc_closure.data.outside.view import open_source
from hpc_closure.experiment.schema import Experiment
from hpc_closure.experiment.sources.faults import ERROR, DataFault, Fault
from hpc_closure.experiment.sources.parts import length_of_part
from hpc_closure.experiment.sources.source import Source


@dataclass
class Checked:
    """What was found, and the faults.

    Attributes:
        screen: (what, text) of what was found.
        faults: in the order of the checks.
        accepted: codes of ``data.accept``.
    """

    screen: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    accepted: tuple[str, ...] = ()

    @property
    def refused(self) -> list[Fault]:
        """Return the errors that are not accepted."""
        return [
            one for one in self.faults if one.severity == ERROR and one.code not in self.accepted
        ]

    def lines(self) -> list[str]:
        """Return screen and faults as lines of text."""
        width = max((len(what) for what, _ in self.screen), default=0)
        rows = [f"{what:<{width}}  {text}" for what, text in self.screen]
        return [*rows, *self.fault_lines()]

    def fault_lines(self) -> list[str]:
        """Return the faults, one line each, with their severity."""
        return [
            f"{'accepted' if one.code in self.accepted else one.severity}: {one.line}"
            for one in self.faults
        ]


def check(experiment: Experiment, advance: solver_faults.Advance | None = None) -> Checked:
    """Check the files of an experiment's ``data`` on a sample of their values.

    Args:
        experiment: the experiment.
        advance: its reduced solver over a closure interval, if there is one.

    Raises:
        DataFault: the files are not those that the experiment was completed with.
    """
    data = experiment.data
    assert data is not None
    source = open_source(experiment)
    checked = Checked(accepted=data.accept)
    try:
        checked.screen = screen(experiment, source)
        sample = Sample(source, data.channels(experiment.physics))
        checked.faults += value_faults.faults(sample, experiment)
        broken = {"NOT_FINITE", "FILL_VALUE", "CONSTANT", "CLOSURE_IS_STATE"}
        if not broken & {one.code for one in checked.faults}:
            checked.faults += vector_faults.faults(sample, experiment)
            checked.faults += _of_the_solver(experiment, sample, advance)
    except DataFault as error:
        checked.faults.append(error.fault)
    finally:
        source.close()
    return checked


def screen(experiment: Experiment, source: Source) -> list[tuple[str, str]]:
    """Describe the files: format, variables, dimensions, members, times, box, memory."""
    data = experiment.data
    assert data is not None and data.found is not None
    found, times = data.found, source.times
    rows = [
        ("files", f"{len(source.paths)}, {source.kind}: {_some([str(p) for p in source.paths])}")
    ]
    for name, references in source.fields.items():
        for channel, reference in references.items():
            axes = source.axes[reference]
            roles: dict[int | None, str] = {axes.member: "member", axes.time: "time"}
            roles |= dict(zip(axes.sides, "xyz"))
            words = [
                (
                    each
                    if each == roles.get(number, "component")
                    else f"{each} ({roles.get(number, 'component')})"
                )
                for number, each in enumerate(axes.names)
            ]
            chosen = "".join(f"[{one}]" for one in reference.components)
            rows.append((name, f"{channel} = {reference.name}{chosen}: {', '.join(words)}"))
    if not data.in_place:
        rows.append(("closure", "computed by generate from the state and a reduced solver"))
    skipped = f", {len(data.skip)} left out" if data.skip else ""
    rows.append(("members", f"{source.members}{skipped}"))
    if found.parts > 1:
        length = length_of_part(found.times, found.parts, found.gap)
        rows.append(
            (
                "parts",
                f"each is divided into {found.parts} of {length} times, {found.gap} times left "
                "out between two; train.split divides parts",
            )
        )
    rows.append(
        (
            "times",
            f"{len(times)}, {found.spacing:g} apart, from {times[0]:g} to {times[-1]:g} (here 0 "
            f"to {found.spacing * (len(times) - 1):g}); a closure stands for "
            f"{experiment.generate.closure_interval:g}",
        )
    )
    points = " x ".join(map(str, source.points))
    rows.append(("box", f"{points} points, {source.dtype}, side {source.length:g}"))
    rows.append(("memory", _memory(experiment, source)))
    return rows


def _memory(experiment: Experiment, source: Source) -> str:
    """Describe how much training holds in memory."""
    number = experiment.data_grid ** len(source.points) * len(experiment.physics.channels)
    held = 2 * 4 * number * source.members * len(source.times)
    budget = experiment.train.memory_gib * 2**30
    how = "held in memory" if held <= budget else "streamed"
    return (
        f"{source.bytes / 1e9:.3g} GB stored; training needs {held / 1e9:.3g} GB, {how} "
        f"(train.memory_gib={experiment.train.memory_gib:g})"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _of_the_solver(
    experiment: Experiment, sample: Sample, advance: solver_faults.Advance | None
) -> Iterator[Fault]:
    """Yield the faults that the reduced solver shows, if there is one and it fits the times."""
    data, spacing = experiment.data, sample.source.times[1] - sample.source.times[0]
    ahead = experiment.generate.closure_interval
    if advance is None or data is None or abs(ahead / spacing - 1) > 1e-3 or not data.in_place:
        return
    scalable = not experiment.reduced.python
    yield from solver_faults.faults(sample, advance, ahead, scalable)
