"""Site profiles: the batch options of a cluster, as YAML.

A profile is a file ``slurm/profiles/<name>.yaml`` in the working folder or the checkout, one of
the shipped ones in ``profiles/`` beside this file, or any path. The experiment names it
(``cluster.profile``). A profile does not affect results, and every key has a default that suits a
plain cluster.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hpc_closure.experiment import renames
from hpc_closure.experiment.duration import seconds
from hpc_closure.experiment.reading import explain, parse_yaml


def _a_duration(text: str) -> str:
    seconds(text)
    return text


Count = Annotated[int, Field(ge=1)]
Duration = Annotated[str, AfterValidator(_a_duration)]
Stage = Literal["generate", "train", "rollout", "evaluate"]
# Folders that usually lie on a disk of the node, invisible to other nodes.
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
SHIPPED = Path(__file__).resolve().parent / "profiles"
_CHECKOUT = Path(__file__).resolve().parents[2]  # or the folder that the wheel is installed into


class Settings(BaseModel):
    """Batch options that may differ between stages; all are optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = Field(None, description="e.g. gpu:a100:4; or use gpus_per_node")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: Count | None = None
    mem: str | None = Field(None, description="per node, in sbatch's words, e.g. 32G")
    nodes: Count | None = Field(None, description="generate and train; the other verbs have 1")
    ntasks_per_node: Count | None = Field(None, description="MPI ranks, or training processes")
    walltime: Duration | None = None
    extra: dict[str, str | int | bool] = Field({}, description="further sbatch options, by name")

    @property
    def devices(self) -> int:
        """GPUs per node."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        found = re.search(r"\bgpu(?::[A-Za-z][^:,]*)?(?::(\d+))?", self.gres or "")
        return int(found.group(1) or 1) if found else 0

    def options(self) -> dict[str, str | int | bool]:
        """Return sbatch options, ``{"account": "x", "gpus-per-node": 4, ...}``."""
        names = (
            "account",
            "partition",
            "qos",
            "constraint",
            "gres",
            "gpus_per_node",
            "cpus_per_task",
            "mem",
        )
        found = {name.replace("_", "-"): getattr(self, name) for name in names}
        if not self.gpus_per_node:
            found["gpus-per-node"] = None
        return {name: value for name, value in found.items() if value is not None} | self.extra


class Profile(Settings):
    """Batch options of a site.

    ``stages`` overrides options for a stage, for example a GPU partition for ``train``.
    """

    name: str = "none"
    modules: list[str] = Field([], description="loaded in every job: module load ...")
    setup: list[str] = Field([], description="shell lines run in every job, after the modules")
    python: str | None = Field(None, description="how to start Python, e.g. in a container")
    mpi: str = Field("auto", description="srun --mpi=...; auto asks the MPI library")
    max_array: Count = Field(1000, description="largest job array of the site (MaxArraySize - 1)")
    max_running_tasks: Count | None = Field(None, description="array tasks that run at once")
    signal_before_end: Duration | None = Field(
        None, description="warning before the wall-time limit"
    )
    max_requeues: Annotated[int, Field(ge=0)] | None = None
    wckey: str | None = Field(None, description="null leaves --wckey out: many sites refuse it")
    node_local: list[str] = Field(list(NODE_LOCAL), description="folders no run may be in")
    stages: dict[Stage, Settings] = {}

    def for_stage(self, stage: Stage) -> "Profile":
        """Return this profile with the overrides of ``stage`` applied."""
        overrides = self.stages.get(stage)
        if overrides is None:
            return self
        changes = {name: getattr(overrides, name) for name in overrides.model_fields_set}
        if "extra" in changes:
            changes["extra"] = {**self.extra, **overrides.extra}
        # gres and gpus_per_node are two ways to request GPUs: an override of one resets both
        if {"gres", "gpus_per_node"} & set(changes):
            changes = {"gres": None, "gpus_per_node": None} | changes
        return self.model_copy(update=changes)

    def shell_lines(self) -> list[str]:
        """Return the shell lines that a job runs first."""
        modules = [f"module load {' '.join(self.modules)}"] if self.modules else []
        return modules + self.setup


def _folders() -> list[Path]:
    """List the folders that are searched, a user's own ones first."""
    working_folder = Path("slurm/profiles").absolute()
    checkout = _CHECKOUT / "slurm" / "profiles"
    more = [checkout] if checkout.is_dir() and checkout != working_folder else []
    return [working_folder, *more, SHIPPED]


def profiles() -> list[str]:
    """List the names of all profiles in the search folders."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def find(name_or_path: str) -> Path:
    """Return the file of a profile. Raises ValueError if there is none."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in name_or_path:
        if not path.is_file():
            raise ValueError(f"profile {name_or_path}: no such file")
        return path
    for folder in _folders():
        if (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    similar = difflib.get_close_matches(name_or_path, profiles(), 1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    raise ValueError(
        f"profile {name_or_path}: not in {' or '.join(map(str, _folders()))} "
        f"({', '.join(profiles()) or 'empty'}){hint}"
    )


def load_profile(name_or_path: str | Path | None) -> Profile:
    """Read a site profile; None gives the defaults.

    Raises:
        ValueError: there is no such profile, or a key, type or range is wrong; one line.
    """
    if name_or_path is None:
        return Profile.model_validate({})
    path = find(str(name_or_path))
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    values = {"name": path.stem} | renames.updated(values, "cluster", source=str(path))
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, str(path), Profile)) from None
