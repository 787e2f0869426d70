"""The list of mutations fits the code; ``launch/check --mutations`` applies them."""

from pathlib import Path

import pytest
from run_mutations import ROOT, Mutation, judge, read

EVERY = read()


@pytest.mark.parametrize("mutation", EVERY, ids=[one.what for one in EVERY])
def test_each_line_is_there_once_and_its_test_exists(mutation):
    text = (ROOT / "hpc_closure" / mutation.file).read_text()
    broken = mutation.apply(text)
    if mutation.file.endswith(".py"):  # templates and sources in C++ are only replaced
        compile(broken, mutation.file, "exec")
    file, name = mutation.test.split("::")
    assert f"def {name.split('[')[0]}(" in (Path(__file__).parent / file).read_text()


def test_no_two_are_the_same():
    assert len({one.what for one in EVERY}) == len(EVERY) >= 20
    assert len({(one.file, one.old, one.new) for one in EVERY}) == len(EVERY)


@pytest.mark.parametrize("text, count", [("a = 1\n", 0), ("b = 1\nb = 1\n", 2)])
def test_a_line_that_is_not_there_once_is_refused(text, count):
    mutation = Mutation("nothing", "x.py", "b = 1", "b = 2", "test_x.py::test_y")
    with pytest.raises(ValueError, match=f"'b = 1' {count} times, expected once: mend mutations"):
        mutation.apply(text)


class Broken:
    """A copy whose test ends with a code, and that notes how it was broken."""

    def __init__(self, folder, code):
        self.folder, self.code, self.seen = folder, code, ""

    def run(self, test):
        self.seen = (self.folder / "hpc_closure" / "x.py").read_text()
        return self.code, "told"


@pytest.mark.parametrize(
    "code, told", [(1, ""), (0, "SURVIVED"), (4, "pytest ended with 4:\ntold")]
)
def test_a_test_must_fail_and_nothing_else(code, told, tmp_path):
    """An id that does not exist, or a file that does not compile, catches nothing."""
    from run_mutations import Copy

    path = tmp_path / "hpc_closure" / "x.py"
    path.parent.mkdir()
    path.write_text("b = 1\n")
    copy = Broken(tmp_path, code)
    copy.mutated = lambda mutation: Copy.mutated(copy, mutation)
    assert judge(copy, Mutation("one", "x.py", "b = 1", "b = 2", "t")) == told
    assert copy.seen == "b = 2\n" and path.read_text() == "b = 1\n"
