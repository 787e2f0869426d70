"""Small ensembles of others: fields with a known closure, in every format that is read."""

from pathlib import Path

import h5py
import numpy as np
import yaml

from hpc_closure.experiment import reading

N, LENGTH, SPACING = 16, 2 * np.pi, 0.1


def fields(members=12, times=12, n=N, seed=0, sides=2, memory=0.9):
    """Filtered noise with memory, and a closure that depends on it: two (members, times, *n)."""
    rng = np.random.default_rng(seed)
    waves = np.meshgrid(*[np.fft.fftfreq(n, 1 / n)] * sides, indexing="ij")
    k2, largest = sum(k**2 for k in waves), np.max(np.abs(waves), axis=0)
    axes = tuple(range(1, 1 + sides))
    size = np.where((k2 > 0) & (largest <= (n - 1) // 3), 1 / (1.0 + k2), 0)

    def noise():
        return np.fft.fftn(rng.standard_normal((members, *[n] * sides)), axes=axes) * size

    fresh = np.sqrt(1 - memory**2)
    state, rest, states, closures = noise(), noise(), [], []
    for _ in range(times):
        field, other = (np.fft.ifftn(one, axes=axes).real for one in (state, rest))
        states.append(field)
        closures.append(0.3 * np.roll(field, 1, 1) + 0.1 * field + 0.2 * other)
        state, rest = memory * state + fresh * noise(), memory * rest + fresh * noise()
    return tuple(np.stack(one, 1).astype(np.float32) for one in (states, closures))


def axes(number, n=N):
    """``number`` times, and the points of a side."""
    return 5 + SPACING * np.arange(number), np.arange(n) * LENGTH / n


def hdf5(path: Path, state, closure, dtype="f4", order=(0, 1, 2, 3), **more):
    """Write HDF5 without labels."""
    with h5py.File(path, "w") as file:
        file["q"] = state.transpose(order).astype(dtype)
        file["sub/forcing"] = closure.transpose(order).astype(dtype)
        file["time"] = axes(state.shape[1])[0]
        for name, values in more.items():
            file[name] = values
    return path


def netcdf(path: Path, state, closure, kind="NETCDF4", dims=("member", "time", "x", "y")):
    """Write NetCDF with coordinates."""
    from netCDF4 import Dataset

    times, points = axes(state.shape[dims.index("time")])
    with Dataset(path, "w", format=kind) as file:
        for name, size in zip(dims, state.shape):
            file.createDimension(name, size)
        for name, values in {"time": times, "x": points, "y": points}.items():
            file.createVariable(name, "f8", (name,))[:] = values
        for name, values in {"q": state, "forcing": closure}.items():
            file.createVariable(name, "f4", dims)[:] = values
    return path


def zarr(path: Path, state, closure, version=3, n=N):
    """Write a Zarr group with names of dimensions."""
    from zarr import open_group

    root, dims = open_group(str(path), mode="w", zarr_format=version), ["member", "time", "x", "y"]
    times, points = axes(state.shape[1], n)
    each = {"q": (state, dims), "forcing": (closure, dims), "time": (times, ["time"])}
    each |= {name: (points, [name]) for name in ("x", "y")}
    for name, (values, names) in each.items():
        labels = {"dimension_names": names} if version == 3 else {}
        chunks = (1, 1, *values.shape[2:]) if values.ndim == 4 else values.shape
        array = root.create_array(
            name, shape=values.shape, chunks=chunks, dtype=values.dtype, **labels
        )
        array[...] = values
        if version == 2:
            array.attrs["_ARRAY_DIMENSIONS"] = names
    return path


def well(folder: Path, state, closure):
    """Write a folder of two files in The Well's layout."""
    folder.mkdir()
    times, points = axes(state.shape[1])
    for number, half in enumerate(np.array_split(np.arange(len(state)), 2)):
        with h5py.File(folder / f"part_{number}.hdf5", "w") as file:
            file.attrs["n_spatial_dims"] = 2
            file.create_group("dimensions").attrs["spatial_dims"] = ["x", "y"]
            for name, values in {"time": times, "x": points, "y": points}.items():
                file[f"dimensions/{name}"] = values
            group = file.create_group("t0_fields")
            group.attrs["field_names"] = ["q", "forcing"]
            for name, values in {"q": state, "forcing": closure}.items():
                group[name] = values[half]
                group[name].attrs["sample_varying"] = group[name].attrs["time_varying"] = True
                group[name].attrs["dim_varying"] = [True, True]
    return folder


DIMS = ("member", "time", "x", "y")


def section(path, **more):
    """Section ``data`` of the ensembles above."""
    return {"path": str(path), "state": {"q": "q"}, "closure": {"q": "forcing"}, **more}


def experiment(folder: Path, data: dict, name="case", **more):
    """Write an experiment with a closed form, read it."""
    values = {
        "name": name,
        "root": str(folder / "runs"),
        "data": data,
        "model": {"preset": "gaussian"},
        "train": {"steps": 5, "batch": 8, "split": [0.7, 0.15, 0.15]},
        "cluster": {"device": "cpu", "threads": 1},
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return reading.load(path)
