"""Closed-form statistics are those of all snapshots, whichever process has read them."""

import sys
from itertools import chain
from pathlib import Path

import pytest
import shares_case
import torch
import trajectory_case
from train_case import Memory

from hpc_closure.closure.reductions import Reader
from hpc_closure.data.samples import TrainingSet
from hpc_closure.train.processes import Processes
from hpc_closure.train.shares import SharedReader

CASE = Path(__file__).with_name("shares_case.py")
EXACT = 1e-10
# Tolerances of what float32 networks have a part in, by words of the names. Batches of another
# shape round otherwise, by 1e-7 of a draw. Coupled runs enlarge that (2e-6 measured), and so do
# the 3000 steps that train the centre (5e-5 measured), which the last gates of "default" read.
TOLERANCES = {
    "default after centre": 1e-3,
    "default: evidence": 1e-3,
    **dict.fromkeys(("law/", "plain/", "memory/", "score/", "mean/largest"), 1e-5),
    **dict.fromkeys(("trajectory/", "evidence", "pairs"), 1e-5),
}


@pytest.mark.mpi
def test_statistics_do_not_depend_on_the_number_of_processes(tmp_path, mpirun):
    """Of three; one has nothing to judge by. A failure on one ends all with its message."""
    done = mpirun(3, [sys.executable, CASE, tmp_path / "out.pt", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    alone, found = shares_case.statistics(Processes()), torch.load(tmp_path / "out.pt")
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert found[name].shape == value.shape, name
        size = value.double().abs().max() if value.numel() else 0.0
        near = next((near for word, near in TOLERANCES.items() if word in name), EXACT)
        far = (found[name] - value).abs() > near * size + 1e-15
        assert not bool(far.any()), (name, value, found[name])
    assert sorted(done.stdout.splitlines()) == [
        "0 Elsewhere: process 2/3 failed: the disk is gone",
        "1 Elsewhere: process 2/3 failed: the disk is gone",
        "2 OSError: the disk is gone",
    ]


def test_alone_it_is_a_plain_reader():
    """Bit for bit, reductions and all."""
    samples, results = trajectory_case.data(), []
    for plain in (True, False):
        model = trajectory_case.model("gaussian")
        for phase in model.phases[:2]:
            part = samples.of(phase.members)
            shared = SharedReader(Processes(), part, part.some(0), 50, len(part.indices))
            model.begin(phase.name, (lambda: part.passes(50)) if plain else shared)
        results.append(model.saved_statistics())
    one, other = results
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("together", [1, 20])  # of 20 snapshots of each trajectory
def test_each_snapshot_is_read_by_one_process_in_the_batch_where_it_is(size, together):
    part = TrainingSet(Memory(), range(9))
    numbers, read = part.some(0), []
    for rank in range(size):
        reader = SharedReader(Processes(rank, size), part, numbers, 32, together)
        share = [batch["sample_index"].tolist() for batch in reader]
        for number, batch in enumerate(share, reader.first_batch):
            assert {sample // 32 for sample in batch} == {number}
        own = list(chain.from_iterable(share))
        assert len(own) % together == 0 and reader.others == 180 - len(own)
        assert not own or reader.first == own[0]
        read.append(own)
    assert list(chain.from_iterable(read)) == list(range(180))
    assert max(map(len, read)) - min(map(len, read)) <= together


def test_batches_may_be_a_list_or_start_over():
    assert list(Reader([1, 2])) == list(Reader(lambda: iter([1, 2]))) == [1, 2]
    reader = Reader([])
    assert Reader.of(reader) is reader


def test_batches_that_are_kept_are_read_once():
    read = []

    def batches():
        read.append(1)
        yield from range(3)

    reader = Reader(batches)
    kept = reader.in_memory()
    assert list(kept) == list(kept) == [0, 1, 2] and len(read) == 1
    assert list(reader) == [0, 1, 2] and len(read) == 2  # which is as it was
