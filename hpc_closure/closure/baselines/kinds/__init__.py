"""Baselines that an experiment can name, one per file; a new file is registered on import."""

from hpc_closure.experiment.kinds import import_all

import_all(__name__, __path__)
