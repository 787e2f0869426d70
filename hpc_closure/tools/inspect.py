"""``hpc-closure inspect``: summarise a product in one screen; report a damaged one in one line.

It reads data and rollout blocks, restart files, ``model.safetensors``, training checkpoints, score
tables, and folders of these, including run folders.
"""

import csv
import json as json_format
from pathlib import Path
from typing import Any

import numpy as np

from hpc_closure.closure.header import shipped
from hpc_closure.closure.part_report import PartReport, describe
from hpc_closure.data.layout import BlockHeader
from hpc_closure.experiment import renames
from hpc_closure.experiment.folder import FOLDERS, Run, shipped_model
from hpc_closure.work import atomic, hdf5

Report = dict[str, Any]
PARTS = ("parts", "do not act")  # report entries that are never shortened
SAMPLED = 8  # snapshots from which statistics are computed without --deep


def run(path: Path, *, deep: bool = False, json: bool = False) -> int:
    """Print a summary of ``path``. Returns the exit code.

    Args:
        path: file, folder, or name of a shipped model.
        deep: read every value.
        json: print JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no product of this package; one line.
    """
    report = inspect(Path(path), deep)
    print(json_format.dumps(report, indent=1, default=str) if json else "\n".join(_lines(report)))
    return 1 if report.get("damaged") else 0


def inspect(path: Path, deep: bool = False) -> Report:
    """Summarise a product as plain data."""
    if not path.exists():
        if str(path) not in shipped():
            raise FileNotFoundError(
                f"{path}: no such file or folder, nor a shipped model ({', '.join(shipped())})"
            )
        path = shipped_model(str(path))
    if path.is_dir():
        if (path / "complete.json").exists() or path.name.startswith("step_"):
            return checkpoint(path, deep)
        return run_folder(path, deep) if (path / "config.yaml").exists() else folder(path, deep)
    readers = {
        ".h5": block,
        ".hdf5": block,
        ".part": block,
        ".safetensors": model,
        ".csv": table,
        ".json": record,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: not a product of this package; expected "
            f"{', '.join(sorted(set(readers) - {'.part'}))} or a folder of them"
        )
    return readers[path.suffix](path, deep)


# HDF5


def block(path: Path, deep: bool = False) -> Report:
    """Summarise a block of trajectories, or a restart file."""
    with hdf5.open_hdf5(path) as file:
        attributes = {key: _plain(value) for key, value in file.attrs.items()}
        if "next_snapshot" in attributes:
            return {
                "file": str(path),
                "kind": "restart file",
                **attributes,
                "data sets": _shapes(file),
                **_checked(file, path, deep),
            }
        header = BlockHeader.from_file(file, path)
        fields = file["t0_fields"]
        report: Report = {
            "file": str(path),
            "kind": f"{attributes.get('stage', 'data')} block",
            "size": f"{header.size / 1e6:.3g} MB",
            "members": f"{header.first} to {header.last} ({len(header.members)})",
            "times": _range_of(header.times),
            "holds": header.holds,
            "data sets": _shapes(file),
            "statistics": {name: _statistics(path, name, fields[name], deep) for name in fields},
            "series": {name: _series(file["scalars"][name]) for name in file.get("scalars", ())},
            "certificate": header.certificate or "none",
            "hashes": {
                key: attributes[key] for key in ("recipe_hash", "member_hash") if key in attributes
            },
            "recipe": renames.updated(header.settings, warn=False),
            "provenance": header.provenance,
        }
        if deep:
            report.update(_checked(file, path, deep))
    if deep:
        report["content sha256"] = hdf5.sha256_datasets(path)
    return report


def _shapes(file) -> dict[str, str]:
    found: dict[str, str] = {}

    def visit(name, item):
        if hasattr(item, "shape") and not name.startswith("boundary_conditions"):
            found[name] = f"{item.dtype} {tuple(item.shape)}"

    file.visititems(visit)
    return found


