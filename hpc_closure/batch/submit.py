"""Submit verbs as batch jobs; the only module that imports submitit.

A rollout becomes job arrays whose tasks share its units or, with ``cluster.allocation``, one job
whose workers share them. Every other verb becomes one job.
:func:`submit` returns as soon as the jobs are queued. A task carries names only (experiment file,
units) and reads from the run folder what is left to do when it starts. A requeued, repeated or
duplicated task is therefore harmless.

    request = Request.of(experiment, run, ["000000-000019", "000020-000039"], run_units)
    print(cost(request), *batch_text(request), sep="\n")
    for submission in submit(request):
        print(submission)

:mod:`hpc_closure.batch.requeue` decides how a task ends.
"""

import contextlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import JobPaths, environment_variables
from submitit.helpers import clean_env

from hpc_closure.batch import environment, requeue
from hpc_closure.batch.site import Profile, Stage, load_profile
from hpc_closure.batch.squeue import record
from hpc_closure.experiment.duration import check_lead, seconds
from hpc_closure.experiment.folder import Run
from hpc_closure.work import claims, launch, log
from hpc_closure.work.stop import Stop

Task = tuple[str, ...]  # names of the units that one task computes in turn
Work = Callable[[str, list[str]], int]  # (experiment file, units) -> exit code

ARRAYS = ("rollout",)  # stages that run as job arrays, their units distributed over the tasks
PROGRAMS = ("generate", "train")  # stages that run as one program of many processes

# Settings of both the experiment and the profile; a value stated in the experiment wins.
_SHARED = ("walltime", "signal_before_end", "max_running_tasks", "max_requeues")
_A_YEAR = 365 * 24 * 60  # minutes; submitit requires a limit, local processes have none


@dataclass(frozen=True)
class Request:
    """A stage to submit, with all settings.

    Attributes:
        run: the run folder; the tasks read its ``config.yaml``.
        units: names of the units to run, in order.
        work: function that a task calls; pickled by name, so it must be importable in the job.
        profile: the site's profile for this stage.
        stage: the stage.
        walltime: limit of a job, seconds.
        signal_before_end: time between the warning signal and the limit, seconds.
        max_running_tasks: tasks that may run at once, over all arrays.
        max_requeues: how often a job may be requeued.
        units_per_task: units per task of an array.
        devices: GPUs per node.
        workers: nodes, and workers per node, of a job whose workers share the units; None = no
            such job.
        after: ids of jobs that must succeed first, joined by colons.
    """

    run: Run
    units: Task
    work: Work
    profile: Profile
    stage: Stage = "rollout"
    walltime: float = 3600.0
    signal_before_end: float = 300.0
    max_running_tasks: int = 64
    max_requeues: int = requeue.MOST
    units_per_task: int = 1
    devices: int = 0
    workers: tuple[int, int] | None = None
    after: str = ""

    def __post_init__(self):
        check_lead(self.signal_before_end, self.walltime)
        if self.signal_before_end >= self.walltime:
            raise ValueError(
                f"signal_before_end={self.signal_before_end:g} s leaves nothing of walltime="
                f"{self.walltime:g} s: shorten it"
            )

    @classmethod
    def of(
        cls,
        experiment,
        run: Run,
        units: Iterable,
        work: Work,
        stage: Stage = "rollout",
        profile: Profile | None = None,
    ) -> "Request":
        """Build the request for ``units`` (or their names) of an experiment.

        Raises:
            ValueError: the profile does not exist, or the signal lead is too long.
        """
        cluster = experiment.cluster
        site = (profile or load_profile(cluster.profile)).for_stage(stage)
        shared = {}
        for name in _SHARED:
            own = getattr(site, name)
            # cluster.walltime of the experiment is the limit of a rollout task
            stated = name in cluster.model_fields_set and (name != "walltime" or stage in ARRAYS)
            shared[name] = getattr(cluster, name) if stated or own is None else own
        for name in ("walltime", "signal_before_end"):
            shared[name] = seconds(shared[name])
        return cls(
            run=run,
            units=tuple(str(unit) for unit in units),
            work=work,
            profile=site,
            stage=stage,
            units_per_task=cluster.units_per_task,
            devices=(cluster.devices_per_task if stage in ARRAYS else 0) or site.devices,
            workers=_workers(cluster.allocation) if stage in ARRAYS else None,
            **shared,
        )

    @property
    def arrays(self) -> list[list[Task]]:
        """List the tasks of every job array; a plain job counts as an array of one task."""
        if self.stage in ARRAYS and not self.workers:
            return plan_arrays(self.units, self.units_per_task, self.profile.max_array)
        return [[self.units]] if self.units else []

    @property
    def nodes(self) -> int:
        if self.workers:
            return self.workers[0]
        return (self.profile.nodes or 1) if self.stage in PROGRAMS else 1

    @property
    def processes(self) -> int:
        """Processes per node."""
        if self.workers:
            return self.workers[1]
        return (self.profile.ntasks_per_node or 1) if self.stage in PROGRAMS else 1

    @property
    def folder(self) -> Path:
        """Folder of submitit's job files and of the logs."""
        return self.run.logs / self.stage / "jobs"

    def log(self, array: bool) -> Path:
        """Return the log path of a task as an sbatch pattern; all its processes write to it.

        Workers have a log per node.
        """
        pattern = str(JobPaths(self.folder).stdout).replace("%t", "%N" if self.workers else "0")
        return Path(pattern.replace("%j", "%A_%a") if array else pattern)


