"""The exported draw is a function of real arrays that equals a process, for every kind of law."""

from dataclasses import replace

import closure_case
import cube_case
import pytest
import torch
from torch import fx
from typer.testing import CliRunner

import hpc_closure
from hpc_closure.cli import app
from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.header import Header
from hpc_closure.export import real_pairs
from hpc_closure.export.package import _prepared, _self_test
from hpc_closure.export.program import Inputs, Program, Settings, noise_of_call

MEMBERS, CALL = 3, 5
NONE = {"sensors": "none"}


def closure_of(model) -> Closure:
    """A closure of a model that was fitted in a test."""
    target = {"kind": "diffusion", "interval": 1, "dt": 0.01, "every": 0.04}
    header = Header(model.config, model.grid, model.length, target, {}, ())
    return Closure(model.eval(), header)


def by_gaussian():
    model = closure_case.fitted(closure_case.law_of(), 60, preset="gaussian")
    times = torch.zeros_like(model.statistics.memory_times)
    times[2], times[3] = 4.0, 20.0
    model.adopt(replace(model.statistics, memory_times=times, memory_spacing=1.0))
    assert len(model.knot_spacings) == 2
    return model


def by_generator(**config):
    model = closure_case.fitted(closure_case.law_of(), 60, **config)
    shells = model.frame.kept.grid.num_shells
    model.adopt(replace(model.statistics, score_gain=torch.ones(shells)))
    return model


KINDS = {
    "gaussian with memory": by_gaussian,
    "modes": lambda: closure_case.fitted(
        closure_case.law_of(), 60, residual="modes", conditions=NONE
    ),
    "mixture": lambda: by_generator(preset="mixture"),
    "crps": lambda: by_generator(residual="crps", conditions=NONE),
    "point mixture": lambda: by_generator(preset="point_mixture"),
    "learned": lambda: by_generator(sensors="learned", conditions={"sensors": "optional"}),
    "deterministic": lambda: closure_case.fitted(
        closure_case.law_of(), 60, residual="none", conditions=NONE
    ),
    "three sides": lambda: cube_case.fitted(100, preset="gaussian"),
}


def inputs_of(program, state, seed):
    """Arguments of a program for a state and a key, without a past."""
    shapes = program.shapes()
    key = keyed_noise.Key(seed, "sample", range(MEMBERS), CALL)
    none = (torch.zeros(shape, dtype=torch.float64) for shape in shapes[1:3])
    noise = noise_of_call(program.noise, key, CALL * program.how.interval_ratio)
    inputs = Inputs(state, *none, *noise)
    assert [tuple(one.shape) for one in inputs] == shapes
    return inputs


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_draws_as_a_process(kind):
    closure = closure_of(KINDS[kind]())
    settings = Settings(MEMBERS, closure.header.size, 2)
    program = Program(closure, settings).eval()
    state = program.example().state
    process = closure.process(MEMBERS, seed=3, interval=2)
    process.calls = CALL
    expected = process(state)
    with _prepared(closure, program):
        inputs = inputs_of(program, state, 3)
        u, _, u_hat, _ = program(*inputs)
        exported = torch.export.export(program, tuple(inputs), strict=False)
        real_pairs.replace(exported.graph)
        exported.graph_module.recompile()
        again = exported.module()(*inputs)[0]
    largest = expected.abs().max()
    assert float((u - expected).abs().max() / largest) < 2e-6
    assert float((again - expected).abs().max() / largest) < 2e-6
    assert bool(torch.isfinite(u_hat).all())


def test_complex_casts_and_reversals_become_real_pairs():
    class Casts(torch.nn.Module):
        def forward(self, x):
            z = torch.view_as_complex(x)
            wide = z.to(torch.complex128) * torch.ones(3, dtype=torch.float64)
            one = (2 - 1j) * z * wide / 3 + wide.conj().flip(-1)
            zeros = z.new_zeros(4, 3)
            zeros[:2] = z
            one = one + zeros.sum(0, keepdim=True)
            inverse = x[..., 1].double() / (one * one) + 2 / one
            return torch.view_as_real(torch.sub(x[..., 0].double() + one, inverse, alpha=2))

    x = torch.randn(2, 3, 2)
    exported = torch.export.export(Casts(), (x,), strict=False)
    assert real_pairs.replace(exported.graph) >= 2
    exported.graph_module.recompile()
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_complex():
            inputs = [one.meta["val"] for one in node.all_input_nodes if isinstance(one, fx.Node)]
            assert all(one.dtype == value.dtype for one in inputs if one.is_complex()), node
            assert node.target not in (*real_pairs.REVERSALS, *real_pairs.SUMS)
    assert torch.allclose(exported.module()(x), Casts()(x), rtol=1e-6)


def test_what_cannot_be_exported_is_said_in_one_line():
    model = closure_case.fitted(closure_case.law_of(), 60, residual="resampled", conditions=NONE)
    with pytest.raises(ValueError, match="archive; train model.residual=gaussian"):
        Program(closure_of(model), Settings(2, 32, 1))
    closure = hpc_closure.load("subgrid_backscatter")
    with pytest.raises(ValueError, match="call it every 80 steps"):
        Program(closure, Settings(2, 32, 40))
    with pytest.raises(ValueError, match="field is 16x16; a band of 10 modes needs"):
        Program(closure, Settings(2, 16, 80))


@pytest.mark.parametrize(
    "words, line",
    [
        ("diffusion --members 4", "--to FOLDER is missing, e.g. --to closure --members 20"),
        ("diffusion --to x", "--members NUMBER is missing"),
        ("x --here --members 4", "--members is fixed in an exported folder"),
        ("none.safetensors --to x --members 4", "none.safetensors: no such file"),
        ("diffusion --to x --members 0", "--members 0: expected at least 1"),
        ("diffusion --to x --members 4 --points 45", "--points 45: expected an even number"),
        ("diffusion --to x --members 4 --march 486", "--march 486: expected one of native,"),
        ("x --here", "closure.json: no such file; export the model again"),
    ],
)
def test_a_wrong_option_is_one_line(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = str(CliRunner().invoke(app, ["export", *words.split()]).exception)
    assert line in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_the_self_test_is_a_later_call_of_a_process_with_a_past():
    closure = hpc_closure.load("subgrid_backscatter")
    made = _self_test(closure, Program(closure, Settings(2, 32, 80)))
    assert b'"calls":"2"' in made and b'"closures"' in made
