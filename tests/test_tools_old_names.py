"""Old names of commands and options: accepted with one line, listed nowhere, unknown elsewhere."""

import subprocess
import sys

import pytest
import typer
from test_cli import COMMANDS
from typer.testing import CliRunner

from hpc_closure.cli import app
from hpc_closure.tools.old_names import NEW


def options_of(command):
    return [option for one in command.params for option in one.opts]


OPTIONS = {old: new for old, new in NEW.items() if old.startswith("--")}
HOLDERS = {
    new: [words for words, command in COMMANDS.items() if new in options_of(command)]
    for new in OPTIONS.values()
}


def context_of(words):
    """The context of the command that these words call; nothing is run."""
    command = typer.main.get_command(app)
    context = command.make_context("hpc-closure", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def line_of(old, new):
    return f"{old} is now {new}; the old name is accepted until the next release\n"


@pytest.mark.parametrize(
    "words, option, value",
    [
        ("generate x.yaml", "--redo", ""),
        ("train x.yaml a=1", "--redo", ""),
        ("evaluate x.yaml", "--redo", ""),
        ("generate x.yaml", "--parts", " 2/8"),
        ("rollout x.yaml", "--parts", "=2/8"),
        ("submit x.yaml", "--after", " 12:13"),
        ("bench sampling", "--one-pass", ""),
        ("bench sampling", "--correct", ""),
    ],
)
def test_an_old_option_is_the_new_one_and_one_line_has_its_name(words, option, value, capsys):
    new = context_of(f"{words} {NEW[option]}{value}".split())
    assert capsys.readouterr().err == ""
    old = context_of(f"{words} {option}{value}".split())
    assert old.command.name == new.command.name and old.params == new.params
    assert capsys.readouterr().err == line_of(option, NEW[option])
    assert new.params != context_of(words.split()).params


def test_a_repeated_old_option_has_one_line(capsys):
    context_of("generate x.yaml --redo --redo --parts 1/2".split())
    assert capsys.readouterr().err == line_of("--parts", "--shard") + line_of(
        "--redo", "--overwrite"
    )


@pytest.mark.parametrize("old, new", [("visit", "gpu"), ("sizes", "network-size")])
def test_an_old_command_is_the_new_one(old, new, capsys):
    words = ["folder"] if old == "visit" else []
    found, wanted = context_of(["bench", old, *words]), context_of(["bench", new, *words])
    assert found.params == wanted.params and found.command.name == wanted.command.name == new
    assert capsys.readouterr().err == line_of(f"bench {old}", f"bench {new}")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_no_old_name(words):
    text = CliRunner().invoke(app, [*words, "--help"]).output.split()
    assert not set(text) & set(OPTIONS) and not {"visit", "sizes"} & set(words)


def test_every_new_name_exists():
    assert all(HOLDERS[new] for new in OPTIONS.values())
    commands = {words[-1] for words in COMMANDS}
    assert {NEW[old] for old in NEW if old not in OPTIONS} <= commands


@pytest.mark.parametrize(
    "words, message",
    [
        ("generate x.yaml --after 3", "No such option: --after"),
        ("train x.yaml --parts 1/2", "No such option: --parts"),
        ("status x.yaml --redo", "No such option: --redo"),
        ("generate x.yaml --redos", "No such option: --redos"),
        ("visit folder", "No such command 'visit'"),
        ("bench visits", "No such command 'visits'"),
    ],
)
def test_names_are_unknown_where_they_were_unknown(words, message, capsys):
    with pytest.raises(Exception, match=message):
        context_of(words.split())
    assert "is now" not in capsys.readouterr().err


def test_words_after_two_dashes_are_no_options(capsys):
    context = context_of(["generate", "--", "x.yaml", "--redo"])
    assert context.params["overrides"] == ["--redo"] and capsys.readouterr().err == ""


def test_one_of_several_processes_prints_the_line(environment):
    words = [
        sys.executable,
        "-m",
        "hpc_closure",
        "generate",
        "no_such_preset",
        "--redo",
    ]
    for rank in ("0", "1"):
        ranks = {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": "2",
        }
        done = subprocess.run(words, capture_output=True, text=True, env={**environment, **ranks})
        assert done.returncode == 2
        assert done.stderr.count("--redo is now --overwrite") == (rank == "0")
