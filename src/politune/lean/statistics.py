"""From differences per item to an effect with an interval, a p-value and the size that could have been detected.

Items of one topic resemble one another, so topics are what is drawn again and what changes its sign: with 13 topics there are 13
observations, however many items they have. Nothing here knows left from right: with every difference negated, every number that
has a sign is negated to the last bit, and every other stays.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[numpy.float64]

CONFIDENCE = 0.95
DRAWS = 10_000
EXACT_TOPICS = 16
"""Up to so many topics all 2^G signs are tried."""
FLIPS = 20_000
POWER = 0.80
FLIPS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Effect:
    """A mean of differences over items.

    Args:
        mean: over items.
        low, high: its 95 % interval, topics drawn again.
        p: two-sided, of no difference, signs of topics flipped.
        detectable: the size that is found with a chance of 80 %; infinite for fewer than two topics.
        items, topics: how many there are.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    items: int
    topics: int


def effect(differences: ArrayLike, topics: Sequence[str], seed: int = 0) -> Effect:
    """The mean difference with everything that says how far to trust it.

    Args:
        differences: [n], one per item, finite.
        topics: [n], the topic of each item.
        seed: of the draws; the same differences give the same numbers.

    Raises:
        ValueError: a difference is not finite, or there are not as many topics.
    """
    values = numpy.asarray(differences, dtype=numpy.float64)
    if not numpy.isfinite(values).all():
        raise ValueError("a difference is not a number")
    sums, counts = _by_topic(values, topics)
    low, high = interval(values, topics, seed)
    return Effect(
        mean=float(sums.sum() / counts.sum()),
        low=low,
        high=high,
        p=sign_flip(sums, seed),
        detectable=detectable(values, topics),
        items=len(values),
        topics=len(sums),
    )


