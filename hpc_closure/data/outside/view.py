"""Files of others as a data set: the interface of our own, read where they are."""

from collections.abc import Sequence

import numpy as np

from hpc_closure.data.layout import STATE
from hpc_closure.data.outside.unpacked import Unpacked
from hpc_closure.data.reader import DataSet, strided
from hpc_closure.experiment.schema import Experiment
from hpc_closure.experiment.sources.faults import refuse
from hpc_closure.experiment.sources.parts import length_of_part
from hpc_closure.experiment.sources.source import Source


def open_source(experiment: Experiment) -> Source:
    """Open the files of an experiment's ``data``.

    Raises:
        DataFault: they are not those that the experiment was completed with.
    """
    data = experiment.data
    assert data is not None and data.found is not None
    source = Source(data, experiment.physics.length)
    if source.sha256 != data.found.sha256:
        source.close()
        raise refuse(
            "CHANGED",
            f"data.path={', '.join(data.patterns)}: {source.members} trajectories of "
            f"{len(source.times)} times, other files than those that the run was made with",
            f"{data.found.members} of {data.found.times} in unchanged files",
            "restore the files, or change `name` for a run of its own",
        )
    return source


class OutsideData(DataSet):
    """Stored states and closures of others, or states alone.

    A trajectory that is divided into parts counts as so many members: part ``p`` of trajectory
    ``m`` is member ``m * parts + p``. Times count from the first of a part.

    Args:
        experiment: an experiment with section ``data``.

    Attributes:
        source: the files.
    """

    def __init__(self, experiment: Experiment):
        data = experiment.data
        assert data is not None and data.found is not None
        self.source = open_source(experiment)
        self._values: Source | Unpacked = self.source
        if data.unpack:
            self._values = Unpacked(self.source, data.unpack_folder)
        self.folder = self.source.paths[0]  # named in messages
        found, physics = data.found, experiment.physics
        self._parts, self._gap = found.parts, found.gap
        self._length = length_of_part(found.times, found.parts, found.gap)
        self._names: Sequence[str] = data.channels(physics)
        self.members = range(found.members * found.parts)
        self.lost = [one for one in self.members if one // found.parts in data.skip]
        self.times = found.spacing * np.arange(self._length)
        self.grid, self.dimensions = found.points, found.sides
        self.channels = physics.channel_names
        self.recipe = {}

    def read(
        self, member: int, index: int | slice, field: str = STATE, grid: int | None = None
    ) -> np.ndarray:
        """Return a field; arguments as of :meth:`~hpc_closure.data.reader.DataSet.read`.

        ``field`` is ``state``, ``closure`` or a channel of the state.
        """
        one = not isinstance(index, slice)
        span = slice(index, index + 1) if not isinstance(index, slice) else index
        start, stop, step = span.indices(self._length)
        trajectory, part = divmod(member, self._parts)
        first = part * (self._length + self._gap)
        times = slice(first + start, first + max(start, stop), step)
        name = "closure" if field == "closure" else STATE
        channels = [field] if field in self._names and field != STATE else self._names
        each = [self._values.read(trajectory, times, name, channel) for channel in channels]
        values = np.stack(each, axis=1) if len(each) > 1 else each[0]
        values = values[0] if one else values
        return values if grid is None else strided(values, self.grid // grid, self.dimensions)

    @property
    def loss(self) -> str:
        """Return a sentence on what ``data.skip`` leaves out; empty if that is nothing."""
        skipped = len({one // self._parts for one in self.lost})
        return f"{skipped} trajectories are left out (data.skip)" if skipped else ""

    def close(self) -> None:
        self._values.close()
