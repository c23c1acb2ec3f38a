"""Which rows are kept, from their columns alone.

Every choice within a group of rows takes those of the lowest rank: a hash of the row's texts and the recipe's seed
(splitmix64, Steele, Lea & Flood 2014, over BLAKE2b). A rank does not depend on which answer is the chosen one, and of the two
sides that first which has the row of the lowest rank (`Selection.sides`): two recipes that take the left and the right answers of
one file take the same rows.

Where a part of the rows is to be like the whole, the k-th of a group's n rows stands at (k + u) / n, and the rows are taken by
where they stand: any first so many of them hold every group in its share, to within one row, and the first of fewer are among the
first of more. u is 1/2; among many small groups it is a hash of the group's name, or those of one row would all stand in the
middle. Ties go by group before rank: how many rows of each group are taken follows from the groups' names and sizes alone. Where
there are many topics, each with both sides, what one of them rounds up the next ones round down (`places.dealt`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from politune.config import PLACEBOS, Recipe, RuleSpec
from politune.data.columns import EMPTY, EQUAL, FIRST_RULE, OTHER_SPLIT, TAKEN, Columns
from politune.data.neighbours import candidates
from politune.data.places import counted, dealt, means, numbered, places, ranks_of
from politune.data.words import mixed
from politune.errors import DataError, safe

if TYPE_CHECKING:
    from numpy.typing import NDArray

Alike: TypeAlias = "Callable[[NDArray[Any]], NDArray[Any]]"
"""Which of some pairs of rows, [pairs, 2], are near-duplicates; a mask."""
Choice: TypeAlias = tuple[Recipe, Columns, Alike]

MOST_ROUNDS = 30
"""Of comparing what may be nearly the same, each a reading of those rows."""
BIN_EDGES = tuple(sorted({round(2 ** (half / 2)) for half in range(64)}))
"""Of lengths and differences: 1, 2, 3, 4, 6, 8, 11, 16, 23, 32 ...; a bin is about 40 % wide."""
SPAN = 2 * len(BIN_EDGES) + 2


@dataclass(frozen=True)
class Step:
    """What a step did to the rows.

    Args:
        dropped: rows that went, by reason.
        most: the most rows that could have been kept (`most_with_share`), where that is known.
    """

    name: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int] = field(default_factory=dict)
    most: float | None = None


@dataclass(frozen=True)
class Chosen:
    """The rows to be written.

    Args:
        rows: their numbers among the columns' rows, ascending.
        turned: whether chosen and rejected change places, [rows].
        before: the rows that could be used at all.
        steps: what became of the others.
    """

    rows: "NDArray[Any]"
    turned: "NDArray[Any]"
    before: "NDArray[Any]"
    steps: tuple[Step, ...]


class Selection:
    """The rows of one recipe that are left, step by step."""

    def __init__(self, recipe: Recipe, columns: Columns, alike: Alike, topic_numbers: dict[str, int]) -> None:
        import numpy as np

        self.recipe, self.columns, self.alike = recipe, columns, alike
        self.steps: list[Step] = []
        self.rows = np.arange(columns.rows)
        # Twins number their topics alike.
        self.topics = np.array([topic_numbers[name] for name in columns.names], np.int64)[columns.topics]
        self.cells = np.zeros(columns.rows, np.int64)
        self.ranks = ranks_of(columns.hashes, recipe.seed)
        self.facing = np.ones(len(recipe.source), np.int64)

    def face(self) -> None:
        """Fixes which side of each source comes first. Of matched recipes it is the shorter: the strata must be equal in both."""
        import numpy as np

        if self.recipe.match is not None:
            return
        decided = self.rows[np.flatnonzero(self.signs)]
        decided = decided[np.argsort(self.ranks[decided], kind="stable")]
        found, first = np.unique(self.columns.sources[decided], return_index=True)
        self.facing[found] = -np.sign(differences(self.columns, decided[first]))

    @property
    def share(self) -> float | None:
        """Of longer chosen answers, where the recipe says one."""
        return 0.5 if self.recipe.balance.lengths else self.recipe.balance.chosen_longer

    # Of the rows that are left:

    @property
    def sources(self) -> "NDArray[Any]":
        import numpy as np

        return self.columns.sources[self.rows].astype(np.int64)

    @property
    def differences(self) -> "NDArray[Any]":
        """How much longer the chosen answer is, in the recipe's unit."""
        return differences(self.columns, self.rows)

    @property
    def strata(self) -> "NDArray[Any]":
        """What the rows are divided by before sides are balanced: the source, and the topic where those are balanced."""
        topics = self.topics[self.rows] if self.recipe.balance.topics else 0
        return self.sources * 2**32 + topics

    @property
    def signs(self) -> "NDArray[Any]":
        """1 where the chosen answer is longer, -1 where it is shorter."""
        import numpy as np

        found: NDArray[Any] = np.sign(self.differences)
        return found

    @property
    def sides(self) -> "NDArray[Any]":
        """As `signs`, with -1 for the side that comes first: the same whichever of two texts is the chosen one."""
        found: NDArray[Any] = self.signs * self.facing[self.sources]
        return found

    @property
    def sizes(self) -> "NDArray[Any]":
        """The class of the difference where those are balanced, else nothing but zeros."""
        import numpy as np

        found: NDArray[Any] = _bins(np.abs(self.differences)) * (1 if self.recipe.balance.lengths else 0)
        return found

    def keep(self, mask: "NDArray[Any]", name: str, reason: str, most: float | None = None) -> None:
        """Leaves the rows of a mask, and notes the step."""
        before = len(self.rows)
        self.rows = self.rows[mask]
        gone = before - len(self.rows)
        self.steps.append(Step(name, before, len(self.rows), {reason: gone} if gone else {}, most))
        self.require_rows()

    def require_rows(self) -> None:
        """Raises DataError where no row is left."""
        step = self.steps[-1]
        if not step.rows_out:
            why = f"{step.rows_in:,} rows came to it: " + ", ".join(
                f"{n:,} {reason}" for reason, n in step.dropped.items()
            )
            raise DataError(f"no row is left after the step {step.name}", why=safe(why))

    def places(self, *groups: "NDArray[Any]") -> "NDArray[Any]":
        """Each row's place within its group, in which sizes of difference and twins' strata come evenly."""
        fine = self.cells[self.rows] * SPAN + self.sizes
        return places(numbered(*groups), fine, self.ranks[self.rows], scattered=True)

    def even_places(self, turned: "NDArray[Any] | None" = None) -> "NDArray[Any]":
        """Each row's place within its source, in which turned rows, topics (where they are balanced) and sides come evenly."""
        import numpy as np

        halves = np.zeros(len(self.rows), np.int64) if turned is None else turned.astype(np.int64)
        sources, sides = self.sources, self.sides
        cells = numbered(sources, halves, self.strata)
        of_side = self.places(cells, sides)
        is_dealt = self.recipe.balance.topics
        of_cell = counted(np.argsort(cells, kind="stable"), cells) if is_dealt else places(cells, sides, of_side)
        of_half = places(numbered(sources, halves), self.strata, of_cell)
        place = places(numbered(sources), halves, of_half)
        if not is_dealt:
            return place
        order = np.lexsort((place, sources))
        after = np.where(halves, -sides, sides)
        targets = np.where(
            np.isin(sources, sources[halves > 0]), means(sources, after)[sources], _targets(self, sources)
        )
        rows = dealt(cells, after, of_side, sources, order, targets)
        # Among the topics that stand at one place the order is free: the last rows of all, whose sides are given, need it.
        stands = (of_cell[order] + 0.5) / np.bincount(cells)[cells[order]]
        rounds = numbered(sources[order], halves[order], stands)
        slots = np.arange(len(rows))
        rows = rows[dealt(rounds, after[rows], slots, sources[order], slots, targets[order])]
        found = np.empty_like(place)
        found[rows] = place[order]
        return found


