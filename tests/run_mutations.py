"""Break one line at a time and demand that a named test fails: ``launch/check --mutations``.

``mutations.yaml`` holds the mutations. Each is applied to a copy of the repository in a temporary
folder, where the test that it names runs alone. The test must pass there before and fail after.
A mutation that survives, whose line is not in the file exactly once, or whose test does not pass
to begin with makes the exit code 1.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutations.yaml")
COPIED = ("hpc_closure", "tests", "docs", "setup.cfg", "setup.py")
FAILED = 1  # exit code of pytest; others mean that it could not run the test


@dataclass(frozen=True)
class Mutation:
    """One line broken.

    Attributes:
        what: in words.
        file: below ``hpc_closure``.
        old, new: the line, or a part of it that is in the file once, and what replaces it.
        test: below ``tests``, the test that must fail.
    """

    what: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, text: str) -> str:
        """The mutated text; ValueError unless ``old`` is in it exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"hpc_closure/{self.file} holds {self.old!r} {count} times, expected once: "
                f"mend {LIST.name}"
            )
        return text.replace(self.old, self.new)


def read() -> list[Mutation]:
    """All of ``mutations.yaml``."""
    return [Mutation(**one) for one in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


class Copy:
    """A copy of the repository in which one test runs at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in COPIED:
            source, copied = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, copied)
        # no bytecode: a line of equal length written in the same second would go unseen
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        where = [sys.executable, "-c", "import hpc_closure; print(hpc_closure.__file__)"]
        found = Path(self._run(where).stdout.strip())
        if folder not in found.parents:
            raise RuntimeError(f"the copy in {folder} is not what is imported, but {found}")

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )

    def run(self, test: str) -> tuple[int, str]:
        """Exit code and output of pytest for one test."""
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = self._run([sys.executable, "-m", "pytest", *options, f"tests/{test}"])
        return done.returncode, done.stdout + done.stderr

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """The copy with one line broken."""
        path = self.folder / "hpc_closure" / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutation.apply(text), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")


def judge(copy: Copy, mutation: Mutation) -> str:
    """Empty where the mutation is caught, else what is wrong."""
    with copy.mutated(mutation):
        code, output = copy.run(mutation.test)
    if code == 0:
        return "SURVIVED"
    return "" if code == FAILED else f"pytest ended with {code}:\n{output}"


def run(mutations: Sequence[Mutation], workers: int) -> list[str]:
    """Names of what is not caught, after a line for each."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(workers):
            place = Path(folder).resolve() / str(number)
            place.mkdir()
            copies.put(Copy(place))

        def each(name: str, work) -> None:
            copy, start = copies.get(), time.monotonic()
            try:
                fault = work(copy)
            except ValueError as error:
                fault = str(error)
            finally:
                copies.put(copy)
            if fault:
                faults.append(name)
            seconds = time.monotonic() - start
            print(f"{fault or 'ok':9} {seconds:4.0f} s  {name}", flush=True)

        def passes(test: str):
            def work(copy: Copy) -> str:
                code, output = copy.run(test)
                return "" if code == 0 else f"does not pass unmutated:\n{output}"

            return work

        with ThreadPoolExecutor(workers) as pool:
            tests = sorted({mutation.test for mutation in mutations})
            print(f"{len(tests)} tests on the unbroken code", flush=True)
            list(pool.map(lambda test: each(test, passes(test)), tests))
            if faults:
                return faults
            print(f"{len(mutations)} mutations", flush=True)
            list(pool.map(lambda one: each(one.what, lambda c: judge(c, one)), mutations))
    return faults


def table(mutations: Sequence[Mutation]) -> str:
    """Lay out what is broken, where, and the test that sees it; returns Markdown."""
    lines = ["| what is broken | where | caught by |", "|---|---|---|"]
    lines += [f"| {one.what} | `{one.file}` | `{one.test}` |" for one in mutations]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/check --mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations with one of these words")
    parser.add_argument("--table", action="store_true", help="print the list, and break nothing")
    chosen = parser.parse_args()
    mutations = [m for m in read() if not chosen.words or any(w in m.what for w in chosen.words)]
    if not mutations:
        parser.error(f"no mutation of {LIST.name} has a word of {chosen.words}")
    if chosen.table:
        print(table(mutations))
        return 0
    faults = run(mutations, int(os.environ.get("HPC_CLOSURE_TEST_WORKERS", "2")))
    print(f"{len(mutations)} mutations: {len(faults)} not as demanded" + ":" * bool(faults))
    for name in faults:
        print(f"    {name}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
