"""Orders of rows in which groups come evenly, and the rows that are taken in such an order.

A rank is a hash of a row's texts and a seed (splitmix64, Steele, Lea & Flood 2014, over BLAKE2b). The k-th of a group's n rows
stands at (k + u) / n: any first so many rows hold every group in its share, to within one row.
"""

import hashlib
from typing import TYPE_CHECKING, Any

from politune.data.words import mixed

if TYPE_CHECKING:
    from numpy.typing import NDArray


def ranks_of(hashes: "NDArray[Any]", seed: int, purpose: str = "") -> "NDArray[Any]":
    """[rows] uint64, the same for a row and for the one with its answers changed about."""
    import numpy as np

    salt = int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest(), "little")
    return mixed(identities(hashes) ^ np.uint64(salt))


def identities(hashes: "NDArray[Any]") -> "NDArray[Any]":
    """Of a row and of the one with its answers changed about, uint64 [rows]."""
    found: NDArray[Any] = mixed(hashes[:, 0]) ^ mixed(mixed(hashes[:, 1]) + mixed(hashes[:, 2]))
    return found


def numbered(*groups: "NDArray[Any]") -> "NDArray[Any]":
    """One number per combination, in the order of the first, then the second."""
    import numpy as np

    number = np.zeros(len(groups[0]), np.int64)
    for group in groups:
        found, index = np.unique(group, return_inverse=True)
        number = number * max(1, len(found)) + index
    return np.unique(number, return_inverse=True)[1]


def places(
    groups: "NDArray[Any]", cells: "NDArray[Any]", ranks: "NDArray[Any]", *, scattered: bool = False
) -> "NDArray[Any]":
    """Each row's place within its group, from 0, in an order in which the cells come evenly and each by rank.

    Args:
        groups: [rows], small numbers
        cells: [rows]
        ranks: [rows]
        scattered: u is a hash of the cell, in place of 1/2.
    """
    import numpy as np

    inner = numbered(groups, cells)
    within = counted(np.lexsort((ranks, inner)), inner)
    if len(groups) and inner.max() == groups.max():  # each group is one cell
        return within
    start = mixed(mixed(cells.astype(np.uint64))) / 2.0**64 if scattered else 0.5
    stands = (within + start) / np.bincount(inner)[inner]
    return counted(np.lexsort((ranks, inner, stands, groups)), groups)


def means(groups: "NDArray[Any]", sides: "NDArray[Any]") -> "NDArray[Any]":
    """The mean side of every group, [groups]."""
    import numpy as np

    found: NDArray[Any] = np.bincount(groups, sides) / np.maximum(1, np.bincount(groups))
    return found


def dealt(
    cells: "NDArray[Any]",
    sides: "NDArray[Any]",
    ranks: "NDArray[Any]",
    sources: "NDArray[Any]",
    slots: "NDArray[Any]",
    targets: "NDArray[Any]",
) -> "NDArray[Any]":
    """The row that each slot takes: of its cell, and of that side which keeps all rows so far nearest to the targets' mean.

    The sum of what is taken stays within one row (two units of a side) of the targets', as long as the cells have both sides;
    within that, each cell takes its own sides evenly.

    Args:
        cells, sides, ranks, sources: of each row.
        slots: rows in whose stead one of the same cell is taken, source by source.
        targets: the mean side that the rows of a slot's source are to have, [rows].
    """
    import numpy as np

    kinds = cells * 3 + sides + 1
    counts = np.bincount(kinds, minlength=3 * (int(cells.max()) + 1)).reshape(-1, 3)
    shares = (counts / np.maximum(1, counts.sum(1, keepdims=True))).tolist()
    begins, piles = (np.cumsum(counts) - counts.ravel()).tolist(), counts.tolist()
    taken = [[0, 0, 0] for _ in piles]
    picked, before, off = [], -1, 0.0
    for cell, source, target in zip(
        cells[slots].tolist(), sources[slots].tolist(), targets[slots].tolist(), strict=True
    ):
        if source != before:
            before, off = source, 0.0
        off += target
        pile, own, share = piles[cell], taken[cell], shares[cell]
        first, ties, second = own
        count = first + ties + second + 1
        # Of each side the square of what the sum would be off by, less what all share, and how far it is ahead in its cell.
        best, least = -1, 0.0
        if first < pile[0]:
            best, least = 0, off + 0.5 - share[0] * count + first
        if ties < pile[1] and (best < 0 or ties - share[1] * count < least - 1e-9):
            best, least = 1, ties - share[1] * count
        if second < pile[2] and (best < 0 or 0.5 - off - share[2] * count + second < least - 1e-9):
            best = 2
        picked.append(begins[cell * 3 + best] + own[best])
        own[best] += 1
        off -= best - 1
    found: NDArray[Any] = np.lexsort((ranks, kinds))[picked]
    return found


def counted(order: "NDArray[Any]", groups: "NDArray[Any]") -> "NDArray[Any]":
    """Each row's place among those of its group, which an order has side by side."""
    import numpy as np

    sizes = np.bincount(groups) if len(groups) else np.zeros(1, np.int64)
    first = np.cumsum(sizes) - sizes
    found = np.empty(len(groups), np.int64)
    found[order] = np.arange(len(groups)) - first[groups[order]]
    return found