def choose(own_side: Choice, twin: Choice | None = None) -> Chosen:
    """The rows to be written, by the recipe's steps: filter, match, balance, mixture, match, sides, dose.

    Strata are matched first, so that what follows takes equally many of each in both twins, and once more, for those whose
    further settings differ.

    Args:
        own_side: the recipe, the figures of its rows, and what tells which of two rows are nearly the same.
        twin: of the recipe that it is matched with.

    Raises:
        DataError: no row is left, or fewer than the dose asks for.
    """
    recipe, both = own_side[0], [own_side, *([twin] if twin else [])]
    numbers = {name: number for number, name in enumerate(sorted({name for _, own, _ in both for name in own.names}))}
    selections = [Selection(*each, numbers) for each in both]
    own = selections[0]
    for each in selections:
        _filter(each)
        each.face()
    before = own.rows
    steps: Sequence[Callable[[Selection], None]] = (_balance_sides, _balance_topics, _mix)
    _match(selections, recipe)
    for each in selections:
        for step in steps:
            step(each)
    _match(selections, recipe)
    if own.steps[-1].name == "match" and not own.steps[-1].dropped:
        own.steps.pop()  # the second time, as a rule
    turned = _turned(own)
    kept = _dose(own, turned)
    return Chosen(own.rows, turned[kept], before, tuple(own.steps))


