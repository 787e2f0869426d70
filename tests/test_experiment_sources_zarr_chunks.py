"""Zarr chunks that are read without zarr hold what zarr reads."""

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ZstdCodec

from hpc_closure.experiment.sources import formats, zarr_chunks

PARTS = (
    (2, slice(1, 9), slice(None), slice(0, 7)),
    (slice(None), 3, slice(2, 3), slice(None)),
    (slice(0, 3), slice(4, 4), slice(None), slice(None)),
    (1, slice(0, 10, 3), slice(None), slice(None)),  # a stride is left to zarr
)
KINDS = {
    "raw": {"compressors": None},
    "zstd": {"compressors": ZstdCodec()},
    "checked": {"compressors": ZstdCodec(checksum=True)},
    "blosc": {"compressors": BloscCodec()},
    "gzip": {"compressors": GzipCodec()},
    "sharded": {"shards": (2, 6, 8, 10)},
    "default 2": {"zarr_format": 2},
    "raw 2": {"zarr_format": 2, "compressors": None},
    "fortran 2": {"zarr_format": 2, "order": "F"},
    "big endian": {"serializer": BytesCodec(endian="big")},
}
OWN = {"raw", "zstd", "blosc", "gzip", "default 2", "raw 2"}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_zarr(kind, tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 10, 8, 10)).astype(np.float32)
    settings = {"dtype": "f4", "chunks": (1, 3, 4, 5), **KINDS[kind]}
    version = settings.pop("zarr_format", 3)
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=version)
    array = root.create_array("in/q", shape=values.shape, fill_value=2.5, **settings)
    array[:2] = values[:2]  # chunks of the last member are not stored
    variable = formats.open_file(tmp_path / "a.zarr").variables["in/q"]
    assert (variable.part.__name__ == "part") == (kind in OWN)
    for index in PARTS:
        read = variable.read(index)
        np.testing.assert_array_equal(read, array[index])
        assert read.shape == array[index].shape


def test_a_damaged_chunk_is_named(tmp_path):
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=(4, 8), dtype="f4", chunks=(1, 8), compressors=None
    )
    array[...] = 1.0
    (tmp_path / "a.zarr" / "c" / "2" / "0").write_bytes(b"torn")
    part = zarr_chunks.reader_of(
        zarr.open(str(tmp_path / "a.zarr"), mode="r"), tmp_path / "a.zarr"
    )
    assert (part((slice(0, 2), slice(None))) == 1).all()
    with pytest.raises(OSError, match="chunk c/2/0"):
        part((slice(0, 4), slice(None)))
