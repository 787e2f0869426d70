"""Ensembles that are conditioned on point readings of the closure, in a subgrid problem.

    python sensors.py EXPERIMENT [KEY=VALUE ...]

Trains one closure, runs it without readings, with 8 x 8 and with 16 x 16 sensors from the same
starts, compares the three, and draws sensors.png.
"""

import csv
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

NUMBERS = (8, 16)  # sensors per side
READABLE = ["model.preset=gaussian", "model.conditions.sensors=optional", "rollout.rungs=[]"]


def verb(*words: str) -> None:
    """Run a verb of the command line."""
    subprocess.run([sys.executable, "-m", "hpc_closure", *words], check=True)


def run(experiment: str, changes: list[str], root: str = "runs") -> Path:
    """Run the verbs; returns the table of scores."""
    verb("generate", experiment, *changes, f"root={root}", "name=fine")
    words = [experiment, *changes, f"root={root}", *READABLE, "use.data=fine"]
    verb("train", *words, "name=readings")
    words.append("use.model=readings")
    verb("rollout", *words, "name=free")
    for number in NUMBERS:
        verb("rollout", *words, f"name=read_{number}", f"rollout.sensors.number={number}")
    first, last = NUMBERS
    compare = f"evaluate.compare={{free: free, read_{last}: read_{last}}}"
    verb("evaluate", *words, f"name=read_{first}", f"rollout.sensors.number={first}", compare)
    return Path(root) / f"read_{first}" / "evaluate" / "scores.csv"


def draw(scores: Path, picture: Path) -> None:
    """Draw the CRPS of the coupled runs over the lead time."""
    first, last = NUMBERS
    labels = {"none": "no closure", "free": "no readings", "model": f"{first} x {first}"}
    labels[f"read_{last}"] = f"{last} x {last}"
    curves: dict[str, dict[float, float]] = {name: {} for name in labels}
    with open(scores) as file:
        for row in csv.DictReader(file):
            whole = (row["stage"], row["score"], row["shell"]) == ("coupled", "crps", "")
            if whole and row["method"] in curves:
                curves[row["method"]][float(row["lead_time"])] = float(row["value"])
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, label in labels.items():
        leads = sorted(curves[name])
        axes.semilogy(leads, [curves[name][lead] for lead in leads], label=label)
    axes.set(xlabel="lead time", ylabel="CRPS against the start's own trajectory")
    axes.set_xlim(left=0)
    axes.legend(title="readings of the closure", frameon=False)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    draw(run(sys.argv[1], sys.argv[2:]), Path("sensors.png"))
