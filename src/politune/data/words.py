"""The words of many texts at once, as numbers: what near-duplicates and shared passages are found by.

A word is a run of letters, digits and marks, whatever its case and its form of writing (NFKC, case folded): `Größe` and `GRÖSSE`
are one, and so are `don't` and `don’t`, each two words. In scripts that write no spaces between words every character is one
(`SPACELESS`), so that eight words are eight characters there. A word's hash is made of all its bytes: the first and the last
eight, the length, and the blocks of eight between them. A run of words is hashed from theirs, by a polynomial with a final mixing
step (the finaliser of SplitMix64, Steele et al. 2014, OOPSLA). Hashes are equal in all processes and on all machines.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST, LAST, LENGTH, STEP = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x100000001B3
"""Odd numbers; what is said of hashes holds for nearly any."""
SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # signs that stand for a Chinese character
    (0x3040, 0x30FF),  # Kana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Letters of scripts without spaces between words, from and to."""


def word_hashes(texts: Sequence[str]) -> tuple["NDArray[np.uint64]", "NDArray[np.int64]"]:
    """Hashes of the words of all texts in their order, [words], and where each text begins among them, [texts + 1]."""
    import numpy as np

    if not all(map(str.isascii, texts)):
        texts = [text if text.isascii() else _spaced(text) for text in texts]
    data = b"\n" + "\n".join(texts).encode("utf-8", "surrogatepass").lower() + b"\n" * 8
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
    longer = long[sizes[long] > 16]
    if len(longer):
        hashes[longer] ^= _between(eight, starts[longer], sizes[longer])
    return mixed(hashes), np.searchsorted(starts, _beginnings(texts))


def _spaced(text: str) -> str:
    """A text whose words are those of `text`, with nothing but ASCII between them."""
    if len(text) > LONG_TEXT:
        text = _MANY_MARKS.sub(r"\g<0> ", text)
    return _UNPLAIN.sub(_as_words, unicodedata.normalize("NFKC", text).casefold())


LONG_TEXT = 4096
"""From so many characters on, marks upon one letter are parted (no writing has 30; the limit is that of Unicode's Annex 15):
normalising them takes the square of their number."""
_MANY_MARKS = re.compile(r"[^\w\x00-\x7f]{30}")


def _as_words(found: re.Match[str]) -> str:
    return found[0].translate(_SPACED)


class _Spaced(dict[int, str]):
    """What a character becomes, found when it is met first."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        if code == SOFT_HYPHEN:
            self[code] = ""
        elif kind[0] in "PSZ" or kind in ("Cc", "Cf"):
            self[code] = " "
        else:
            alone = any(first <= code <= last for first, last in SPACELESS)
            self[code] = f" {character} " if alone else character
        return self[code]


SOFT_HYPHEN = 0xAD
"""Says where a word may be broken, and is no part of it."""
_UNPLAIN = re.compile(rf"(?![\x00-\x7f])[\W{''.join(f'{chr(first)}-{chr(last)}' for first, last in SPACELESS)}]+")
"""What is neither ASCII nor letters of a script with spaces, nor digits."""
_SPACED = _Spaced()


def _between(
    eight: "NDArray[np.uint64]", starts: "NDArray[np.int64]", sizes: "NDArray[np.int64]"
) -> "NDArray[np.uint64]":
    """Of words of more than 16 bytes, what lies between the first and the last eight: the sum of its blocks, each mixed with
    its place; the last block reaches into the last eight bytes."""
    import numpy as np

    counts = (sizes - 9) // 8
    firsts = np.cumsum(counts) - counts
    places = np.arange(counts.sum()) - np.repeat(firsts, counts) + 1
    blocks = eight[np.repeat(starts, counts) + 8 * places]
    found: NDArray[np.uint64] = np.add.reduceat(mixed(blocks + places.astype(np.uint64) * np.uint64(STEP)), firsts)
    return found


_IS_WORD = bytes(byte >= 128 or chr(byte).isalnum() for byte in range(256))
_MASKS = [(1 << 8 * size) - 1 for size in range(9)]
"""Of eight bytes the first 0 to 8, the first one lowest."""


def _beginnings(texts: Sequence[str]) -> "NDArray[np.int64]":
    """Where each text begins among the bytes, and where the last one ends."""
    import numpy as np

    sizes = [len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts]
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
