"""``hpc-closure config``: list, show, check, diff and copy experiment files."""

from pathlib import Path

from pydantic import BaseModel

from hpc_closure.batch import site
from hpc_closure.experiment import reading
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.recipe import Family


def list_presets() -> None:
    """Print the name of every shipped preset with the comments of its file."""
    for name in reading.presets():
        text, _ = reading.read_source(name)
        comment = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        print(f"{name:20s} {' '.join(comment)}")


def show(experiment: Experiment, doc: bool = False) -> None:
    """Print the resolved experiment as YAML, or with ``doc`` key by key with descriptions."""
    if doc:
        print("\n".join(describe(experiment)))
    else:
        print(reading.dump(experiment), end="")


def describe(section: BaseModel, prefix: str = "") -> list[str]:
    """List one line per key with value and description; sections follow their parent's keys."""
    lines, sections = [], []
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            text = (type(value).__doc__ or "").strip().partition("\n")[0]
            sections += ["", f"# {key}  {text}".rstrip(), *describe(value, f"{key}.")]
            continue
        text = field.description or ""
        if isinstance(section, Family) and name == section.discriminator:
            text = "; ".join([*filter(None, [text]), f"one of {', '.join(section.kinds)}"])
        lines.append(f"{key} = {value!r:<12}" + (f"  # {text}" if text else ""))
    return lines + sections


def check(experiment: Experiment, source: str) -> None:
    """Print the run folder and the hashes of a valid experiment."""
    stages = ("generate", "train", "rollout")
    hashes = ", ".join(f"{stage} {experiment.stage_hash(stage)[:10]}" for stage in stages)
    print(f"{source}: valid; run folder {experiment.folder}; hashes {hashes}")


def diff(left_experiment: Experiment, right_experiment: Experiment) -> None:
    """Print the keys in which two experiments differ."""
    rows = reading.differences(
        left_experiment.model_dump(mode="json"), right_experiment.model_dump(mode="json")
    )
    for key, left, right in rows:
        if key != "base":
            print(f"{key}: {left} -> {right}")


def copy(preset: str, target: Path) -> None:
    """Write the text of a preset, comments included, to a new file."""
    text, source = reading.read_source(preset)
    write_new(target, text)
    print(f"{target}: copied from {source}")


def copy_profile(name: str, target: Path) -> None:
    """Write the text of a site profile, comments included, to a new file; make its folder."""
    source = site.find(name)
    write_new(target, source.read_text(encoding="utf-8"), make_folder=True)
    print(f"{target}: copied from {source}")


def write_new(target: Path, text: str, make_folder: bool = False) -> None:
    """Write a text to a file that does not exist yet; ``make_folder``: make its folder as well.

    Raises:
        ValueError: the file exists.
        RuntimeError: it cannot be written.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already; choose another name")
    try:
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RuntimeError(f"{target}: cannot be written ({error.strerror})") from None
