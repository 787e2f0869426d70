"""The methods that stand in the tables of scores: names, meanings and order, once for all readers.

The schema refuses these names for further closures, the rows are sorted by them, and the report
and its summary explain them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One method of the tables.

    Attributes:
        name: in the column ``method`` of the rows.
        meaning: for the report's glossary, one sentence.
        words: in a sentence beside the model's score; empty for what is not set beside it.
        reserved: no further closure may have the name, and ``evaluate.against`` may name it.
        opponent: a closure without a generator that the model is compared with.
    """

    name: str
    meaning: str
    words: str = ""
    reserved: bool = True
    opponent: bool = False


MODEL = "model"
GRANTED = "model+physics"  # the model where conditions.physics grants it an estimate of U
MODELS = (MODEL, GRANTED)
TRUTH = "truth"  # the DNS itself, in figures and files; it has no scores

# in the order in which they are printed
METHODS = (
    Method(MODEL, "the trained closure"),
    Method(
        GRANTED, "the trained closure, granted an estimate of the closure (conditions.physics)"
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
        "an opponent without a generator: such a law, whose amplitudes follow the state",
        words="a Gaussian law that follows the state",
        reserved=False,
        opponent=True,
    ),
    Method(
        "mixture",
        "an opponent without a generator: two such laws, whose weights follow the state, too",
        words="a mixture of two Gaussian laws that follow the state",
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
        "draws of the exact law; in the coupled run the full system with other noise, with "
        "sensors the reduced solver with draws of the exact law given what they read; of a "
        "subgrid closure the replicas: DNS that share the resolved past",
        words="the exact law",
    ),
    Method(
        "oracle_x0.95",
        "the exact law with its spread shrunk to 95 %: a control that must fail",
        reserved=False,
    ),
    Method("physics", "the known term granted, no network", words="the granted physics"),
    Method(
        "fourier",
        "periodic Fourier interpolation of the sensors alone",
        words="Fourier interpolation of the sensors alone",
    ),
    Method("climatology", "random states of the training members", words="climatology"),
    Method("none", "no closure", words="no closure"),
)
RESERVED = tuple(method.name for method in METHODS if method.reserved)
