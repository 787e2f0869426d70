"""The memory that a dry run states is that of the solver's arrays."""

import pytest

from hpc_closure.generate import memory
from hpc_closure.spectral import simulation
from hpc_closure.spectral.cpu import cube_kernels, line_kernels
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.schemes import SCHEMES
from hpc_closure.spectral.simulation import Simulation


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tables_are_those_of_the_solver(scheme):
    assert memory.REGISTERS.get(scheme, 2) == SCHEMES[scheme].num_registers
    assert (scheme in memory.PAST) == SCHEMES[scheme].has_memory
    constants = simulation.CHUNK_POINTS, line_kernels.LANES, cube_kernels.PRODUCTS
    assert (memory.CHUNK_POINTS, memory.LANES, memory.PRODUCTS) == constants


@pytest.mark.parametrize("scheme", ["rk4", "cn_ab2"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_memory_of_a_run(scheme, dimensions):
    equation = {"equation": "navier_stokes_3d"} if dimensions == 3 else {}
    problem = Problem(grid=12, scheme=scheme, **equation)
    sim = Simulation(problem, range(3), 0, threads=1).initialise().advance(2)
    member, work = memory.of_run(problem)
    past = sum(value.nbytes for value in sim.scheme.save().values())
    assert 3 * member == sim.pairs.nbytes + past
    registers = sum(value.nbytes for value in sim._workers[0]._registers.values())
    chunk = max(sim._workers[0]._registers)
    spectrum = sim.pairs.nbytes // 3
    found = registers + chunk * spectrum  # and what is held
    chunks = memory.CHUNK_POINTS // (len(problem.physics.channels) * 12**dimensions)
    expected = found * chunks // chunk
    if dimensions == 3:
        expected += sim._workers[0].equation.convection.compiled._planes(1).nbytes
    assert work == expected
