"""Define names, meanings and order of the methods in the tables of scores.

The schema reserves these names, the rows are sorted in this order, and report and summary print
the meanings.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One method of the tables.

    Attributes:
        name: value of the column ``method`` in the rows.
        meaning: explanation in the report's glossary.
        words: name in a sentence that compares it with the model; empty if it is never compared.
        reserved: whether no other closure may have the name; ``evaluate.against`` may name it.
        opponent: whether it is a closure without a generator, as a comparison for the model.
    """

    name: str
    meaning: str
    words: str = ""
    reserved: bool = True
    opponent: bool = False


MODEL = "model"
GRANTED = "model+physics"  # the model with an estimate of U as input (conditions.physics_estimate)
MODELS = (MODEL, GRANTED)
TRUTH = "truth"  # the DNS, in figures and files; it has no scores

# in the order of the tables
METHODS = (
    Method(MODEL, "the trained closure"),
    Method(
        GRANTED,
        "the trained closure, granted an estimate of the closure (conditions.physics_estimate)",
    ),
    Method(
        "gaussian_modes",
        "an opponent without a generator: a Gaussian law with a covariance for each wavevector",
        words="a Gaussian law by wavevector",
        reserved=False,
        opponent=True,
    ),
    Method(
        "gaussian_state",
        "an opponent without a generator: the same law with amplitudes that depend on the state",
        words="a Gaussian law that follows the state",
        reserved=False,
        opponent=True,
    ),
    Method(
        "mixture",
        "an opponent without a generator: a mixture of two such laws with weights that depend on "
        "the state",
        words="a mixture of two Gaussian laws that follow the state",
        reserved=False,
        opponent=True,
    ),
    Method(
        "gaussian_amplitude",
        "an opponent without a generator: a Gaussian process with a spread that depends on place "
        "and state",
        words="a Gaussian process with a spread by place",
        reserved=False,
        opponent=True,
    ),
    Method(
        "resampled",
        "an opponent without a generator: residuals of the training, drawn at random, moved, and "
        "scaled by a spread that depends on place and state",
        words="resampled residuals",
        reserved=False,
        opponent=True,
    ),
    Method(
        "point_mixture",
        "an opponent without a generator: a mixture of two normal laws at every point that "
        "depends on the state, joined by a Gaussian copula",
        words="a mixture at every point",
        reserved=False,
        opponent=True,
    ),
    Method(
        "mean_gp",
        "the trained closure's own mean and Gaussian law, without its generator",
        words="mean + Gaussian process",
        opponent=True,
    ),
    Method(
        "oracle",
        "draws of the exact law; in the coupled run the full system with independent noise, or "
        "with sensors the reduced solver with draws of the exact law conditioned on the readings; "
        "for a subgrid closure without sensors the replicas: DNS with the same resolved past",
        words="the exact law",
    ),
    Method(
        "oracle_x0.95",
        "the exact law with its spread reduced to 95 %: a control that must fail the rank test",
        reserved=False,
    ),
    Method(
        "physics",
        "the known term of the closure, no network",
        words="the known term of the closure",
    ),
    Method(
        "fourier",
        "periodic Fourier interpolation of the sensors alone",
        words="Fourier interpolation of the sensors alone",
    ),
    Method("climatology", "random states of the training members", words="climatology"),
    Method("none", "no closure", words="no closure"),
)
RESERVED = tuple(method.name for method in METHODS if method.reserved)
