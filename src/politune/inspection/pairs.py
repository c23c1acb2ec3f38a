"""Near-duplicates within a scanned data set, or between two: candidates by their sketches, then compared word by word."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from politune.data.neighbours import THRESHOLD, candidates, shingles, similarity
from politune.data.texts import whole_text
from politune.data.words import mixed
from politune.inspection.scan import Scan, row_keys, rows_by_part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Similar:
    """Pairs of rows that are alike up to a few words, exact copies aside.

    Args:
        pairs: how many were found.
        rows: in how many rows.
        across_prompts: of the rows, how many are alike to one with another prompt.
        is_all: whether all candidates were compared; where a group is large, a part of its pairs is, and there are more.
        example: the most similar pair, as numbers of rows; empty where there is none.
    """

    pairs: int = 0
    rows: int = 0
    across_prompts: int = 0
    is_all: bool = True
    example: tuple[int, ...] = ()


def find_similar(scan: Scan, rows: "NDArray[np.int64]") -> Similar:
    """The near-duplicates among these rows, of which none is another's exact copy."""
    import numpy as np

    found, scores, is_all = similar_pairs(scan, rows)
    if not len(found):
        return Similar(is_all=is_all)
    prompts = scan["keys"][:, 0]
    across = found[prompts[found[:, 0]] != prompts[found[:, 1]]]
    best = found[int(np.argmax(scores))].tolist()
    return Similar(len(found), len(np.unique(found)), len(np.unique(across)), is_all, (best[1], best[0]))


def similar_pairs(scan: Scan, rows: "NDArray[np.int64]") -> tuple["NDArray[np.int64]", "NDArray[np.float64]", bool]:
    """(pairs of row numbers, [pairs, 2]; their similarities; whether all candidates were compared)."""
    import numpy as np

    maybe, is_all = candidates(scan["bands"], rows[scan["reason"][rows] != 1])
    runs = _shingles_at(scan, maybe)
    scores = np.array([similarity(runs[first], runs[second]) for first, second in maybe.tolist()])
    alike = scores >= THRESHOLD
    return maybe[alike], scores[alike], is_all


def find_similar_between(one: Scan, other: Scan) -> tuple[int, bool]:
    """(rows of one data set that are copies or near-duplicates of a row of the other, whether those are all)."""
    import numpy as np

    (keys, firsts), (others_keys, others_firsts) = distinct(one), distinct(other)
    bands = np.concatenate([one["bands"][firsts], other["bands"][others_firsts]])
    sound = np.flatnonzero(np.concatenate([one["reason"][firsts], other["reason"][others_firsts]]) != 1)
    # In an order by chance: in a group of both, the next ones are of both.
    maybe, is_all = candidates(bands, sound[np.argsort(mixed(sound.astype(np.uint64)))])
    maybe = maybe[(maybe[:, 0] < len(firsts)) & (maybe[:, 1] >= len(firsts))]
    pairs = np.stack([firsts[maybe[:, 0]], others_firsts[maybe[:, 1] - len(firsts)]], 1)
    runs, others_runs = _shingles_at(one, pairs[:, :1]), _shingles_at(other, pairs[:, 1:])
    alike = [similarity(runs[first], others_runs[second]) >= THRESHOLD for first, second in pairs.tolist()]
    found = np.union1d(keys[pairs[alike, 0]], np.intersect1d(keys[firsts], others_keys[others_firsts]))
    return int(np.isin(keys, found).sum()), is_all


def distinct(scan: Scan) -> tuple["NDArray[np.uint64]", "NDArray[np.int64]"]:
    """(a hash of each row's prompt and answers, in their order; the first row with each of them)."""
    import numpy as np

    keys = row_keys(*scan["keys"].T)
    return keys, np.sort(np.unique(keys, return_index=True)[1])


def first_repetition(keys: "NDArray[np.uint64]", firsts: "NDArray[np.int64]") -> tuple[int, ...]:
    """The first row that repeats an earlier one, and that one, by what `distinct` found; empty where none does."""
    import numpy as np

    again = np.setdiff1d(np.arange(len(keys)), firsts, assume_unique=True)[:1]
    return tuple(int(row) for row in again for row in (row, np.argmax(keys == keys[row])))


def find_contradictions(scan: Scan, keys: "NDArray[np.uint64]") -> tuple[int, tuple[int, ...]]:
    """(rows for which another row with the same prompt has the same two answers the other way round, the first such pair)."""
    import numpy as np

    prompt, chosen, rejected = scan["keys"].T
    differs = chosen != rejected
    turned = row_keys(prompt, rejected, chosen)
    found = np.flatnonzero(np.isin(turned, keys[differs]) & differs)
    return len(found), tuple(int(row) for row in found[:1] for row in (row, np.argmax(keys == turned[row])))


def _shingles_at(scan: Scan, pairs: "NDArray[np.int64]") -> dict[int, Any]:
    """The runs of the rows that stand in pairs; their texts are held a part of the data at a time."""
    import numpy as np

    found: dict[int, Any] = {}
    for rows in rows_by_part(scan, np.unique(pairs).tolist()):
        found |= zip(rows, shingles([whole_text(row.prompt, *row.completions) for row in rows.values()]), strict=True)
    return found
