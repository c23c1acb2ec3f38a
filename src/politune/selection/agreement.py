"""How far two annotators agree beyond chance: Cohen's kappa, with an interval over rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = str | int
Pair: TypeAlias = tuple[Value | None, Value | None]

DRAWS = 2000
DRAWN_AT_ONCE = 1 << 22
CONFIDENCE = 0.95
LEAST_ROWS = 10
"""Fewer rows say nothing about how much another sample would differ."""
UNPARSED = "unparsed"
WORDS = ((0.8, "almost perfect"), (0.6, "substantial"), (0.4, "moderate"), (0.2, "fair"), (0.0, "slight"))
"""Landis & Koch 1977, Biometrics 33(1), 159-174: conventions, as they say themselves."""


@dataclass(frozen=True)
class Agreement:
    """Two annotators on one question.

    Args:
        question: its name; where it is about answers, all sides together.
        other: whom the model is compared with.
        rows: distinct ones that both have; `pairs` of answers in them.
        unparsed: pairs in which one of the two could not be read, which counts as disagreement.
        agreement: share of pairs.
        kappa: Cohen 1960; None where chance alone would agree always.
        low, high: its 95 % interval; None for fewer than 10 rows, and where all rows agree or all do not.
        labels: of rows (the other's) and columns (the model's) of `counts`.
        counts: of pairs.
        by_column: the share of each column that the question has, such as one for each side.
    """

    question: str
    other: str
    rows: int
    pairs: int
    unparsed: int
    agreement: float
    kappa: float | None
    low: float | None
    high: float | None
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    by_column: tuple[tuple[str, float], ...] = ()

    @property
    def verdict(self) -> str:
        """In one line, by the lower end of the interval, so that few rows cannot say much."""
        said = f"{self.question}: {self.agreement:.0%} agree with {self.other}"
        if len(self.by_column) > 1:
            said += f" ({', '.join(f'{column} {share:.0%}' for column, share in self.by_column)})"
        if self.kappa is None:
            return f"{said}; kappa cannot be told, one answer is given always"
        if self.low is None or self.high is None:
            return f"{said}; kappa {self.kappa:.2f}, with no interval: too few rows, or none that differ from the rest"
        word = next((word for least, word in WORDS if self.low > least), "no better than chance")
        return f"{said}; kappa {self.kappa:.2f} [{self.low:.2f}, {self.high:.2f}]: at the least {word}"


def agree(
    question: str, other: str, allowed: Sequence[Value], rows: Sequence[Sequence[Pair]], seed: int = 0
) -> Agreement:
    """Compares two annotators.

    Args:
        allowed: the answers to the question.
        rows: of each row its pairs (the other's answer, the model's), one that comes twice with all its pairs; None is what
            could not be read.
        seed: of the draws.
    """
    import numpy

    # What neither could read is no agreement: each has a label of its own for it.
    size = len(allowed) + 2
    place = {value: number for number, value in enumerate(allowed)}
    tables = numpy.zeros((len(rows), size * size))
    for number, pairs in enumerate(rows):
        for other_says, model_says in pairs:
            one = place.get(other_says, size - 2) if other_says is not None else size - 2
            two = place.get(model_says, size - 1) if model_says is not None else size - 1
            tables[number, one * size + two] += 1
    whole = tables.sum(0)
    kappa = float(_kappas(whole[None], size)[0])
    low, high = _interval(tables, size, seed) if len(rows) >= LEAST_ROWS else (None, None)
    counts = whole.reshape(size, size).astype(int).tolist()
    merged = [
        [*row[:-2], row[-2] + row[-1]] for row in [*counts[:-2], [a + b for a, b in zip(*counts[-2:], strict=True)]]
    ]
    pairs_n = int(whole.sum())
    return Agreement(
        question, other, len(rows), pairs_n, sum(None in pair for row in rows for pair in row),
        float(numpy.trace(whole.reshape(size, size)) / pairs_n) if pairs_n else 0.0,
        None if math.isnan(kappa) else kappa, low, high,
        (*map(str, allowed), UNPARSED), tuple(map(tuple, merged)),
    )  # fmt: skip


def _kappas(tables: Any, size: int) -> Any:
    """Of each flattened table, [n, size * size]: (observed - expected) / (1 - expected), not a number where 1 is expected.

    Cohen 1960, Educational and Psychological Measurement 20(1), 37-46.
    """
    import numpy

    square = tables.reshape(-1, size, size)
    total = square.sum((1, 2))
    with numpy.errstate(invalid="ignore", divide="ignore"):
        observed = numpy.trace(square, axis1=1, axis2=2) / total
        expected = (square.sum(2) * square.sum(1)).sum(1) / total**2
        return numpy.where(1 - expected > 1e-12, (observed - expected) / (1 - expected), numpy.nan)


def _interval(tables: Any, size: int, seed: int) -> tuple[float | None, float | None]:
    """The percentile bootstrap over rows (Efron 1979), whose answers of one row stay together.

    Where no row differs from the others in whether it agrees, draws cannot show how another sample would differ: none is given.
    """
    import numpy

    diagonal = numpy.eye(size, dtype=bool).ravel()
    agreeing = tables[:, diagonal].sum(1) / numpy.maximum(tables.sum(1), 1)
    if (agreeing == agreeing[0]).all():
        return None, None
    chance, rows = numpy.random.default_rng(seed), len(tables)
    at_once = max(1, DRAWN_AT_ONCE // rows)
    drawn = []
    for start in range(0, DRAWS, at_once):
        weights = chance.multinomial(rows, numpy.full(rows, 1 / rows), min(at_once, DRAWS - start))
        drawn.append(_kappas(weights @ tables, size))
    kappas = numpy.concatenate(drawn)
    if numpy.isnan(kappas).mean() > 1 - CONFIDENCE:
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.nanquantile(kappas, [tail, 1 - tail])
    return float(low), float(high)
