"""The statistics against simulation: what covers, what rejects, and what negating the sides does."""

import itertools
import math

import numpy
import pytest

from politune.chance import holm
from politune.lean import statistics
from politune.lean.statistics import (
    detectable,
    effect,
    interval,
    over_seeds,
    sign_flip,
    specificity,
    student_quantile,
)

TOPICS = [f"topic {number}" for number in range(13) for _ in range(4)]


def draw(
    chance: numpy.random.Generator, mean: float = 0.0, topics: int = 13, items: int = 4, skewed: bool = False
) -> numpy.ndarray:
    """Differences of items whose topics have effects of their own."""
    own = chance.exponential(1.0, topics) - 1 if skewed else chance.normal(size=topics)
    return mean + 0.3 * numpy.repeat(own, items) + 0.3 * chance.normal(size=topics * items)


@pytest.fixture
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 999)


@pytest.mark.parametrize("skewed", [False, True], ids=["normal", "skewed"])
def test_a_planted_effect_is_covered(fewer_draws: None, skewed: bool) -> None:
    """In 1,000 simulations; the plain percentile interval of the same draws covers too seldom."""
    chance, covered, plain = numpy.random.default_rng(1), 0, 0
    for _ in range(1000):
        values = draw(chance, mean=0.2, skewed=skewed)
        low, high = interval(values, TOPICS)
        covered += low <= 0.2 <= high
        means = values.reshape(13, 4).mean(1)
        draws = numpy.sort(means[chance.integers(0, 13, (999, 13))].mean(1))
        plain += draws[24] <= 0.2 <= draws[974]
    assert 0.93 <= covered / 1000 <= 0.97
    assert plain / 1000 < 0.93


def test_without_an_effect_one_test_in_twenty_rejects() -> None:
    chance = numpy.random.default_rng(2)
    p_values = numpy.array([sign_flip(draw(chance, topics=9).reshape(9, 4).mean(1)) for _ in range(2000)])
    for level in (0.05, 0.2, 0.5):
        assert (p_values <= level).mean() == pytest.approx(level, abs=0.025)


def test_what_is_called_detectable_is_detected_in_four_of_five() -> None:
    chance = numpy.random.default_rng(3)
    error = math.sqrt(0.3**2 + 0.3**2 / 4)
    size = (student_quantile(0.975, 12) + student_quantile(0.8, 12)) * error / math.sqrt(13)
    found = [sign_flip(draw(chance, mean=size).reshape(13, 4).mean(1)) <= 0.05 for _ in range(600)]
    assert numpy.mean(found) == pytest.approx(0.8, abs=0.05)
    sizes = [detectable(draw(chance), TOPICS) for _ in range(600)]
    assert numpy.median(sizes) == pytest.approx(size, rel=0.06)


def test_texts_that_all_change_alike_are_seldom_called_specific(fewer_draws: None) -> None:
    chance, wrong, right = numpy.random.default_rng(4), 0, 0
    for _ in range(500):
        control = draw(chance)
        wrong += specificity(draw(chance), TOPICS, control, TOPICS).low > 1
        right += specificity(draw(chance, mean=1.5), TOPICS, control, TOPICS).low > 1
    assert wrong / 500 <= 0.05
    assert right / 500 > 0.9


def test_negating_the_sides_negates_every_number_exactly() -> None:
    values = draw(numpy.random.default_rng(5), mean=0.1)
    there, back = effect(values, TOPICS), effect(-values, TOPICS)
    assert (back.mean, back.low, back.high) == (-there.mean, -there.high, -there.low)
    assert (back.p, back.detectable, back.items, back.topics) == (there.p, there.detectable, 52, 13)
    assert specificity(values, TOPICS, -values[::-1], TOPICS) == specificity(-values, TOPICS, values[::-1], TOPICS)
    runs = over_seeds([0.1, 0.3, 0.2]), over_seeds([-0.1, -0.3, -0.2])
    assert (runs[1].mean, runs[1].low, runs[1].high) == (-runs[0].mean, -runs[0].high, -runs[0].low)


