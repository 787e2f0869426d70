"""Make the pictures of README.md and docs/index.md again, and the figures in their caption.

    python docs/images/make.py RUN

RUN is the folder of a finished quickstart, e.g. runs/quickstart: its picture ``closure`` is
copied, and what its report says first goes between the marks ``quickstart figures``.
"""

import re
import shutil
import sys
from pathlib import Path

import workflow

import hpc_closure
from hpc_closure.evaluate.report.summary import headline
from hpc_closure.evaluate.rows import read
from hpc_closure.experiment.folder import Run

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent.parent / "README.md", HERE.parent / "index.md")
MARKED = re.compile(r"(?<=<!-- quickstart figures -->\n).*?(?=<!-- end -->)", re.S)


def main(folder: Path) -> None:
    """Draw, copy, and write the caption's figures."""
    run = Run(folder)
    rows = read(run.scores_csv)
    lines = headline(hpc_closure.load(run.model).parts(), rows)
    if len(lines) < 2:
        raise SystemExit(f"{run.scores_csv} has no scores beside the exact law; evaluate {folder}")
    shutil.copyfile(run.figures / "closure.png", HERE / "closure.png")
    workflow.write(HERE / "workflow.svg")
    for page in PAGES:
        text, places = MARKED.subn(f"> {lines[1]}\n", page.read_text())
        if places != 1:
            raise SystemExit(f"{page}: expected the marks of the quickstart's figures once")
        page.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
