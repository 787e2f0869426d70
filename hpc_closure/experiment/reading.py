"""Read experiments: a YAML file whose ``base`` names a preset and which states the differences.

Precedence: preset < file < ``key=value`` overrides. Every error is one line with source, key,
value and expectation.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hpc_closure.experiment import renames
from hpc_closure.experiment.completing import DataFault, completed
from hpc_closure.experiment.schema import Experiment
from hpc_closure.experiment.user_modules import beside, pattern_beside
from hpc_closure.spectral.recipe import Section

PRESETS = Path(__file__).parent / "presets"


class _Loader(yaml.SafeLoader):
    """Load YAML 1.2 scalars (1e-4 is a number, ``on`` is a string); refuse duplicate keys."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a word", key_node.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stated twice", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag
        not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> dict:
    """Parse a YAML mapping.

    Raises:
        ValueError: it is invalid; the message has ``source``, line and column.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{where}: not valid YAML: {problem}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{source}: read a {type(value).__name__}, expected key: value lines")
    return value


def presets() -> list[str]:
    """List the names of the shipped experiment presets."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in PRESETS.iterdir()
        if entry.name.endswith(".yaml")
    )


def read_source(name_or_path: str | Path) -> tuple[str, str]:
    """Read an experiment file or a shipped preset; return its text and the name of the source.

    Raises:
        ValueError: there is no such file or preset, or the file cannot be read.
    """
    path = Path(name_or_path)
    # a run folder named like a preset does not hide the preset
    run_of_preset = path.is_dir() and str(name_or_path) in presets()
    there = path.exists() and not run_of_preset
    if path.suffix in (".yaml", ".yml") or there or os.sep in str(name_or_path):
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except FileNotFoundError:
            raise ValueError(
                f"{path}: no such file; `hpc-closure config list` names the presets"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(
                f"{path}: cannot be read ({reason}); expected a YAML experiment file"
            ) from None
    if str(name_or_path) in presets():
        return (PRESETS / f"{name_or_path}.yaml").read_text(
            encoding="utf-8"
        ), f"preset {name_or_path}"
    near = difflib.get_close_matches(str(name_or_path), presets(), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{name_or_path}: neither a file nor a preset ({', '.join(presets())}){hint}")


def _merge(lower: dict, upper: dict) -> dict:
    """Merge two trees; values of ``upper`` win."""
    merged = dict(lower)
    for key, value in upper.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _compose(name_or_path: str | Path, warn: bool, chain: tuple[str, ...] = ()) -> dict:
    """Read a source and merge it into its ``base``; ``chain`` holds the sources so far."""
    text, source = read_source(name_or_path)
    if not text.strip():
        raise ValueError(f"{source}: empty; a first line `base: quickstart` names a preset")
    if source in chain:
        raise ValueError(f"{source}: base leads back to itself ({' -> '.join((*chain, source))})")
    values = renames.updated(parse_yaml(text, source), source=source, warn=warn)
    if not source.startswith("preset "):
        _locate(values, Path(source).parent)
    base = values.get("base")
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{source}: base={base!r} is not a preset's name")
    if (
        base.endswith((".yaml", ".yml"))
        and not Path(base).is_absolute()
        and not source.startswith("preset ")
    ):
        base = str(Path(source).parent / base)
    return _merge(_compose(base, warn, (*chain, source)), values)


def _locate(values: dict, folder: Path) -> None:
    """Give the files that an experiment names their absolute paths; changes ``values``."""
    data = values.get("data")
    data = data if isinstance(data, dict) else {}
    for section in (values.get("reduced"), data.get("filter")):
        if isinstance(section, dict) and isinstance(section.get("python"), str):
            section["python"] = beside(section["python"], folder)
    if isinstance(data.get("path"), str):
        data["path"] = pattern_beside(data["path"], folder)
    elif isinstance(data.get("path"), list):
        data["path"] = [pattern_beside(str(one), folder) for one in data["path"]]


def _apply_overrides(values: dict, overrides: list[str], warn: bool) -> dict:
    """Merge overrides ``key=value`` into the values."""
    for text in overrides:
        if len(text.splitlines()) > 1:
            raise ValueError(f"{text!r}: an override is one line")
        key, equals, raw = text.partition("=")
        if key.strip() == "base":
            raise ValueError(
                f"{text!r}: base cannot be overridden; name that preset itself, or copy it with "
                "`hpc-closure config copy`"
            )
        if not equals or not key.strip():
            raise ValueError(f"{text!r}: an override is key=value, for example train.lr=3e-4")
        parsed: Any = None
        if raw.strip():
            parsed = parse_yaml(f"value: {raw}", f"override {text}")["value"]
        for part in reversed(key.strip().split(".")):
            parsed = {part: parsed}
        _locate(parsed, Path())
        values = _merge(values, renames.updated(parsed, source=f"override {text}", warn=warn))
    return values


def explain(error: ValidationError, source: str, model: type[BaseModel]) -> str:
    """Format the first error as one line, with the number of further errors.

    Args:
        error: errors of the validation.
        source: file or preset of the values.
        model: the schema, whose valid keys are listed after an unknown key.
    """
    lines = [_one_line(dict(item), source, model) for item in error.errors()]
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _one_line(error: dict, source: str, model: type[BaseModel]) -> str:
    location = error["loc"]
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, 1)
        hint = f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}? " if near else ""
        return f"{source}: unknown key {key}; {hint}valid here: {', '.join(valid)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing" and location and isinstance(location[-1], int):
        read = error.get("input")
        key = key.rpartition(".")[0]
        return f"{source}: {key}={read}: too few values, at least {location[-1] + 1} expected"
    if not key:
        return f"{source}: {message}"
    if error["type"] == "value_error":
        return f"{source}: {key}: {message}"
    value = error.get("input")
    shown = value if isinstance(value, (int, float, bool)) else repr(value)
    return f"{source}: {key}={shown}: {message}"


