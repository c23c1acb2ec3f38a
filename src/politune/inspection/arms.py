"""Whether data sets that are to be compared differ in more than what they are compared for.

A difference counts where it is larger than a tolerance and than chance, between any two of them: shares by `chance.shares_p`,
distributions by their largest distance (Kolmogorov-Smirnov), topics by the total variation distance and `chance.counts_p`. Rows
of one prompt are no independent draws: lengths of prompts are those of distinct ones, and all else is tested with the number of
rows that a data set is worth. The number of rows itself is no matter of chance.

Cheap features of the answers, such as line breaks, are compared side by side: the shares of answers that have any, and the
distributions; all those tests together count as one (Bonferroni). What is rare matters where it stands in one data set alone, so
that the tolerance is Cohen's h (Statistical Power Analysis 1988, chapter 6), of distributions that of the shares where they are
furthest apart: 10 points about the middle, 1 point from 0.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeAlias

from politune.chance import counts_p, estimate, shares_p
from politune.errors import safe
from politune.inspection import topics
from politune.inspection.features import FEATURES, Feature, Text
from politune.inspection.findings import MISLEADS, WORTH_KNOWING, DataAudit, Finding
from politune.inspection.groups import group_rows
from politune.inspection.pairs import find_similar_between
from politune.inspection.scan import HIDDEN, Scan
from politune.report import Lines, Section, Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Grouped: TypeAlias = "tuple[NDArray[Any], NDArray[np.intp]]"
"""A value of each row, and the number of the row's prompt."""

ROWS_WITHIN = 0.01
"""Relative difference in the number of rows that is none."""
SHARE_WITHIN = 0.05
"""Difference in a share or an accuracy that is none, in parts of 1."""
DISTANCE_WITHIN = 0.1
"""Distance between two distributions that is none."""
EFFECT_WITHIN = 0.2
"""Cohen's h between the shares of answers with more or less of a feature that is none: he calls it small."""
MOST_ANSWERS = 2000
"""Rows of the sample whose answers are compared: half a millisecond each."""
OF_ANSWERS = (
    *(feature for feature in FEATURES if feature.name != "length in words"),  # which is compared over all rows
    Feature("begins with a space", "", "", lambda text: float(text.raw[:1].isspace() and text.raw[0] not in "\r\n")),
    Feature("hidden characters", "", "", lambda text: sum(map(HIDDEN.__contains__, text.raw))),
)
LEVEL = 0.001
"""Of each test of two data sets: what chance gives more often is no difference."""
SHOWN_WORDS = 10


