"""Units with empty physics, for tests of submission, requeueing and bookkeeping.

``config.yaml`` of the run folder is JSON: ``{"run", "members", "per_block", "steps", "seconds",
"again"}``. A unit takes ``steps`` steps in ``seconds``, goes on from a save at the pace of
``again`` seconds, saves every tenth step, and writes a file whose content depends on its members
alone.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import h5py
import numpy as np

from hpc_closure.batch import submit
from hpc_closure.batch.site import load_profile
from hpc_closure.batch.squeue import queued_members
from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, loop, units
from hpc_closure.work.stop import Stop, Stopped

STAGE = "rollout"


def ledger(plan: dict) -> units.Ledger:
    return units.Ledger(
        Run(Path(plan["run"])),
        STAGE,
        recipe="empty physics",
        holds={"t_end": 1.0},
        stale_after=plan.get("stale_after", 4.0),
    )


def read(config_path) -> dict:
    return json.loads(Path(config_path).read_text())


def run_units(config_path, names) -> int:
    plan = read(config_path)
    books = ledger(plan)
    chosen = [
        unit for unit in books.plan(plan["members"], plan["per_block"]) if unit.name in set(names)
    ]
    with Stop() as stop:

        def run_unit(unit, claim):
            saved = books.open_restart(unit)[0] / "step.json"
            step, seconds = 0, plan["seconds"]
            if saved.exists():
                step, seconds = atomic.read_json(saved)["step"], plan.get("again", seconds)
            print(f"unit {unit} from step {step}", flush=True)
            while step < plan["steps"]:
                if stop.requested:
                    atomic.write_json(saved, {"step": step})
                    raise Stopped(stop.reason)
                time.sleep(seconds / plan["steps"])
                step += 1
                claim.refresh()
                if step % 10 == 0:
                    atomic.write_json(saved, {"step": step})
            digest = hashlib.sha256(repr(unit.members).encode()).digest()
            with books.publish(unit, claim=claim) as part, h5py.File(part, "w") as file:
                file["values"] = np.frombuffer(digest, dtype=np.uint8)
                file.attrs.update({**books.attributes(unit), "complete": 1})
            atomic.append_jsonl(books.run.root / "published.jsonl", {"unit": unit.name})

        outcome = loop.work(books, chosen, run_unit, stop=stop)
    return outcome.exit_code


def with_tests() -> str:
    """PYTHONPATH on which jobs find the module of their payload."""
    return os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )


class Ensemble:
    """A run of empty physics and its submission."""

    def __init__(self, folder, **changes):
        folder.mkdir(exist_ok=True)
        self.plan = {
            "run": str(folder / "run"),
            "members": 4,
            "per_block": 1,
            "steps": 100,
            "seconds": 1.0,
        } | changes
        self.folder, self.run = folder, Run(folder / "run")
        self.config = self.run.config
        atomic.write_text(self.config, json.dumps(self.plan))
        self.books = ledger(self.plan)

    def state(self):
        return self.books.survey(
            self.plan["members"], self.plan["per_block"], queued_members(self.run)
        )

    def counts(self):
        return {key: value for key, value in self.state().counts().items() if value}

    def submit(self, profile=None, **settings):
        survey = self.state()
        missing = [unit.name for state in ("missing", "failed") for unit in survey.states[state]]
        return self.submit_units(missing, profile, **settings)

    def submit_units(self, units, profile=None, **settings):
        return submit.submit(self.request(units, profile, **settings))

    def request(self, units, profile=None, **settings):
        profile = (profile or load_profile("testbed")).for_stage("rollout")
        settings = {"walltime": 600.0, "signal_before_end": 60.0} | settings
        return submit.Request(self.run, tuple(units), run_units, profile, **settings)

    def done(self):
        return self.counts().get("done") == self.counts()["units"]

    def log(self, submission, task="0"):
        return Path(str(submission.log).replace("%a", task)).read_text()