def test_the_order_of_items_does_not_matter_but_their_topic_does() -> None:
    values, turn = draw(numpy.random.default_rng(6), mean=0.1), numpy.random.default_rng(7).permutation(52)
    moved = effect(values[turn], [TOPICS[index] for index in turn])
    assert moved.mean == pytest.approx(effect(values, TOPICS).mean)
    assert moved.low == pytest.approx(effect(values, TOPICS).low)
    each_alone = interval(values, [str(number) for number in range(52)])
    together = interval(values, TOPICS)
    assert each_alone[1] - each_alone[0] < 0.8 * (together[1] - together[0]), "items of a topic are not observations"


def test_the_exact_p_is_a_count_of_signs() -> None:
    means = numpy.array([0.3, -0.1, 0.4, 0.2])
    sums = [
        abs(sum(s * m for s, m in zip(signs, means, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip(means) == sum(one >= 0.8 - 1e-9 for one in sums) / 16 == 0.25
    assert sign_flip([0.5] * 5) == 2 / 32
    assert sign_flip([]) == sign_flip([0.0, 0.0]) == 1.0
    many = numpy.random.default_rng(8).normal(0.3, 1, 17)
    assert sign_flip(many) == pytest.approx(exact_p(many), abs=0.01)


def exact_p(means: numpy.ndarray) -> float:
    signs = 1 - 2.0 * ((numpy.arange(2 ** len(means))[:, None] >> numpy.arange(len(means))) & 1)
    return float((abs(signs @ means) >= abs(means.sum()) - 1e-12).mean())


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 12, 2.1788),
        (0.8, 12, 0.8726),
        (0.975, 200, 1.9719),
        (0.5, 3, 0.0),
    ],
)
def test_students_quantiles_are_the_tables(probability: float, freedom: int, value: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(value, abs=1e-4)


def test_seeds_are_what_varies_between_runs() -> None:
    chance = numpy.random.default_rng(9)
    covered = [each.low <= 0.2 <= each.high for each in (over_seeds(chance.normal(0.2, 0.1, 3)) for _ in range(2000))]
    assert numpy.mean(covered) == pytest.approx(0.95, abs=0.015)
    alone = over_seeds([0.3])
    assert (alone.mean, alone.low, alone.high, alone.runs) == (0.3, -math.inf, math.inf, 1)


def test_values_that_hardly_differ_have_a_finite_interval() -> None:
    """One topic of 42 differs: most draws miss it, and their ratios would be infinite."""
    values, names = [-0.5] * 41 + [0.5], [str(number) for number in range(42)]
    low, high = interval(values, names)
    assert -0.6 < low < sum(values) / 42 < high < -0.4
    assert interval([0.25] * 9, names[:9]) == (0.25, 0.25)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        effect([0.1, math.nan], ["a", "b"])


def test_a_mean_and_its_p_are_of_one_quantity() -> None:
    """Nine items of a topic against eight topics of one item: the mean over items is positive, that over topics is not."""
    found = effect([0.1] * 9 + [-0.05] * 8, ["many"] * 9 + [str(number) for number in range(8)])
    assert found.mean > 0
    assert found.p == pytest.approx(sign_flip([0.9] + [-0.05] * 8))


def test_a_difference_of_two_samples_is_covered(fewer_draws: None) -> None:
    chance, covered = numpy.random.default_rng(10), 0
    for _ in range(600):
        found = statistics.difference(draw(chance, mean=0.3), TOPICS, draw(chance, mean=0.1), TOPICS)
        covered += found.low <= 0.2 <= found.high
    assert 0.925 <= covered / 600 <= 0.975


def test_too_few_topics_say_nothing() -> None:
    found = effect([1.0, 2.0], ["one", "one"])
    assert (found.mean, found.low, found.high, found.p, found.detectable) == (1.5, -math.inf, math.inf, 1.0, math.inf)
    none = specificity([1.0, 1.0], ["a", "b"], [0.0, 0.0], ["a", "b"])
    assert math.isnan(none.ratio)
    with pytest.raises(ValueError, match="2 values, 1 topics"):
        effect([1.0, 2.0], ["one"])
