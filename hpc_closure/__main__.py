"""``hpc-closure`` and ``python -m hpc_closure``: run the parser, turn errors into one line."""

import os
import sys

# the variables in which launchers tell a process its rank; read before anything heavy is imported
RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "SLURM_PROCID")


def _first_rank() -> bool:
    ranks = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return not ranks or ranks[0] == "0"


def main() -> None:
    from hpc_closure.cli import UsageError, app

    try:
        app()
    except UsageError as error:
        if _first_rank():
            print(f"hpc-closure: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("HPC_CLOSURE_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hpc-closure: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
