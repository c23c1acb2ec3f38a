"""The words of many texts at once, as numbers: what near-duplicates and shared passages are found by.

A word is a run of letters and digits (every character beyond ASCII counts as a letter), in lower case. Its hash is made of its
first and its last eight bytes and its length. A run of words is hashed from theirs, by a polynomial with a final mixing step
(the finaliser of SplitMix64, Steele et al. 2014, OOPSLA). Hashes are equal in all processes and on all machines.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST, LAST, LENGTH, STEP = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x100000001B3
"""Odd numbers; what is said of hashes holds for nearly any."""


def word_hashes(texts: Sequence[str]) -> tuple["NDArray[np.uint64]", "NDArray[np.int64]"]:
    """Hashes of the words of all texts in their order, [words], and where each text begins among them, [texts + 1]."""
    import numpy as np

    data = b"\n" + "\n".join(texts).lower().encode("utf-8", "surrogatepass") + b"\n" * 8
    raw = np.frombuffer(data, np.uint8)
    inside = np.frombuffer(data.translate(_IS_WORD), np.uint8)
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    sizes = ends - starts
    # Eight bytes from any place on: numbers that overlap.
    eight = np.ndarray((len(raw) - 7,), "<u8", data, 0, (1,))
    first = eight[starts] & np.array(_MASKS, np.uint64)[np.minimum(sizes, 8)]
    hashes = first * np.uint64(FIRST) ^ sizes.astype(np.uint64) * np.uint64(LENGTH)
    long = np.flatnonzero(sizes > 8)
    hashes[long] ^= eight[ends[long] - 8] * np.uint64(LAST)
    return mixed(hashes), np.searchsorted(starts, _beginnings(texts, raw))


_IS_WORD = bytes(byte >= 128 or chr(byte).isalnum() for byte in range(256))
_MASKS = [(1 << 8 * size) - 1 for size in range(9)]
"""Of eight bytes the first 0 to 8, the first one lowest."""


def _beginnings(texts: Sequence[str], raw: "NDArray[np.uint8]") -> "NDArray[np.int64]":
    """Where each text begins among the bytes, and where the last one ends."""
    import numpy as np

    sizes = [len(text) if text.isascii() else len(text.lower().encode("utf-8", "surrogatepass")) for text in texts]
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64) + 1)]) + 1


def mixed(hashes: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """The finaliser of SplitMix64."""
    import numpy as np

    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def runs(
    words: "NDArray[np.uint64]", begins: "NDArray[np.int64]", length: int
) -> tuple["NDArray[np.uint64]", "NDArray[np.int64]"]:
    """Hashes of all runs of so many words within a text, [runs], and the number of the text of each, [runs].

    A text with fewer words is one run of all of them; one without words has none.
    """
    import numpy as np

    counts = np.diff(begins)
    of = np.repeat(np.arange(len(counts)), counts)
    left = begins[1:][of] - np.arange(len(words))
    hashes = np.zeros(len(words), np.uint64)
    for step in range(min(length, len(words))):
        hashes *= np.uint64(STEP)
        hashes[: len(words) - step] += words[step:]
    for text in np.flatnonzero((counts > 0) & (counts < length)):  # few: their one run ends with them
        here = words[begins[text] : begins[text + 1]]
        places = np.arange(len(here)).astype(np.uint64)
        hashes[begins[text]] = np.bitwise_xor.reduce(mixed(here + places))
    is_run = left >= length
    is_run[begins[:-1][counts > 0]] = True
    return mixed(hashes[is_run]), of[is_run]
