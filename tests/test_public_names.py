"""Public names do not change without an entry in CHANGELOG.md.

``public_names.txt`` holds the names of the last release: commands and options, keys of an
experiment and the words that they accept, presets, shipped models, and the Python names of
docs/api.md. A name that is new or gone since then must be in the first section of the changelog,
or a name above it that changed with it (`cluster.pilot` for its keys). After a release::

    python tests/test_public_names.py        # writes public_names.txt
"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import typer
import yaml

import hpc_closure
from hpc_closure.cli import app
from hpc_closure.closure.header import shipped
from hpc_closure.experiment import kinds, reading
from hpc_closure.experiment.models import PRESETS
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.recipe import Family, Section

ROOT = Path(__file__).resolve().parent.parent
# keys whose values are names of parts
PARTS = {
    "model.mean": kinds.NetworkKind,
    "model.residual": kinds.ResidualKind,
    "model.preset": kinds.ModelKind,
}
RECORD = Path(__file__).with_name("public_names.txt")


def commands(group=typer.main.get_command(app), above=""):
    """``command config``, ``command config show``, ``command config show --doc``, ..."""
    for name, command in group.commands.items():
        full = f"{above} {name}".strip()
        yield f"command {full}"
        for option in command.params:
            if option.param_type_name == "option":
                yield f"command {full} {option.opts[-1]}"
        if hasattr(command, "commands"):
            yield from commands(command, full)


def is_ours(kind):
    """Whether a class is the package's, not one that another test defined."""
    return kind.__module__.startswith("hpc_closure.")


