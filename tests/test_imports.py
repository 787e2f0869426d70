"""The import rule: subpackages depend one way; three libraries have one door each."""

import ast
from pathlib import Path

import pytest

import hpc_closure

PACKAGE = Path(hpc_closure.__file__).parent
MAY_IMPORT = {
    "spectral": set(),
    "closure": {"spectral"},
    "data": {"spectral"},
    "train": {"data", "closure", "spectral"},
    "rollout": {"spectral", "data", "closure"},
    "evaluate": {"spectral", "data", "closure"},
    "bench": {"spectral", "data", "closure", "train", "evaluate"},
}
DOORS = {
    "mpi4py": {"parallel.py"},
    "deepspeed": {"train/engine.py"},
    "submitit": {"rollout/submit.py"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in it; relative ones resolved."""
    names: set[str] = set()
    inside = ["hpc_closure", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names} | {stem}
    return names


def subpackages(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names if name.startswith("hpc_closure.")]
    return {part[1] for part in parts if (PACKAGE / part[1]).is_dir()}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_subpackages_import_one_way(package):
    for path in (PACKAGE / package).rglob("*.py"):
        extra = subpackages(imports(path)) - MAY_IMPORT[package] - {package}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}"


@pytest.mark.parametrize("library", DOORS)
def test_one_door_to_each_library(library):
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == DOORS[library]


def test_the_rule_would_notice():
    """The parser of this test sees relative imports too."""
    assert "hpc_closure.run" in imports(PACKAGE / "units.py")


def test_every_module_is_below_its_size():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long
