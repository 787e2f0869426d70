"""The residuals that an experiment may name, one file each; a new file is known at once."""

from hpc_closure.experiment.kinds import import_all

import_all(__name__, __path__)
