"""What chance explains: a mean of rows that are no independent draws, and whether two data sets differ by more than it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

Z_95 = 1.959964
ENOUGH = 5.0
"""What is expected in a cell, for a normal approximation to hold (Cochran 1954, Biometrics 10)."""


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95 % interval; `rows` is what the rows are worth as independent ones without ties."""

    accuracy: float
    low: float
    high: float
    rows: float


def estimate(
    values: "NDArray[Any]",
    groups: "NDArray[Any]",
    weights: "NDArray[Any] | None" = None,
    jackknifed: float | None = None,
) -> Estimate:
    """A mean of values from 0 to 1, whose rows depend on each other within groups.

    The interval is Wilson's (E. B. Wilson 1927, JASA 22) with an effective number of rows: the variance is that of sums over
    groups, n_eff = p(1 - p) / var(p) (as in Korn & Graubard 1998, Survey Methodology 24), and no more than that of rows which do
    not depend on each other and are spread as these are: of zeros and ones their own number, with ties more. That is also what a
    variance of zero comes to, as of pairs that all stand both ways round.

    Values of a cross-validation depend on one another besides: each row is judged by what the others teach. Where the mean is a
    sum of terms that each depend on k groups together, the sum over single groups makes its variance 1/k of what it is, and a
    jackknife k times that (Efron & Stein 1981, Annals of Statistics 9): the geometric mean of both is right, and too large where
    k differs between terms (Cauchy-Schwarz). k is 1 where what is learned is plain, and 2 or 3 where there is nothing to learn.

    Args:
        values: [rows]
        groups: the number of each row's group, [rows]
        weights: [rows]; None for equal ones.
        jackknifed: the variance of the mean by a jackknife that leaves out what a row teaches as well, or the part of it that is
            to count.
    """
    import numpy as np

    weights = np.full(len(values), 1.0) if weights is None else weights
    weights = weights / weights.sum()
    mean = min(1.0, float((weights * values).sum()))
    sums, held = np.bincount(groups, weights * (values - mean)), np.bincount(groups, weights)
    count = int((held > 0).sum())
    variance = float((sums**2).sum()) * count / max(1, count - 1)
    if np.ptp(values) > 0:
        spread = float((weights * (values - mean) ** 2).sum())
        variance = max(variance, spread * float((weights**2).sum()))
        if jackknifed is not None:
            variance = max(variance, math.sqrt(variance * jackknifed))
        rows = mean * (1 - mean) / variance
    else:  # all or none: they say nothing of how prompts differ
        mean, rows = float(values[0]), 1 / float((held**2).sum())
    centre, half = _wilson(mean, rows)
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), rows)


def _wilson(mean: float, rows: float) -> tuple[float, float]:
    scale = 1 + Z_95**2 / rows
    return (
        (mean + Z_95**2 / (2 * rows)) / scale,
        Z_95 * math.sqrt(mean * (1 - mean) / rows + Z_95**2 / (4 * rows**2)) / scale,
    )


def shares_p(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Two-sided p of two shares being one: a z test, or Fisher's exact test where too little is expected in a cell.

    Args:
        one, other: the share, and the number of independent rows that it is known from.
    """
    from scipy.stats import fisher_exact

    (here, rows), (there, others) = one, other
    together = (here * rows + there * others) / (rows + others)
    if min(together, 1 - together) * min(rows, others) < ENOUGH:
        cells = [[round(share * count), round((1 - share) * count)] for share, count in (one, other)]
        return float(fisher_exact(cells).pvalue)
    spread = math.sqrt(together * (1 - together) * (1 / rows + 1 / others))
    return math.erfc(abs(here - there) / spread / math.sqrt(2))


def counts_p(here: Sequence[float], there: Sequence[float]) -> float:
    """P of two sets being of the same kinds: chi-squared, the kinds of which too little is expected taken together.

    Where that leaves one, the kind that differs most decides, by Fisher's test and Bonferroni's bound.

    Args:
        here, there: by kind, how many of the independent rows are of it.
    """
    import numpy as np
    from scipy.stats import chi2_contingency

    table = np.array([here, there], dtype=float)
    rows = table.sum(1)
    rare = table.sum(0) * rows.min() / rows.sum() < ENOUGH
    kinds = table[:, ~rare]
    if rare.any():
        kinds = np.column_stack([kinds, table[:, rare].sum(1)])
    if kinds.shape[1] > 2 and kinds[:, -1].sum() * rows.min() / rows.sum() < ENOUGH:
        kinds = kinds[:, :-1]  # so few that nothing can be said of them
    if kinds.shape[1] > 2:
        return float(chi2_contingency(kinds).pvalue)
    first, second = rows.tolist()
    kinds = kinds if kinds.shape[1] > 1 else table
    asked = kinds[:, :1] if kinds.shape[1] == 2 else kinds  # of two, one is what the other is not
    each = [shares_p((one / first, first), (other / second, second)) for one, other in asked.T.tolist()]
    return min(1.0, len(each) * min(each))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold for all of the tests together, in their order (Holm 1979, Scandinavian J. of Statistics 6, 65-70)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
