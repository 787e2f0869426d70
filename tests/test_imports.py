"""The import rule: wings depend one way, without circles; three libraries have one door each."""

import ast
from pathlib import Path

import pytest

import hpc_closure

PACKAGE = Path(hpc_closure.__file__).parent
DOOR = ("__init__", "__main__", "cli")
# Floors from the top; a wing imports itself and the floors below its own.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("tools", "bench"),
    ("evaluate",),
    ("rollout", "train", "export"),
    ("generate",),
    ("closure", "data"),
    ("batch",),
    ("work",),
    ("experiment",),
    ("spectral",),
)
DOORS = {
    "mpi4py": {"work/mpi.py"},
    "deepspeed": {"train/deepspeed.py"},
    "submitit": {"batch/submit.py"},
}
USERS_MODULES = {
    "experiment/kinds.py",
    "experiment/user_modules.py",
}  # import what an experiment names
# Inside a wing: at most so many boxes, floors, and arrows between boxes.
LIMITS = {
    "closure": (17, 6, 42),
    "spectral": (16, 9, 45),
    "evaluate": (8, 8, 23),
    "evaluate.scores": (14, 7, 39),
    "batch": (5, 2, 4),
    "rollout": (4, 4, 3),
    "train": (11, 5, 16),
    "work": (16, 7, 41),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name of a module inside the package; "" for the package itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def graph() -> dict[str, set[str]]:
    """Modules of the package and the modules of the package that each imports."""
    known = {name_of(path): path for path in MODULES}
    out = {}
    for name, path in known.items():
        inner = {one.removeprefix("hpc_closure.") for one in imports(path)}
        out[name] = {one for one in inner if one in known and one and one != name}
    return out


def wing(name: str) -> str:
    return name.partition(".")[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(arrows[module]):
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            at = stack.index(module)
            circle = stack[at:]
            del stack[at:]
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in sorted(arrows):
        if module not in number:
            visit(module)
    return found


def figures(room: str = "") -> dict:
    """Count boxes, floors, arrows between boxes, circles and modules of the package or a wing."""
    stem = f"{room}." if room else ""
    arrows = {
        one.removeprefix(stem): {other.removeprefix(stem) for other in others if stem in other}
        for one, others in graph().items()
        if one.startswith(stem) and one != room
    }
    boxes = {wing(name) for name in arrows}
    between = {
        (wing(one), wing(other))
        for one, others in arrows.items()
        for other in others
        if wing(one) != wing(other) and wing(other) in boxes
    }
    height: dict[str, int] = {}

    def floor(box: str, above: tuple = ()) -> int:
        if box not in height:
            below = [b for a, b in between if a == box and b not in above]
            height[box] = 1 + max((floor(b, (*above, box)) for b in below), default=0)
        return height[box]

    return {
        "boxes": len(boxes),
        "floors": max(floor(box) for box in boxes),
        "arrows": len(between),
        "circles": len(circles({box: {b for a, b in between if a == box} for box in boxes})),
        "modules": len(arrows),
    }


def test_nothing_but_the_door_stands_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(DOOR)
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert wings == {name for names in FLOORS for name in names} - set(DOOR)


@pytest.mark.parametrize("name", [name for names in FLOORS for name in names])
def test_imports_run_one_way(name):
    level = next(at for at, names in enumerate(FLOORS) if name in names)
    below = {name, *(one for names in FLOORS[level + 1 :] for one in names)}
    for module, others in graph().items():
        if wing(module) == name:
            up = {other for other in others if wing(other) not in below}
            assert not up, f"{module} imports {sorted(up)}"


def test_no_circles():
    assert circles(graph()) == []


@pytest.mark.parametrize("room", LIMITS)
def test_a_wing_stays_as_flat_as_it_is(room):
    found = figures(room)
    limits = dict(zip(("boxes", "floors", "arrows"), LIMITS[room], strict=True))
    assert found["circles"] == 0
    assert {name: found[name] for name in limits if found[name] > limits[name]} == {}


def test_verbs_do_not_import_verbs():
    arrows = graph()
    verbs = {name for name in arrows if name.endswith(".verb")}
    for verb in verbs:
        assert not arrows[verb] & verbs, f"{verb} imports {sorted(arrows[verb] & verbs)}"


def strings_that_import(path: Path) -> set[str]:
    """String constants of a module that name a module of the package."""
    known = {f"hpc_closure.{name}" for name in map(name_of, MODULES) if name}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {name for name in (node.value, node.value.partition(":")[0]) if name in known}
        if isinstance(node, (ast.Name, ast.Attribute)):
            word = node.id if isinstance(node, ast.Name) else node.attr
            if word in ("import_module", "__import__"):
                found.add(word)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_by_string(path):
    allowed = {"import_module"} if str(path.relative_to(PACKAGE)) in USERS_MODULES else set()
    assert strings_that_import(path) == allowed


@pytest.mark.parametrize("library", DOORS)
def test_one_door_to_each_library(library):
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == DOORS[library]


def test_the_rule_would_notice(tmp_path):
    """A circle, a relative import and an import by string are seen."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert "spectral.modes.grid" in graph()["spectral.modes.transform"]
    module = tmp_path / "x.py"
    module.write_text('payload = "hpc_closure.rollout.verb:run_units"\n')
    assert strings_that_import(module) == {"hpc_closure.rollout.verb"}


if __name__ == "__main__":
    for room in ("", *sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")})):
        counts = ", ".join(f"{value} {name}" for name, value in figures(room).items())
        print(f"{room or 'package'}: {counts}")
