"""A flow of another solver: its box, its fields, and what the package refuses to do with it."""

import json

import pytest

from hpc_closure.data.symmetry import Symmetry
from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation


def external(**settings):
    return Equation.model_validate({"equation": "external", **settings})


def test_fields_and_sides_belong_to_each_problem():
    one, two = external(sides=1), external(fields={"b": "scalar", "a": "pseudo-scalar"})
    assert (one.dimensions, two.dimensions) == (1, 2)
    assert (one.channel_shape, two.channel_shape) == ((), (2,))
    assert [channel.name for channel in one.channels] == ["state"]
    assert two.channel_names == ("b", "a")
    assert [channel.kind for channel in two.channels] == ["scalar", "pseudo-scalar"]


def test_settings_of_a_file_keep_the_order_of_the_fields():
    problem = Problem(equation="external", fields={"b": {"unit": "m"}, "a": "scalar"}, length=6.0)
    stored = json.loads(json.dumps(problem.recipe(), sort_keys=True))
    assert Problem(**stored) == problem
    swapped = problem.replace(fields={"a": "scalar", "b": {"unit": "m"}})
    assert swapped.member_hash() != problem.member_hash()


def test_built_in_solver_is_refused_in_one_line():
    problem = Problem(equation="external", grid=16)
    with pytest.raises(ValueError, match="has no solver in this package: name yours in reduced"):
        Simulation(problem, [0], 0)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"noise": {"kind": "ring"}}, "physics.noise.kind=ring: equation external"),
        ({"fields": {}}, "expected at least one field"),
        ({"fields": {"u": "vector x"}}, "expected vector x followed by"),
        ({"fields": {"v": "vector y", "u": "vector x"}}, "expected vector x followed by"),
        ({"sides": 1, "fields": {"a": "scalar", "b": "scalar"}}, "2 fields on a line"),
        ({"sides": 3}, "in three dimensions closures read the velocity"),
        ({"fields": [{"name": "a"}, {"name": "a"}]}, "a is listed twice"),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_one_line(settings, line):
    with pytest.raises(ValueError, match=line):
        Problem(equation="external", grid=16, **settings)


def test_velocities_follow_from_the_first_pseudo_scalar():
    grid = Grid(16)
    factors = external(fields={"a": "scalar", "w": "pseudo-scalar"}).stream_factors(grid)
    assert not factors[0, 0].any() and factors[0, 1].equal(grid.inverse_k2)


def test_symmetries_are_translations_unless_stated():
    assert len(Symmetry.of(external(length=2.0), 8)) == 64
    assert len(Symmetry.of(external(length=2.0, symmetries="all"), 8)) == 8 * 64