def _statistics(path: Path, name: str, values, deep: bool) -> dict:
    """Compute moments over (members, times, x, y), of all snapshots or an even sample.

    Raises:
        ValueError: a value is not finite.
    """
    low, high, total, square, count = np.inf, -np.inf, 0.0, 0.0, 0
    num_members, num_times = values.shape[:2]
    if not num_members or not num_times:
        return {}
    if deep:
        picks = [(row, slice(None)) for row in range(num_members)]
    else:
        rows = np.unique(np.linspace(0, num_members - 1, SAMPLED // 4).astype(int))
        steps = np.unique(np.linspace(0, num_times - 1, SAMPLED // 2).astype(int))
        picks = [(int(row), slice(int(step), int(step) + 1)) for row in rows for step in steps]
    for row, step in picks:
        part = values[row, step].astype(np.float64)
        if not np.isfinite(part).all():
            raise ValueError(
                f"{path}: {name} has non-finite values (row {row}); delete it and "
                "run the verb that makes it again"
            )
        low, high = min(low, part.min()), max(high, part.max())
        total, square, count = total + part.sum(), square + (part**2).sum(), count + part.size
    mean = total / count
    return {
        "mean": _round(mean),
        "rms": _round((square / count) ** 0.5),
        "min": _round(low),
        "max": _round(high),
        "of": "all values" if deep else f"{len(picks)} snapshots",
    }


def _series(values) -> dict:
    data = values[...]
    return (
        {
            "first": _round(data[..., 0].mean()),
            "last": _round(data[..., -1].mean()),
            "min": _round(data.min()),
            "max": _round(data.max()),
        }
        if data.size
        else {}
    )


def _checked(file, path: Path, deep: bool) -> Report:
    """Read every value of every data set if ``deep``; returns how many were read.

    Raises:
        ValueError: a value is not finite.
    """
    if not deep:
        return {}
    number = 0

    def visit(name, item):
        nonlocal number
        if not hasattr(item, "shape"):
            return
        for start in range(0, item.shape[0], max(1, item.shape[0] // 64)) if item.shape else [()]:
            part = item[()] if start == () else item[start : start + max(1, item.shape[0] // 64)]
            part = np.asarray(part)
            number += part.size
            if part.dtype.kind in "fc" and not np.isfinite(part).all():
                raise ValueError(
                    f"{path}: {name} has non-finite values; delete it and run the "
                    "verb that makes it again"
                )

    file.visititems(visit)
    return {"values read": number}


# model and checkpoints


def model(path: Path, deep: bool = False) -> Report:
    """Summarise a trained closure: header and shapes; with ``deep`` check every weight."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {key: _json(value) for key, value in (file.metadata() or {}).items()}
            parts = [PartReport(**part) for part in metadata.pop("parts", ())]
            names = sorted(file.keys())
            weights = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if deep:
                for name in names:
                    if not np.isfinite(file.get_tensor(name)).all():
                        raise ValueError(f"{path}: weight {name} has non-finite values")
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({' '.join(str(error).split())}); "
            "delete it and run `hpc-closure train` again"
        ) from None
    number = sum(int(np.prod(shape)) for shape in weights.values())
    report: Report = {
        **_parts(parts),
        "file": str(path),
        "kind": "model",
        "size": f"{path.stat().st_size / 1e6:.3g} MB",
        "parameters": number,
        **metadata,
    }
    report["weights"] = {name: str(shape) for name, shape in weights.items()}
    if deep:
        report["values read"] = number
    return report


def _parts(parts: list[PartReport]) -> Report:
    """Describe which parts of a model are active and which are not."""
    descriptions = describe(parts).partition("; do not act: ")[::2] if parts else ()
    return {key: words for key, words in zip(PARTS, descriptions) if words}


def checkpoint(path: Path, deep: bool = False) -> Report:
    """Summarise a restart point of a training."""
    from hpc_closure.train.checkpoint import damage

    reason = damage(path)
    if reason is not None:
        raise ValueError(
            f"{path}: damaged restart point: {reason}; delete it, training goes on "
            "from the one before"
        )
    progress = atomic.read_json(path / "progress.json")
    report: Report = {
        "folder": str(path),
        "kind": "training restart point",
        **{key: value for key, value in progress.items() if key != "pending"},
    }
    report["files"] = {
        part.name: f"{part.stat().st_size / 1e6:.3g} MB" for part in sorted(path.iterdir())
    }
    for part in sorted(path.glob("*.safetensors")):
        weights = model(part, deep)
        report[part.stem] = f"{len(weights['weights'])} tensors, {weights['parameters']} values"
    return report


# tables and records


def table(path: Path, deep: bool = False) -> Report:
    """Summarise a CSV table of scores or metrics."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable CSV table ({error})") from None
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"{path}: damaged CSV table (no rows, or rows of different lengths); "
            "delete it and run the verb that makes it again"
        )
    header, rows = rows[0], rows[1:]
    report: Report = {
        "file": str(path),
        "kind": "table",
        "rows": len(rows),
        "columns": ", ".join(header),
    }
    for key in ("stage", "method", "score"):
        if key in header:
            values = sorted({row[header.index(key)] for row in rows})
            report[f"{key} values"] = ", ".join(values)
    if deep:
        for name, column in zip(header, zip(*rows)):
            if len({_is_number(cell) for cell in column if cell}) > 1:
                raise ValueError(
                    f"{path}: column {name} mixes numbers and words; delete it and "
                    "run the verb that makes it again"
                )
        report["values read"] = len(rows) * len(header)
    return report


def _is_number(cell: str) -> bool:
    try:
        float(cell)
        return True
    except ValueError:
        return False


def record(path: Path, deep: bool = False) -> Report:
    """Summarise a JSON file."""
    value = atomic.read_json(path)
    kind = f"list of {len(value)}" if isinstance(value, list) else type(value).__name__
    return {
        "file": str(path),
        "kind": f"JSON {kind}",
        **({key: value[key] for key in value} if isinstance(value, dict) else {}),
    }


# folders


def folder(path: Path, deep: bool = False) -> Report:
    """Summarise every product of a folder in a line; list damaged ones separately."""
    found: dict[str, str] = {}
    damaged: list[str] = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or ".part" in entry.suffixes or ".damaged" in entry.name:
            continue
        if entry.is_dir() and not entry.name.startswith("step_"):
            continue
        if entry.is_file() and entry.suffix not in (".h5", ".safetensors", ".csv", ".json"):
            continue
        try:
            inner = inspect(entry, deep)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
            continue
        words = [str(inner[key]) for key in ("kind", "size") if key in inner]
        words += [
            f"{key} {inner[key]}"
            for key in ("members", "times", "step", "rows")
            if isinstance(inner.get(key), (str, int))
        ]
        found[entry.name] = ", ".join(words)
    if not found and not damaged:
        raise ValueError(f"{path}: no product of this package in this folder")
    return {"folder": str(path), "products": found, **({"damaged": damaged} if damaged else {})}


def run_folder(path: Path, deep: bool = False) -> Report:
    """Summarise a run: state, products by stage, provenance."""
    from hpc_closure.experiment import reading
    from hpc_closure.tools import status

    layout = Run(path)
    experiment = reading.load(layout.config, warn=False)
    report: Report = {
        "run": str(path),
        "experiment": experiment.name,
        "hashes": {stage: experiment.stage_hash(stage)[:12] for stage in experiment.stages},
    }
    if experiment.use.test:
        report["test set"] = experiment.use.test
    damaged: list[str] = []
    if experiment.folder.resolve() == path.resolve():
        report["state"] = {
            name: ", ".join(f"{count} {state}" for state, count in stage.counts.items() if count)
            for name, stage in status.survey(experiment).items()
        }
    else:
        report["note"] = f"moved here from {experiment.folder}"
    places = [(stage, layout.folder(stage)) for stage in FOLDERS]
    for name, place in [*places, ("checkpoints", layout.checkpoints)]:
        if not place.is_dir():
            continue
        try:
            inner = folder(place, deep)
        except ValueError:
            continue
        products = inner["products"]
        shown = dict(list(products.items())[:8]) if isinstance(products, dict) else {}
        if len(products) > len(shown):
            shown["..."] = f"{len(products) - len(shown)} more"
        report[name] = shown
        damaged += inner.get("damaged", [])
    history = atomic.read_jsonl(layout.provenance)
    report["provenance"] = [
        f"{item.get('time', '?')} {item.get('verb', '?')} on {item.get('host', '?')}, "
        f"{item.get('ranks', '?')} rank(s), version {item.get('version', '?')}"
        for item in history[-8:]
    ]
    if damaged:
        report["damaged"] = damaged
    return report


# formatting


def _plain(value):
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.tolist() if hasattr(value, "tolist") else value


def _json(text):
    """Parse JSON; return the text itself if it is none."""
    if not isinstance(text, str):
        return text
    try:
        return json_format.loads(text)
    except ValueError:
        return text


def _round(value) -> float:
    return float(f"{float(value):.5g}")


def _range_of(times) -> str:
    if not len(times):
        return "none"
    step = f", every {times[1] - times[0]:g}" if len(times) > 1 else ""
    return f"{times[0]:g} to {times[-1]:g} ({len(times)}{step})"


def _lines(value: dict, indent: str = "") -> list[str]:
    """Format plain data as indented lines; a small mapping takes one line."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat = ", ".join(f"{name} {_short(part)}" for name, part in item.items())
            nested = any(isinstance(part, (dict, list)) for part in item.values())
            if not nested and len(flat) < 80:
                lines.append(f"{indent}{key}: {flat}")
            else:
                lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif (
            isinstance(item, list)
            and item
            and all(isinstance(part, str) for part in item)
            and key != "command"
        ):
            lines += [f"{indent}{key}:", *(f"{indent}  {part}" for part in item)]
        else:
            lines.append(f"{indent}{key}: {item if key in PARTS else _short(item)}")
    return lines


def _short(item: object) -> str:
    if isinstance(item, float):
        return f"{item:.6g}"
    text = " ".join(str(part) for part in item) if isinstance(item, list) else str(item)
    return text if len(text) < 160 else text[:157] + "..."