def differences(columns: Columns, rows: "NDArray[Any]") -> "NDArray[Any]":
    """How much longer the chosen answer is, int64 [rows], in the recipe's unit."""
    lengths = columns.lengths[rows].astype("int64")
    found: NDArray[Any] = lengths[:, 1] - lengths[:, 2]
    return found


def _bins(lengths: "NDArray[Any]") -> "NDArray[Any]":
    import numpy as np

    return np.searchsorted(np.array(BIN_EDGES), lengths, side="right")


# --- filter ----------------------------------------------------------------------------------------------------------


def _filter(each: Selection) -> None:
    import numpy as np

    columns, recipe = each.columns, each.recipe
    reasons = {
        OTHER_SPLIT: "of another split",
        EMPTY: "empty",
        EQUAL: "equal sides",
        **{FIRST_RULE + number: reason for number, reason in enumerate(_rules(recipe))},
    }
    gone = Counter(
        {reasons[code]: int(count) for code, count in enumerate(np.bincount(columns.verdicts)) if code and count}
    )
    mask = columns.verdicts == TAKEN
    for part, name in enumerate(("prompt", "chosen", "rejected")):
        if (bounds := getattr(recipe.filter, name)) is not None:
            outside = (columns.lengths[:, part] < bounds[0]) | (columns.lengths[:, part] > bounds[1])
            gone[f"length of {name}"] = int((mask & outside).sum())
            mask &= ~outside
    each.rows = each.rows[mask]
    each.steps.append(Step("filter", columns.rows, len(each.rows), {key: n for key, n in gone.items() if n}))
    each.require_rows()
    if recipe.filter.duplicates:
        first = np.unique(_ordered(columns.hashes[each.rows], 1, 2), return_index=True)[1]
        mask = np.zeros(len(each.rows), bool)
        mask[first] = True
        each.keep(mask, "duplicates", "repeats an earlier row")
    if recipe.filter.contradictions:
        hashes = columns.hashes[each.rows]
        mask = ~_are_in(_ordered(hashes, 1, 2), _ordered(hashes, 2, 1))
        each.keep(mask, "contradictions", "stands against the same pair the other way round")
    if recipe.filter.near_duplicates:
        each.keep(_one_of_each_group(each), "near-duplicates", "is nearly a row that is kept")


def _one_of_each_group(each: Selection) -> "NDArray[Any]":
    """Of rows that are nearly the same, directly or through others, the one with the lowest rank; a mask of the rows left.

    Where there are too many to compare all at once, those that stay are compared again, as often as some go.
    """
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    left = each.rows[np.argsort(each.ranks[each.rows], kind="stable")]
    for _ in range(MOST_ROUNDS):
        pairs, is_all = candidates(each.columns.bands, left)
        pairs = pairs[each.alike(pairs)]
        size = each.columns.rows
        graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
        groups = connected_components(graph, directed=False)[1]
        left = left[np.sort(np.unique(groups[left], return_index=True)[1])]
        if is_all:
            return np.isin(each.rows, left)
        if not len(pairs):
            break
    raise DataError(
        "too many rows are nearly the same to compare them all",
        where="filter.near_duplicates",
        why="they seem to be made by a template",
        fix="leave near_duplicates out, or drop such rows by a rule",
    )


