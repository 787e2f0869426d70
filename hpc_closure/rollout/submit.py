"""Work units as batch jobs: the only module that knows submitit (``queue`` asks what it sent).

The unit names go into arrays of tasks, submitit sends them off, and we return at once. A task
carries only (experiment file, unit names): what is left to do is read from the run folder when it
starts, so a requeued, repeated or duplicated task is harmless, and nobody ever waits for a result.

    request = Request.of(experiment, config_path, run, ["000000-000019", "000020-000039"])
    print(cost(request), *batch_text(request), sep="\n")
    for submission in submit(request):
        print(submission.job, submission.log)

How a task ends: exit code 75 of the units' loop (saved, not finished) is requeued when the cluster
sent SIGUSR2 (time limit or preemption) or the loop stopped by itself, at most ``max_requeues``
times; not after a preemption that requeues by itself, nor after a bare SIGTERM, which is
``scancel`` unless the time is up.
(submitit counts time limits only, and takes every signal in a job of up to ten minutes for one.)
"""

import contextlib
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import JobPaths, environment_variables
from submitit.helpers import DelayedSubmission, clean_env

from hpc_closure.experiment.duration import seconds
from hpc_closure.experiment.folder import Run
from hpc_closure.rollout.site import Profile, Stage, load_profile
from hpc_closure.rollout.squeue import queued_members, queued_units
from hpc_closure.work import atomic
from hpc_closure.work.stop import EXIT_STOPPED

__all__ = [
    "Payload",
    "Profile",
    "Request",
    "Submission",
    "batch_text",
    "cost",
    "load_profile",
    "plan_arrays",
    "queued_members",
    "queued_units",
    "record",
    "submit",
]

_MAX_REQUEUES = "HPC_CLOSURE_MAX_REQUEUES"
Task = tuple[str, ...]  # names of units that one array task works through

# Settings that the experiment and the profile both know; the experiment wins where it states one.
_SHARED = ("walltime", "signal_lead", "throttle", "max_requeues")
_OTHER_WALLTIMES = {("walltime", stage) for stage in ("generate", "train", "evaluate")}


@dataclass(frozen=True)
class Request:
    """All that is needed to submit units.

    Attributes:
        config_path: experiment file that the tasks read; the run's own ``config.yaml`` is best,
            because it holds the overrides of the command line.
        run: the run folder.
        units: names of the units to run, in order.
        profile: the site, already narrowed to the stage.
        walltime, signal_lead: seconds.
        throttle: tasks that may run at once, over all arrays.
        units_per_task: units that one task works through.
        devices: GPUs of a task.
        payload: ``module:function`` that runs units; ``(config_path, units) -> exit code``.
    """

    config_path: Path
    run: Run
    units: tuple[str, ...]
    profile: Profile
    walltime: float = 3600.0
    signal_lead: float = 300.0
    throttle: int = 64
    max_requeues: int = 20
    units_per_task: int = 1
    devices: int = 0
    stage: str = "rollout"
    payload: str = "hpc_closure.rollout.verb:run_units"

    def __post_init__(self):
        limit = max(600.0, 0.2 * self.walltime)
        if self.signal_lead > limit:
            raise ValueError(
                f"signal_lead={self.signal_lead:g} s is longer than max(600 s, 20 % of walltime="
                f"{self.walltime:g} s) = {limit:g} s; submitit would take the time limit for a "
                "preemption and requeue without end: shorten it, or ask for more walltime"
            )
        if self.signal_lead >= self.walltime:
            raise ValueError(
                f"signal_lead={self.signal_lead:g} s leaves nothing of walltime="
                f"{self.walltime:g} s: shorten it"
            )

    @classmethod
    def of(
        cls,
        experiment,
        config_path: str | Path,
        run: Run,
        units: Iterable,
        profile: Profile | None = None,
        stage: Stage = "rollout",
    ) -> "Request":
        """The request for ``units`` (or their names) of an experiment.

        Raises:
            ValueError: unknown profile, or a signal lead that submitit would misread.
        """
        cluster = experiment.cluster
        site = (profile or load_profile(cluster.profile)).for_stage(stage)
        shared = {}
        for name in _SHARED:
            own = getattr(site, name)
            # The experiment's walltime is that of a rollout task.
            stated = name in cluster.model_fields_set and (name, stage) not in _OTHER_WALLTIMES
            shared[name] = getattr(cluster, name) if stated or own is None else own
        for name in ("walltime", "signal_lead"):
            shared[name] = seconds(shared[name])
        return cls(
            config_path=Path(config_path).absolute(),
            run=run,
            units=tuple(str(unit) for unit in units),
            profile=site,
            units_per_task=cluster.units_per_task,
            stage=stage,
            devices=cluster.devices_per_task or site.devices,
            **shared,
        )

    @property
    def arrays(self) -> list[list[Task]]:
        return plan_arrays(self.units, self.units_per_task, self.profile.max_array)

    @property
    def folder(self) -> Path:
        """Where submitit keeps its job files and where the logs go."""
        return self.run.logs / self.stage / "jobs"


