"""Two scores: a function of one sample, and a formula of statistics per sample."""

from hpc_closure.evaluate.scores.record import ACCURACY, Score


def peak_error(ensemble, truth):
    """Relative error of the largest value: (M, S, n, n) and (S, n, n) -> (S,)."""
    peaks, true = (fields.abs().amax((-2, -1)) for fields in (ensemble, truth))
    return ((peaks - true).abs() / true).mean(0)


SCORES = (
    Score(
        name="peak_error",
        heading="error of the peak",
        meaning="relative error of the largest value of a member",
        table=ACCURACY,
        sample=peak_error,
    ),
    Score(
        name="explained",
        heading="explained",
        meaning="share of the truth's mean square that the ensemble mean explains",
        table="Explained by the mean",
        needs=("mean_mse", "truth_energy"),
        formula=lambda s, m: 1 - s["mean_mse"] / s["truth_energy"],
        per_shell=True,
        by_lead_time=True,
    ),
)