@dataclass(frozen=True)
class Submission:
    """A submitted job array, single job, or local process.

    Attributes:
        job: id of the job.
        tasks: units of each task.
        log: path of the logs, with ``%a`` for the task number.
    """

    job: str
    tasks: list[Task]
    log: Path

    def __str__(self) -> str:
        return f"job {self.job}: {len(self.tasks)} task(s), logs {self.log}"


@dataclass(frozen=True)
class Payload:
    """The call that a task makes; without progress, so that a requeued task can repeat it.

    Attributes:
        work, config_path, units: see :class:`Request`.
        claims: folder of the claims. The first worker of an allocation requeues the job, after all
            other workers have saved and released theirs.
        patience: seconds that it waits for them.
    """

    work: Work
    config_path: str
    units: Task
    claims: Path = Path()
    patience: float = 0.0

    def __call__(self) -> None:
        Stop.process_ends = True
        # until the verb installs its handler there is nothing to save
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(requeue.EXIT_STOPPED))
        with requeue.SignalRecorder() as recorder:
            try:
                code = self.work(self.config_path, list(self.units)) or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        if code == requeue.EXIT_STOPPED and launch.worker() != (0, 1):
            claims.wait_for_job(self.claims, self.patience)
        code = requeue.settle(code, recorder.signals)
        if code:
            sys.exit(code)


def _workers(allocation) -> tuple[int, int] | None:
    return (allocation.nodes, allocation.workers_per_node) if allocation else None


def plan_arrays(units: Sequence[str], per_task: int, max_array: int) -> list[list[Task]]:
    """Group units into tasks of ``per_task``, and tasks into arrays of at most ``max_array``.

    >>> plan_arrays(["a", "b", "c", "d", "e"], per_task=2, max_array=2)
    [[('a', 'b'), ('c', 'd')], [('e',)]]
    """
    if per_task < 1 or max_array < 1:
        raise ValueError(f"per_task={per_task}, max_array={max_array}: expected at least 1")
    tasks = [tuple(units[index : index + per_task]) for index in range(0, len(units), per_task)]
    return [tasks[index : index + max_array] for index in range(0, len(tasks), max_array)]


class _Slurm(submitit.SlurmExecutor):
    """submitit's Slurm executor, usable without Slurm to print batch scripts."""

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
    if request.after:
        options["dependency"] = f"afterok:{request.after}"
        options["kill-on-invalid-dep"] = "yes"
    setup = [
        *profile.shell_lines(),
        # since Slurm 22.05, srun does not inherit this option from sbatch
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        f"export {requeue.MAX_REQUEUES}={request.max_requeues}",
    ]
    if request.workers:
        setup.append(f"export {launch.WORKER}=auto")
        # a log per node; a worker that dies ends no other
        srun = ["--mpi=none", "--kill-on-bad-exit=0", f"--output={request.log(array=False)}"]
    elif request.stage in PROGRAMS:
        python = profile.python or shlex.quote(sys.executable)
        setup.append(f'eval "$({python} -m {environment.__name__})"')
        srun = [f"--output={request.log(array=False)}"]
        srun += [] if profile.mpi == "auto" else [f"--mpi={profile.mpi}"]
    else:
        # a task is one process without MPI, whatever the site's MpiDefault is
        srun = ["--mpi=none"]
    executor = _Slurm(request.folder, python=profile.python)
    executor.update_parameters(
        job_name=f"{request.run.root.name}-{request.stage}",
        time=math.ceil(request.walltime / 60),
        nodes=request.nodes,
        ntasks_per_node=request.processes,
        signal_delay_s=int(request.signal_before_end),
        array_parallelism=throttle,
        stderr_to_stdout=True,
        wckey=profile.wckey,  # many sites refuse submitit's default
        setup=setup,
        srun_args=srun,
        additional_parameters=options,
    )
    return executor


def _jobs(request: Request) -> Iterator[tuple[list[Task], _Slurm]]:
    """Yield every job array with its executor; divides the throttle, at least 1 per array."""
    arrays = request.arrays
    for index, tasks in enumerate(arrays):
        share = request.max_running_tasks // len(arrays) + (
            index < request.max_running_tasks % len(arrays)
        )
        yield tasks, _slurm(request, max(1, share))


def batch_text(request: Request) -> list[str]:
    """Return the batch script of every array; needs no Slurm and writes no file."""
    texts = []
    for tasks, executor in _jobs(request):
        if len(tasks) > 1:
            executor.parameters["map_count"] = len(tasks)
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts


