"""The stream of samples: each once per epoch, the same however it is shared and read."""

import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from train_case import Memory

from hpc_closure.data.samples import Order, Past, Share, TrainingSet, permutation
from hpc_closure.data.symmetry import Symmetry

TINY = 40_000  # bytes: forces streaming in windows of 16 samples


def test_permutation():
    one = permutation(7, "order", 3, 1000)
    assert sorted(one) == list(range(1000))
    assert (one == permutation(7, "order", 3, 1000)).all()
    assert (one != permutation(7, "order", 4, 1000)).mean() > 0.9
    assert (one != permutation(8, "order", 3, 1000)).mean() > 0.9


@pytest.mark.parametrize("order", [Order(103, 5), Order(103, 5, run=16, window=32)])
def test_every_epoch_holds_every_sample(order):
    seen = order.samples(np.arange(3 * 103)).reshape(3, 103)
    for epoch in seen:
        assert sorted(epoch) == list(range(103))
    assert (seen[0] != seen[1]).mean() > 0.8
    pieces = [order.samples(np.arange(first, first + 7)) for first in range(0, 3 * 103 - 7, 7)]
    assert (np.concatenate(pieces) == seen.ravel()[: 7 * len(pieces)]).all()


@pytest.mark.parametrize("history", [0, 5])
def test_samples_are_the_stored_ones(history):
    store = Memory()
    members = [4, 2, 9]
    part = TrainingSet(store, members, range(3, 18), past=Past(history))
    first = max(3, history)
    assert len(part) == 3 * (18 - first)
    batch = part.batch(0, 20)
    for row in range(20):
        member, index = int(batch["member"][row]), int(batch["time_index"][row])
        assert member in members and first <= index < 18
        assert (batch["state"][row].numpy() == store.read(member, index)).all()
        assert (batch["target"][row].numpy() == store.read(member, index, "closure")).all()
        for back in range(history):
            earlier = store.read(member, index - (back + 1))
            assert (batch["history"][row, back].numpy() == earlier).all()


@pytest.mark.parametrize("budget", [2**32, TINY])
def test_samples_with_the_last_closures(budget):
    """Of bursts: only those times that have them, and never those of another burst."""
    store = Memory()
    chosen = [4, 5, 9, 10, 14, 15]
    part = TrainingSet(store, range(9), chosen, past=Past(1, 2), budget=budget)
    assert part.resident == (budget > TINY) and len(part) == 9 * len(chosen)
    batch = part.batch(0, 12)
    for row in range(12):
        member, index = int(batch["member"][row]), int(batch["time_index"][row])
        assert index in chosen and batch["history"].shape[1] == 1
        assert (batch["history"][row, 0].numpy() == store.read(member, index - 1)).all()
        for back in (0, 1):
            last = store.read(member, index - (back + 1), "closure")
            assert (batch["previous"][row, back].numpy() == last).all()
    part.close()


@pytest.mark.parametrize("budget", [2**32, TINY])
def test_samples_with_the_states_that_follow(budget):
    """Only those that have them all: not across the gap between two bursts."""
    store = Memory()
    store.times = np.concatenate([np.arange(10) * 0.1, 5 + np.arange(10) * 0.1])
    whole = TrainingSet(store, range(9), range(2, 18), past=Past(0, 2), budget=budget)
    part = whole.followed(3)
    assert part.resident == (budget > TINY) and not whole.ahead
    assert part.indices.tolist() == [2, 3, 4, 5, 6, 10, 11, 12, 13, 14]
    batch = part.batch(0, 12)
    for row in range(12):
        member, index = int(batch["member"][row]), int(batch["time_index"][row])
        for step in range(3):
            later = store.read(member, index + step + 1)
            assert (batch["ahead"][row, step].numpy() == later).all()
            last = store.read(member, index - 1, "closure")
        assert (batch["previous"][row, 0].numpy() == last).all()
    part.close()
    with pytest.raises(ValueError, match="no stored time is followed by 10 others"):
        whole.followed(10)


