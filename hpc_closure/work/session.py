"""The first and last steps of every verb: run folder, log, provenance, stop flag, device.

    with Session(experiment, "generate", Options(max_elapsed="3h50m")) as session:
        ... session.run, session.world, session.stop, session.device ...

Only one program at a time may run train or evaluate.
"""

import contextlib
import shutil
from dataclasses import replace

from hpc_closure.experiment import reading
from hpc_closure.experiment.duration import seconds
from hpc_closure.experiment.folder import BESIDE_DATA, STAGES, Run, stages_of, verb_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral import switches
from hpc_closure.work import atomic, claims, launch, log, loop, mpi, provenance, units
from hpc_closure.work.options import Options
from hpc_closure.work.stop import Stop


class Session:
    """One invocation of a verb on one experiment.

    Attributes:
        run: paths of the run folder.
        world: the MPI world (one rank if no MPI launcher started it).
        rank, size: rank and number of processes, those of torchrun included.
        groups: groups of ranks that share one field.
        stop: the flag that signals and ``--max-elapsed`` set.
        device: torch device name.
        record: provenance of this invocation, for the products.
    """

    def __init__(
        self,
        experiment: Experiment,
        verb: str,
        options: Options = Options(),
    ):
        self.experiment, self.verb, self.options = experiment, verb, options
        self.run = Run.of(experiment)
        self.world = mpi.world()
        started = launch.launch()
        self.rank = started.rank if started.launcher == "torchrun" else self.world.rank
        self.size = started.size if started.launcher == "torchrun" else self.world.size
        self.worker, self.workers = launch.worker()
        limit = seconds(options.max_elapsed) if options.max_elapsed else None
        self.stop = Stop(limit)
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "Session":
        with contextlib.ExitStack() as closing:
            closing.enter_context(self.world.guard())
            closing.enter_context(self.stop)
            cluster, shared = self.experiment.cluster, self.verb != "train"
            on = switches.active()  # refuses a wrong name on every device
            self.device = launch.choose_device(cluster.device, shared=shared)
            launch.set_threads(cluster.threads)
            ranks = cluster.domain_ranks if self.verb == "generate" else 1
            self.groups = self.world.groups(ranks)
            check_recipe(self.run, self.experiment, self.verb, overwrite=self.options.overwrite)
            first = self.rank == 0 and self.worker == 0  # it books for all
            error = self.world.agree_on_error(self._open_folder() if first else None)
            if error is not None:
                raise error
            log.setup(
                max(self.rank, self.worker),
                max(self.size, self.workers),
                verbosity=self.options.verbosity,
                file=self.run.log(self.verb),
            )
            self.record = provenance.collect(
                quick=not first,  # of thousands of processes one looks for changes
                ranks=self.size,
                device=launch.device_name(self.device),
                threads=launch.num_threads(),
                verb=self.verb,
                hashes={stage: self.experiment.stage_hash(stage) for stage in self._inputs()},
                cuda=sorted(on) if on and self.device != "cpu" else None,
                run=str(self.run),
            )
            if first:
                provenance.append(self.run, self.record)
                log.banner(f"{self.verb} {self.experiment.name}", self.record)
            if self.verb in ("train", "evaluate"):
                closing.enter_context(self._exclusive())
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._closing.__exit__(*error)

    def options_left(self) -> Options:
        """Return the options for the next verb of the same invocation, with the time left."""
        if self.options.max_elapsed is None:
            return self.options
        return replace(self.options, max_elapsed=f"{max(self.stop.remaining, 1.0):.0f}s")

    @contextlib.contextmanager
    def _exclusive(self):
        """Hold a stage that two programs must not run at once: they would spoil its files."""
        with contextlib.ExitStack() as claims_held:
            error = None
            if self.rank == 0:
                recipe = self.experiment.stage_hash(self.verb)
                stale_after = self.experiment.cluster.claim_timeout
                try:
                    claims_held.enter_context(
                        loop.single(self.run, self.verb, recipe, stale_after)
                    )
                except RuntimeError as busy:
                    error = busy
            error = self.world.agree_on_error(error)
            if error is not None:
                raise error
            yield

    def _inputs(self) -> tuple[str, ...]:
        return STAGES[: STAGES.index(self.verb) + 1]

    def _open_folder(self) -> Exception | None:
        """Make the folder and store the settings; return the error, so that all ranks learn it."""
        try:
            if self.options.overwrite:
                self._delete_products()
            atomic.make_folder(self.run.folder(self.verb))
            store_settings(self.run, self.experiment)
        except Exception as error:
            return error
        return None

    def _delete_products(self) -> None:
        folder, books = self.run.folder(self.verb), self.run.units(self.verb)
        if not folder.exists():
            return
        names = [entry.name for entry in units.listing(books)]
        fresh_claims = claims.living(books, names, self.experiment.cluster.claim_timeout)
        for name, owner in fresh_claims.items():
            raise RuntimeError(
                f"{folder}: {name} is being computed by process {owner.get('pid', '?')} on "
                f"{owner.get('host', '?')}; end it before --overwrite"
            )
        if not self.options.yes:
            try:
                answer = input(f"delete {folder} and all its files? [y/N] ")
            except EOFError:  # no terminal, in a batch job say
                answer = ""
            if answer.strip().lower() not in ("y", "yes"):
                raise RuntimeError(f"{folder}: not deleted; --yes deletes it without a question")
        for stage in stages_of(self.verb):
            for path in (self.run.folder(stage), self.run.units(stage)):
                shutil.rmtree(path, ignore_errors=True)


