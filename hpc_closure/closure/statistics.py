r"""Closed-form statistics of the default model, phase by phase.

``mean``: feature scales, library regression, first residual spectrum, sizes. ``generator``: gains
of the mean network on members it has not seen, amplitude, law of the residual. ``check``: gains of
the generator. A gain is the regression of the truth on the output, per shell, within [0, 2],
and zero where its t-value over snapshots is below 3: an unneeded network drops out exactly.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure import draws
from hpc_closure.closure.band import band
from hpc_closure.closure.interface import iterate, unpack
from hpc_closure.closure.residual_memory import LagCorrelation
from hpc_closure.spectral.grid import resize

# Sizes of the generator's grid: even, with small prime factors.
SIZES = (16, 20, 24, 32, 36, 40, 48, 60, 64, 72, 80, 96, 108, 120, 128, 144, 160, 192, 216, 256)
SIGNIFICANT = 3.0
CHECK_SEED = 20240807


def _tags(batch) -> tuple[Tensor, Tensor] | None:
    """(member, time index) of a batch's snapshots, where the reader tells."""
    if not isinstance(batch, dict) or "time_index" not in batch or "member" not in batch:
        return None
    return torch.as_tensor(batch["member"]), torch.as_tensor(batch["time_index"])


def _spectra(model, reader, tagged: bool = False):
    """(frames_hat, target_hat, state, history or tags) of every batch, float64."""
    device = next(model.parameters()).device
    for batch in iterate(reader):
        state, target, history = unpack(batch)
        state, target = state.to(device).double(), target.to(device).double()
        stack = state[:, None]
        if history is not None:
            history = history.to(device).double()
            stack = torch.cat([stack, history], dim=1)
        spectra = model.band.to_spectral(stack), model.band.to_spectral(target)
        yield (*spectra, state, history, _tags(batch)) if tagged else (*spectra, state, history)


def fit_mean(model, reader) -> dict[str, Any]:
    """Scales, library, first residual spectrum and the generator's grid, from ``fit`` members."""
    b = model.band
    model.statistics = {}
    active = model.library.fit((f, t) for f, t, _, _ in _spectra(model, reader))
    power = torch.zeros((), dtype=torch.float64)  # (features,)
    spectrum = torch.zeros(len(b.group_k2), dtype=torch.float64)
    total = torch.zeros(len(b.group_k2), dtype=torch.float64)
    num, largest = 0, []
    for frames_hat, target_hat, _, _ in _spectra(model, reader):
        largest.append(b.largest(frames_hat[:, 0]).cpu())
        features = b.by_group(model.present_features(frames_hat[:, 0]).abs().square())
        power = power + features.sum((0, -1)).cpu()
        residual = target_hat - model.library(frames_hat)
        spectrum += b.by_group(residual.abs().square()).sum(0).cpu()
        total += b.by_group(target_hat.abs().square()).sum(0).cpu()
        num += len(target_hat)
    rms = (power / num).sqrt()
    low = torch.cat(largest)
    low_std = low.std(0).clamp(min=1e-6 * float(rms[2]))
    variance = spectrum / num
    if not float(total.sum()) > 0:
        raise ValueError("the closure targets are all zero: nothing to learn")
    modes, size, tail = generator_grid(b, variance, model.config["modes"])
    kept = band(modes, model.length)
    per_mode = resize(b.spread(variance / b.group_size), modes)
    model.statistics = {
        "library": model.library.coefficients,
        "features/rms": rms.clamp(min=1e-30),
        "largest/mean": low.mean(0),
        "largest/std": low_std,
        "target/rms": (total.sum() / num).sqrt(),
        "first/spectrum": _group_values(kept, per_mode),
        "first/tail": torch.tensor(tail, dtype=torch.float64),
        "first/snapshots": torch.tensor(float(num), dtype=torch.float64),
        "generator/modes": torch.tensor(float(modes), dtype=torch.float64),
        "generator/size": torch.tensor(float(size), dtype=torch.float64),
    }
    model.refresh()
    return {
        "terms": active,
        "residual": math.sqrt(float(variance.sum()) / float(total.sum() / num)),
        "generator_grid": size,
        "generator_modes": modes,
        "snapshots": num,
    }


def power_of(spectrum: Tensor, kept) -> float:
    """Pointwise variance of a group spectrum."""
    return float((spectrum * kept.group_size).sum())


def _group_values(kept, per_mode: Tensor) -> Tensor:
    """Group averages (groups,) of per-mode values."""
    return kept.by_group(per_mode) / kept.group_size