def _ordered(hashes: "NDArray[Any]", first: int, second: int) -> "NDArray[Any]":
    """Of a row with one of its answers first and the other second, uint64 [rows]."""
    import numpy as np

    return mixed(mixed(hashes[:, 0]) ^ (mixed(hashes[:, first]) + mixed(hashes[:, second]) * np.uint64(3)))


def _are_in(numbers: "NDArray[Any]", others: "NDArray[Any]") -> "NDArray[Any]":
    """`np.isin` in less time and memory, for millions of numbers that differ."""
    import numpy as np

    others = np.sort(others)
    found: NDArray[Any] = others[np.searchsorted(others, numbers).clip(0, len(others) - 1)] == numbers
    return found


def _rules(recipe: Recipe) -> list[str]:
    return [*map(_reason, recipe.filter.drop), *(_reason(rule, keeps=True) for rule in recipe.filter.keep)]


def _reason(rule: RuleSpec, *, keeps: bool = False) -> str:
    if rule.pattern is not None:
        return f"{rule.field} {'does not match' if keeps else 'matches'} {rule.pattern!r}"
    if rule.min is not None and rule.max is not None:
        numbers = f"{rule.min:g} to {rule.max:g}"
    else:
        numbers = f"{rule.max:g} or less" if rule.min is None else f"{rule.min:g} or more"
    return f"{rule.field} is {'not ' if keeps else ''}{numbers}"


# --- match -----------------------------------------------------------------------------------------------------------


def _match(selections: Sequence[Selection], recipe: Recipe) -> None:
    """Leaves equally many rows of every stratum in both."""
    import numpy as np

    if recipe.match is None or len(selections) != 2:
        return
    for each in selections:
        each.cells = _cells(each, recipe.match.on)
    counts = [np.unique(each.cells[each.rows], return_counts=True) for each in selections]
    shared, one, other = np.intersect1d(counts[0][0], counts[1][0], return_indices=True)
    fewest = np.minimum(counts[0][1][one], counts[1][1][other])
    for each in selections:
        own = each.cells[each.rows]
        where = np.searchsorted(shared, own).clip(0, max(0, len(shared) - 1))
        is_shared = np.isin(own, shared)
        room = fewest[where] if len(shared) else np.zeros(len(own), np.int64)
        place = places(numbered(own), own * 0, each.ranks[each.rows])
        each.keep(is_shared & (place < room), "match", "without a partner in the twin")


def _cells(each: Selection, on: Sequence[str]) -> "NDArray[Any]":
    """The stratum of every row, [rows of the columns]; the same number means the same in both twins."""
    import numpy as np

    lengths = each.columns.lengths.astype(np.int64)
    more = lengths[:, 1] - lengths[:, 2]
    cells = each.topics if "topic" in on else np.zeros(each.columns.rows, np.int64)
    cells = cells * SPAN + (_bins(lengths[:, 1] + lengths[:, 2]) if "length" in on else 0)
    return cells * SPAN + (np.sign(more) * _bins(np.abs(more)) + len(BIN_EDGES) if "difference" in on else 0)


# --- balance ---------------------------------------------------------------------------------------------------------


def most_with_share(longer: int, shorter: int, ties: int, share: float) -> float:
    r"""The most rows of which a share has the longer chosen answer, a tie as half.

    Let a row be worth v = 1 (chosen longer), 1/2 (tie) or 0. Rows of the share p have \sum (v - p) = 0. With
    E = L (1 - p) + T (1/2 - p) - S p over all rows, those that go must sum to E. If E > 0, a row takes off at most 1 - p, which
    only longer ones do: at least E / (1 - p) go, and so many are enough where L has them. Where it has not, all of L go, and
    ties, each 1/2 - p (for p < 1/2; otherwise E would be no longer positive). E < 0 mirrors it. So the rows that go are the
    fewest when those furthest from p go first. For p = 1/2 that leaves 2 min(L, S) + T rows.
    """
    return longer + shorter + ties - sum(_to_go(longer, shorter, ties, share))


