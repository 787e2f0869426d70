"""``hpc-closure data check``: what files of others hold, and what is wrong with them."""

import json as json_format
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from hpc_closure.data.outside.checking import Checked
from hpc_closure.experiment import reading
from hpc_closure.experiment.completing import completed
from hpc_closure.experiment.schema import Experiment
from hpc_closure.experiment.sources.faults import DataFault
from hpc_closure.experiment.sources.formats import Opened, open_file
from hpc_closure.experiment.sources.labels import COMPONENT, MEMBER, SIDES, TIME, role_of
from hpc_closure.experiment.sources.source import paths_of
from hpc_closure.generate import outside
from hpc_closure.work.options import UsageError

LISTED = 12  # most variables of a file that are listed
CLOSURES = ("closure", "forcing", "subgrid", "sgs")  # words in names of stored closures


def run(target: str, overrides: Sequence[str] = (), *, json: bool = False) -> int:
    """Print what was found and the faults. Returns the exit code, 1 with errors.

    Args:
        target: an experiment, or a file, folder or pattern of data.
        overrides: changed keys of the experiment, ``key=value``.
        json: print JSON.

    Raises:
        UsageError: an invalid experiment, or one without section ``data``.
    """
    is_experiment = target.endswith((".yaml", ".yml")) or target in reading.presets()
    lines, checked = [], Checked()
    try:
        if is_experiment:
            experiment = _experiment(target, overrides)
        else:
            path = os.path.abspath(target)
            file = open_file(paths_of([path])[0])
            try:
                lines = listed(file)
                proposed = propose(file, [path])
            finally:
                file.close()
            text = yaml.safe_dump({"data": proposed}, sort_keys=False, default_flow_style=None)
            lines += ["", "a section for an experiment, to be mended:", "", text.rstrip(), ""]
            experiment = _proposed(proposed, checked)
        found = outside.check(experiment)
        checked = replace(found, faults=[*checked.faults, *found.faults])
    except DataFault as error:
        checked.faults.append(error.fault)
    if json:
        print(json_format.dumps(as_json(checked), indent=1))
    else:
        print("\n".join([*lines, *checked.lines(), "", verdict(checked)]))
    return 1 if checked.refused else 0


def verdict(checked: Checked) -> str:
    """Return one line: how many faults there are, and what follows."""
    errors, number = len(checked.refused), len(checked.faults)
    if not number:
        return "no faults found on a sample of the values"
    end = "train and generate refuse the errors" if errors else "train and generate go on"
    return f"{errors} error(s), {number - errors} other(s): {end} (codes: docs/your_data.md)"


def as_json(checked: Checked) -> dict:
    """Return what was found and the faults as plain values."""
    return {
        "found": [list(row) for row in checked.screen],
        "faults": [
            {"code": one.code, "severity": one.severity, "line": one.line}
            for one in checked.faults
        ],
        "refused": len(checked.refused),
    }


def _experiment(target: str, overrides: Sequence[str]) -> Experiment:
    """Load an experiment with section ``data``; a fault of its files is raised as it is."""
    try:
        values = reading.values_of(target, list(overrides))
        if not values.get("data"):
            raise ValueError(
                f"{target}: no section data; expected data: {{path: ..., state: ...}}, or the "
                "name of a data file in place of the experiment"
            )
        return Experiment.model_validate(completed(values))
    except DataFault:
        raise
    except ValidationError as error:
        raise UsageError(reading.explain(error, target, Experiment)) from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _proposed(proposed: dict, checked: Checked) -> Experiment:
    """Build an experiment of a proposed section, for the faults of its values.

    A missing length or spacing is added to the faults, and taken as 1 for what follows.
    """
    section = dict(proposed)
    for _ in range(3):
        try:
            return Experiment.model_validate(completed({"name": "check", "data": section}))
        except ValidationError as error:
            raise UsageError(reading.explain(error, "data", Experiment)) from None
        except DataFault as error:
            key = {"NO_LENGTH": "length", "NO_TIME": "spacing"}.get(error.fault.code)
            if key is None or key in section:
                raise
            checked.faults.append(error.fault)
            section[key] = 1.0
    raise AssertionError("two keys at most are missing")


def listed(file: Opened) -> list[str]:
    """List the variables of a file with their dimensions and roles."""
    rows = [f"{file.path}: {file.kind}"]
    arrays = [one for one in file.variables.values() if len(one.shape) > 1]
    for one in arrays[:LISTED]:
        dims = []
        for name, size in zip(one.dims, one.shape):
            role = role_of(name, file)
            dims.append(f"{name or '?'}{f' ({role})' if role not in (None, name) else ''} {size}")
        rows.append(f"  {one.name}: {one.dtype}, {', '.join(dims)}")
    if len(arrays) > LISTED:
        rows.append(f"  and {len(arrays) - LISTED} more")
    return rows


def propose(file: Opened, path: list[str]) -> dict:
    """Return a section ``data`` for the fields of a file.

    Fields are the variables with a time and sides, on the grid of the first of them. A variable
    whose name has the word closure, forcing, subgrid or sgs is taken as a closure if there is one
    for each field.
    """
    fields: dict[str, str] = {}
    first: tuple | None = None
    dims: list[str] | None = None
    for one in file.variables.values():
        roles = [role_of(name, file) for name in one.dims]
        if None in one.dims and 3 <= len(one.shape) <= 5:  # by position: member, time, sides
            sides = list(SIDES[: len(one.shape) - 2])[::-1]
            roles = [MEMBER, TIME, *sides] if len(one.shape) > 3 else [TIME, "y", "x"]
            dims = [str(role) for role in roles]
        grid = [size for role, size in zip(roles, one.shape) if role in SIDES]
        if TIME not in roles or not grid or one.dtype.kind not in "fiu":
            continue
        if first is None:
            first = (roles, grid)
        if (roles, grid) != first and COMPONENT not in roles or grid != first[1]:
            continue
        sizes = [size for role, size in zip(roles, one.shape) if role in (COMPONENT, None)]
        word = "".join(letter if letter.isalnum() else "_" for letter in Path(one.name).name)
        if len(sizes) == 1:
            fields |= {f"{word}_{n}": f"{one.name}[{n}]" for n in range(min(sizes[0], 8))}
        elif not sizes:
            fields[word] = one.name
    closures = {
        name: text for name, text in fields.items() if any(w in name.lower() for w in CLOSURES)
    }
    states = {name: text for name, text in fields.items() if name not in closures}
    section: dict = {"path": path, "state": states or {"q": "NAME"}}
    if closures and len(closures) == len(states):
        section["closure"] = dict(zip(states, closures.values()))
    if dims:
        section["dims"] = dims
    return section
