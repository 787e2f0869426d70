"""``hpc-closure`` and ``python -m hpc_closure``: run the parser, turn errors into one line."""

import os
import sys

from hpc_closure.work.launch import Launch, launch
from hpc_closure.work.stop import Stop

# Threads that wait give way: spinning ones on cores that others use, too, take 10 times longer.
# The OpenMP of torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

INTERRUPTED = "interrupted; the same command goes on"


def main() -> None:
    """Run the command line and end with its exit code: 0, 1, 2, 3, 75, or 130 for Ctrl-C."""
    Stop.process_ends = True
    try:
        _run()
    except KeyboardInterrupt:  # before a verb listens, or the second one
        _end(INTERRUPTED, 130)


def _run() -> None:
    from hpc_closure.work import extras
    from hpc_closure.work.options import UsageError

    try:
        from hpc_closure.cli import app

        sys.exit(app(prog_name="hpc-closure", standalone_mode=False))
    except SystemExit as end:
        if hasattr(end, "reason"):  # stop.Stopped: saved, not finished
            _end(end, 75)
        raise
    except UsageError as error:
        _end(error, 2)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("HPC_CLOSURE_TRACEBACK"):
            raise
        _end(str(error).strip() or type(error).__name__, 1)
    except ImportError as error:
        ours = (error.name or "").startswith("hpc_closure")  # a module of this package: a defect
        if ours or os.environ.get("HPC_CLOSURE_TRACEBACK"):
            raise
        _end(extras.explain(error), 1)
    except Exception as error:
        _refuse(error)
        raise


def _refuse(error: Exception) -> None:
    """The parser's own complaints, which typer would spread over several lines."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "Abort" in kinds:
        _end(INTERRUPTED, 130)
    if "NoArgsIsHelpError" in kinds:
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if "ClickException" in kinds:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hpc-closure"
        message, code = error.format_message(), error.exit_code  # type: ignore[attr-defined]
        _end(f"{message} See `{command} --help`.", code)


def _end(message: object, code: int) -> None:
    """Say it in one line, on the first of the ranks that end alike."""
    try:
        started = launch()
    except ValueError:  # which then is the message
        started = Launch()
    if not (started.mpi and started.rank):
        print(f"hpc-closure: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