def _to_go(longer: float, shorter: float, ties: float, share: float) -> tuple[float, float, float]:
    """(longer, shorter, ties) rows that go, as real numbers."""
    excess = longer * (1 - share) + ties * (0.5 - share) - shorter * share
    if excess < 0:
        turned = _to_go(shorter, longer, ties, 1 - share)
        return turned[1], turned[0], turned[2]
    first = min(longer, excess / (1 - share)) if share < 1 else 0.0
    rest = excess - first * (1 - share)
    then = min(ties, rest / (0.5 - share)) if rest > 1e-9 and share < 0.5 else 0.0
    return first, 0.0, then


def kept_of_sides(counts: "NDArray[Any]", share: float) -> "NDArray[Any]":
    """How many (longer, shorter, ties) rows of each stratum are kept for `most_with_share`, whole ones, [strata, 3].

    What one stratum rounds down adds to the next ones: all together meet the share to within one row.
    """
    import numpy as np

    gone = np.array([_to_go(longer, shorter, ties, share) for longer, shorter, ties in counts.tolist()])
    so_far = np.floor(np.cumsum(counts - gone, axis=0) + 1e-9).astype(np.int64)
    return np.diff(so_far, axis=0, prepend=0)


def _balance_sides(each: Selection) -> None:
    import numpy as np

    share = each.share
    if share is None:
        return
    signs = each.signs
    strata = numbered(each.strata, each.sizes)
    counts = np.stack([np.bincount(strata[signs == sign], minlength=strata.max() + 1) for sign in (1, -1, 0)], 1)
    kept = np.zeros_like(counts)
    source_of = np.zeros(len(counts), np.int64)
    source_of[strata] = each.sources
    for source in np.unique(source_of):
        kept[source_of == source] = kept_of_sides(counts[source_of == source], share)
    most = sum(most_with_share(int(longer), int(shorter), int(ties), share) for longer, shorter, ties in counts)
    left = kept[strata, np.choose(signs + 1, [1, 2, 0])]
    place = each.places(strata, signs)
    each.keep(place < left, "balance of sides", "too many of its side", most)


