"""What a model file says of itself.

A model file is safetensors: eight bytes that hold the length of a JSON header, the header, the
tensors. Its metadata hold, as JSON again, what :class:`Header` has. Read by hand, so that asking
does not import torch; reading cannot run code.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_closure.closure.part_report import PartReport
from hpc_closure.experiment.folder import SHIPPED

__all__ = ["Header", "read_header", "shipped"]

FORMAT = "hpc_closure model 2"
LONGEST = 10**8  # bytes of a header


@dataclass(frozen=True)
class Header:
    """What a model file holds beside its tensors.

    Attributes:
        config: the model's configuration, resolved.
        size: points per side of the training fields.
        length: side of the square.
        target: what U stands for: ``kind``, ``interval`` (solver steps), ``dt``, and ``every``,
            the time between the snapshots it was trained on (memory needs it).
        provenance: how it was made.
        parts: which parts act; those that were dropped from the file are told, too.
    """

    config: dict[str, Any]
    size: int
    length: float
    target: dict[str, Any]
    provenance: dict[str, Any]
    parts: tuple[PartReport, ...] = ()

    @property
    def train_hash(self) -> str:
        """Hash of the settings that made the model; "" where it is not told."""
        hashes = self.provenance.get("hashes")
        return str(hashes.get("train", "")) if isinstance(hashes, dict) else ""

    @property
    def metadata(self) -> dict[str, str]:
        """As the file holds it."""
        return {
            "format": FORMAT,
            "config": json.dumps(self.config),
            "grid": json.dumps({"size": self.size, "length": self.length}),
            "target": json.dumps(self.target),
            "provenance": json.dumps(self.provenance, default=str),
            "parts": json.dumps([asdict(part) for part in self.parts]),
        }


def read_header(path: str | Path) -> Header:
    """The header of a model file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: truncated, foreign or damaged.
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
        told = tuple(PartReport(**part) for part in json.loads(metadata["parts"]))
        return Header(**parts, **json.loads(metadata["grid"]), parts=told)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: its header is damaged ({error}); train again") from None


def _metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file whose size is the one that its header tells."""
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
    """Names of the models that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))