def store_settings(run: Run, experiment: Experiment) -> None:
    """Write RUN/config.yaml; call :func:`check_recipe` first."""
    text = reading.dump(experiment)
    if not run.config.exists() or run.config.read_text() != text:
        atomic.write_text(run.config, text)


def check_recipe(run: Run, experiment: Experiment, verb: str, overwrite: bool = False) -> None:
    """Refuse to mix products of two experiments in one folder; name the keys that differ.

    Raises:
        ValueError: products of ``verb``, or of a stage that it reads, were made with other
            settings.
    """
    if run.data_root:
        if verb == "generate":
            raise ValueError(
                f"use.data={experiment.use.data}: the data are those of another run; "
                "there is nothing to generate here"
            )
        check_recipe(Run(run.data_root), experiment, "generate")
    if run.model_file and verb == "train":
        raise ValueError(
            f"use.model={experiment.use.model}: the model is there already; there is "
            "nothing to train here"
        )
    with atomic.disk_errors(run.root):
        if not run.config.exists():
            return
    stored = reading.load(run.config, warn=False)
    for stage in (*STAGES[: STAGES.index(verb)], *stages_of(verb)):
        if run.data_root and stage == "generate":
            continue
        if stage in BESIDE_DATA and stage not in experiment.stages:
            continue  # this experiment neither reads nor changes them
        if verb_of(stage) == verb and (overwrite or stage == "evaluate"):
            continue
        folder = run.folder(stage)
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        differing = reading.differences(
            stored.stage_settings(stage), experiment.stage_settings(stage)
        )
        if run.root == experiment.folder:  # data of another run may have more outputs
            differing += reading.differences(
                stored.stage_outputs(stage), experiment.stage_outputs(stage)
            )
        # the stored settings are those of the last command, which may not have read the stage
        recipe = units.first_recipe(folder) if differing and stage in BESIDE_DATA else ""
        if differing and recipe != experiment.stage_hash(stage):
            changes = ", ".join(f"{key}: {old} -> {new}" for key, old, new in differing[:4])
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            way_out = f"remove {folder}" if stage in BESIDE_DATA else f"run `{stage} --overwrite`"
            raise ValueError(
                f"{folder} was made with other settings ({changes}{more}); change `name`, "
                f"or {way_out}"
            )
