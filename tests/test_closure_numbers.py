"""Functions of single numbers of the state: found where they are, and not where nothing is."""

import torch

from hpc_closure.closure.composed.numbers import MOST, NumberMean, candidates
from hpc_closure.closure.reductions import Reader


def fitted(answer, count=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, 51, generator=generator, dtype=torch.float64)
    largest = torch.randn(count, 25, generator=generator, dtype=torch.float64)
    largest[:, 3] += answer(numbers)
    mean = NumberMean()
    for first in range(0, count, 1000):
        mean.add(numbers[first : first + 1000], largest[first : first + 1000])
    return mean.coefficients(Reader([])), numbers


def test_a_step_of_one_number_takes_few_terms_and_is_nearer_than_weights_would_be():
    def answer(numbers):
        return torch.tanh(2.4 * (numbers[:, 7] + 0.3))

    coefficients, numbers = fitted(answer)
    terms = (coefficients != 0).sum(0)
    assert 1 <= int(terms[3]) <= MOST and int(terms.sum()) == int(terms[3])
    fresh = torch.randn(4000, 51, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    error = (candidates(fresh) @ coefficients)[:, 3] - answer(fresh)
    assert float(error.square().mean()) < 0.01  # noise: 1; a network of 51 inputs: 0.02


def test_noise_has_no_terms():
    coefficients, _ = fitted(lambda numbers: 0.0)
    assert not bool(coefficients.any())
