"""Define the paths in a run folder; no other module contains them.

    RUN = root/name
      config.yaml           the resolved experiment, written by the first verb
      provenance.jsonl      one line per invocation of any verb
      data/                 block_000000-000019.h5 ...     (generate)
      replicas/             block_000000-000019.h5 ...     (generate, with replicas.members)
      pilot/                block_000000-000003.h5 ... choices.json     (generate and advise)
      train/                model.safetensors metrics.csv tensorboard/ checkpoints/
      rollout/              block_000000-000019.h5 ...
      evaluate/             scores.csv scores.json report.html figures/
      opponents/            NAME/train NAME/rollout: a run folder each (train.opponents)
      logs/                 <stage>/<unit>.log
      .units/<stage>/       claims, failures, restart files, manifest, submissions

A block is named by its first and last member, so that blocks of different sizes never share a
name.
"""

import re
from dataclasses import dataclass
from pathlib import Path

STAGES = ("generate", "train", "rollout", "evaluate")
# trained models that come with the package
SHIPPED = Path(__file__).parents[1] / "closure" / "models"
# stages whose products are blocks of members
BLOCKS = ("pilot", "generate", "replicas", "rollout")
#: pattern of the name of a unit, FIRST-LAST: its first and last member
UNIT = r"(\d{6,})-(\d{6,})"
BESIDE_DATA = ("pilot", "replicas")  # stages that the verb generate computes besides the data
FOLDERS = {"generate": "data", **{name: name for name in (*BESIDE_DATA, *STAGES[1:])}}


def unit_name(first: int, last: int) -> str:
    """Return the name of a unit of these members."""
    return f"{first:06d}-{last:06d}"


def members_of_unit(name: str) -> tuple[int, int]:
    """Return the first and last member of a unit's name.

    Raises:
        ValueError: not a unit name.
    """
    numbers = re.fullmatch(UNIT, name)
    if not numbers:
        raise ValueError(f"unit {name!r}: expected FIRST-LAST with six digits each")
    return int(numbers.group(1)), int(numbers.group(2))


def verb_of(stage: str) -> str:
    """Return the verb that computes a stage: its name, or generate for pilot and replicas."""
    return "generate" if stage in BESIDE_DATA else stage


def stages_of(verb: str) -> list[str]:
    """List the stages that a verb computes."""
    return [stage for stage in FOLDERS if verb_of(stage) == verb]


@dataclass(frozen=True)
class Run:
    """Paths of one run; no file is read or written.

    Args:
        root: the run folder.
        data_root: run folder whose data are read (``use.data``); None = ``root``.
        model_file: trained model that is used (``use.model``); None = the model of this run.
    """

    root: Path
    data_root: Path | None = None
    model_file: Path | None = None

    def __post_init__(self):
        for key in ("root", "data_root", "model_file"):
            if getattr(self, key) is not None:
                absolute = Path(getattr(self, key)).expanduser().absolute()
                object.__setattr__(self, key, absolute)

    @classmethod
    def of(cls, experiment) -> "Run":
        """Return the run of an experiment, with data and model of ``use``."""
        root, use = experiment.folder, experiment.use
        data = model = None
        if use.data:
            data = _beside(root, use.data)
        if use.model:
            model = model_at(root, use.model)
        return cls(root, data, model)

    def __str__(self) -> str:
        return str(self.root)

    # The run folder.

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.jsonl"

    def folder(self, stage: str) -> Path:
        """Return the folder with the products of ``stage``."""
        if stage not in FOLDERS:
            raise ValueError(f"stage {stage!r} is none of {', '.join(FOLDERS)}")
        return self._home(stage) / FOLDERS[stage]

    def _home(self, stage: str) -> Path:
        return self.data_root if verb_of(stage) == "generate" and self.data_root else self.root

    @property
    def data(self) -> Path:
        return self.folder("generate")

    @property
    def choices(self) -> Path:
        """File of the steps and drains chosen on the pilot's trajectories."""
        return self.folder("pilot") / "choices.json"

    @property
    def train(self) -> Path:
        return self.folder("train")

    @property
    def rollout(self) -> Path:
        return self.folder("rollout")

    @property
    def evaluate(self) -> Path:
        return self.folder("evaluate")

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, stage: str, unit="main") -> Path:
        """Return the log file of a unit, by default that of the stage."""
        return self.logs / stage / f"{unit}.log"

    # Units: of BLOCKS.

    def product(self, stage: str, unit) -> Path:
        """Return the published file of a unit (a ``units.Unit`` or its name ``000000-000019``)."""
        return self.folder(stage) / self.product_name(unit)

    @staticmethod
    def product_name(unit) -> str:
        """Return the name of the published file of a unit."""
        return f"block_{unit}.h5"

    @property
    def units_dir(self) -> Path:
        return self.root / ".units"

    def units(self, stage: str) -> Path:
        """Return the bookkeeping folder of a stage."""
        return self._home(stage) / ".units" / stage

    def claim(self, stage: str, unit) -> Path:
        return self.units(stage) / f"{unit}.claim"

    def error(self, stage: str, unit) -> Path:
        return self.units(stage) / f"{unit}.error"

    def restart(self, stage: str, unit, step: int | None = None) -> Path:
        """Return the restart file of a unit at ``step``; without a step the folder of them."""
        folder = self.units(stage) / f"{unit}.restart"
        return folder if step is None else folder / f"step_{step:010d}.h5"

    def manifest(self, stage: str) -> Path:
        return self.units(stage) / "manifest.jsonl"

    def submissions(self, stage: str) -> Path:
        return self.units(stage) / "submissions.jsonl"

    # Train.

    @property
    def model(self) -> Path:
        return self.model_file or self.train / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.train / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.train / "metrics.csv"

    @property
    def tensorboard(self) -> Path:
        return self.train / "tensorboard"

    # Opponents.

    @property
    def opponents(self) -> Path:
        """Folder of the opponents' runs."""
        return self.root / "opponents"

    # Evaluate.

    @property
    def scores_csv(self) -> Path:
        return self.evaluate / "scores.csv"

    @property
    def scores_json(self) -> Path:
        return self.evaluate / "scores.json"

    @property
    def figures(self) -> Path:
        return self.evaluate / "figures"

    @property
    def report(self) -> Path:
        return self.evaluate / "report.html"


def run_at(root: Path, name: str) -> Run | None:
    """Find a run by its name beside the run at ``root``, or by its folder; None if missing."""
    path = _beside(root, name)
    return Run(path) if path.is_dir() else None


def model_at(root: Path, name: str) -> Path:
    """Return the path of a model: of a run, a .safetensors file, or shipped; it may not exist."""
    path = _beside(root, name)
    if path.suffix == ".safetensors":
        return path
    return Run(path).model if path.is_dir() else shipped_model(name)


def shipped_model(name: str) -> Path:
    """Return the path of a model of the package; it may not exist."""
    return SHIPPED / f"{name}.safetensors"


def _beside(root: Path, name: str) -> Path:
    """Return the run folder of this name beside ``root`` if it exists, else the name as path."""
    neighbour = root.parent / name
    return neighbour if neighbour.is_dir() else Path(name).expanduser()
