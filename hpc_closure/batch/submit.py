"""Any verb as batch jobs: the only module that knows submitit.

A rollout becomes arrays of tasks that share its units, every other verb one job; submitit sends
them off, and we return at once. A task carries names only (experiment file, units): what is left
to do is read from the run folder when it starts, so a requeued, repeated or duplicated task is
harmless, and nobody ever waits for a result.

    request = Request.of(experiment, run, ["000000-000019", "000020-000039"], run_units)
    print(cost(request), *batch_text(request), sep="\n")
    for submission in submit(request):
        print(submission)

How a task ends is the matter of :mod:`hpc_closure.batch.requeue`.
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

Task = tuple[str, ...]  # names of units that one task works through
Work = Callable[[str, list[str]], int]  # (experiment file, units) -> exit code

ARRAYS = ("rollout",)  # stages whose units are shared out among the tasks of job arrays
PROGRAMS = ("generate", "train")  # stages that are one program of many processes

# Settings that the experiment and the profile both know; the experiment wins where it states one.
_SHARED = ("walltime", "signal_lead", "throttle", "max_requeues")
_A_YEAR = 365 * 24 * 60  # minutes: a machine of one's own sets no limit


@dataclass(frozen=True)
class Request:
    """All that is needed to submit a stage.

    Attributes:
        run: the run folder; the tasks read its ``config.yaml``.
        units: names of the units to run, in order.
        work: what a task does; travels by its name, so it must be importable in the job.
        profile: the site, already narrowed to the stage.
        walltime, signal_lead: seconds.
        throttle: tasks that may run at once, over all arrays.
        units_per_task: units that one task of an array works through.
        devices: GPUs of a node.
        after: ids of jobs that must have succeeded, with colons between them.
    """

    run: Run
    units: Task
    work: Work
    profile: Profile
    stage: Stage = "rollout"
    walltime: float = 3600.0
    signal_lead: float = 300.0
    throttle: int = 64
    max_requeues: int = requeue.MOST
    units_per_task: int = 1
    devices: int = 0
    after: str = ""

    def __post_init__(self):
        check_lead(self.signal_lead, self.walltime)
        if self.signal_lead >= self.walltime:
            raise ValueError(
                f"signal_lead={self.signal_lead:g} s leaves nothing of walltime="
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
        """The request for ``units`` (or their names) of an experiment.

        Raises:
            ValueError: unknown profile, or a signal lead that is too long.
        """
        cluster = experiment.cluster
        site = (profile or load_profile(cluster.profile)).for_stage(stage)
        shared = {}
        for name in _SHARED:
            own = getattr(site, name)
            # The experiment's walltime is that of a rollout task.
            stated = name in cluster.model_fields_set and (name != "walltime" or stage in ARRAYS)
            shared[name] = getattr(cluster, name) if stated or own is None else own
        for name in ("walltime", "signal_lead"):
            shared[name] = seconds(shared[name])
        return cls(
            run=run,
            units=tuple(str(unit) for unit in units),
            work=work,
            profile=site,
            stage=stage,
            units_per_task=cluster.units_per_task,
            devices=(cluster.devices_per_task if stage in ARRAYS else 0) or site.devices,
            **shared,
        )

    @property
    def arrays(self) -> list[list[Task]]:
        """Tasks of every job array; a job that is no array is one of a single task."""
        if self.stage in ARRAYS:
            return plan_arrays(self.units, self.units_per_task, self.profile.max_array)
        return [[self.units]] if self.units else []

    @property
    def nodes(self) -> int:
        return (self.profile.nodes or 1) if self.stage in PROGRAMS else 1

    @property
    def processes(self) -> int:
        """Processes on every node."""
        return (self.profile.ntasks_per_node or 1) if self.stage in PROGRAMS else 1

    @property
    def folder(self) -> Path:
        """Where submitit keeps its job files and where the logs go."""
        return self.run.logs / self.stage / "jobs"

    def log(self, array: bool) -> Path:
        """Log of a task, in sbatch's pattern; all its processes write there."""
        pattern = str(JobPaths(self.folder).stdout).replace("%t", "0")
        return Path(pattern.replace("%j", "%A_%a") if array else pattern)


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

    def __str__(self) -> str:
        return f"job {self.job}: {len(self.tasks)} task(s), logs {self.log}"


