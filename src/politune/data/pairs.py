"""Near-duplicates within a scanned data set, or between two: candidates by their sketches, then compared word by word."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from politune.data.neighbours import THRESHOLD, candidates, shingles, similarity
from politune.data.scan import Scan, rows_at, whole_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS_AT_ONCE = 2000


@dataclass(frozen=True)
class Similar:
    """Pairs of rows that are alike up to a few words, exact copies aside.

    Args:
        pairs: how many there are.
        rows: in how many rows.
        across_prompts: how many pairs have different prompts.
        is_all: whether all candidates were compared; where there are too many, a part of them is, and there are more pairs.
        example: the most similar pair, as numbers of rows; empty where there is none.
    """

    pairs: int = 0
    rows: int = 0
    across_prompts: int = 0
    is_all: bool = True
    example: tuple[int, ...] = ()


def find_similar(scan: Scan, rows: "NDArray[np.int64]") -> Similar:
    """The near-duplicates among these rows, of which none is another's exact copy."""
    found, scores, is_all = similar_pairs(scan, rows)
    if not len(found):
        return Similar(is_all=is_all)
    import numpy as np

    prompts = scan["keys"][:, 0]
    across = int((prompts[found[:, 0]] != prompts[found[:, 1]]).sum())
    best = found[int(np.argmax(scores))].tolist()
    return Similar(len(found), len(np.unique(found)), across, is_all, (best[1], best[0]))


def similar_pairs(scan: Scan, rows: "NDArray[np.int64]") -> tuple["NDArray[np.int64]", "NDArray[np.float64]", bool]:
    """(pairs of row numbers, [pairs, 2]; their similarities; whether all candidates were compared)."""
    maybe, is_all = candidates(scan["bands"], rows[scan["reason"][rows] != 1])
    return *_verified(maybe, _shingles_at(scan, maybe)), is_all


def find_similar_between(one: Scan, other: Scan) -> int:
    """How many rows of one data set are near-duplicates, or copies, of a row of the other."""
    import numpy as np

    bands = np.concatenate([one["bands"], other["bands"]])
    sound = np.flatnonzero(np.concatenate([one["reason"], other["reason"]]) != 1)
    maybe, _ = candidates(bands, sound)
    maybe = maybe[(maybe[:, 0] < one.rows) & (maybe[:, 1] >= one.rows)]
    shifted = maybe - np.array([0, one.rows])
    known = {(0, row): runs for row, runs in _shingles_at(one, shifted[:, :1]).items()}
    known |= {(1, row): runs for row, runs in _shingles_at(other, shifted[:, 1:]).items()}
    alike = [similarity(known[0, first], known[1, second]) >= THRESHOLD for first, second in shifted.tolist()]
    return len(np.unique(shifted[alike, 0]))


def _shingles_at(scan: Scan, pairs: "NDArray[np.int64]") -> dict[int, Any]:
    import numpy as np

    rows = rows_at(scan, np.unique(pairs).tolist())
    numbers = sorted(rows)
    found: dict[int, Any] = {}
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        some = numbers[start : start + ROWS_AT_ONCE]
        found |= zip(some, shingles([whole_text(rows[number]) for number in some]), strict=True)
    return found


def _verified(pairs: "NDArray[np.int64]", runs: dict[int, Any]) -> tuple["NDArray[np.int64]", "NDArray[np.float64]"]:
    import numpy as np

    scores = np.array([similarity(runs[first], runs[second]) for first, second in pairs.tolist()])
    alike = scores >= THRESHOLD if len(scores) else np.zeros(0, bool)
    return pairs[alike], scores[alike]