def _balance_topics(each: Selection) -> None:
    import numpy as np

    if not each.recipe.balance.topics:
        return
    strata = numbered(each.strata)
    sizes = np.bincount(strata)
    source_of = np.zeros(len(sizes), np.int64)
    source_of[strata] = each.sources
    fewest = np.full(source_of.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(fewest, source_of, sizes)
    room, sides, sources = fewest[source_of][strata], each.sides, each.sources
    within = counted(np.argsort(strata, kind="stable"), strata)
    slots = np.flatnonzero(within < room)
    slots = slots[np.lexsort((strata[slots], within[slots], sources[slots]))]
    mask = np.zeros(len(strata), bool)
    mask[dealt(strata, sides, each.places(strata, sides), sources, slots, _targets(each, strata))] = True
    most = float(fewest[source_of].sum())
    each.keep(mask, "balance of topics", "too many of its topic in its source", most)


def _targets(each: Selection, groups: "NDArray[Any]") -> "NDArray[Any]":
    """The mean side that what is taken of a row's group is to have: the recipe's, where it says one, else the group's own."""
    if each.share is None:
        own: NDArray[Any] = means(groups, each.sides)[groups]
        return own
    # Rounded, so that the mirrored share of a mirrored file is the same number.
    found: NDArray[Any] = each.facing[each.sources] * round(2 * each.share - 1, 12)
    return found


# --- mixture and dose ------------------------------------------------------------------------------------------------


def _mix(each: Selection) -> None:
    """Takes of every source as many rows, or as much text, as its share says of the most that all of them have."""
    import numpy as np

    shares = [source.share for source in each.recipe.source]
    if shares[0] is None:
        return
    weights = np.array(shares, float) / sum(share for share in shares if share is not None)
    sources = each.sources
    place = each.even_places()
    worth = np.ones(len(place), np.int64)
    if each.recipe.mix == "text":
        worth = each.columns.lengths[each.rows].astype(np.int64).sum(1)
    elif each.recipe.mix == "tokens":
        worth = each.columns.tokens[each.rows, 0].astype(np.int64)
    totals = np.array([worth[sources == number].sum() for number in range(len(weights))])
    whole = (totals / weights).min()
    mask = np.zeros(len(place), bool)
    for number, weight in enumerate(weights):
        own = np.flatnonzero(sources == number)
        own = own[np.argsort(place[own])]
        so_far = np.cumsum(worth[own])
        # The row that would go over its share is taken where most of it still belongs there.
        mask[own[so_far - worth[own] / 2 <= whole * weight + 1e-6]] = True
    each.keep(mask, "mixture", "more than its source's share")


def _dose(each: Selection, turned: "NDArray[Any]") -> "NDArray[Any]":
    """Leaves the first so many rows; which of them those are, as a mask."""
    import numpy as np

    dose = each.recipe.dose
    rows = len(each.rows)
    if dose is None:
        return np.ones(rows, bool)
    wanted = int(rows * dose.fraction + 0.5) if dose.fraction is not None else dose.rows or 0
    if wanted > rows:
        raise DataError(
            f"the dose asks for {wanted:,} rows and {rows:,} are left",
            where="dose.rows",
            fix="ask for fewer, or leave less out",
        )
    # Sources in their shares first, in each of them turned and other rows by halves, in these all else.
    of_source = each.even_places(turned)
    place = places(np.zeros(rows, np.int64), each.sources, of_source)
    each.keep(place < wanted, "dose", "beyond the dose")
    return place < wanted


# --- placebos --------------------------------------------------------------------------------------------------------


def _turned(each: Selection) -> "NDArray[Any]":
    """Whether a row's answers change places: drawn, for the sources that are a placebo; [rows]."""
    import numpy as np

    found = np.zeros(len(each.rows), bool)
    ranks = ranks_of(each.columns.hashes[each.rows], each.recipe.seed, "sides")
    signs = each.signs
    for number, source in enumerate(each.recipe.source):
        own = np.flatnonzero(each.sources == number)
        if source.direction == "shuffled":
            found[own] = _half(signs[own], ranks[own])
        elif source.direction == "length":
            found[own] = _by_length(signs[own], ranks[own])
        if len(own) and source.direction in PLACEBOS and not found[own].any():
            raise DataError(
                f"no row of {safe(source.name)} changes places: a placebo by {source.direction} leaves it as it is",
                where="source.direction",
                why=f"of {len(own):,} rows, {int((signs[own] > 0).sum()):,} have the longer answer chosen",
                fix="balance its sides first ([balance] chosen_longer), or name another direction",
            )
    return found


def _half(signs: "NDArray[Any]", ranks: "NDArray[Any]") -> "NDArray[Any]":
    """A half of all rows (rounded down), and of those with a longer, an equal and a shorter chosen answer each."""
    import numpy as np

    found, before, taken = np.zeros(len(signs), bool), 0, 0
    for sign in (1, 0, -1):
        own = np.flatnonzero(signs == sign)
        before += len(own)
        found[own[np.argsort(ranks[own], kind="stable")][: before // 2 - taken]] = True
        taken = before // 2
    return found


def _by_length(signs: "NDArray[Any]", ranks: "NDArray[Any]") -> "NDArray[Any]":
    """As many rows as before have the longer answer chosen, but others: which, is drawn without regard to which it was."""
    import numpy as np

    found = np.zeros(len(signs), bool)
    decided = np.flatnonzero(signs)
    order = decided[np.argsort(ranks[decided], kind="stable")]
    becomes = np.full(len(signs), -1)
    becomes[order[: int((signs > 0).sum())]] = 1
    found[decided] = becomes[decided] != signs[decided]
    ties = np.flatnonzero(signs == 0)
    found[ties[np.argsort(ranks[ties], kind="stable")][: len(ties) // 2]] = True
    return found
