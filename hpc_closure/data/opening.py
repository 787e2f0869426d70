"""Open the data of an experiment: blocks of this package, or files of others."""

from hpc_closure.data.reader import DataSet
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment


def open_data(experiment: Experiment, run: Run | None = None) -> DataSet:
    """Return the trajectories with their closures.

    Args:
        experiment: the experiment that made or names them.
        run: its folder, if it has moved.

    Raises:
        ValueError: there are no data files, or they have changed.
    """
    if experiment.data is not None and experiment.data.in_place:
        from hpc_closure.data.outside.view import OutsideData

        return OutsideData(experiment)
    return DataSet((run or Run.of(experiment)).data)