def generator_grid(b, variance: Tensor, network_modes: int) -> tuple[int, int, float]:
    """(modes, grid, variance beyond) that hold the residual.

    All but 1e-7 of its variance on a grid of at most 32, else all but 1e-4, within the band.
    """
    per_mode = b.spread(variance / b.group_size) * b.weights
    whole = float(variance.sum())

    def tail(modes: int) -> float:
        return max(whole - float(resize(per_mode, modes).sum()), 0.0)

    options = list(range(min(4, b.modes), b.modes + 1))
    small = [m for m in options if m <= 15 and tail(m) <= 1e-7 * whole]
    loose = [m for m in options if tail(m) <= 1e-4 * whole]
    modes = (small or loose or [b.modes])[0]
    need = max(2 * modes + 2, 2 * network_modes)
    size = next((s for s in SIZES if s >= need), need + need % 2)
    return modes, size, tail(modes)


def _shell_sums(kept, values: Tensor) -> Tensor:
    """(B, shells) sums over the plane of per-mode values (B, ...)."""
    shell = kept.grid.shell().to(values.device).flatten()
    out = values.new_zeros(len(values), kept.grid.num_shells)
    weighted = values * kept.on("weights", values.device, values.dtype)
    return out.index_add_(1, shell, weighted.flatten(1))


def shell_gain(products: Tensor, squares: Tensor) -> Tensor:
    """Gain per shell (shells,) from per-snapshot sums <truth, output> and <output, output>."""
    total, power = products.sum(0), squares.sum(0)
    error = products.square().sum(0).sqrt()
    gain = (total / power.clamp(min=1e-300)).clamp(0.0, 2.0)
    return torch.where((total > SIGNIFICANT * error) & (power > 0), gain, 0.0)


def fit_law(model, reader) -> dict[str, Any]:
    """Gains of the mean network, amplitude and law of the residual, from ``hold`` members."""
    kept = model.residual_band
    for key in ("mean/gain", "amplitude/gain", "law/spectrum", "law/tail", "score/gain"):
        model.statistics.pop(key, None)
    shares = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    products, squares = [], []
    for frames_hat, target_hat, state, history in _spectra(model, reader):
        encoding = model.encode(state, history, raw=True)
        output = kept.to_spectral(encoding.raw[:, 0].double())
        residual = resize(target_hat - encoding.mean_hat, kept.modes)
        white = residual * model.first.modes("whiten", residual)
        output = output * model.first.modes("mask", residual)
        products.append(_shell_sums(kept, (white.conj() * output).real).cpu())
        squares.append(_shell_sums(kept, output.abs().square()).cpu())
    model.statistics["mean/gain"] = shell_gain(torch.cat(products), torch.cat(squares))
    if model.config["amplitude"]:
        model.statistics["amplitude/gain"] = _amplitude_gain(model, reader, shares)
    kept_power = torch.zeros(len(kept.group_k2), dtype=torch.float64)
    plain_power, tail, num = torch.zeros_like(kept_power), 0.0, 0
    memory = LagCorrelation(kept)
    for frames_hat, target_hat, state, history, tags in _spectra(model, reader, tagged=True):
        encoding = model.encode(state, history)
        residual = target_hat - encoding.mean_hat
        q_hat = model.standardise(residual, encoding.log_amplitude)
        kept_power += kept.by_group(q_hat.abs().square()).sum(0).cpu()
        memory.add(q_hat, tags)
        inside = resize(residual, kept.modes)
        plain_power += kept.by_group(inside.abs().square()).sum(0).cpu()
        beyond = residual - resize(inside, model.band.modes)
        tail += float(model.band.by_group(beyond.abs().square()).sum())
        num += len(q_hat)
    spectrum, tail = kept_power / num / kept.group_size, tail / num
    plain = plain_power / num / kept.group_size
    if not bool((model.statistics["mean/gain"] != 0).any()) and model.amplitude_share == 0:
        # nothing was learned by gradients: the members of ``fit`` are as good as unseen
        share = num / (num + float(model.statistics["first/snapshots"]))
        spectrum = share * spectrum + (1 - share) * model.statistics["first/spectrum"]
        tail = share * tail + (1 - share) * float(model.statistics["first/tail"])
    if model.config["base_noise"] == "white":
        level = power_of(spectrum, kept) / float(kept.group_size.sum())
        spectrum = torch.full_like(spectrum, level)
    elif model.config["base_noise"] != "matched":
        raise ValueError(f"base_noise={model.config['base_noise']!r}, expected matched or white")
    model.statistics["law/spectrum"] = spectrum
    model.statistics["plain/spectrum"] = plain
    model.statistics["memory/times"] = memory.times()
    model.statistics["law/tail"] = torch.tensor(tail, dtype=torch.float64)
    model.refresh()
    gain = model.statistics["mean/gain"]
    return {
        "mean_gain": [round(float(g), 3) for g in gain],
        "amplitude_gain": model.amplitude_share,
        "memory": [round(float(t), 2) for t in model.statistics["memory/times"]],
        "residual": math.sqrt(power_of(spectrum, kept) + tail)
        / float(model.statistics["target/rms"]),
        "snapshots": num,
    }


