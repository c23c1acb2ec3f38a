"""Rows that are no independent draws: those of one prompt, and those that hold one answer."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from politune.data.texts import hash_texts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_OF_ROWS = 0.05
"""A group that only single answers would make larger is not made: what so many rows say is a formula, not a copied answer."""


def group_rows(prompts: Sequence[Hashable], answers: Sequence[Sequence[str]]) -> "NDArray[np.intp]":
    """The number of each row's group, from 0 and without a gap, [rows].

    Rows are of one group that share their prompt, all of their answers whichever side those are on, or, up to `MOST_OF_ROWS`, one
    answer; case and white space aside. Answers that stand in the fewest rows come first; the order of the rows changes nothing.

    Args:
        prompts: what makes two prompts equal, [rows].
        answers: of each row.
    """
    import numpy as np

    parents, sizes = list(range(len(prompts))), [1] * len(prompts)

    def first(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    def unite(rows: Iterable[int], most: float) -> None:
        firsts = {first(row) for row in rows}
        if len(firsts) > 1 and sum(sizes[each] for each in firsts) <= most:
            kept, *others = firsts
            for each in others:
                parents[each] = kept
                sizes[kept] += sizes[each]

    hashed = [hash_texts(" ".join(text.casefold().split()) for text in row) for row in answers]
    by_answer: defaultdict[int, list[int]] = defaultdict(list)
    whole: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, (prompt, row) in enumerate(zip(prompts, hashed, strict=True)):
        whole["prompt", prompt].append(number)
        if len(row) > 1:
            whole["answers", tuple(sorted(row))].append(number)
        for answer in set(row):
            by_answer[answer].append(number)
    for rows in whole.values():
        unite(rows, len(prompts))
    for answer in sorted(by_answer, key=lambda answer: (len(by_answer[answer]), answer)):
        unite(by_answer[answer], MOST_OF_ROWS * len(prompts))
    groups: NDArray[np.intp] = np.unique([first(row) for row in range(len(prompts))], return_inverse=True)[1]
    return groups
