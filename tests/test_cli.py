"""The parser: quick, teaching, complete."""

import resource
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from hpc_closure.cli import app
from hpc_closure.work.options import Options

VERBS = ["generate", "train", "rollout", "evaluate", "status", "inspect", "config", "bench"]


def test_help_names_every_verb():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for verb in VERBS:
        assert verb in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and len(result.output.splitlines()) > 5


def commands(group=typer.main.get_command(app), above=()):
    """(words, command) of every command that does something."""
    for name, command in group.commands.items():
        words = (*above, name)
        if hasattr(command, "commands"):
            yield from commands(command, words)
        else:
            yield words, command


COMMANDS = dict(commands())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_every_option_says_what_it_does(words):
    command, result = COMMANDS[words], CliRunner().invoke(app, [*words, "--help"])
    text = " ".join(result.output.split())
    assert result.exit_code == 0 and command.help.split("\n")[0] in text
    for option in command.params:
        assert option.help and option.help.split()[-1] in text, option.name
        assert option.opts[-1] in text or option.metavar in text, option.name


def test_a_verb_gets_what_was_typed(monkeypatch):
    """Every option of a verb reaches it, in one record."""
    from hpc_closure.generate import verb

    seen = []
    monkeypatch.setattr(verb, "run", lambda *given: seen.append(given) or 75)
    line = "quickstart seed=3 --members 4 --shard 1/2 --retry-failed --dry-run -vv"
    line += " --max-elapsed 1h --overwrite --yes"
    result = CliRunner().invoke(app, ["generate", *line.split()])
    assert result.exit_code == 75
    [(experiment, options)] = seen
    assert experiment.seed == 3
    assert options == Options(
        members="4",
        shard="1/2",
        retry_failed=True,
        dry_run=True,
        max_elapsed="1h",
        overwrite=True,
        yes=True,
        verbosity=2,
        typed=("quickstart", "seed=3"),
    )


def test_an_executor_is_an_override(monkeypatch):
    from hpc_closure.rollout import verb

    seen = []
    monkeypatch.setattr(verb, "run", lambda *given: seen.append(given) or 0)
    CliRunner().invoke(app, ["rollout", "quickstart", "--executor", "slurm", "-q"])
    [(experiment, options)] = seen
    assert experiment.cluster.executor == "slurm" and options.verbosity == -1
    assert options.typed == ("quickstart", "cluster.executor=slurm")


HEAVY = {"torch", "numpy", "pandas", "mpi4py", "deepspeed", "h5py", "submitit"}


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from hpc_closure.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        f"found = {HEAVY | {'pydantic'}} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    ["hpc-closure gen", "hpc-closure rollout quickstart a=3 --ex", "hpc-closure bench dns --thr"],
)
def test_completion_imports_nothing_heavy(environment, words):
    """But for pydantic, with which the parser itself converts values while it completes."""
    code = (
        "import sys\n"
        "from hpc_closure.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"found = {HEAVY} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    asked = {
        "_HPC_CLOSURE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, "hpc-closure"],
        capture_output=True,
        text=True,
        env={**environment, **asked},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(words.split()[-1])


def processor_seconds(words, environment):
    """Of one process from its start to its end; its wall time where that is less."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(words, env=environment, capture_output=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return min(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


PLAIN = """
import typer
app = typer.Typer(rich_markup_mode=None)
@app.command()
def generate(experiment: str) -> None: "Make data."
@app.command()
def train(experiment: str) -> None: "Fit it."
app(prog_name="hpc-closure")
"""


def test_help_and_completion_answer_at_once(environment):
    """Beside a program of two empty verbs, turn by turn: machines and releases of the library
    of the command line differ by more than what a careless import costs."""
    completing = {
        **environment,
        "_HPC_CLOSURE_COMPLETE": "complete_bash",
        "COMP_WORDS": "hpc-closure gen",
        "COMP_CWORD": "1",
    }
    plain, ours = [sys.executable, "-c", PLAIN], ["hpc-closure"]
    asked = {
        "plain help": ([*plain, "--help"], environment),
        "help": ([*ours, "--help"], environment),
        "plain completion": (plain, completing),
        "completion": (ours, completing),
    }
    best = dict.fromkeys(asked, 9.0)
    for _ in range(8):
        for name, (words, variables) in asked.items():
            best[name] = min(best[name], processor_seconds(words, variables))
    assert best["help"] < 1.7 * best["plain help"], best
    assert best["completion"] < 1.7 * best["plain completion"], best


def test_completion_knows_verbs_and_presets(environment):
    words = {"_HPC_CLOSURE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    done = subprocess.run(
        ["hpc-closure"],
        env={**environment, **words, "COMP_WORDS": "hpc-closure gen"},
        capture_output=True,
        text=True,
    )
    assert "generate" in done.stdout
    done = subprocess.run(
        ["hpc-closure"],
        env={**environment, **words, "COMP_WORDS": "hpc-closure train qui", "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
    )
    assert "quickstart" in done.stdout