def interval(differences: ArrayLike, topics: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """The studentised cluster bootstrap's 95 % interval of a mean over items; infinite for fewer than two topics.

    Topics are drawn with replacement, and each draw's mean is divided by its own cluster-robust standard error, whose quantiles
    then scale that of the data: with a dozen topics the plain percentile interval is too short (Cameron, Gelbach & Miller 2008,
    Review of Economics and Statistics 90(3), 414-427).
    """
    sums, counts = _by_topic(numpy.asarray(differences, dtype=numpy.float64), topics)
    groups = len(sums)
    if groups < 2:
        return -math.inf, math.inf
    mean, error = _mean_and_error(sums, counts)
    drawn = numpy.random.default_rng(seed).integers(0, groups, (DRAWS, groups))
    return _studentised(float(mean), float(error), *_mean_and_error(sums[drawn], counts[drawn]), freedom=groups - 1)


@dataclass(frozen=True)
class Difference:
    """Of two means, with its 95 % interval."""

    mean: float
    low: float
    high: float


def difference(
    values: ArrayLike, topics: Sequence[str], others: ArrayLike, other_topics: Sequence[str], seed: int = 0
) -> Difference:
    """The mean of some items less that of others, of other topics; `interval` for two samples, both drawn again."""
    chance = numpy.random.default_rng(seed)
    mean, variance, means, variances, freedom = 0.0, 0.0, numpy.zeros(DRAWS), numpy.zeros(DRAWS), 0
    for sign, given, names in ((1, values, topics), (-1, others, other_topics)):
        sums, counts = _by_topic(numpy.asarray(given, dtype=numpy.float64), names)
        if len(sums) < 2:
            return Difference(math.nan, -math.inf, math.inf)
        drawn = chance.integers(0, len(sums), (DRAWS, len(sums)))
        own, error = _mean_and_error(sums, counts)
        draws, errors = _mean_and_error(sums[drawn], counts[drawn])
        mean, variance = mean + sign * float(own), variance + float(error) ** 2
        means, variances, freedom = means + sign * draws, variances + errors**2, freedom + len(sums) - 1
    low, high = _studentised(mean, math.sqrt(variance), means, numpy.sqrt(variances), freedom=freedom)
    return Difference(mean, low, high)


def sign_flip(topic_sums: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of the sum of topics' sums being zero, each as likely to have had the other sign (Fisher 1935).

    All 2^G signs up to `EXACT_TOPICS` topics; else random ones, the one observed counted among them (Phipson & Smyth 2010,
    doi:10.2202/1544-6115.1585).
    """
    sums = numpy.asarray(topic_sums, dtype=numpy.float64)
    if not len(sums):
        return 1.0
    observed = abs(sums.sum())
    enough = observed - 1e-12 * numpy.abs(sums).sum()
    if len(sums) <= EXACT_TOPICS:
        signs = numpy.array(list(itertools.product((1.0, -1.0), repeat=len(sums))))
        return float((numpy.abs(signs @ sums) >= enough).mean())
    chance, hits = numpy.random.default_rng(seed), 0
    for start in range(0, FLIPS, FLIPS_AT_ONCE):
        signs = chance.choice((1.0, -1.0), (min(FLIPS_AT_ONCE, FLIPS - start), len(sums)))
        hits += int((numpy.abs(signs @ sums) >= enough).sum())
    return (1 + hits) / (1 + FLIPS)


def detectable(differences: ArrayLike, topics: Sequence[str]) -> float:
    """The smallest mean that a two-sided 5 % test finds with a chance of 80 %: (t(0.975) + t(0.8)) cluster-robust errors.

    Bloom 1995, Evaluation Review 19(5), 547-556, with G - 1 degrees of freedom for G topics; infinite for fewer than two.
    """
    sums, counts = _by_topic(numpy.asarray(differences, dtype=numpy.float64), topics)
    freedom = len(sums) - 1
    if freedom < 1:
        return math.inf
    multiplier = student_quantile((1 + CONFIDENCE) / 2, freedom) + student_quantile(POWER, freedom)
    return multiplier * float(_mean_and_error(sums, counts)[1])


@dataclass(frozen=True)
class Ratio:
    """How many times larger something is than something else, with its 95 % interval."""

    ratio: float
    low: float
    high: float


def specificity(
    differences: ArrayLike, topics: Sequence[str], control: ArrayLike, control_topics: Sequence[str], seed: int = 0
) -> Ratio:
    """Root mean square of the political items' differences by that of the control items'.

    Tuning that changes all texts alike has a ratio of one, whatever their mean does. Topics of both are drawn again, each draw's
    logarithm is centred on the observed one's mirror image (the basic bootstrap: Davison & Hinkley 1997, section 5.2).
    """
    chance = numpy.random.default_rng(seed)
    observed, draws = 0.0, numpy.zeros(DRAWS)
    for sign, values, names in ((1, differences, topics), (-1, control, control_topics)):
        squares, counts = _by_topic(numpy.square(numpy.asarray(values, dtype=numpy.float64)), names)
        if len(squares) < 2 or not squares.sum():
            return Ratio(math.nan, 0.0, math.inf)
        drawn = chance.integers(0, len(squares), (DRAWS, len(squares)))
        with numpy.errstate(divide="ignore"):
            observed += sign * math.log(squares.sum() / counts.sum()) / 2
            draws += sign * numpy.log(squares[drawn].sum(1) / counts[drawn].sum(1)) / 2
    draws.sort()
    tail = int((DRAWS + 1) * (1 - CONFIDENCE) / 2)
    low, high = 2 * observed - draws[DRAWS - tail], 2 * observed - draws[tail - 1]
    return Ratio(math.exp(observed), math.exp(low), math.exp(high))


@dataclass(frozen=True)
class OverSeeds:
    """What several training runs of one recipe have in common; the interval is infinite for a single run."""

    mean: float
    low: float
    high: float
    deviation: float
    runs: int


def over_seeds(effects: Sequence[float]) -> OverSeeds:
    """Student's interval of the mean effect over training runs (Student 1908), whose items are the same.

    It holds for other seeds of the recipe on these items; each run's own interval holds for other topics with this seed.
    """
    values = numpy.asarray(effects, dtype=numpy.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return OverSeeds(mean, -math.inf, math.inf, math.nan, len(values))
    deviation = float(values.std(ddof=1))
    half = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return OverSeeds(mean, mean - half, mean + half, deviation, len(values))


@functools.cache
def student_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below, for a probability of one half or more."""
    nodes, weights = numpy.polynomial.legendre.leggauss(400)

    def below(value: float) -> float:
        points = numpy.arctan(value / math.sqrt(freedom)) * (nodes + 1) / 2  # x = sqrt(freedom) tan(angle)
        area = (weights * numpy.cos(points) ** (freedom - 1)).sum() * numpy.arctan(value / math.sqrt(freedom)) / 2
        scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
        return float(0.5 + area * math.exp(scale))

    low, high = 0.0, 1.0
    while below(high) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return (low + high) / 2


def _studentised(mean: float, error: float, means: Floats, errors: Floats, *, freedom: int) -> tuple[float, float]:
    """The interval of a mean from what draws of the data gave, [DRAWS] each.

    Where so many draws have no error of their own that they would be the quantile (nearly all topics have the same value), ratios
    say nothing, and Student's interval stands in.
    """
    tail = int((DRAWS + 1) * (1 - CONFIDENCE) / 2)
    has_error = errors > 1e-9 * error
    if error == 0:
        return mean, mean
    if freedom > 2 and int((~has_error).sum()) >= tail:
        half = student_quantile((1 + CONFIDENCE) / 2, freedom) * error
        return mean - half, mean + half
    shift = means - mean
    beyond = numpy.where(shift == 0, 0.0, numpy.copysign(numpy.inf, shift))
    ratios = numpy.divide(shift, errors, out=beyond, where=has_error)
    ratios.sort()
    return float(mean - ratios[DRAWS - tail] * error), float(mean - ratios[tail - 1] * error)


def _by_topic(values: Floats, topics: Sequence[str]) -> tuple[Floats, Floats]:
    """(sum, number) of the items of each topic."""
    if len(values) != len(topics):
        raise ValueError(f"{len(values)} values, {len(topics)} topics")
    names, index = numpy.unique(numpy.asarray(topics, dtype=str), return_inverse=True)
    sums, counts = numpy.zeros(len(names)), numpy.zeros(len(names))
    numpy.add.at(sums, index, values)
    numpy.add.at(counts, index, 1.0)
    return sums, counts


def _mean_and_error(sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Mean over items and its cluster-robust standard error, of topics along the last axis."""
    groups, total = sums.shape[-1], counts.sum(-1)
    mean = sums.sum(-1) / total
    residuals = sums - mean[..., None] * counts
    return mean, numpy.sqrt(groups / (groups - 1) * numpy.square(residuals).sum(-1)) / total
