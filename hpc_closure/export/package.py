"""The folder of an exported closure: the compiled draw, its description, sources and a self-test.

``closure.pt2`` is the draw (:mod:`.program`) compiled by AOTInductor, ``model.safetensors`` the
model from which :func:`compile_here` makes it again, ``closure.json`` its description,
``check.bin`` a state with its key, past and closure in Python. The sources of ``kit`` are copied
beside them. Everything that the C++ source reads is JSON or safetensors. Programs of torch.export
are not stored, because torch unpickles what it loads of them.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

import hpc_closure
from hpc_closure.closure.artifact import Closure, load, model_file
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.networks import compiled
from hpc_closure.export import real_pairs
from hpc_closure.export.program import Inputs, Once, Program, Settings, noise_of_call
from hpc_closure.spectral.modes.grid import to_fields
from hpc_closure.spectral.noise.counters import key_of, uniform_bits
from hpc_closure.work import atomic

__all__ = ["AGREE", "MARCHES", "compile_here", "default_march", "write"]

FORMAT = "hpc_closure export 1"
CHECK = "hpc_closure check 1"
KIT = Path(__file__).parent / "kit"
SOURCES = ("hpc_closure.h", "hpc_closure.cpp", "hpc_closure.f90", "CMakeLists.txt")
DESCRIPTION, SELF_TEST = "closure.json", "check.bin"
PROGRAM, MODEL, SCRIPTED = "closure.pt2", "model.safetensors", "closure.ts"
STAGE = "sample"  # of the keys of a process
AGREE = 2e-6  # largest difference of closures over the largest closure
CALLS = 3  # of the self-test; the last one is compared
SEED = 20261129
#: processors by name: settings of the compiler, and instructions that the package then needs
MARCHES: dict[str, tuple[dict[str, Any], str]] = {
    "native": ({}, ""),
    "x86-64-v3": ({"cpp.march": "x86-64-v3", "cpp.simdlen": 256}, "avx2"),
    "x86-64-v4": ({"cpp.march": "x86-64-v4", "cpp.simdlen": 512}, "avx512"),
}


def write(
    model: str | Path,
    settings: Settings,
    folder: Path,
    march: str = "native",
    scripted: bool = False,
) -> dict[str, Any]:
    """Write the folder of an exported closure; returns its description.

    Args:
        model: model file, or name of a shipped model.
        settings: members, grid, interval and sampler that the draw is made for.
        folder: folder to write; files of an earlier export there are replaced.
        march: processor to compile for, a key of :data:`MARCHES`.
        scripted: whether to write ``closure.ts``, the draw as TorchScript, too.

    Raises:
        ValueError: the closure cannot be exported, or the machine cannot compile for ``march``.
        RuntimeError: the compiled closures differ from those of Python.
    """
    _check_machine(march)
    closure = load(model)
    program = Program(closure, settings).eval()
    test = _self_test(closure, program)
    exported, scripts = _export(closure, program, scripted)
    folder.mkdir(parents=True, exist_ok=True)
    source = model_file(model)
    if not (folder / MODEL).exists() or not source.samefile(folder / MODEL):
        with atomic.publish(folder / MODEL) as part:
            shutil.copyfile(source, part)
    if scripts is not None:
        with atomic.publish(folder / SCRIPTED) as part:
            torch.jit.save(scripts, str(part))
    with atomic.publish(folder / SELF_TEST) as part:
        part.write_bytes(test)
    for name in SOURCES:
        with atomic.publish(folder / name) as part:
            shutil.copyfile(KIT / name, part)
    return _compile(exported, folder, _description(closure, program), march)


def _export(closure: Closure, program: Program, scripted: bool = False) -> tuple[Any, Any]:
    """Return the exported program, and its trace as TorchScript or None."""
    with _prepared(closure, program) as example:
        exported = torch.export.export(program, tuple(example), strict=False)
        real_pairs.replace(exported.graph)
        exported.graph_module.recompile()
        # of the exported program, whose sizes are numbers
        scripts = torch.jit.trace(exported.module(), tuple(example)) if scripted else None
    return exported, scripts


def compile_here(folder: Path, march: str = "native") -> dict[str, Any]:
    """Compile an exported closure again, for this machine and torch; returns its description.

    Raises:
        FileNotFoundError: a file of the export is missing.
        ValueError: a file is damaged or of another format.
    """
    for name in (DESCRIPTION, MODEL, SELF_TEST):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: no such file; export the model again")
    _check_machine(march)
    try:
        about = json.loads((folder / DESCRIPTION).read_text())
        known = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION}: damaged ({error}); export again") from None
    if known != FORMAT:
        raise ValueError(f"{folder / DESCRIPTION}: format {known!r}, expected {FORMAT!r}")
    if _digest(folder / MODEL) != about["hashes"].get(MODEL):
        raise ValueError(f"{folder / MODEL}: not the file of {DESCRIPTION}; export again")
    closure, sampler = load(folder / MODEL), about["sampler"]
    settings = Settings(
        about["members"],
        about["points"],
        about["interval"],
        sampler["method"],
        sampler["evaluations"] or None,
    )
    exported, _ = _export(closure, Program(closure, settings).eval())
    return _compile(exported, folder, about, march)


def _compile(exported: Any, folder: Path, about: dict[str, Any], march: str) -> dict[str, Any]:
    """Compile a program, compare it with the self-test, and write package and description."""
    options, isa = MARCHES[march]
    with _quiet(), atomic.publish(folder / PROGRAM) as part:
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(part.with_suffix(".pt2")), inductor_configs=options
        )
        try:
            off = _difference(made, folder / SELF_TEST, about)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"{folder / PROGRAM}: the compiled draw does not run with torch "
                f"{torch.__version__} ({reason}): please report this"
            ) from None
        os.replace(made, part)
        if not off <= AGREE:
            raise RuntimeError(
                f"{folder / PROGRAM}: closures differ from Python's by {off:.1e} of their size, "
                f"at most {AGREE:g} expected: please report this"
            )
    about = {
        **about,
        "torch": torch.__version__,
        "march": march,
        "isa": isa or _own_isa(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    names = [PROGRAM, MODEL, SELF_TEST, SCRIPTED]
    about["hashes"] = {name: _digest(folder / name) for name in names if (folder / name).exists()}
    with atomic.publish(folder / DESCRIPTION) as part:
        part.write_text(json.dumps(about, indent=1) + "\n")
    return {**about, "difference": off}


def _description(closure: Closure, program: Program) -> dict[str, Any]:
    """Describe a program as the C++ source and people read it."""
    settings, memory, target = program.settings, program.memory, closure.target
    features = getattr(closure.model, "feature_set")
    fields = list(features.channels) or ["u" if closure.dimensions == 1 else "vorticity"]
    return {
        "format": FORMAT,
        "version": hpc_closure.__version__,
        "model": closure.header.train_hash,
        "kind": target.get("kind", ""),
        "members": settings.members,
        "points": settings.points,
        "modes": program.modes,
        "band": closure.model.band.modes,  # type: ignore[union-attr]
        "dimensions": closure.dimensions,
        "length": closure.header.length,
        "fields": fields,
        "units": "state: as in the training; closure: state per unit of time",
        "layout": "double, members slowest, then fields, then x, y (z), the last side fastest",
        "interval": settings.interval,
        "interval_ratio": program.how.interval_ratio,
        "dt": target["dt"],
        "reads_forecast": bool(closure.config["conditions"].get("forecast")),
        "memory": {
            "frames": memory.frames,
            "lag": memory.lag,
            "previous": memory.previous,
        },
        "sampler": {
            "method": settings.method or closure.config.get("method"),
            "evaluations": closure.evaluations(settings.evaluations),
        },
        "stage": STAGE,
        "noise": {
            **program.noise,
            "streams": {
                "base": keyed_noise.STREAM_BASE,
                "memory": keyed_noise.STREAM_MEMORY,
                "component": keyed_noise.STREAM_COMPONENT,
            },
        },
        "range": closure.model.has_range,
        "shells": closure.model.band.grid.num_shells,  # type: ignore[union-attr]
        "config": closure.config,
    }


# -- self-test ------------------------------------------------------------------------------------


def _self_test(closure: Closure, program: Program) -> bytes:
    """Draw with Python's process for a random state; returns the file of the self-test."""
    settings = program.settings
    process = closure.process(
        settings.members,
        seed=SEED,
        interval=settings.interval,
        evaluations=settings.evaluations,
        method=settings.method,
    )
    memory, count = program.memory, settings.members
    fields = iter(_fields(program, count * (CALLS + memory.frames * memory.lag)).split(count))
    past = [next(fields) for _ in range(memory.frames * memory.lag)]
    none = torch.zeros(program.shapes()[0], dtype=torch.float64)
    process.begin(past, [none] * memory.previous)
    for _ in range(CALLS - 1):
        process(next(fields))
    stored, state = process.state_dict(), next(fields)
    expected = process(state)
    tensors = {"state": state, "expected": expected}
    for name in ("states", "closures"):
        if name in stored:
            spectra = torch.as_tensor(stored[name]).to(torch.complex128)
            tensors[name] = torch.view_as_real(spectra)
    key = key_of(SEED, STAGE, 0)
    words = uniform_bits(key, keyed_noise.STREAM_BASE, 0, 2, stored["calls"])
    tensors["words"] = torch.from_numpy(words.astype("int64"))
    metadata = {name: json.dumps(stored[name]) for name in ("calls", "members", "seed")}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return bytes(serialize(tensors, metadata={"format": CHECK, **metadata}))


