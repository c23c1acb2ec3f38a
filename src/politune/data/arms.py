"""Whether data sets that are to be compared differ in more than what they are compared for.

A difference counts where it is larger than a tolerance and than chance: shares by a two-proportion z test, distributions by their
largest distance (Kolmogorov-Smirnov), topics by the total variation distance with a chi-squared test of homogeneity.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from politune.data import topics
from politune.data.checks import SIGNIFICANT_Z
from politune.data.findings import MISLEADS, WORTH_KNOWING, DataAudit, Finding
from politune.data.pairs import find_similar_between
from politune.data.scan import Scan
from politune.errors import safe
from politune.report import Lines, Section, Table

ROWS_WITHIN = 0.01
"""Relative difference in the number of rows that is none."""
SHARE_WITHIN = 0.05
"""Difference in a share or an accuracy that is none, in parts of 1."""
DISTANCE_WITHIN = 0.1
"""Distance between two distributions that is none."""
LEVEL = 0.001
SHOWN_WORDS = 10


@dataclass(frozen=True)
class Compared:
    """One line of the comparison: a value per data set, and how far they are apart."""

    what: str
    values: tuple[str, ...]
    difference: str
    is_matched: bool


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
        return tuple(line for line in self.lines if not line.is_matched)

    @property
    def verdict(self) -> str:
        if not self.unmatched:
            return "yes, in all that was compared, up to chance and tolerance"
        named = "; ".join(f"{line.what} ({' against '.join(line.values)})" for line in self.unmatched[:4])
        more = f"; and {len(self.unmatched) - 4} more" if len(self.unmatched) > 4 else ""
        return f"no: they differ in {named}{more}"

    def findings(self) -> Iterator[Finding]:
        """What a person should know of the arms together."""
        for line in self.unmatched:
            text = f"the arms differ in {line.what}: {' against '.join(line.values)} ({line.difference})"
            yield Finding(MISLEADS, f"arms {line.what}", text, 1.0, "arms")
        for one, other, count in self.shared_prompts:
            if count:
                text = f"{count:,} prompts stand both in {one} and in {other}"
                yield Finding(WORTH_KNOWING, "shared-prompts", text, 0.0, "arms")

    def sections(self) -> Iterator[Section]:
        """The comparison as a table, and the words that set the first two apart."""
        rows = tuple(
            (line.what, *line.values, line.difference, "yes" if line.is_matched else "no") for line in self.lines
        )
        note = (
            f"Matched: rows within {ROWS_WITHIN:.0%}, shares and accuracies within {SHARE_WITHIN:.0%}, distributions within a "
            f"distance of {DISTANCE_WITHIN}, or a difference that chance explains (p > {LEVEL})."
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
        Counter(
            word for each in scan.facts.sample for word in set(topics.content_words(each.row.prompt[-1]["content"]))
        )
        for scan in (one, other)
    )
    words = topics.words_apart(here, there)
    telling = [each for each in words if abs(each.z) > SIGNIFICANT_Z]
    more = tuple(f"{each.word} ({each.here}:{each.there})" for each in telling if each.z > 0)[:SHOWN_WORDS]
    less = tuple(f"{each.word} ({each.there}:{each.here})" for each in reversed(telling) if each.z < 0)[:SHOWN_WORDS]
    return more, less


# --- what is compared ------------------------------------------------------------------------------------------------


def _rows(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    counts = [audit.rows for audit in audits]
    ratio = max(counts) / min(counts) - 1
    yield Compared("rows", tuple(f"{count:,}" for count in counts), f"{ratio:.1%}", ratio <= ROWS_WITHIN)


def _lengths(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Medians are shown, whole distributions are compared."""
    import numpy as np
    from scipy.stats import ks_2samp

    for column, part in enumerate(
        ("prompt", "chosen", "rejected") if audits[0].method == "dpo" else ("prompt", "answer")
    ):
        lengths = [scan["words"][:, column] for scan in scans]
        tests = [ks_2samp(one, other, method="asymp") for one, other in combinations(lengths, 2)]
        distance, p = max((float(test.statistic), float(test.pvalue)) for test in tests)
        values = tuple(f"{float(np.median(each)):g}" for each in lengths)
        is_matched = distance <= DISTANCE_WITHIN or p > LEVEL
        yield Compared(f"words of {part}, median", values, f"distance {distance:.2f}", is_matched)