def sections(annotation):
    """Sections in a type, such as those of ``tuple[Rung, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def choices(annotation):
    """Words in a type, such as those of ``Literal["on", "off"] | None``."""
    if get_origin(annotation) is Literal:
        yield from (value for value in get_args(annotation) if isinstance(value, str))
    else:
        for part in get_args(annotation):
            yield from choices(part)


def keys(section=Experiment, above=""):
    """``key train.lr``, and ``key model.generator=cnn`` for the words that it accepts."""
    parts = [section]
    if Family in section.__bases__:
        parts += filter(is_ours, section.kinds.values())
        yield from (
            f"key {above}{section.discriminator}={name}"
            for name, kind in section.kinds.items()
            if is_ours(kind)
        )
    for part in parts:
        for name, field in part.model_fields.items():
            yield f"key {above}{name}"
            yield from (f"key {above}{name}={value}" for value in choices(field.annotation))
            for inner in sections(field.annotation):
                yield from keys(inner, f"{above}{name}.")


def python_names():
    """``python hpc_closure.load``: what the reference of docs/api.md shows."""
    page = (ROOT / "docs" / "api.md").read_text()
    for module_name, chosen in re.findall(r"automodule:: (\S+)\n +:members:(.*)", page):
        module = importlib.import_module(module_name)
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        names = names or getattr(module, "__all__", None) or public(module, module_name)
        for name in names:
            yield f"python {module_name}.{name}"
            one = getattr(module, name)
            if inspect.isclass(one):
                inner = {*vars(one), *getattr(one, "__annotations__", {})}
                inner |= set(getattr(one, "model_fields", {}))
                inner = {word for word in inner if not word.startswith(("_", "model_"))}
                yield from (f"python {module_name}.{name}.{word}" for word in inner)


def public(module, name):
    """Functions and classes that a module defines."""
    return [
        word
        for word, one in vars(module).items()
        if getattr(one, "__module__", "") == name and not word.startswith("_")
    ]


def names():
    """All public names, sorted."""
    found = {*commands(), *keys(), *python_names()}
    found |= {f"preset {name}" for name in reading.presets()}
    found |= {f"key model.preset={name}" for name in PRESETS}
    for key, family in PARTS.items():
        of_family = {name: kinds.find(family, name, key) for name in kinds.names(family)}
        found |= {f"key {key}={name}" for name, kind in of_family.items() if is_ours(kind)}
    return sorted(found | {f"model {name}" for name in shipped()})


def unreleased(text):
    """The first section of a changelog."""
    title, _, rest = text.partition("\n## ")[2].partition("\n")
    assert "eleased" in title, f"CHANGELOG.md begins with {title!r}: expected Not released"
    return rest.partition("\n## ")[0]


def without_an_entry(before, now, section):
    """Names that are new or gone and in no code (`...`) of a section of the changelog.

    Of a word that a key accepts the word will do, and of a Python name its last part.
    """
    changed = set(before) ^ set(now)

    code = [span.replace(": ", "=") for span in re.findall(r"`([^`]+)`", section)]

    def is_said(word, before=r"[\w.-]"):
        found = re.compile(rf"(?<!{before}){re.escape(word)}(?![\w-])")
        return any(found.search(span) for span in code)

    def is_named(name):
        kind, _, word = name.partition(" ")
        if is_said(word) or word.partition("=")[2] in code:
            return True
        if kind == "python" and is_said(word.rpartition(".")[2], before=r"[\w-]"):
            return True
        above = re.match(r"(\w+ .+)[ .=]", name)
        return bool(above) and above[1] in changed and is_named(above[1])

    return sorted(name for name in changed if not is_named(name))


def test_a_public_name_changes_with_an_entry_in_the_changelog():
    version, *before = RECORD.read_text().splitlines()
    assert version == f"version {hpc_closure.__version__}", "python tests/test_public_names.py"
    section = unreleased((ROOT / "CHANGELOG.md").read_text())
    lacking = without_an_entry(before, names(), section)
    assert not lacking, f"public names changed: name them in CHANGELOG.md, Not released: {lacking}"


def test_the_names_are_those_that_a_user_sees():
    found = set(names())
    for name in (
        "command generate",
        "command rollout --executor",
        "command config show --doc",
        "key train.lr",
        "key cluster.walltime",
        "key train.rollout_training.horizon",
        "key physics.equation=clouds",
        "key physics.noise.kind=ring",
        "key model.residual=resampled",
        "key model.generator=cnn",
        "key model.preset=point_mixture",
        "preset quickstart",
        "model diffusion",
        "python hpc_closure.load",
        "python hpc_closure.data.reader.DataSet.read",
        "python hpc_closure.spectral.problem.Problem.viscosity",
    ):
        assert name in found, name
    assert "python hpc_closure.importlib" not in found and hpc_closure.__all__ == ["load"]


def test_the_citation_and_the_package_have_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hpc_closure.__version__ and citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert f"\nversion = {hpc_closure.__version__}\n" in (ROOT / "setup.cfg").read_text()


def test_what_counts_as_an_entry():
    section = "* `hpc-closure doctor` looks.\n* `cluster.pilot`: one allocation. `closure.run(x)`"
    section += "\n* `a.b: c` and train.other"
    now = [
        "command doctor",
        "command doctor --json",
        "key cluster.pilot",
        "key cluster.pilot.nodes",
    ]
    assert without_an_entry([], now, section) == []
    assert without_an_entry(["key train.lr"], now, section) == ["key train.lr"]  # gone
    assert without_an_entry([], ["key cluster.pilots"], section) == ["key cluster.pilots"]
    assert without_an_entry(["key cluster"], ["key cluster", "key cluster.x"], section) == [
        "key cluster.x"
    ]
    assert without_an_entry([], ["key pilot", "key train.other"], section) == [
        "key pilot",
        "key train.other",
    ]
    assert without_an_entry([], ["key a.b=c", "python p.Closure.run"], section) == []
    assert without_an_entry([], ["key a.b=d", "python p.Closure.runs"], section) == [
        "key a.b=d",
        "python p.Closure.runs",
    ]
    assert unreleased("# C\n\n## Not released\na\n\n## 0.1\nb") == "a\n"


if __name__ == "__main__":
    lines = [f"version {hpc_closure.__version__}", *names()]
    RECORD.write_text("\n".join(lines) + "\n")
    print(f"{RECORD}: {len(lines) - 1} names", file=sys.stderr)
