"""No function takes more than seven arguments: what goes together is a record."""

import ast
from pathlib import Path

import hpc_closure

PACKAGE = Path(hpc_closure.__file__).parent
MOST = 7
# The parser needs an argument for every option, a GPU kernel one for every array, and what users
# call is as wide as what they can ask.
PARSERS = ("cli.py", "bench/cli.py")
PUBLIC = ("closure/artifact.py", "Closure.sample")


def signatures(tree: ast.AST, above: tuple[str, ...] = ()):
    """(dotted name, number of arguments, decorators) of every function; self does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            decorators = [ast.unparse(one) for one in node.decorator_list]
            if names[:1] in (["self"], ["cls"]):
                names = names[1:]
            yield ".".join((*above, node.name)), len(names), decorators
        inner = getattr(node, "name", None)
        yield from signatures(node, (*above, inner) if isinstance(inner, str) else above)


def too_long() -> set[tuple[str, str]]:
    """File and name of the functions that have too many arguments."""
    long = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        for name, number, decorators in signatures(ast.parse(path.read_text())):
            command = file in PARSERS and any(".command(" in one for one in decorators)
            kernel = any(one.startswith("triton.jit") for one in decorators)
            if number > MOST and not (command or kernel or (file, name) == PUBLIC):
                long.add((file, name))
    return long


def test_no_function_takes_more_than_seven_arguments():
    assert not too_long()


def test_the_test_would_notice():
    text = (
        "class A:\n    def f(self, a, b, /, c, *rest, d, e=1, **more):\n        def g(x): pass\n"
    )
    assert list(signatures(ast.parse(text))) == [("A.f", 5, []), ("A.f.g", 1, [])]
