"""Header of a model file.

A model file is in the safetensors format: eight bytes with the length of a JSON header, the
header, the tensors. The header's metadata hold, as JSON again, the fields of :class:`Header`. They
are read here without torch, and reading them runs no code.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_closure.closure.part_report import PartReport
from hpc_closure.experiment import renames
from hpc_closure.experiment.folder import SHIPPED
from hpc_closure.spectral.modes.resolution import alike

__all__ = ["Header", "read_header", "shipped"]

FORMAT = "hpc_closure model 2"
LONGEST = 10**8  # bytes of a header


@dataclass(frozen=True)
class Header:
    """Contents of a model file beside its tensors.

    Attributes:
        config: resolved configuration of the model.
        size: points per side of the training fields; a tuple if sides have different numbers.
        length: side of the square; a tuple if sides have different lengths.
        target: definition of U: ``kind``, ``interval`` (solver steps), ``dt``, and ``every``, the
            time between the training snapshots, which the noise's memory needs.
        provenance: record of how the model was made.
        parts: which parts act, with those that were dropped from the file.
    """

    config: dict[str, Any]
    size: Any
    length: Any
    target: dict[str, Any]
    provenance: dict[str, Any]
    parts: tuple[PartReport, ...] = ()

    @property
    def train_hash(self) -> str:
        """Hash of the settings that made the model; "" if not recorded."""
        hashes = self.provenance.get("hashes")
        return str(hashes.get("train", "")) if isinstance(hashes, dict) else ""

    @property
    def metadata(self) -> dict[str, str]:
        """The fields as strings, in the form of the file."""
        return {
            "format": FORMAT,
            "config": json.dumps(self.config),
            "grid": json.dumps({"size": self.size, "length": self.length}),
            "target": json.dumps(self.target),
            "provenance": json.dumps(self.provenance, default=str),
            "parts": json.dumps([asdict(part) for part in self.parts]),
        }


def read_header(path: str | Path) -> Header:
    """Read the header of a model file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, foreign or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a model.safetensors file")
    try:
        metadata = _metadata(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a whole model file ({error}); train again or fetch it again"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a safetensors file, but not a model of this package "
            f"(format {metadata.get('format')!r}, expected {FORMAT!r})"
        )
    try:
        parts = {key: json.loads(metadata[key]) for key in ("config", "target", "provenance")}
        parts["config"] = renames.updated(parts["config"], "model", warn=False)
        reports = tuple(PartReport(**part) for part in json.loads(metadata["parts"]))
        grid = {key: alike(value) for key, value in json.loads(metadata["grid"]).items()}
        return Header(**parts, **grid, parts=reports)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: its header is damaged ({error}); train again") from None


def _metadata(path: Path) -> dict[str, str]:
    """Read the metadata; raises ValueError if the file's size differs from the header's."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, LONGEST)))
    metadata = header.pop("__metadata__", None) or {}
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    expected = 8 + length + end
    if path.stat().st_size != expected:
        raise ValueError(f"it has {path.stat().st_size} bytes, expected {expected}")
    return metadata


def shipped() -> list[str]:
    """List the names of the shipped models."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))