@dataclass(frozen=True)
class Submission:
    """A job array (or single job, or local process) that was handed over.

    Attributes:
        job: its id.
        tasks: the units of each of its tasks.
        log: logs of its tasks, ``%a`` for the number of the task.
    """

    job: str
    tasks: list[Task]
    log: Path


class Payload:
    """What a task does: run units of an experiment.

    It holds no progress, so the requeued task and the first one are the same thing. Everything
    but the import happens in the job.
    """

    def __init__(self, config_path: str, units: Task, payload: str):
        self.config_path, self.units, self.payload = config_path, units, payload

    def __call__(self) -> None:
        module, _, function = self.payload.partition(":")
        submitit_handler = signal.getsignal(signal.SIGUSR2)
        # Until the units' loop sets handlers of its own: straight back to the queue.
        signal.signal(signal.SIGUSR2, lambda *_: _requeue(submitit_handler))
        with _Heard() as heard:
            try:
                run_units = getattr(importlib.import_module(module), function)
                code = run_units(self.config_path, list(self.units)) or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        cancelled = heard.signals & {signal.SIGTERM, signal.SIGUSR2} == {signal.SIGTERM}
        if code == EXIT_STOPPED and (not cancelled or _time_is_up()):
            _requeue(submitit_handler)
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """The task to queue again: the same (submitit's protocol)."""
        with contextlib.suppress(OSError, KeyError, RuntimeError):  # outside of submitit: none
            # A task killed while it was queued again leaves this file, and submitit refuses to
            # write over it.
            path = submitit.JobEnvironment().paths.submitted_pickle
            path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
        return DelayedSubmission(self)


class _Heard:
    """Notes which signals arrive, whoever handles them."""

    def __enter__(self) -> "_Heard":
        self.signals: set[int] = set()
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._previous)
        with contextlib.suppress(BlockingIOError):
            self.signals = set(os.read(self._read, 4096))
        os.close(self._read)
        os.close(self._write)


def _time_is_up() -> bool:
    """Whether the job is past its time limit: its warning was lost, for it had just started."""
    with contextlib.suppress(ValueError):
        return 0 < float(os.environ.get("SLURM_JOB_END_TIME") or 0) <= time.time()
    return False