@dataclass(frozen=True)
class Payload:
    """What a task does. It holds no progress: the requeued task and the first one are the same."""

    work: Work
    config_path: str
    units: Task

    def __call__(self) -> None:
        # Until the verb sets a handler of its own there is nothing to save.
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(requeue.EXIT_STOPPED))
        with requeue.Heard() as heard:
            try:
                code = self.work(self.config_path, list(self.units)) or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        code = requeue.settle(code, heard.signals)
        if code:
            sys.exit(code)


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
    if request.after:
        options["dependency"] = f"afterok:{request.after}"
        options["kill-on-invalid-dep"] = "yes"
    setup = [
        *profile.shell_lines(),
        # srun stopped taking this from sbatch in Slurm 22.05.
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        f"export {requeue.MAX_REQUEUES}={request.max_requeues}",
    ]
    if request.stage in PROGRAMS:
        python = profile.python or shlex.quote(sys.executable)
        setup.append(f'eval "$({python} -m {environment.__name__})"')
        srun = [f"--output={request.log(array=False)}"]
        srun += [] if profile.mpi == "auto" else [f"--mpi={profile.mpi}"]
    else:
        # A task is one process without MPI, whatever MpiDefault of the site expects.
        srun = ["--mpi=none"]
    executor = _Slurm(request.folder, python=profile.python)
    executor.update_parameters(
        job_name=f"{request.run.root.name}-{request.stage}",
        time=math.ceil(request.walltime / 60),
        nodes=request.nodes,
        ntasks_per_node=request.processes,
        signal_delay_s=int(request.signal_lead),
        array_parallelism=throttle,
        stderr_to_stdout=True,
        wckey=profile.wckey,  # submitit's own default is refused by many sites
        setup=setup,
        srun_args=srun,
        additional_parameters=options,
    )
    return executor


def _jobs(request: Request) -> Iterator[tuple[list[Task], _Slurm]]:
    """Every job array and the executor for it; the throttle is shared out, at least one each."""
    arrays = request.arrays
    for at, tasks in enumerate(arrays):
        share = request.throttle // len(arrays) + (at < request.throttle % len(arrays))
        yield tasks, _slurm(request, max(1, share))


def batch_text(request: Request) -> list[str]:
    """The exact batch script of every array; needs no Slurm and writes nothing."""
    texts = []
    for tasks, executor in _jobs(request):
        if len(tasks) > 1:
            executor.parameters["map_count"] = len(tasks)
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts


def cost(request: Request) -> str:
    """What the submission costs at most, in one line."""
    number, what = request.nodes, "node"
    if request.stage in ARRAYS:
        number, what = sum(map(len, request.arrays)), "task"
    each, unit = request.devices, "GPU"
    if not each:
        each, unit = request.processes * (request.profile.cpus_per_task or 1), "core"
    hours = request.walltime / 3600
    return (
        f"{number} {what}{'s' * (number != 1)} x {hours:.3g} h x {each} {unit}"
        f"{'s' * (each != 1)} <= {number * hours * each:.6g} {unit}-hours"
    )


def check_place(request: Request) -> None:
    """Raise where a job could not be sent from, or would not find its run.

    Raises:
        ValueError: the run folder is on a disk that other nodes do not see.
        RuntimeError: no Slurm here.
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
    check_place(request)
    sent: list[Submission] = []
    for tasks, slurm in _jobs(request):
        try:
            # without the settings of the job that we may be running in
            with clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
                jobs = slurm.submit_array([_payload(request, task) for task in tasks])
        except Exception as error:
            raise RuntimeError(_refused(error, sent)) from error
        job = jobs[0].job_id.partition("_")[0]
        log = str(request.log(array=len(tasks) > 1)).replace("%A", job).replace("%j", job)
        record(request.run, request.stage, job, tasks, log)
        sent.append(Submission(job, tasks, Path(log)))
    return sent


def _payload(request: Request, task: Task) -> Payload:
    return Payload(request.work, str(request.run.config.absolute()), task)


def _refused(error: Exception, sent: list[Submission]) -> str:
    lines = [line for line in str(error).splitlines() if "sbatch: error" in line]
    reason = (lines or str(error).strip().splitlines())[-1].strip()
    before = ", ".join(one.job for one in sent)
    if before:
        reason += f" (accepted before: {before}; the same command submits the rest later)"
    return f"sbatch refused: {reason}"


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
    sent = []
    for slot in range(at_once):
        task = request.units[slot::at_once]
        executor = submitit.LocalExecutor(request.folder)
        executor.update_parameters(
            timeout_min=_A_YEAR,
            stderr_to_stdout=True,
            gpus_per_node=1 if devices else 0,
            visible_gpus=(slot,) if devices else (),
        )
        with environment_variables(OMP_NUM_THREADS=threads), _quiet_children():
            job = executor.submit(_payload(request, task))
        record(request.run, request.stage, job.job_id, [task], job.paths.stdout, "local")
        sent.append(Submission(job.job_id, [task], job.paths.stdout))
    return sent