def cost(request: Request) -> str:
    """Describe the upper bound of the cost of a submission, in one line."""
    number, noun = request.nodes, "node"
    if request.stage in ARRAYS and not request.workers:
        number, noun = sum(map(len, request.arrays)), "task"
    per_noun, unit = request.devices, "GPU"
    if not per_noun:
        per_noun, unit = request.processes * (request.profile.cpus_per_task or 1), "core"
    hours = request.walltime / 3600
    return (
        f"{number} {noun}{'s' * (number != 1)} x {hours:.3g} h x {per_noun} {unit}"
        f"{'s' * (per_noun != 1)} <= {number * hours * per_noun:.6g} {unit}-hours"
    )


def check_place(request: Request) -> None:
    """Check that jobs can be submitted here and that they will see the run folder.

    Raises:
        ValueError: the run folder is on a disk of this node.
        RuntimeError: there is no Slurm on this machine.
    """
    root = request.run.root.resolve()
    for folder in request.profile.node_local:
        if root.is_relative_to(folder):
            raise ValueError(
                f"{request.run.root}: {folder} is usually a node's own disk, which other nodes "
                "and you do not see; set `root` to a shared folder, or, if this one is shared, "
                f"`node_local: []` in profile {request.profile.name}"
            )
    if submitit.SlurmExecutor.affinity() < 0:
        raise RuntimeError(
            "no Slurm here (srun is not on PATH); use --executor local or inline, "
            "or --dry-run to see the batch scripts"
        )


def submit(request: Request, executor: str = "slurm") -> list[Submission]:
    """Submit the units and return without waiting for them.

    Args:
        request: the stage to submit.
        executor: "slurm", or "local" for processes on this machine, as many as it has GPUs, else
            cores.

    Raises:
        ValueError: the run folder is on a disk of this node.
        RuntimeError: there is no Slurm here, or it refused; jobs accepted before are recorded.
    """
    if not request.units:
        return []
    if executor == "local":
        return _submit_local(request)
    if executor != "slurm":
        raise ValueError(f"executor={executor!r}: expected slurm or local")
    check_place(request)
    if request.workers and request.workers[1] < request.devices:
        log.get().warning(
            f"cluster.allocation.workers_per_node={request.workers[1]} on nodes with "
            f"{request.devices} GPUs: a worker uses one GPU, so the others stay idle"
        )
    sent: list[Submission] = []
    for tasks, slurm in _jobs(request):
        try:
            # inside a job, sbatch would inherit that job's settings
            with clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
                jobs = slurm.submit_array([_payload(request, task) for task in tasks])
        except Exception as error:
            raise RuntimeError(_refused(error, sent)) from error
        job = jobs[0].job_id.partition("_")[0]
        path = str(request.log(array=len(tasks) > 1)).replace("%A", job).replace("%j", job)
        record(request.run, request.stage, job, tasks, path)
        sent.append(Submission(job, tasks, Path(path)))
    return sent


def _payload(request: Request, task: Task) -> Payload:
    folder = request.run.units(request.stage).absolute()
    patience = 0.8 * request.signal_before_end
    return Payload(request.work, str(request.run.config.absolute()), task, folder, patience)


def _refused(error: Exception, sent: list[Submission]) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error" in line]
    reason = (lines or str(error).strip().splitlines())[-1].strip()
    accepted = ", ".join(submission.job for submission in sent)
    if accepted:
        reason += f" (accepted before: {accepted}; the same command submits the rest later)"
    return f"sbatch refused: {reason}"


@contextlib.contextmanager
def _quiet_children():
    """Redirect stdout and stderr of child processes to /dev/null.

    A child that inherited our pipe would keep it open, and its reader would wait for the child.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for number, own in zip((1, 2), saved):
            os.dup2(own, number)
        for handle in (*saved, null):
            os.close(handle)


def _submit_local(request: Request) -> list[Submission]:
    import torch

    devices, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    at_once = min(len(request.units), request.max_running_tasks, devices or cores)
    if request.workers:
        at_once = request.workers[1]
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores // at_once)
    sent = []
    for slot in range(at_once):
        task = request.units if request.workers else request.units[slot::at_once]
        place = {launch.WORKER: f"{slot}/{at_once}"} if request.workers else {}
        executor = submitit.LocalExecutor(request.folder)
        executor.update_parameters(
            timeout_min=_A_YEAR,
            stderr_to_stdout=True,
            gpus_per_node=1 if devices else 0,
            visible_gpus=(slot % devices,) if devices else (),
        )
        with environment_variables(OMP_NUM_THREADS=threads, **place), _quiet_children():
            job = executor.submit(_payload(request, task))
        record(request.run, request.stage, job.job_id, [task], job.paths.stdout, "local")
        sent.append(Submission(job.job_id, [task], job.paths.stdout))
    return sent
