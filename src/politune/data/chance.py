"""How far figures of rows can be trusted whose prompts are no independent draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

Z_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95 % interval; `rows` is what the rows are worth as independent ones."""

    accuracy: float
    low: float
    high: float
    rows: float


def estimate(values: "NDArray[Any]", groups: "NDArray[Any]", weights: "NDArray[Any] | None" = None) -> Estimate:
    """A mean of values from 0 to 1, whose rows depend on each other within groups.

    The interval is Wilson's (E. B. Wilson 1927, JASA 22) with an effective number of rows: the variance is that of sums over
    groups, n_eff = p(1 - p) / var(p) (as in Korn & Graubard 1998, Survey Methodology 24), and no more than the rows' own number.
    That is also what a variance of zero comes to, as of pairs that all stand both ways round.

    Args:
        values: [rows]
        groups: the number of each row's group, [rows]
        weights: [rows]; None for equal ones.
    """
    import numpy as np

    weights = np.full(len(values), 1.0) if weights is None else weights
    weights = weights / weights.sum()
    mean = min(1.0, float((weights * values).sum()))
    sums, held = np.bincount(groups, weights * (values - mean)), np.bincount(groups, weights)
    count = int((held > 0).sum())
    variance = float((sums**2).sum()) * count / max(1, count - 1)
    if np.ptp(values) > 0:
        most = 1 / float((weights**2).sum())
        rows = min(mean * (1 - mean) / variance, most) if variance else most
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


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold for all of the tests together, in their order (Holm 1979, Scandinavian J. of Statistics 6, 65-70)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
