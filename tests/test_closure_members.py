"""Several states in one call, each for several members: the samples of one call for each."""

from dataclasses import replace

import pytest
import torch
from closure_case import SMALL, batches_of, law_of, states_of

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields.keyed_noise import pair
from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.sensors import Sensors, regular_positions
from hpc_closure.closure.model import Request
from hpc_closure.closure.networks.blocks import FieldNetwork, ScoreNetwork
from hpc_closure.closure.networks.sensor_network import PosteriorNetwork

STATES, MEMBERS = 3, 4
WITHOUT = {"sensors": "none"}
CONFIGS = {
    "score": {},
    "one pass": {"residual": "crps"},
    "learned": {"sensors": "learned"},
    "gaussian": {"residual": "gaussian"},
    "mean alone": {"residual": "none", "conditions": WITHOUT},
}
CLOSED = {"smagorinsky": 0.2, "jansen_held": 0.3}


def acting(**config):
    """A small model of which every part acts, with random weights where they begin at zero."""
    law = law_of()
    torch.manual_seed(0)
    model = build({**SMALL, **config}, law.grid.size)
    batches = batches_of(law, 60)
    model.begin("mean", batches)
    model.begin(model.phases[1].name, batches)
    with torch.no_grad():
        for weight in model.parameters():
            if not bool(weight.any()):
                weight.copy_(0.05 * torch.randn(weight.shape))
    ones = torch.ones(model.frame.kept.grid.num_shells).double()
    told = replace(model.statistics, mean_gain=ones, amplitude_gain=1.0, score_gain=ones)
    model.adopt(told)
    return model.eval().requires_grad_(False)


def both(model, sensors=None, **options):
    """Samples of all states at once, and state by state, (B, M, n, n)."""
    states = states_of(STATES).float()
    ids = [[pair(member, row) for member in range(MEMBERS)] for row in range(STATES)]
    asked = Request(states, sum(ids, []), seed=3, sensors=sensors, **options)
    alone = [
        replace(
            asked,
            state=states[row : row + 1],
            members=ids[row],
            sensors=None if sensors is None else sensors.rows(slice(row, row + 1)),
        )
        for row in range(STATES)
    ]
    together = model.sample_batch(asked).unflatten(0, (STATES, MEMBERS))
    return together, torch.stack([model.sample_batch(one) for one in alone])


def close(one, other):
    return float((one - other).abs().max() / other.abs().max()) < 2e-5  # single precision


@pytest.mark.parametrize("name", CONFIGS)
def test_states_of_one_call_are_sampled_as_each_alone(name):
    model = acting(**CONFIGS[name])
    shown = [None]
    if model.sensors_allowed != "none":
        law = law_of()
        values = law.sample(states_of(STATES), members=[1], seed=2)[0, :, ::8, ::8].flatten(1)
        noise = 0.3 * law.variance**0.5
        shown += [Sensors(values, regular_positions(4), std) for std in (0.0, noise)]
    for sensors in shown:
        for options in ({}, {"interval_ratio": 2.0}, {"method": "mean_gp"}):
            together, alone = both(model, sensors, **options)
            assert close(together, alone), (sensors, options)
            assert not close(together[1], alone[0])


@pytest.mark.parametrize("kind", CLOSED)
def test_eddy_viscosities_answer_each_state(kind):
    together, alone = both(build({"preset": kind, "coefficient": CLOSED[kind]}, 32))
    assert close(together, alone) and not close(together[1], alone[0])


@pytest.mark.parametrize("sensors", ["none", "required"])
def test_the_published_network_answers_each_state(sensors):
    small = {"width": 4, "modes": 4, "layers": 1, "conditions": {"sensors": sensors}}
    torch.manual_seed(0)
    values = 30 * torch.randn(STATES, 256)
    given = None if sensors == "none" else Sensors(values, regular_positions(16))
    model = build({"preset": "published", **small}, 32).requires_grad_(False)
    for weight in model.network.head.parameters():
        weight *= 100  # what the network says is seen beside the noise
    together, alone = both(model, given)
    assert close(together, alone) and not close(together[1], alone[0])


@pytest.mark.parametrize("name", ["score", "learned"])
def test_what_a_state_decides_is_computed_once_for_its_members(name, monkeypatch):
    rows = []

    def count(network, method, fields_of):
        plain = getattr(network, method)

        def counted(self, *given):
            rows.append(len(fields_of(given)))
            return plain(self, *given)

        monkeypatch.setattr(network, method, counted)

    count(FieldNetwork, "forward", lambda given: given[0])
    count(ScoreNetwork, "encode", lambda given: given[0])
    count(PosteriorNetwork, "estimate", lambda given: given[1].fields)
    model = acting(**CONFIGS[name])
    rows.clear()
    drawn = model.sample_batch(Request(states_of(STATES), range(STATES * MEMBERS)))
    assert len(drawn) == STATES * MEMBERS
    assert rows == 3 * [STATES]  # of the mean, of the amplitude, of the generator


def test_rows_for_members():
    rows = torch.arange(6).unflatten(0, (3, 2))
    assert for_members(rows, 6).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert for_members(rows, 3) is rows and len(for_members(rows[:1], 7)) == 1
