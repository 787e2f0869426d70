"""``hpc-closure export``: write a closure for C, C++ and Fortran, or compile it again."""

from pathlib import Path
from typing import Any

from hpc_closure.experiment.folder import Run


def run(  # noqa: PLR0913 - the options of the command
    model: str,
    to: Path,
    members: int,
    points: int | None,
    interval: int | None,
    evaluations: int | None,
    march: str | None,
    torchscript: bool,
) -> int:
    """Export a model; returns the exit code.

    Args:
        model: model file, run folder or name of a shipped model.
        to: folder to write.
        members: number of members.
        points: points per side; None = of the training.
        interval: solver steps between calls; None = as trained.
        evaluations: of the sampler; None = the model's.
        march: processor to compile for; None = a common one.
        torchscript: write ``closure.ts``, too.

    Raises:
        ValueError: an option or the model cannot be exported; one line.
    """
    for name, value, least in (
        ("--members", members, 1),
        ("--points", points, 4),
        ("--interval", interval, 1),
        ("--evaluations", evaluations, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} {value}: expected at least {least}")
    if points is not None and points % 2:
        raise ValueError(f"--points {points}: expected an even number")
    from hpc_closure.closure.artifact import model_file
    from hpc_closure.closure.header import read_header
    from hpc_closure.export import package
    from hpc_closure.export.program import Settings

    folder = Path(model)
    path = model_file(Run(folder).model if folder.is_dir() else model)
    header = read_header(path)
    for name, value in (("grid", header.size), ("length", header.length)):
        if isinstance(value, tuple):
            raise ValueError(
                f"{path}: {name} {' x '.join(f'{one:g}' for one in value)}, expected equal sides: "
                "an exported draw has one number of points; call the model from Python"
            )
    settings = Settings(
        members,
        points or header.size,
        interval or header.target.get("interval", 1),
        None,
        evaluations,
    )
    about = package.write(path, settings, to, march or package.default_march(), torchscript)
    print(_summary(to, about))
    print(
        f"next: cmake -S {to} -B build -DCMAKE_PREFIX_PATH=$(python -c "
        "'import torch; print(torch.utils.cmake_prefix_path)') && cmake --build build"
    )
    return 0


def here(folder: Path, march: str | None) -> int:
    """Compile an exported folder for this machine and torch; returns the exit code."""
    from hpc_closure.export import package

    print(_summary(folder, package.compile_here(folder, march or package.default_march())))
    return 0


def _summary(folder: Path, about: dict[str, Any]) -> str:
    """Say in one line what was compiled."""
    isa = f" ({about['isa']})" if about["isa"] else ""
    return (
        f"{folder}: {about['members']} members on {about['points']} points per side, every "
        f"{about['interval']} steps; torch {about['torch']}, {about['march']}{isa}; differs from "
        f"Python's closure by {about['difference']:.1e} of its size"
    )
