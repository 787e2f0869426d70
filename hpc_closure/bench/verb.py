"""``hpc-closure bench``: measure speed and calibration on this machine."""

import json as json_format
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hpc_closure.bench import dns as dns_bench
from hpc_closure.bench import measure, ranks
from hpc_closure.bench import sampling as sampling_bench
from hpc_closure.bench import training as training_bench
from hpc_closure.work import atomic


def dns(
    *,
    grids: str,
    members: str,
    precisions: str,
    num_ranks: str,
    domain_ranks: int,
    against: str | None,
    scheme: str,
    noise: bool,
    steps: int,
    repeats: int,
    seconds: float,
    threads: int,
    device: str,
    json: Path | None,
) -> int:
    """Speed of the DNS, over grids x members x ranks x precisions. Returns the exit code."""
    found = _machine(device, threads)
    records: list[dict[str, Any]] = []
    cases = [
        case
        for grid in _numbers("--grid", grids)
        for count in _numbers("--members", members)
        for precision in _words(precisions)
        for size in _numbers("--ranks", num_ranks)
        for case in dns_bench.split(
            dns_bench.Case(
                grid=grid,
                members=count,
                precision=precision,
                against=_words(against or ""),
                noise=noise,
                scheme=scheme,
                steps=steps,
                repeats=repeats,
                seconds=seconds,
                device=device,
                ranks=size,
                domain_ranks=domain_ranks if size > 1 else 1,
                threads=_threads_per_rank(size, threads),
            )
        )
    ]
    for case in cases:
        if case.ranks > 1:
            rows, remarks, _ = ranks.start(case)
        else:
            rows, remarks = dns_bench.run(case)
        for line in remarks:
            print(line)
        _print(rows, dns_bench.COLUMNS, header=not records)
        for row in rows:
            if "difference" in row:
                print(
                    f"  {row['method']}: after ten steps {row['difference']:.1e} of the change "
                    "from ours"
                )
        records += rows
    return _save(json, found, records)


def training(
    *,
    grid: int,
    batch: int,
    samples: str,
    steps: int,
    repeats: int,
    seconds: float,
    threads: int,
    device: str,
    json: Path | None,
) -> int:
    """Speed of a training step and of a sample. Returns the exit code."""
    found = _machine(device, threads)
    records = training_bench.run(
        grid=grid,
        batch=batch,
        samples=tuple(_numbers("--samples", samples)),
        device=device,
        repeats=repeats,
        seconds=seconds,
        steps=steps,
    )
    _print(records, training_bench.COLUMNS)
    return _save(json, found, records)


def sampling(
    *,
    case: str,
    grid: int,
    model: str | None,
    methods: str | None,
    evaluations: str,
    states: int,
    members: int,
    steps: int,
    samples: int,
    one_pass: bool,
    correct: bool,
    threads: int,
    device: str,
    json: Path | None,
) -> int:
    """Calibration and cost by sampler and evaluations. Returns the exit code."""
    from hpc_closure.bench.known import Known, fit
    from hpc_closure.closure import artifact
    from hpc_closure.train.settings import TrainSettings

    found = _machine(device, threads)
    known = Known(case, grid)

    def train(**config):
        settings = TrainSettings(steps=max(steps, 1), batch=64, lr=2e-3, engine="torch")
        small = {"width": 16, "modes": 6, "layers": 2}  # as in the presets on 64^2
        config = {**small, **config}
        return fit(known, samples=samples, settings=settings, config=config, optimise=steps > 0)

    trained = train() if model is None else artifact.load(model).model
    if getattr(trained, "score_active", True) is False:
        print("the score network did not earn its place on this law: the samplers do not differ")
    records = sampling_bench.run(
        known,
        trained.to(device),
        methods=_words(methods) if methods else sampling_bench.METHODS,
        evaluations=_numbers("--evaluations", evaluations),
        states=states,
        members=members,
        device=device,
        one_pass=train(preset=sampling_bench.ONE_PASS).to(device) if one_pass else None,
        unseen=known.batches("valid", max(samples // 4, 1)) if correct else (),
    )
    _print(records, sampling_bench.COLUMNS)
    return _save(json, found, records)


def _machine(device: str, threads: int) -> dict[str, object]:
    """Set the number of threads and print where this runs."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to use the CPU")
    if threads:
        torch.set_num_threads(threads)
    found = measure.machine(device)
    print(measure.describe(found), flush=True)
    return found


def _threads_per_rank(size: int, threads: int) -> int:
    """All of ours for one process; the machine's, shared, for several."""
    if size == 1:
        return threads
    return max(1, (threads or torch.get_num_threads()) // size)


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(word) for word in _words(text)]
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers, for example 64,256") from None
    if not found or min(found) < 1:
        raise ValueError(f"{option} {text}: expected positive numbers, for example 64,256")
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _print(rows: Iterable[dict], columns: dict[str, str], header: bool = True) -> None:
    lines = measure.table(list(rows), columns, widths=9).splitlines()
    print("\n".join(lines if header else lines[1:]), flush=True)


def _save(path: Path | None, machine: dict, records: list[dict]) -> int:
    if path is not None:
        text = json_format.dumps({"machine": machine, "records": records}, indent=1)
        atomic.write_text(path, text + "\n")
        print(f"wrote {path}")
    return 0