def _amplitude_gain(model, reader, shares: Tensor) -> Tensor:
    """Share of log D, 0 to 1, that is most likely on unseen members; 0 unless significant."""
    kept, found = model.residual_band, []
    for frames_hat, target_hat, state, history in _spectra(model, reader):
        encoding = model.encode(state, history, raw=True)
        field = kept.to_physical(
            resize(target_hat - encoding.mean_hat, kept.modes), model.size
        ).square()
        log = model.log_amplitude(encoding.raw).double()
        powers = [(field * torch.exp(-2 * share * log)).mean((-2, -1)) for share in (0.0, *shares)]
        found.append(torch.stack([log.mean((-2, -1)), *powers], dim=1).cpu())
    table = torch.cat(found)
    level, scaled = table[:, :1], table[:, 1:]
    # each amplitude, the uniform one included, with its own best overall factor
    factor = scaled.mean(0)
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), shares])
    loss = shares * level + 0.5 * (factor.log() + scaled / factor)
    table = loss[:, :1] - loss[:, 1:]
    shares = shares[1:]
    total, error = table.sum(0), (table - table.mean(0)).square().sum(0).sqrt()
    best = int(total.argmax())
    significant = float(total[best]) > SIGNIFICANT * float(error[best])
    # a uniform amplitude costs accuracy and buys nothing below a part in a thousand
    worth = significant and float(table[:, best].mean()) > 1e-3
    return shares[best] if worth else torch.tensor(0.0, dtype=torch.float64)


def check_generator(model, reader) -> dict[str, Any]:
    """Gains of the generator's velocity and of its samples' spread, from ``valid`` members."""
    kept = model.residual_band
    for key in ("score/gain", "score/spread"):
        model.statistics.pop(key, None)
    if model.config["generator"] != "score":
        return {}
    products, squares, first = [], [], 0
    for repeat in range(2):
        for frames_hat, target_hat, state, history in _spectra(model, reader):
            encoding = model.encode(state, history)
            q_hat = model.standardise(target_hat - encoding.mean_hat, encoding.log_amplitude)
            ids = range(first, first + len(q_hat))
            first += len(q_hat)
            uniform = draws.uniforms(CHECK_SEED, "check", ids, 0).to(q_hat.device)
            z = model.base_noise(CHECK_SEED, "check", ids, 0, like=q_hat)
            angle = uniform[:, 0] * (math.pi / 2)
            cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
            x = (cos * q_hat + sin * z).to(torch.complex64)
            velocity = (cos * z - sin * q_hat) * model.law.modes("whiten", q_hat)
            encoded = model.encode_conditions(encoding, None, None)
            output = model.whitened_velocity(x, angle, encoded).to(torch.complex128)
            output = output * model.law.modes("mask", q_hat)
            products.append(_shell_sums(kept, (velocity.conj() * output).real).cpu())
            squares.append(_shell_sums(kept, output.abs().square()).cpu())
    gain = shell_gain(torch.cat(products), torch.cat(squares))
    model.statistics["score/gain"] = gain
    report = {"score_gain": [round(float(g), 3) for g in gain], "snapshots": first // 2}
    if model.score_active:
        spread = _spread_gain(model, reader)
        model.statistics["score/spread"] = spread
        report["spread_gain"] = [round(float(s), 3) for s in spread]
    return report


def _spread_gain(model, reader) -> Tensor:
    """Standard deviation of the residual over that of the generator's samples, per shell."""
    kept, first = model.residual_band, 0
    seen = torch.zeros(kept.grid.num_shells, dtype=torch.float64)
    drawn = torch.zeros_like(seen)
    for _, target_hat, state, history in _spectra(model, reader):
        encoding = model.encode(state, history)
        q_hat = model.standardise(target_hat - encoding.mean_hat, encoding.log_amplitude)
        ids = range(first, first + len(q_hat))
        first += len(q_hat)
        z = model.base_noise(CHECK_SEED, "check", ids, 1, like=q_hat)
        x = model.generate(encoding, None, None, z, ids, CHECK_SEED, 1, None, None)
        seen += _shell_sums(kept, q_hat.abs().square()).sum(0).cpu()
        drawn += _shell_sums(kept, x.abs().square().double()).sum(0).cpu()
    ratio = (seen / drawn.clamp(min=1e-300)).sqrt()
    return torch.where((seen > 0) & (drawn > 0), ratio.clamp(0.5, 2.0), 1.0)