def test_streamed_samples_are_those_of_memory():
    """Streaming changes the order only; every process reads its own slices."""
    store = Memory()
    held = TrainingSet(store, range(9), past=Past(1))
    streamed = TrainingSet(store, range(9), past=Past(1), budget=TINY)
    assert held.resident and not streamed.resident and streamed.order.window == 16
    for step in range(30):
        for rank in range(2):
            share = Share(8, rank, 2)
            ours = TrainingSet.batch(streamed, step * 8 + rank * 4, 4, Share(8, 0, 1))
            theirs = held.gather(streamed.order.samples(np.arange(4) + step * 8 + rank * 4))
            for key in ("state", "target", "history"):
                assert (ours[key] == theirs[key]).all()
            assert (share.holds(np.arange(8) + 8 * step) == (np.arange(8) // 4 == rank)).all()
    streamed.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_a_streamed_batch(size):
    store = Memory()
    parts = [TrainingSet(store, range(9), budget=TINY) for _ in range(size)]
    whole = TrainingSet(store, range(9), budget=TINY)
    for step in (0, 1, 5, 40, 41):  # forwards, a leap as on resuming, over an epoch's end
        expected = whole.batch(step * 8, 8, Share(8, 0, 1))["target"]
        count = 8 // size
        found = [
            part.batch(step * 8 + rank * count, count, Share(8, rank, size))["target"]
            for rank, part in enumerate(parts)
        ]
        assert (torch.cat(found) == expected).all()
    for part in [*parts, whole]:
        part.close()


def test_streaming_reads_hdf5_in_the_background(tmp_path):
    """From a real file, larger than the budget; reading is done by the time it is wanted."""
    path, store = tmp_path / "data.h5", Memory(members=6, times=64)
    with h5py.File(path, "w") as file:
        for name, values in store.fields.items():
            file[name] = values
    with h5py.File(path) as file:
        on_disk = SimpleNamespace(
            members=store.members,
            times=store.times,
            grid=store.grid,
            dimensions=2,
            channels=(),
            read=lambda member, index, field="state", grid=None: file[field][member, index],
        )
        streamed = TrainingSet(on_disk, range(6), budget=400_000)
        assert not streamed.resident
        held = TrainingSet(store, range(6))
        waited = 0.0
        for step in range(48):
            began = time.perf_counter()
            batch = streamed.batch(step * 8, 8, Share(8, 0, 1))
            waited += time.perf_counter() - began
            numbers = streamed.order.samples(np.arange(8) + step * 8)
            assert (batch["state"] == held.gather(numbers)["state"]).all()
        streamed.close()


def test_strided_grid():
    part = TrainingSet(Memory(), [0], grid=8)
    assert part.gather(np.array([3]))["state"].shape == (1, 8, 8)
    assert (part.gather(np.array([3]))["state"][0].numpy() == Memory().read(0, 3)[::2, ::2]).all()


def test_parts_split_the_members():
    whole = TrainingSet(Memory(), [1, 3, 5, 7, 9])
    fit, hold = whole.part(0, 2), whole.part(1, 2)
    members = [set(part.batch(0, 200)["member"].tolist()) for part in (fit, hold)]
    assert members == [{1, 5, 9}, {3, 7}]
    assert len(fit) + len(hold) == len(whole)
    alone = TrainingSet(Memory(), [4])
    assert len(alone.part(1, 2)) == len(alone)
    assert sum(len(batch["state"]) for batch in hold.passes(7)) == len(hold)


def test_passes_over_large_fields_take_fewer_samples_at_once():
    samples = TrainingSet(Memory(), [1, 3, 5, 7, 9])
    assert samples.points == (16, 16) and samples.pass_size == 256
    samples.points = (128, 128)
    assert samples.pass_size == 64
    assert {len(batch["state"]) for batch in samples.passes()} == {64, len(samples) % 64}
    samples.points = (64, 64, 64)
    assert samples.pass_size == 16


def test_symmetries_move_state_target_and_history_together():
    store = Memory()
    symmetry = Symmetry([np.zeros((16, 16))])
    plain = TrainingSet(store, range(9), past=Past(1), seed=3).followed(2)
    moved = plain.augmented(symmetry)
    one, other = plain.batch(24, 8), moved.batch(24, 8)
    elements = symmetry.draw(3, 24, 8)
    for key in ("state", "target", "history", "ahead"):
        assert (symmetry.apply(one[key], elements) == other[key]).all()
    assert (other["state"] != one["state"]).any()
    # the same position gets the same map in any batch
    assert (moved.batch(28, 4)["target"] == other["target"][4:]).all()


def test_what_follows_has_the_symmetries_of_the_flow():
    free, none = Symmetry([np.zeros((16, 16))]), Symmetry(
        [np.random.default_rng(0).random((16, 16))]
    )
    plain = TrainingSet(Memory(), range(9), seed=3)
    moved = plain.augmented(free, none)
    assert (moved.batch(24, 8)["state"] != plain.batch(24, 8)["state"]).any()
    one, other = (samples.followed(2).batch(24, 8) for samples in (plain, moved))
    assert (one["ahead"] == other["ahead"]).all()


def test_no_samples():
    with pytest.raises(ValueError, match="no samples: 0 trajectories"):
        TrainingSet(Memory(), [])
    with pytest.raises(ValueError, match="no samples: 1 trajectories and 0 of 20 stored times"):
        TrainingSet(Memory(), [0], range(5, 5))
