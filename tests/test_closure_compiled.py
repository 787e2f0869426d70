"""Networks as compiled functions: those of torch, bits, and who goes which way."""

import copy
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hpc_closure.closure.networks import blocks, compiled
from hpc_closure.closure.networks.blocks import FieldNetwork, ScoreNetwork
from hpc_closure.closure.networks.compiled import compiling
from hpc_closure.closure.networks.sensor_network import Blocks

SIZE, CHANNELS = 10, 3


def filled(module):
    """With weights of no layer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return module.eval()


def field_network():
    return filled(FieldNetwork(CHANNELS, 6, 3, 2))


def fields(count, channels=CHANNELS, size=SIZE):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, channels, size, size, generator=generator)


def numbers(count, width=blocks.SUMMARY):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def field_answer(count=4, size=SIZE):
    made = field_network()
    return lambda rows=slice(None): (made(fields(count, size=size)[rows], numbers(count)[rows]),)


def score_answer(count=4, size=SIZE, states=None):
    states = states or count
    made = filled(ScoreNetwork(CHANNELS, 5, 3, 3))
    noisy, largest = fields(count, 2, size), numbers(count, blocks.LARGEST)
    angle = torch.linspace(0.1, 1.5, count)

    def answer(rows=slice(None)):
        own = rows if states == count else slice(None)
        encoded = made.encode(fields(states, size=size)[own], numbers(states)[own])
        return (*made(noisy[rows], largest[rows], angle[rows], encoded), encoded.maps)

    return answer


def blocks_answer(count=4, size=SIZE):
    made, maps = filled(Blocks(CHANNELS, 6, 3, 2, "auto")), fields(count, 24, size)
    everywhere = numbers(count, 24)[..., None, None]

    def answer(rows=slice(None)):
        x = fields(count, size=size)[rows]
        alone, both = made(x), made(x, maps[rows], everywhere[rows])
        return (*alone, *both, made(x, everywhere[rows])[1], made(x, maps[rows])[1])

    return answer


ANSWERS = {"field": field_answer, "score": score_answer, "blocks": blocks_answer}


@pytest.fixture
def counted(monkeypatch):
    """Names of the compiled functions that were called."""
    seen, run = [], compiled._run
    monkeypatch.setattr(
        compiled,
        "_run",
        lambda made, *rest: (seen.append(made.__name__), run(made, *rest)),
    )
    blocks._compare()
    seen.clear()
    return seen


def assert_close(found, expected, tolerance=1e-5):  # round-off of both, through all blocks
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("size", [6, 10, 48])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_those_of_torch(name, size, counted):
    answer = ANSWERS[name](size=size)
    found = answer()
    assert "_fourier_chain" in counted
    with compiling.off():
        expected = answer()
    assert_close(found, expected)
    assert all(bool(one.any()) for one in expected)


@torch.no_grad()
def test_members_share_a_state(counted):
    answer = score_answer(count=4, states=1)
    found = answer()
    with compiling.off():
        assert_close(found, answer())
    assert set(counted) == {"_fourier_chain", "_perceptrons", "_noisy_numbers"}


@torch.no_grad()
@pytest.mark.parametrize("name", ANSWERS)
def test_bits_depend_neither_on_the_batch_nor_on_threads(name, monkeypatch):
    answer = ANSWERS[name](count=5)
    every = answer()
    for rows in (slice(0, 1), slice(1, 3), slice(2, 5)):
        for one, whole in zip(answer(rows), every):
            assert torch.equal(one, whole[rows])
    for threads in (2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert all(torch.equal(one, whole) for one, whole in zip(answer(), every))


@torch.no_grad()
def test_a_sample_that_is_lost_is_lost_alone():
    made, x = field_network(), fields(3)
    expected = made(x, numbers(3))
    x[1, 0, 2, 2] = torch.nan
    found = made(x, numbers(3))
    assert torch.equal(found[::2], expected[::2]) and bool(found[1].isnan().all())


def test_gelu():
    x = np.concatenate([np.linspace(-7, 7, 4001), [-1e6, -40, 40, 1e6, 1e30]]).astype("f4")
    found = np.array([compiled._gelu(one) for one in x])
    expected = functional.gelu(torch.from_numpy(x).double()).numpy()
    assert (np.abs(found - expected) <= 4e-7 * np.maximum(np.abs(x), 1)).all()
    assert np.isnan(compiled._gelu(np.float32("nan")))
    assert compiled._gelu(np.float32(-1e30)) == 0


@pytest.mark.parametrize("why", ["gradient", "double", "autocast", "large", "fft", "asked"])
def test_who_goes_by_operations_of_torch(why, counted):
    made, x, told = field_network(), fields(2), numbers(2)
    if why == "gradient":
        return _without(made, x, told, counted)
    with torch.no_grad():
        if why == "double":
            return _without(made.double(), x.double(), told.double(), counted)
        if why == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return _without(made, x, told, counted)
        if why == "asked":
            with compiling.off():
                return _without(made, x, told, counted)
        if why == "fft":
            made = filled(FieldNetwork(CHANNELS, 6, 3, 2, form="fft"))
        else:
            x = fields(1, size=compiled.LARGEST_SIDE + 2)
        made(x, told[: len(x)])
    assert "_fourier_chain" not in counted


def _without(made, x, told, counted):
    made(x, told)
    assert not counted


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_weights_that_change_are_read_again(training, counted):
    made, x, told = field_network().train(training), fields(2), numbers(2)

    def agrees():
        found = made(x, told)
        with compiling.off():
            expected = made(x, told)
        assert_close([found], [expected])
        return found

    first = agrees()
    made.blocks[1].spectral.weight.mul_(3)
    second = agrees()
    made.modulation.net[-1].bias.add_(1)
    third = agrees()
    other = copy.deepcopy(made)
    other.lift.weight.mul_(2)
    assert torch.equal(made(x, told), third) and not torch.equal(other(x, told), third)
    made.lift.weight = nn.Parameter(2 * made.lift.weight)
    assert torch.equal(agrees(), other(x, told))
    assert not torch.equal(first, second) and not torch.equal(second, third)


@torch.no_grad()
def test_an_engine_writes_behind_the_versions():
    made, x, told = field_network().train(), fields(2), numbers(2)
    seen = [made(x, told)]
    for then in (made.train, made.eval):
        made.blocks[0].out.weight.data.mul_(2)
        then()
        seen.append(made(x, told))
        with compiling.off():
            assert_close(seen[-1:], [made(x, told)])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@torch.no_grad()
def test_weights_that_are_elsewhere_are_not_read(counted):
    """ZeRO stage 3 gathers those of a layer when the layer is called."""
    made, x, told = field_network(), fields(2), numbers(2)
    expected = made(x, told)
    whole = {id(one): one.data for one in made.parameters()}
    layers = [one for one in made.modules() if one._parameters]

    def gather(layer, inputs):
        for weight in layer._parameters.values():
            if weight is not None:
                weight.data = whole[id(weight)]

    def part(layer, *_):
        for weight in layer._parameters.values():
            if weight is not None:
                weight.data = torch.empty(0)

    for layer in layers:
        part(layer)
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(part)
    counted.clear()
    assert_close([made(x, told)], [expected])
    assert not counted


@torch.no_grad()
def test_wrong_shapes_are_refused():
    stack, x = filled(Blocks(CHANNELS, 6, 3, 2, "auto")), fields(2)
    for wrong in (x[:, :2], fields(2, size=4)):
        with pytest.raises(ValueError, match="expected 3 channels on a square grid of at least 6"):
            stack(wrong)
    with pytest.raises(ValueError, match="field is 10x8; modes=3 needs a square grid"):
        stack(x[..., :8])
    with pytest.raises(ValueError, match="expected 24 of each sample"):
        stack(x, torch.zeros(1, 12, 1, 1))
    with pytest.raises(ValueError, match="expected 24 of each sample"):
        stack(x, torch.zeros(3, 24, 1, 1))
    with pytest.raises(ValueError, match="for fields"):
        stack(x, torch.zeros(1, 24, 5, 5))
    with pytest.raises(ValueError, match=r"expected \(B, 51\)"):
        field_network()(x, numbers(2, 50))
    noisy = torch.ones(1), numbers(2, blocks.LARGEST), x, numbers(3)
    with pytest.raises(ValueError, match="3 rows of conditions for 2 samples"):
        blocks.noisy_numbers(*noisy)
    assert stack(x[:0])[0].shape == (0, 6, SIZE, SIZE)


def test_inference_mode():
    blocks._compare.cache_clear()
    made, x, told = field_network(), fields(2), numbers(2)
    with torch.inference_mode():
        found, born = made(x, told), field_network()
        assert torch.equal(born(x, told), found)
    with torch.no_grad():
        assert torch.equal(made(x, told), found)


def test_after_a_fork_threads_are_new(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made, x, told = field_network(), fields(2), numbers(2)
    with torch.no_grad():
        expected = made(x, told)
        pid = os.fork()
        if not pid:
            signal.alarm(20)  # a thread that is not there would be waited for
            os._exit(0 if torch.equal(made(x, told), expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_switch_is_that_of_one_thread():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with compiling.off():
            seen.append(compiling.on)
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with compiling.off():
        leave.set()
        thread.join()
    assert seen == [False] and compiling.on


@torch.no_grad()
def test_a_wrong_function_is_not_believed(monkeypatch):
    run = compiled._run

    def wrong(made, *arguments):
        run(made, *arguments)
        if made is compiled._perceptrons:
            arguments[-1][:] *= 1.001

    monkeypatch.setattr(compiled, "_run", wrong)
    blocks._compare.cache_clear()
    with pytest.raises(
        RuntimeError, match="compiled functions of networks are wrong: remove Numba"
    ):
        field_network()(fields(1), numbers(1))
    monkeypatch.undo()
    blocks._compare.cache_clear()
    field_network()(fields(1), numbers(1))