@dataclass(frozen=True)
class Compared:
    """One line of the comparison: a value per data set, and how far those two are apart that differ most.

    `is_matched` is None where there was nothing to compare.
    """

    what: str
    values: tuple[str, ...]
    difference: str
    is_matched: bool | None
    furthest: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Arms:
    """Data sets beside one another.

    Args:
        names: of the data sets.
        lines: what is compared.
        apart: of the first two, the words that set their prompts apart: here more often, there more often.
        shared_prompts: by pair of data sets, prompts that stand in both.
        similar: by pair, rows of the first that are copies or near-duplicates of a row of the second; whether those are all.
    """

    names: tuple[str, ...]
    lines: tuple[Compared, ...]
    apart: tuple[tuple[str, ...], tuple[str, ...]]
    shared_prompts: tuple[tuple[str, str, int], ...]
    similar: tuple[tuple[str, str, int, bool], ...]

    @property
    def unmatched(self) -> tuple[Compared, ...]:
        return tuple(line for line in self.lines if line.is_matched is False)

    @property
    def not_compared(self) -> tuple[Compared, ...]:
        return tuple(line for line in self.lines if line.is_matched is None)

    @property
    def verdict(self) -> str:
        if not self.unmatched:
            but = "".join(f"; {line.what} were not" for line in self.not_compared)
            return f"yes, in all that was compared, up to chance and tolerance{but}"
        named = "; ".join(f"{line.what} ({_against(line)})" for line in self.unmatched[:4])
        more = f"; and {len(self.unmatched) - 4} more" if len(self.unmatched) > 4 else ""
        return f"no: they differ in {named}{more}"

    def findings(self) -> Iterator[Finding]:
        """What a person should know of the arms together."""
        for line in self.unmatched:
            text = f"the arms differ in {line.what}: {_against(line)} ({self._difference(line)})"
            yield Finding(MISLEADS, f"arms {line.what}", text, 1.0, "arms")
        for line in self.not_compared:
            text = f"{line.what} of the arms were not compared: {_against(line)}"
            yield Finding(WORTH_KNOWING, f"arms {line.what}", text, 0.0, "arms")
        for one, other, count in self.shared_prompts:
            if count:
                text = f"{count:,} prompts stand both in {one} and in {other}"
                yield Finding(WORTH_KNOWING, "shared-prompts", text, 0.0, "arms")

    def _difference(self, line: Compared) -> str:
        if len(self.names) < 3 or not line.difference:
            return line.difference
        one, other = line.furthest
        return f"{line.difference} between {self.names[one]} and {self.names[other]}"

    def sections(self) -> Iterator[Section]:
        """The comparison as a table, and the words that set the first two apart."""
        matched = {True: "yes", False: "no", None: "not compared"}
        rows = tuple((line.what, *line.values, self._difference(line), matched[line.is_matched]) for line in self.lines)
        note = (
            f"Matched: rows within {ROWS_WITHIN:.0%}, whatever chance says; shares and accuracies within {SHARE_WITHIN:.0%}, "
            f"distributions within a distance of {DISTANCE_WITHIN}, features of the answers within h = {EFFECT_WITHIN} (Cohen's, "
            f"of the shares where they are furthest apart), or a difference that chance explains (p > {LEVEL}), between any two "
            "arms. Lengths of prompts are those of distinct prompts; rows of one prompt count as what they are worth."
        )
        yield Table("Are the arms matched?", ("compared", *self.names, "difference", "matched"), rows, note)
        both = [
            (f"{one} and {other}", shared, f"{alike:,}{'' if is_all else ' or more'}")
            for (one, other, shared), (_, _, alike, is_all) in zip(self.shared_prompts, self.similar, strict=True)
        ]
        yield Table("What the arms share", ("arms", "prompts", "near-duplicate rows"), tuple(both))
        here, there = self.apart
        lines = (f"{self.names[0]}: {', '.join(here) or 'none'}", f"{self.names[1]}: {', '.join(there) or 'none'}")
        yield Lines("Words that set the prompts apart", lines)


def _against(line: Compared) -> str:
    return " against ".join(value for value in line.values if value)


