"""``hpc-closure`` and ``python -m hpc_closure``: run the parser, turn errors into one line."""

import os
import sys

# the variables in which MPI launchers tell a process its rank; its peers end with the same error
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")

INTERRUPTED = "interrupted; the same command goes on"


def _first_rank() -> bool:
    ranks = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return not ranks or ranks[0] == "0"


def _end(message: object, code: int) -> None:
    if _first_rank():
        print(f"hpc-closure: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def _complete_quickly() -> None:
    """Spare shell completion the import of pydantic, by which newer typers convert values.

    It doubles the time to the answer, and completion needs no values. This reaches into typer:
    in a version that looks different inside, completion is slower and nothing else.
    """
    try:
        from typer import _coercion, core

        class AsTyped(_coercion.RuntimeParam):
            def _coerce_value(self, value, param, ctx):
                return value

        core.build_runtime_param = lambda descriptor: AsTyped(
            parameter_info=descriptor.parameter_info, annotation=descriptor.annotation
        )
    except (ImportError, AttributeError, TypeError):
        pass


def main() -> None:
    if "_HPC_CLOSURE_COMPLETE" in os.environ:
        _complete_quickly()
    try:
        _main()
    except KeyboardInterrupt:  # before a verb listens, or the second one
        _end(INTERRUPTED, 130)


def _main() -> None:
    from hpc_closure.cli import UsageError, app

    try:
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
    except Exception as error:
        _usage(error)
        raise


def _usage(error: Exception) -> None:
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


if __name__ == "__main__":
    main()