def _fields(program: Program, count: int) -> Tensor:
    """Make random states (count, n, n) of the size of the training states, smooth in space."""
    model, own = program.model, program.model.feature_set.own
    rms = model.statistics.features_rms[own]
    shape = band(program.modes, model.length, model.dimensions)
    white = keyed_noise.white_fields(
        shape,
        keyed_noise.Key(SEED, "check", range(count), 0),
        keyed_noise.STREAM_BASE,
        torch.device("cpu"),
        model.channel_shape,
    )
    falls = (1 + shape.grid.integer_k2.double()) ** -1.0
    falls.view(-1)[0] = 0.0
    size = (shape.weights * falls.square()).sum().sqrt()
    spectra = white * (falls / size) * shape.each(torch.as_tensor(rms).double())
    return to_fields(spectra, program.settings.points, model.dimensions)


def _difference(package: str, test: Path, about: dict[str, Any]) -> float:
    """Compare a compiled program with the self-test; returns the largest difference, relative."""
    with safe_open(test, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        stored = {name: json.loads(file.metadata()[name]) for name in ("calls", "members", "seed")}
    state, expected, memory = tensors["state"], tensors["expected"], about["memory"]
    sides = [2 * about["modes"] + 1] * (about["dimensions"] - 1) + [about["modes"] + 1]
    fields = [len(about["fields"])] if len(about["fields"]) > 1 else []
    none = state.new_zeros(0, len(state), *fields, *sides, 2)
    states = tensors.get("states", none)
    newest_first = [-number * memory["lag"] for number in range(1, memory["frames"] + 1)]
    key = keyed_noise.Key(stored["seed"], about["stage"], stored["members"], stored["calls"])
    inputs = Inputs(
        state,
        states[newest_first].transpose(0, 1).contiguous(),
        tensors.get("closures", none).transpose(0, 1).contiguous(),
        *noise_of_call(about["noise"], key, stored["calls"] * about["interval_ratio"]),
    )
    with torch.no_grad():
        u = torch._inductor.aoti_load_package(package)(*inputs)[0]
    return float((u - expected).abs().max() / expected.abs().max())


# -- machine --------------------------------------------------------------------------------------


@contextmanager
def _prepared(closure: Closure, program: Program) -> Iterator[Inputs]:
    """Yield arguments for an export; all that depends on weights alone has been computed."""
    model, example = closure.model, program.example()
    with torch.no_grad(), compiled.compiling.off(), _quiet():
        before, model.replayed = model.replayed, Once()
        try:
            program(*example)
            yield example
        finally:
            model.replayed = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about complex numbers and processors while it exports."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def default_march() -> str:
    """Return the processor to compile for: x86-64-v3 if this machine has AVX2, else its own."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return "x86-64-v3" if is_x86 and _own_isa() in ("avx2", "avx512") else "native"


def _check_machine(march: str) -> None:
    """Raise ValueError, one line, if this machine cannot compile for a processor."""
    if march not in MARCHES:
        raise ValueError(f"--march {march}: expected one of {', '.join(MARCHES)}")
    if march != "native" and platform.machine() not in ("x86_64", "AMD64"):
        raise ValueError(f"--march {march}: this machine is {platform.machine()}; use native")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError(
            f"no C++ compiler {os.environ.get('CXX', 'g++')} on PATH, which torch needs to "
            "compile the draw: apt-get install g++, or module load gcc"
        )


def _own_isa() -> str:
    """Return the vector instructions of this machine that torch compiles for."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    name = str(pick_vec_isa()).lower()
    return next((isa for isa in ("avx512", "avx2") if isa in name), "")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
