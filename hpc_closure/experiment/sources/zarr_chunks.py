"""Parts of Zarr arrays, chunk by chunk from their files.

Zarr 3 sends each chunk through an event loop and a thread, which takes 0.1 ms: as long as a chunk
of 64 KiB takes to be unpacked, and five times as long as it takes to be read. Arrays in a folder
with one usual codec are read here; all others are left to zarr.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: codecs of Zarr 3 and their classes in numcodecs, which unpack the same bytes
CODECS = {"zstd": "Zstd", "blosc": "Blosc", "gzip": "GZip"}


def reader_of(item: Any, folder: Path) -> Callable[[tuple], np.ndarray]:
    """Return the function that reads a part of an array by a tuple of integers and slices.

    Args:
        item: a zarr array.
        folder: folder of its Zarr store.
    """
    metadata, dtype = item.metadata, item.dtype  # zarr forms them anew at each access
    unpack, shape, sizes = _unpacker(metadata), item.shape, item.chunks
    if unpack is None or dtype.kind not in "fiu" or not dtype.isnative or not shape:
        return item.__getitem__
    root, fill = folder / item.path, item.fill_value

    def part(index: tuple) -> np.ndarray:
        spans = [
            slice(one, one + 1) if isinstance(one, int) else slice(*one.indices(size))
            for one, size in zip(index, shape)
        ]
        if len(index) != len(shape) or any(one.step not in (None, 1) for one in spans):
            return item[index]
        out = np.empty([max(0, one.stop - one.start) for one in spans], dtype)
        along = [
            range(one.start // size, -(-one.stop // size)) if one.stop > one.start else ()
            for one, size in zip(spans, sizes)
        ]
        for chunk in itertools.product(*along):
            source, target = [], []
            for number, size, span in zip(chunk, sizes, spans):
                first, last = max(number * size, span.start), min(number * size + size, span.stop)
                source.append(slice(first - number * size, last - number * size))
                target.append(slice(first - span.start, last - span.start))
            key = metadata.encode_chunk_key(chunk)
            try:
                with open(f"{root}/{key}", "rb", buffering=0) as file:
                    packed = file.readall()
            except FileNotFoundError:  # a chunk without values is not stored
                out[tuple(target)] = 0 if fill is None else fill
                continue
            try:
                values = np.frombuffer(unpack(packed), dtype).reshape(sizes)
            except Exception as error:  # each codec has its own
                raise OSError(f"chunk {key}: {error}") from error
            out[tuple(target)] = values[tuple(source)]
        return out[tuple(0 if isinstance(one, int) else slice(None) for one in index)]

    return part


def _unpacker(metadata: Any) -> Callable[[bytes], Any] | None:
    """Return the function that unpacks a chunk; None if the array has unusual codecs."""
    import numcodecs  # zarr's own codecs

    if metadata.zarr_format == 2:
        if metadata.order != "C" or metadata.filters:
            return None
        return metadata.compressor.decode if metadata.compressor else bytes
    codecs = [codec.to_dict() for codec in metadata.codecs]
    settings = codecs[0].get("configuration", {})
    if codecs[0]["name"] != "bytes" or settings.get("endian", "little") != "little":
        return None
    if len(codecs) == 1:
        return bytes
    if len(codecs) > 2 or codecs[1]["name"] not in CODECS:
        return None
    if codecs[1].get("configuration", {}).get("checksum"):
        return None
    return getattr(numcodecs, CODECS[codecs[1]["name"]])().decode