def _requeue(submitit_handler) -> None:
    """Hand the task back to the queue through submitit, or end it saying why not."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if restarts >= int(os.environ.get(_MAX_REQUEUES) or restarts + 1):
        why = f"started {restarts + 1} times already (cluster.max_requeues)"
    elif not callable(submitit_handler):
        why = "not under submitit"
    elif _preempted_to_queue():
        why = "Slurm does it itself"
    else:
        try:
            submitit_handler(signal.SIGUSR2, None)
            return  # not reached: it exits when it has requeued
        except FileNotFoundError:
            why = "there is no scontrol on this node"
        except subprocess.SubprocessError as error:
            why = f"the cluster refused ({error})"
        except Exception as error:
            why = str(error)
    print(
        f"stopped, all is saved; not requeued: {why}; in any case the same command continues",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(EXIT_STOPPED)


def _preempted_to_queue() -> bool:
    """Whether this job is being preempted by a partition that requeues.

    Slurm then requeues a job that ends in its grace time; one that was also requeued by hand is
    started once more after it has finished (seen with Slurm 24.11).
    """

    def show(what: str, variable: str) -> str:
        return subprocess.run(
            ["scontrol", "show", "-o", what, os.environ[variable]],
            text=True,
            capture_output=True,
            check=True,
            timeout=30,
        ).stdout

    with contextlib.suppress(OSError, subprocess.SubprocessError, KeyError):
        preempted = re.search(r"\bPreemptTime=\d", show("job", "SLURM_JOB_ID"))
        return bool(preempted) and "PreemptMode=REQUEUE" in show(
            "partition", "SLURM_JOB_PARTITION"
        )
    return False


def plan_arrays(units: Sequence[str], per_task: int, max_array: int) -> list[list[Task]]:
    """Units as tasks of ``per_task``, tasks as arrays of at most ``max_array``, in order.

    >>> plan_arrays(["a", "b", "c", "d", "e"], per_task=2, max_array=2)
    [[('a', 'b'), ('c', 'd')], [('e',)]]
    """
    if per_task < 1 or max_array < 1:
        raise ValueError(f"per_task={per_task}, max_array={max_array}: expected at least 1")
    tasks = [tuple(units[at : at + per_task]) for at in range(0, len(units), per_task)]
    return [tasks[at : at + max_array] for at in range(0, len(tasks), max_array)]


class _Slurm(submitit.SlurmExecutor):
    """submitit's Slurm executor, which can also be made where there is no Slurm."""

    @classmethod
    def name(cls) -> str:
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        return 2


def _slurm(request: Request, throttle: int) -> _Slurm:
    profile = request.profile
    options = profile.options() | {"requeue": True}
    if request.devices and not profile.gres:
        options["gpus-per-node"] = request.devices
    setup = [
        *profile.shell_lines(),
        # srun stopped taking this from sbatch in Slurm 22.05.
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        f"export {_MAX_REQUEUES}={request.max_requeues}",
    ]
    executor = _Slurm(request.folder, max_num_timeout=request.max_requeues, python=profile.python)
    executor.update_parameters(
        job_name=f"{request.run.root.name}-{request.stage}",
        time=math.ceil(request.walltime / 60),
        nodes=1,
        ntasks_per_node=1,
        signal_delay_s=int(request.signal_lead),
        array_parallelism=throttle,
        stderr_to_stdout=True,
        wckey=profile.wckey,  # submitit's own default is refused by many sites
        setup=setup,
        # A task is one process without MPI, whatever MpiDefault of the site expects.
        srun_args=["--mpi=none"],
        additional_parameters=options,
    )
    return executor