def _valid_keys(model: type[BaseModel], location: tuple) -> list[str]:
    """List the keys of the section at ``location``; indices and free names are skipped."""
    for part in location:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return model.keys() if issubclass(model, Section) else list(model.model_fields)


def values_of(
    name_or_path: str | Path, overrides: list[str] | None = None, *, warn: bool = True
) -> dict:
    """Return the keys that an experiment states, with those of its presets; not yet checked."""
    values = _apply_overrides(_compose(name_or_path, warn), list(overrides or ()), warn)
    if "name" not in values:
        values["name"] = Path(str(name_or_path)).stem
    return values


def load(
    name_or_path: str | Path, overrides: list[str] | None = None, *, warn: bool = True
) -> Experiment:
    """Read an experiment: preset < file < overrides; ``data`` is completed by its files.

    Args:
        name_or_path: an experiment file, or the name of a preset.
        overrides: changed keys, ``key=value``.
        warn: whether old names of keys are logged; False for a file that the package has written.

    Raises:
        ValueError: one line with source, key, value and expectation.
    """
    source = str(name_or_path)
    values = values_of(name_or_path, overrides, warn=warn)
    try:
        return Experiment.model_validate(completed(values))
    except DataFault as fault:
        raise ValueError(f"{source}: {fault}") from None
    except ValidationError as error:
        raise ValueError(explain(error, source, Experiment)) from None


def dump(experiment: Experiment) -> str:
    """Format the resolved experiment as YAML, which loads to an equal experiment."""
    values = experiment.model_dump(mode="json", exclude={"base"})
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def differences(first: Any, second: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the leaves that differ between two plain trees, as (key, first, second)."""
    if isinstance(first, dict) and isinstance(second, dict):
        rows: list[tuple[str, Any, Any]] = []
        for key in [*first, *(key for key in second if key not in first)]:
            rows += differences(
                first.get(key), second.get(key), f"{prefix}.{key}" if prefix else key
            )
        return rows
    return [] if first == second else [(prefix, first, second)]
