"""Near-duplicates among millions of texts: pairs whose runs of three words have a Jaccard similarity of 0.8 or more.

MinHash with one permutation (Li, Owen & Zhang 2012, NIPS): the runs of a text fall into 32 bins, of each bin the smallest hash is
kept, and an empty bin borrows its right neighbour's (Shrivastava & Li 2014, UAI). Two texts agree in a bin with a probability
equal to their similarity. Locality-sensitive hashing: texts that agree in all four bins of one of eight bands are candidates;
of pairs at 0.8 those are 98.5 %, of pairs at 0.9 all but 0.02 %, of pairs at 0.1 one in 1,250. Every candidate is then compared
run by run, by 32-bit hashes of all their bytes, so that no pair is named that is below the threshold. Where rows of a template
fill a band by the hundred, they are compared in part alone, and `candidates` says so.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from politune.data.words import mixed, runs, word_hashes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUN = 3
"""Words of a run."""
THRESHOLD = 0.8
BANDS, BINS_OF_A_BAND = 8, 4
BINS = BANDS * BINS_OF_A_BAND
BIN_SHIFT = 59
"""The upper five of 64 bits say which bin."""
PARTNERS = 20
"""Rows of a group that each is compared with."""
MOST_CANDIDATES = 100_000


def sketch(texts: Sequence[str]) -> "NDArray[np.uint32]":
    """What texts are compared by, [texts, `BANDS`]: similar ones agree in a band."""
    import numpy as np

    hashes, of = runs(*word_hashes(texts), RUN)
    bins = _smallest(hashes, of, len(texts))
    bands = np.zeros((len(texts), BANDS), np.uint64)
    for step in range(BINS_OF_A_BAND):
        bands = mixed(bands ^ bins[:, step::BINS_OF_A_BAND].astype(np.uint64)) + np.uint64(step + 1)
    return (bands >> np.uint64(32)).astype(np.uint32)


def _smallest(hashes: "NDArray[np.uint64]", of: "NDArray[np.int64]", count: int) -> "NDArray[np.uint32]":
    """The smallest hash of each text in each bin, [texts, `BINS`]; an empty bin has what the next one has, and more."""
    import numpy as np

    # One number of text, bin and hash: sorted, the first of each text and bin is the smallest.
    bins = hashes >> np.uint64(BIN_SHIFT)
    keys = np.sort(of.astype(np.uint64) << np.uint64(37) | bins << np.uint64(32) | (hashes & np.uint64(0xFFFFFFFF)))
    places = keys >> np.uint64(32)
    is_first = np.ones(len(keys), bool)
    is_first[1:] = places[1:] != places[:-1]
    found = np.full(count * BINS, -1, np.int64)
    found[places[is_first].astype(np.int64)] = (keys[is_first] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    grid = found.reshape(count, BINS)
    for turn in range(1, BINS):
        empty = grid < 0
        if not empty.any():
            break
        # What is borrowed is marked by how far it came, so that two empty bins of one value do not count twice.
        borrowed = np.roll(found.reshape(count, BINS), -turn, axis=1)
        grid = np.where(empty & (borrowed >= 0), (borrowed + turn * 0x9E3779B1) & 0xFFFFFFFF, grid)
    return np.where(grid < 0, np.arange(count)[:, None] * BINS + np.arange(BINS), grid).astype(np.uint32)


def candidates(bands: "NDArray[np.uint32]", rows: "NDArray[np.int64]") -> tuple["NDArray[np.int64]", bool]:
    """Pairs of rows that may be similar, [pairs, 2], the smaller number first, sorted; and whether that is all of them.

    Of the rows that agree in a band each is paired with the next `PARTNERS`. Larger groups, of rows made by a template for
    instance, are not paired throughout: then there may be more.

    Args:
        bands: what `sketch` gave, [all rows, `BANDS`].
        rows: which ones are compared, in an order that says who the next ones are.
    """
    import numpy as np

    found, is_all = [np.empty(0, np.int64)], True
    for band in range(BANDS):
        # In a large group, rows that agree in the next bands as well stand side by side.
        order = np.lexsort([bands[rows, (band + step) % BANDS] for step in (2, 1, 0)])
        keys, sorted_rows = bands[rows, band][order], rows[order]
        for step in range(1, PARTNERS + 1):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if not len(same):
                break
            one, other = sorted_rows[same], sorted_rows[same + step]
            found.append(np.minimum(one, other) * len(bands) + np.maximum(one, other))
        else:
            is_all &= not bool((keys[PARTNERS + 1 :] == keys[: -PARTNERS - 1]).any())
    pairs = np.unique(np.concatenate(found))
    if len(pairs) > MOST_CANDIDATES:
        pairs, is_all = (
            np.sort(pairs[np.argsort(mixed(pairs.astype(np.uint64)), kind="stable")[:MOST_CANDIDATES]]),
            False,
        )
    return np.stack(np.divmod(pairs, len(bands)), 1), is_all


def shingles(texts: Sequence[str]) -> list["NDArray[np.uint32]"]:
    """The distinct runs of each text, sorted, in 32 bits: what `similarity` compares."""
    import numpy as np

    hashes, of = runs(*word_hashes(texts), RUN)
    bounds = np.searchsorted(of, np.arange(len(texts) + 1))
    return [
        np.unique((hashes[bounds[text] : bounds[text + 1]] >> np.uint64(16)).astype(np.uint32))
        for text in range(len(texts))
    ]


def similarity(one: "NDArray[np.uint32]", other: "NDArray[np.uint32]") -> float:
    """Jaccard: of the runs that stand in either text, the share that stands in both; 0 where neither has any."""
    import numpy as np

    shared = len(np.intersect1d(one, other, assume_unique=True))
    together = len(one) + len(other) - shared
    return shared / together if together else 0.0
