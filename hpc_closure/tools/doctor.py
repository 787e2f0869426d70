"""``hpc-closure doctor``: check this installation and this machine, one line a thing.

:data:`hpc_closure.tools.doctor_checks.CHECKS` lists the checks. They run at once in threads, each
within its own time limit, and never raise: what a check did not expect is a line as well.
"""

import json as json_format
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import hpc_closure
from hpc_closure.tools.doctor_checks import CHECKS, Check, Finding

AT_ONCE = 8  # checks; most of them wait for another program


def run(json: bool = False, checks: Sequence[Check] = CHECKS) -> int:
    """Print a line for each check, and which verbs cannot run.

    Args:
        json: print ``{"version": ..., "checks": [{"name", "state", "text", "mend", "stops",
            "used_by"}, ...], "stopped": {verb: [names]}}``.
        checks: checks to run.

    Returns:
        the exit code: 1 if a verb cannot run, else 0.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        findings = list(pool.map(_look, checks))
    stopped: dict[str, list[str]] = {}
    for check, finding in zip(checks, findings, strict=True):
        for verb in finding.stops:
            stopped.setdefault(verb, []).append(check.name)
    if json:
        rows = [
            {"name": check.name, **asdict(finding), "used_by": check.used_by}
            for check, finding in zip(checks, findings, strict=True)
        ]
        report = {"version": hpc_closure.__version__, "checks": rows, "stopped": stopped}
        print(json_format.dumps(report, indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check, finding in zip(checks, findings, strict=True):
            print(_line(check, finding, width))
        print(_verdict(stopped))
    return 1 if stopped else 0


def _look(check: Check) -> Finding:
    """Run a check; an error of its own is a finding."""
    try:
        return check.look()
    except Exception as error:  # a doctor that stops at the first surprise helps nobody
        return Finding("note", f"could not be checked ({type(error).__name__}: {error})")


def _line(check: Check, finding: Finding, width: int) -> str:
    """Format ``state  name  text [who needs it]; mend: command``."""
    need = f"needed by {', '.join(finding.stops)}" if finding.stops else ""
    if finding.state in ("missing", "broken") and not need:
        need = f"optional, {check.used_by}"
    text = " ".join(finding.text.split())
    line = f"{finding.state:8s} {check.name:{width}s}  {text}" + (f" [{need}]" if need else "")
    return line + (f"; mend: {finding.mend}" if finding.mend else "")


def _verdict(stopped: dict[str, list[str]]) -> str:
    """Say in one line which verbs cannot run, and why."""
    if not stopped:
        return "every verb can run"
    reasons = [f"{verb} ({', '.join(names)})" for verb, names in stopped.items()]
    return f"cannot run: {', '.join(reasons)}"