def _throttles(total: int, arrays: int) -> list[int]:
    """``total`` shared out among arrays, at least one each."""
    return [max(1, total // arrays + (at < total % arrays)) for at in range(arrays)]


def batch_text(request: Request) -> list[str]:
    """The exact batch script of every array; needs no Slurm and writes nothing."""
    arrays, texts = request.arrays, []
    for tasks, throttle in zip(arrays, _throttles(request.throttle, len(arrays) or 1)):
        executor = _slurm(request, throttle)
        if len(tasks) > 1:
            executor.parameters["map_count"] = len(tasks)
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts


def cost(request: Request) -> str:
    """What the submission costs at most, in one line."""
    tasks = sum(map(len, request.arrays))
    hours = request.walltime / 3600
    number, unit = (
        (request.devices, "GPU")
        if request.devices
        else (request.profile.cpus_per_task or 1, "core")
    )
    return (
        f"{tasks} task{'s' * (tasks != 1)} x {hours:.3g} h x {number} {unit}"
        f"{'s' * (number != 1)} <= {tasks * hours * number:.6g} {unit}-hours"
    )


def check_shared(request: Request) -> None:
    """Raise ValueError when the run folder is on a disk that other nodes do not see."""
    root = request.run.root.resolve()
    for folder in request.profile.node_local:
        if root.is_relative_to(folder):
            raise ValueError(
                f"{request.run.root}: {folder} is usually a node's own disk, which other nodes "
                "and you do not see; set `root` to a shared folder, or, if this one is shared, "
                f"`node_local: []` in profile {request.profile.name}"
            )


def submit(request: Request, executor: str = "slurm") -> list[Submission]:
    """Hand the units over and return at once.

    Args:
        executor: "slurm", or "local" for processes on this machine (then as many tasks as it
            can run at once).

    Raises:
        ValueError: the run folder is on a node's own disk.
        RuntimeError: no Slurm here, or it refused; what was accepted before is recorded.
    """
    if not request.units:
        return []
    if executor == "local":
        return _submit_local(request)
    if executor != "slurm":
        raise ValueError(f"executor={executor!r}: expected slurm or local")
    check_shared(request)
    if submitit.SlurmExecutor.affinity() < 0:
        raise RuntimeError(
            "no Slurm here (srun is not on PATH); use --executor local or inline, "
            "or --dry-run to see the batch scripts"
        )
    arrays, found = request.arrays, list[Submission]()
    for tasks, throttle in zip(arrays, _throttles(request.throttle, len(arrays))):
        try:
            with _outside():
                jobs = _slurm(request, throttle).submit_array(_payloads(request, tasks))
        except Exception as error:
            already = ", ".join(one.job for one in found)
            raise RuntimeError(
                f"sbatch refused: {_last_line(error)}"
                + (
                    f" (accepted before: {already}; the same command submits the rest later)"
                    if already
                    else ""
                )
            ) from error
        job = jobs[0].job_id.partition("_")[0]
        pattern = "%A_%a" if len(tasks) > 1 else "%j"
        name = JobPaths(request.folder).stdout.name.replace("%j", pattern).replace("%t", "0")
        log = request.folder / name.replace("%A", job).replace("%j", job)
        record(request.run, request.stage, job, tasks, log)
        found.append(Submission(job, tasks, log))
    return found


def _payloads(request: Request, tasks: list[Task]) -> list[Payload]:
    return [Payload(str(request.config_path), task, request.payload) for task in tasks]


def _outside():
    """Without the settings of the job that we may be running in."""
    return clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext()


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error" in line]
    return (lines[-1] if lines else str(error).strip().splitlines()[-1]).strip()


def record(
    run: Run,
    stage: str,
    job: str,
    tasks: Sequence[Sequence[str]],
    log: Path | str,
    executor: str = "slurm",
) -> None:
    """Note a submission in the run folder: how ``status`` knows what the queue's jobs are.

    Args:
        tasks: units of task 0, 1, ... of the job; of a job that is no array, one entry.
    """
    atomic.append_jsonl(
        run.submissions(stage),
        {
            "job": job,
            "executor": executor,
            "tasks": [list(task) for task in tasks],
            "log": str(log),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


@contextlib.contextmanager
def _quiet_children():
    """Give processes started here no pipe of ours: whoever reads our words would wait for them."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for number, own in zip((1, 2), kept):
            os.dup2(own, number)
        for handle in (*kept, null):
            os.close(handle)


def _submit_local(request: Request) -> list[Submission]:
    import torch

    devices, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    at_once = min(len(request.units), request.throttle, devices or cores)
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // at_once)
    found = []
    for slot in range(at_once):
        task = request.units[slot::at_once]
        executor = submitit.LocalExecutor(request.folder, max_num_timeout=request.max_requeues)
        executor.update_parameters(
            timeout_min=request.walltime / 60,
            signal_delay_s=request.signal_lead,
            stderr_to_stdout=True,
            gpus_per_node=1 if devices else 0,
            visible_gpus=(slot,) if devices else (),
        )
        with environment_variables(OMP_NUM_THREADS=threads), _quiet_children():
            job = executor.submit(Payload(str(request.config_path), task, request.payload))
        record(request.run, request.stage, job.job_id, [task], job.paths.stdout, "local")
        found.append(Submission(job.job_id, [task], job.paths.stdout))
    return found
