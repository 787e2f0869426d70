"""Write scores.md from the records of scores and methods: ``python docs/scores.py``."""

import ast
import inspect
from pathlib import Path
from types import FunctionType, ModuleType

from hpc_closure.evaluate.rows import RENAMED
from hpc_closure.evaluate.scores import record
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.registry import BUILT_IN, MODULES
from hpc_closure.evaluate.scores.table import SHELL_STATISTICS, STATISTICS
from hpc_closure.experiment.method_names import METHODS

PAGE = Path(__file__).with_name("scores.md")
ALONE = "No column in these tables"
HEAD = """# Scores

<!-- written by docs/scores.py from the records in hpc_closure/evaluate/scores -->

Each row of `RUN/evaluate/scores.csv` is one number. The columns `score`, `method`, `lead_time`,
`shell` and others identify it; `value` is the number; `low` and `high` are the ends of its 95 %
interval. This page lists the values of the columns `score` and `method`, in the order of the
tables of the report. A score whose heading is in *italics* also has a table by lead time; *shells*
marks scores with rows per wavenumber shell. A formula combines means over samples of the
[statistics](#statistics) `s` with the ensemble size `M`. If the column names a module instead, its
functions compute the score.
"""
OWN = """## Add a score

List your scores in a module and name the module in the experiment. Its folder must be in
`PYTHONPATH`, or its package must be installed. The scores are written to `scores.csv` and to the
report, for every method and with intervals. Data, model and rollout are not computed again.

```yaml
base: quickstart
name: with_my_scores
use: {data: quickstart, model: quickstart}
evaluate: {scores: [score_example]}
```

```{literalinclude} ../tests/extend/score_example.py
:language: python
```

`sample` is a function of a block of samples: an ensemble (members, samples, x, y), with one member
for a point forecast, and its truth (samples, x, y), both float64. It returns one number per
sample; the score is their mean. A `formula` computes the score from means of the statistics above.
A new name in `table` adds a table to the report.
"""
REFERENCE = (
    "With the prefix `reference_` a name denotes the statistic of the method `oracle`, if that is "
    "an ensemble."
)


class Inline(ast.NodeTransformer):
    """Replace ``s["name"]`` by the name, parameters by arguments, and calls by function bodies.

    Args:
        function: function whose body is transformed.
        arguments: expression for each of its parameters.
    """

    def __init__(self, function: FunctionType, arguments: dict[str, ast.expr]):
        closure = inspect.getclosurevars(function)
        self.names = {**closure.globals, **closure.nonlocals}
        self.arguments = arguments

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.arguments.get(node.id, node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        key = node.slice
        name = self.names[key.id] if isinstance(key, ast.Name) else ast.literal_eval(key)
        return ast.Name(name)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        target = node.func
        called = None
        if isinstance(target, ast.Name):
            called = self.names.get(target.id)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            called = getattr(self.names.get(target.value.id), target.attr, None)
        if not isinstance(called, FunctionType):
            return self.generic_visit(node)  # type: ignore[return-value]
        return expression(called, [self.visit(one) for one in node.args])


def expression(function: FunctionType, arguments: list[ast.expr]) -> ast.expr:
    """Return the expression that a one-expression function computes, with its calls inlined."""
    code = function.__code__
    tree = ast.parse(Path(code.co_filename).read_text(encoding="utf-8"))
    (node,) = (
        one
        for one in ast.walk(tree)
        if isinstance(one, (ast.Lambda, ast.FunctionDef)) and one.lineno == code.co_firstlineno
    )
    body = node.body if isinstance(node, ast.Lambda) else node.body[-1].value  # type: ignore
    names = [one.arg for one in node.args.args]
    return Inline(function, dict(zip(names, arguments, strict=True))).visit(body)


def formula(score: Score, module: ModuleType) -> str:
    """Format a score's formula, or name the module whose functions compute it."""
    if isinstance(score.formula, FunctionType):
        return f"`{ast.unparse(expression(score.formula, [ast.Name('s'), ast.Name('M')]))}`"
    return "`" + module.__name__.removeprefix("hpc_closure.") + "`"


def row(*cells: str) -> str:
    """Format a line of a table."""
    return "| " + " | ".join(cell.replace("``", "`").replace("|", r"\|") for cell in cells) + " |"


def page() -> str:
    """Build the text of the page."""
    where = {score.name: module for module in MODULES for score in module.SCORES}
    lines = [HEAD]
    captions = dict.fromkeys(score.table or ALONE for score in BUILT_IN.values())
    for caption in [*(one for one in captions if one != ALONE), ALONE]:
        lines += [f"## {caption}\n", "| score | heading | meaning | where | formula | |"]
        lines.append("|---|---|---|---|---|---|")
        for score in BUILT_IN.values():
            if (score.table or ALONE) == caption:
                heading = f"*{score.heading}*" if score.by_lead_time else score.heading
                shells = "shells" if score.per_shell else ""
                text = formula(score, where[score.name])
                name = f"`{score.name}`"
                lines.append(row(name, heading, score.meaning, score.requires, text, shells))
        if caption == record.PAIRED:
            lines.append("\nThe report adds *better*, *worse* or *indistinguishable*.")
        lines.append("")
    lines += ["## Statistics\n", "| name | meaning, of one sample | |", "|---|---|---|"]
    for name, meaning in STATISTICS.items():
        lines.append(row(f"`{name}`", meaning, "shells" * (name in SHELL_STATISTICS)))
    lines += [
        f"\n{REFERENCE}\n",
        OWN,
        "## Methods\n",
        "| method | meaning |",
        "|---|---|",
    ]
    lines += [row(f"`{method.name}`", method.meaning) for method in METHODS]
    lines += [
        row("`rung_GRID_START`", "a bare solver on a finer grid (`rollout.rungs`)"),
        row("`NAME`, `NAME#1`", "a closure of `evaluate.compare`; one training of `seeds`"),
        row("`NAME_gp`", "draws of a compared closure's Gaussian law; scores of innovations only"),
    ]
    lines += [
        "\n## Names of the previous release\n",
        "`evaluate.rows.read` renames the scores of older files.\n",
        "| then | now |",
        "|---|---|",
    ]
    lines += [row(f"`{then}`", f"`{now}`") for then, now in RENAMED.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