def _longer(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    if audits[0].method != "dpo":
        return
    counts = [(int((each["words"][:, 1] > each["words"][:, 2]).sum()), each.rows) for each in scans]
    yield _shares("chosen longer", counts)


def _shares(what: str, counts: Sequence[tuple[int, int]]) -> Compared:
    shares = [count / rows for count, rows in counts]
    furthest = max(combinations(range(len(counts)), 2), key=lambda pair: abs(shares[pair[0]] - shares[pair[1]]))
    difference = abs(shares[furthest[0]] - shares[furthest[1]])
    z = _two_proportions(*(counts[number] for number in furthest))
    is_matched = difference <= SHARE_WITHIN or z < SIGNIFICANT_Z
    return Compared(what, tuple(f"{share:.0%}" for share in shares), f"{100 * difference:.0f} points", is_matched)


def _two_proportions(one: tuple[int, int], other: tuple[int, int]) -> float:
    together = (one[0] + other[0]) / (one[1] + other[1])
    spread = math.sqrt(together * (1 - together) * (1 / one[1] + 1 / other[1]))
    return abs(one[0] / one[1] - other[0] / other[1]) / spread if spread else 0.0


def _topics(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Topics that all data sets name are compared over all rows; else groups of the prompts of all samples together."""
    if all(audit.topics_are_named for audit in audits):
        counts = [scan.facts.topics for scan in scans]
    else:
        samples = [
            [each.row.prompt[-1]["content"] for each in scan.facts.sample[: topics.MOST_PROMPTS]] for scan in scans
        ]
        names, _ = topics.name_topics(
            [prompt for sample in samples for prompt in sample], [""] * sum(map(len, samples))
        )
        given = iter(names)
        counts = [Counter(next(given) for _ in sample) for sample in samples]
    if len(set().union(*counts)) < 2:
        return
    distance, p = max(_distance(one, other) for one, other in combinations(counts, 2))
    tops = tuple(
        f"{safe(each.most_common(1)[0][0], 40)} {each.most_common(1)[0][1] / each.total():.0%}" for each in counts
    )
    is_matched = distance <= DISTANCE_WITHIN or p > LEVEL
    yield Compared("topics, most frequent", tops, f"distance {distance:.2f}", is_matched)


def _distance(one: Counter[str], other: Counter[str]) -> tuple[float, float]:
    """(total variation distance, p of the chi-squared test)."""
    from scipy.stats import chi2_contingency

    names = sorted({*one, *other})
    table = [[each[name] for name in names] for each in (one, other)]
    distance = sum(abs(one[name] / one.total() - other[name] / other.total()) for name in names) / 2
    return distance, float(chi2_contingency(table).pvalue)


def _generators(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    named = tuple(safe(audit.generator or "unknown", 40) for audit in audits)
    yield Compared("generator", named, "", len(set(named)) == 1)


def _languages(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    main = audits[0].languages[0][0]
    counts = [(dict(audit.languages).get(main, 0), sum(count for _, count in audit.languages)) for audit in audits]
    yield _shares(f"rows in {main}", counts)


def _shortcuts(scans: Sequence[Scan], audits: Sequence[DataAudit]) -> Iterator[Compared]:
    """Each feature whose accuracy differs; a feature that points the other way counts from the other end."""
    forensics = [audit.shortcuts for audit in audits if audit.shortcuts]
    if len(forensics) < len(audits):
        return
    by_name = [{each.feature: each for each in found.shortcuts} for found in forensics]
    for feature in sorted({each.feature for found in forensics for each in found.found}):
        each_arm: list[Any] = [found[feature] for found in by_name]
        first = each_arm[0].chosen
        accuracies = [
            each.estimate.accuracy if each.is_fitted or each.chosen == first else 1 - each.estimate.accuracy
            for each in each_arm
        ]
        difference = max(accuracies) - min(accuracies)
        spread = max(each.estimate.high - each.estimate.low for each in each_arm)
        if difference > SHARE_WITHIN and difference > spread:
            values = tuple(f"{accuracy:.0%}" for accuracy in accuracies)
            yield Compared(f"shortcut: {feature}", values, f"{100 * difference:.0f} points", False)


COMPARISONS: tuple[Callable[[Sequence[Scan], Sequence[DataAudit]], Iterator[Compared]], ...] = (
    _rows,
    _lengths,
    _longer,
    _topics,
    _generators,
    _languages,
    _shortcuts,
)