def compare(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Arms:
    """Holds two or more data sets against one another, the same ones measured and judged."""
    names = _names(audits)
    lines = [line for compare in COMPARISONS for line in compare(scans, audits)]
    pairs = list(combinations(range(len(scans)), 2))
    shared = tuple((names[one], names[other], _count_shared(scans[one], scans[other])) for one, other in pairs)
    similar = tuple(
        (names[one], names[other], found[0], found[1])
        for one, other in pairs
        for found in [find_similar_between(scans[one], scans[other])]
    )
    return Arms(names, tuple(lines), _apart(scans[0], scans[1]), shared, similar)


def _names(audits: Sequence[DataAudit]) -> tuple[str, ...]:
    """The names of the data sets, told apart by a number where they are equal."""
    counts = Counter(audit.name for audit in audits)
    return tuple(
        f"{safe(audit.name, 40)} ({number})" if counts[audit.name] > 1 else safe(audit.name, 40)
        for number, audit in enumerate(audits, start=1)
    )


def _count_shared(one: Scan, other: Scan) -> int:
    import numpy as np

    return len(np.intersect1d(one["keys"][:, 0], other["keys"][:, 0]))


def _apart(one: Scan, other: Scan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    here, there = (
        Counter(word for prompt in set(_sampled_prompts(scan)) for word in set(topics.content_words(prompt)))
        for scan in (one, other)
    )
    words = topics.words_apart(here, there)
    significant = NormalDist().inv_cdf(1 - LEVEL / 2)
    telling = [each for each in words if abs(each.z) > significant]
    more = tuple(f"{each.word} ({each.here}:{each.there})" for each in telling if each.z > 0)[:SHOWN_WORDS]
    less = tuple(f"{each.word} ({each.there}:{each.here})" for each in reversed(telling) if each.z < 0)[:SHOWN_WORDS]
    return more, less


def _sampled_prompts(scan: Scan, most: int | None = None) -> list[str]:
    return [each.row.prompt[-1]["content"] for each in scan.facts.sample[:most]]


# --- what is compared ------------------------------------------------------------------------------------------------


def _judged(
    what: str,
    values: Sequence[str],
    apart: Callable[[int, int], float],
    p: Callable[[int, int], float],
    within: float,
    shown: Callable[[float], str],
) -> Compared:
    """Matched where every two data sets are.

    Args:
        apart: how far two data sets are apart, by their numbers.
        p: of that by chance; asked only beyond the tolerance.
        within: the tolerance.
    """
    differences = {pair: apart(*pair) for pair in combinations(range(len(values)), 2)}
    wrong = [pair for pair, difference in differences.items() if difference > within and p(*pair) <= LEVEL]
    furthest = max(wrong or differences, key=differences.__getitem__)
    return Compared(what, tuple(values), shown(differences[furthest]), not wrong, furthest)


def _rows(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    counts = [audit.rows for audit in audits]

    def ratio(one: int, other: int) -> float:
        return max(counts[one], counts[other]) / min(counts[one], counts[other]) - 1

    yield _judged("rows", [f"{count:,}" for count in counts], ratio, lambda *_: 0.0, ROWS_WITHIN, lambda r: f"{r:.1%}")


def _lengths(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Medians are shown, whole distributions are compared."""
    import numpy as np

    parts = ("prompt", "chosen", "rejected") if audits[0].method == "dpo" else ("prompt", "answer")
    prompts = [_prompts(scan["keys"][:, 0]) for scan in scans]
    for column, part in enumerate(parts):
        if column == 0:
            given = [
                (scan["words"][first, 0], np.arange(len(first)))
                for scan, (first, _) in zip(scans, prompts, strict=True)
            ]
        else:
            given = [(scan["words"][:, column], groups) for scan, (_, groups) in zip(scans, prompts, strict=True)]
        yield _distributions(f"words of {part}, median", given)


def _prompts(keys: "NDArray[Any]") -> tuple["NDArray[np.intp]", "NDArray[np.intp]"]:
    """(the first row of each prompt, the number of each row's prompt)."""
    import numpy as np

    _, first, groups = np.unique(keys, return_index=True, return_inverse=True)
    return first, groups


def _distributions(what: str, given: Sequence[Grouped]) -> Compared:
    import numpy as np

    def p(one: int, other: int) -> float:
        return _distributions_p(given[one], given[other], _furthest(given[one][0], given[other][0])[1])

    def distance(one: int, other: int) -> float:
        return _furthest(given[one][0], given[other][0])[0]

    medians = [f"{float(np.median(values)):g}" for values, _ in given]
    return _judged(what, medians, distance, p, DISTANCE_WITHIN, lambda d: f"distance {d:.2f}")


def _distributions_p(one: Grouped, other: Grouped, place: float) -> float:
    """The exact test of so many rows as those are worth for the share below `place`, where the two are furthest apart."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(_thinned(*one, place), _thinned(*other, place), method="auto").pvalue)


def _shares_below_p(one: Grouped, other: Grouped, place: float) -> float:
    """The test of the shares at or below `place`, which is not chosen by how far the two are apart."""
    known = [(float((values <= place).mean()), _worth(values <= place, groups)) for values, groups in (one, other)]
    return shares_p(known[0], known[1])


def _furthest(one: "NDArray[Any]", other: "NDArray[Any]") -> tuple[float, float]:
    """(the largest distance between two distributions, the value at which it is)."""
    import numpy as np

    places = np.union1d(one, other)
    here, there = (np.searchsorted(np.sort(values), places, "right") / len(values) for values in (one, other))
    at = int(np.abs(here - there).argmax())
    return float(abs(here[at] - there[at])), float(places[at])


def _thinned(values: "NDArray[Any]", groups: "NDArray[np.intp]", place: float) -> "NDArray[Any]":
    """As many of the values as they are worth, evenly from the sorted ones."""
    import numpy as np

    count = max(1, round(_worth(values <= place, groups)))
    found: NDArray[Any] = np.sort(values)[((np.arange(count) + 0.5) * len(values) / count).astype(int)]
    return found


def _worth(values: "NDArray[Any]", groups: "NDArray[np.intp]") -> float:
    """How many independent rows a share is known from as well as from these, of which some have the same prompt.

    With few prompts their spread is little known, so that the number is less by Student's quantile over the normal one (Korn &
    Graubard 1998). Where all rows have one prompt, they are what was drawn.
    """
    from scipy.stats import t

    prompts = int(groups.max()) + 1
    if prompts in (1, len(groups)):
        return len(groups)
    quantiles = NormalDist().inv_cdf(1 - LEVEL / 2) / float(t.isf(LEVEL / 2, prompts - 1))
    return max(1.0, estimate(values.astype(float), groups).rows * quantiles**2)


def _longer(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    if audits[0].method != "dpo":
        return
    longer = [scan["words"][:, 1] > scan["words"][:, 2] for scan in scans]
    groups = [_prompts(scan["keys"][:, 0])[1] for scan in scans]
    yield _shares(
        "chosen longer", [(float(each.mean()), _worth(each, of)) for each, of in zip(longer, groups, strict=True)]
    )


def _shares(what: str, known: Sequence[tuple[float, float]]) -> Compared:
    """Compares shares, each with the number of rows that it is known from."""
    return _judged(
        what,
        [f"{share:.0%}" for share, _ in known],
        lambda one, other: abs(known[one][0] - known[other][0]),
        lambda one, other: shares_p(known[one], known[other]),
        SHARE_WITHIN,
        lambda difference: f"{100 * difference:.0f} points",
    )


def _topics(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Topics that all data sets name are compared over all rows; else groups of the prompts of all samples together."""
    keys = [scan["keys"][:, 0] for scan in scans]
    if all(audit.topics_are_named for audit in audits):
        counts = [topics.over_all_rows(scan.facts.topics, scan.rows) for scan in scans]
    else:
        samples = [_sampled_prompts(scan, topics.MOST_PROMPTS) for scan in scans]
        names, _ = topics.name_topics(
            [prompt for sample in samples for prompt in sample], [""] * sum(map(len, samples))
        )
        given = iter(names)
        counts = [Counter(next(given) for _ in sample) for sample in samples]
        keys = [_sampled_keys(scan, topics.MOST_PROMPTS) for scan in scans]
    if len(set().union(*counts)) < 2:
        return
    worth = [_worth_of_prompts(each) for each in keys]

    def distance(one: int, other: int) -> float:
        here, there = counts[one], counts[other]
        return sum(abs(here[name] / here.total() - there[name] / there.total()) for name in {*here, *there}) / 2

    def p(one: int, other: int) -> float:
        names = sorted({*counts[one], *counts[other]})
        return counts_p(
            *(
                [counts[number][name] / counts[number].total() * worth[number] for name in names]
                for number in (one, other)
            )
        )

    tops = [f"{safe(name, 40)} {count / each.total():.0%}" for each in counts for name, count in each.most_common(1)]
    yield _judged("topics, most frequent", tops, distance, p, DISTANCE_WITHIN, lambda d: f"distance {d:.2f}")


def _sampled_keys(scan: Scan, most: int) -> "NDArray[Any]":
    found: NDArray[Any] = scan["keys"][[each.number for each in scan.facts.sample[:most]], 0]
    return found


def _worth_of_prompts(keys: "NDArray[Any]") -> float:
    """The number of independent rows for what is the same in all rows of a prompt (Kish 1965, Survey Sampling); see `_worth`."""
    import numpy as np

    held = np.unique(keys, return_counts=True)[1].astype(float)
    return len(keys) if len(held) == 1 else float(held.sum() ** 2 / (held**2).sum())


def _generators(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    named = [safe(audit.generator or "unknown", 40) for audit in audits]
    yield _judged(
        "generator", named, lambda one, other: float(named[one] != named[other]), lambda *_: 0.0, 0.0, lambda _: ""
    )


def _languages(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    main = audits[0].languages[0][0]
    known = []
    for scan, audit in zip(scans, audits, strict=True):
        rows = sum(count for _, count in audit.languages)
        known.append((dict(audit.languages).get(main, 0) / rows, _worth_of_prompts(_sampled_keys(scan, rows))))
    yield _shares(f"rows in {main}", known)


def _shortcuts(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Each feature whose accuracy differs; a feature that points the other way counts from the other end."""
    if audits[0].method != "dpo":
        return
    known = [number for number, audit in enumerate(audits) if audit.shortcuts]
    if len(known) < len(audits):
        reasons = tuple("looked at" if audit.shortcuts else audit.without_forensics for audit in audits)
        yield Compared("shortcuts", reasons, "", None)
    forensics = [audit.shortcuts for audit in audits if audit.shortcuts]
    if len(known) < 2:
        return
    by_name = [{each.feature: each for each in found.shortcuts} for found in forensics]
    matched = set()

    def placed(values: Sequence[str]) -> tuple[str, ...]:
        given = iter(values)
        return tuple(next(given) if number in known else "" for number in range(len(audits)))

    for feature in sorted({each.feature for found in forensics for each in found.found}):
        of_arms = [found[feature] for found in by_name]
        first = of_arms[0].chosen
        line = _shares(
            f"shortcut: {feature}",
            [
                (accuracy if each.is_fitted or each.chosen == first else 1 - accuracy, each.estimate.rows)
                for each, accuracy in ((each, each.estimate.accuracy) for each in of_arms)
            ],
        )
        if line.is_matched:
            matched.add(feature)
        else:
            one, other = line.furthest
            yield replace(line, values=placed(line.values), furthest=(known[one], known[other]))
    counts = [sum(each.feature in matched for each in found.found) for found in forensics]
    yield Compared("shortcuts that match", placed([f"{count} found" for count in counts]), "", True)


def _answers(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Each cheap feature that the answers of one side have more of in one data set, the one furthest apart first."""
    import numpy as np

    sides = "mean of chosen / rejected" if audits[0].method == "dpo" else "mean"
    samples = [[each.row for each in scan.facts.sample[:MOST_ANSWERS]] for scan in scans]
    texts = [
        [list(map(Text, side)) for side in zip(*(row.completions for row in rows), strict=True)] for rows in samples
    ]
    groups = [
        group_rows(_sampled_keys(scan, MOST_ANSWERS).tolist(), [row.completions for row in rows])
        for scan, rows in zip(scans, samples, strict=True)
    ]
    tests = len(OF_ANSWERS) * len(texts[0])
    unmatched = []
    for feature in OF_ANSWERS:
        values = [[np.array([feature.measure(text) for text in side], float) for side in arm] for arm in texts]
        line, effect = _of_answers(f"{feature.name}, {sides}", values, groups, tests)
        unmatched += [] if line.is_matched else [(effect, line)]
    yield from (line for _, line in sorted(unmatched, key=lambda each: -each[0]))
    match = f"{len(OF_ANSWERS) - len(unmatched)} of {len(OF_ANSWERS)}"
    yield Compared("features of the answers that match", (match,) * len(scans), "", True)


def _of_answers(
    what: str, values: Sequence[Sequence["NDArray[Any]"]], groups: Sequence["NDArray[np.intp]"], tests: int
) -> tuple[Compared, float]:
    """(one feature compared, how far the two are apart that differ most).

    Args:
        values: of each data set, of each side, [rows].
        tests: of features and sides together.
    """
    import numpy as np

    def effects(one: int, other: int) -> list[tuple[float, float]]:
        """By side, of the share that has any and of the distribution: Cohen's h, and its p."""
        found = []
        for sides in zip(values[one], values[other], strict=True):
            given = list(zip(sides, (groups[one], groups[other]), strict=True))
            lowest = float(min(each.min() for each in sides))
            for place, test in ((lowest, _shares_below_p), (_furthest(*sides)[1], _distributions_p)):
                angles = [2 * np.arcsin(np.sqrt((each <= place).mean())) for each in sides]
                effect = float(abs(angles[0] - angles[1]))
                found.append((effect, 2 * tests * test(given[0], given[1], place) if effect > EFFECT_WITHIN else 1.0))
        return found

    by_pair = {pair: effects(*pair) for pair in combinations(range(len(values)), 2)}
    # The difference that counts is the one that is shown.
    apart = {pair: max(found, key=lambda each: (each[1] <= LEVEL, each[0])) for pair, found in by_pair.items()}
    means = [" / ".join(f"{float(side.mean()):.3g}" for side in arm) for arm in values]
    line = _judged(
        what, means, lambda *pair: apart[pair][0], lambda *pair: apart[pair][1], EFFECT_WITHIN, lambda h: f"h {h:.2f}"
    )
    return line, apart[line.furthest][0]


COMPARISONS: tuple[Callable[[Sequence[Scan], Sequence[DataAudit]], Iterator[Compared]], ...] = (
    _rows,
    _lengths,
    _longer,
    _topics,
    _generators,
    _languages,
    _shortcuts,
    _answers,
)
