"""Draw ``workflow.svg``: the four verbs, the files between them, and the equation they serve.

    python docs/images/workflow.py [FILE]

The same bytes every time: no date, no random ids. Letters are drawn as outlines, so that it looks
the same everywhere.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, QUIET, LINE = "#1b1f24", "#57606a", "#8c959f"
# verb, colour (Okabe and Ito), what it does
VERBS = (
    (
        "generate",
        "#56B4E9",
        ("DNS ensemble", "MPI slabs × member batches", "spectral, on CPU or GPU"),
    ),
    (
        "train",
        "#009E73",
        ("mean + score network (FNO)", "DeepSpeed, data parallel", "a gate: may the network act?"),
    ),
    (
        "rollout",
        "#E69F00",
        ("coupled ensembles", "submitit on Slurm, or local", "killed blocks are taken up"),
    ),
    (
        "evaluate",
        "#CC79A7",
        ("scores beside the exact law", "and beside no network", "tables, figures, report"),
    ),
)
FILES = (
    "RUN/data/\nblock_*.h5",
    "RUN/train/\nmodel.safetensors",
    "RUN/rollout/\nblock_*.h5",
    "RUN/evaluate/\nreport.html\nscores.csv",
)
WIDTH, HEIGHT = 10.0, 3.72
BOX, GAP, LEFT, TALL, BASE = 2.16, 0.32, 0.2, 1.2, 2.3


def draw() -> Figure:
    """The drawing, laid out in inches."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axis.axis("off")
    for place, ((verb, colour, lines), file) in enumerate(zip(VERBS, FILES, strict=True)):
        x = LEFT + place * (BOX + GAP)
        _box(axis, x, BASE, BOX, TALL, colour)
        axis.text(x + BOX / 2, BASE + TALL - 0.22, verb, size=13, weight="bold", **_centred())
        for line, text in enumerate(lines):
            y = BASE + TALL - 0.52 - 0.235 * line
            axis.text(x + BOX / 2, y, text, size=9.2, **_centred(INK if not line else QUIET))
        if place < len(VERBS) - 1:
            _arrow(axis, (x + BOX, BASE + TALL / 2), (x + BOX + GAP, BASE + TALL / 2))
        _arrow(axis, (x + BOX / 2, BASE), (x + BOX / 2, BASE - 0.27))
        axis.text(
            x + BOX / 2, BASE - 0.31, file, size=9, family="monospace", ha="center", va="top",
            color=INK, linespacing=1.25,
        )  # fmt: skip
    _equation(axis)
    return figure


def _equation(axis) -> None:
    """The closure in the solver, and what is exact beside it."""
    top, tall, half = 1.22, 1.06, 5.5
    _box(axis, LEFT, top - tall, half, tall, LINE)
    middle = LEFT + half / 2
    axis.text(
        middle,
        top - 0.3,
        r"$dV/dt = \tilde{M}(V) + U, \quad U = m(V) + D\,q$",
        size=13,
        **_centred()
    )
    for line, text in enumerate(
        (
            "M̃: the reduced solver   m: mean (regression, FNO)   D: amplitude",
            "q: drawn by the score network, or Gaussian where the gate is shut",
        )
    ):
        axis.text(middle, top - 0.64 - 0.235 * line, text, size=9.2, **_centred(QUIET))
    left = LEFT + half + GAP
    wide = WIDTH - LEFT - left
    _box(axis, left, top - tall, wide, tall, LINE, dashed=True)
    middle = left + wide / 2
    axis.text(middle, top - 0.3, "exact: the oracle", size=11, weight="bold", **_centred())
    for line, text in enumerate(
        (
            "p(U | V) in closed form for the test problems,",
            "scored as one more row beside the model's",
        )
    ):
        axis.text(middle, top - 0.64 - 0.235 * line, text, size=9.2, **_centred(QUIET))


def _centred(colour: str = INK) -> dict:
    return {"ha": "center", "va": "center", "color": colour}


def _box(axis, x: float, y: float, wide: float, tall: float, colour: str, dashed=False) -> None:
    style = "round,pad=0,rounding_size=0.09"
    kind = {"facecolor": "#f6f8fa", "edgecolor": colour, "linestyle": "--" if dashed else "-"}
    if colour != LINE:
        kind["facecolor"] = matplotlib.colors.to_rgba(colour, 0.16)
    axis.add_patch(FancyBboxPatch((x, y), wide, tall, boxstyle=style, linewidth=1.4, **kind))


def _arrow(axis, start, end) -> None:
    kind = {"arrowstyle": "-|>", "mutation_scale": 13, "color": QUIET, "linewidth": 1.4}
    axis.add_patch(FancyArrowPatch(start, end, shrinkA=1, shrinkB=1, **kind))


def write(path: Path) -> None:
    """Write the drawing as SVG."""
    style = {
        "svg.hashsalt": "hpc_closure",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "mathtext.fontset": "dejavusans",
    }
    with matplotlib.rc_context(style):
        draw().savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
