"""What a data set shares with texts that it must not have: prompts word for word, and passages of eight words.

A passage is a run of eight words (GPT-2's report, Radford et al. 2019, looks for overlap by runs of eight as well), as they are
told apart by `words`: punctuation and case make no difference, and in scripts without spaces it is eight characters. Of large
texts to be held against, only those passages are remembered whose hashes are smallest (a fixed share, `Index.share`): a text that
was copied as a whole is still found, a single passage with that probability.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from politune.data.words import runs, word_hashes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PASSAGE = 8
MOST_PASSAGES = 2_000_000
TABLE_BITS = 24
LARGEST = 2**64 - 1


@dataclass(frozen=True)
class Index:
    """Texts to be held against, as hashes.

    Args:
        name: of where they come from.
        prompts: of the prompts, sorted.
        passages: of the passages that are remembered, sorted.
        share: of the passages that is remembered.
    """

    name: str
    prompts: "NDArray[np.uint64]"
    passages: "NDArray[np.uint64]"
    share: float = 1.0

    def save(self, path: Path) -> None:
        """Writes the index, for the processes that look into it."""
        import numpy as np

        np.savez(path, prompts=self.prompts, passages=self.passages, share=self.share, name=self.name)


@cache
def load(path: Path) -> tuple[Index, "NDArray[np.bool_]"]:
    """An index that was saved, and a table of the upper bits of its passages: most others are told apart by it alone."""
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        found = Index(str(data["name"]), data["prompts"], data["passages"], float(data["share"]))
    table = np.zeros(1 << TABLE_BITS, bool)
    table[(found.passages >> np.uint64(64 - TABLE_BITS)).astype(np.int64)] = True
    return found, table


def build(name: str, some_at_a_time: Iterable[tuple[Sequence[int], Sequence[str]]]) -> Index:
    """An index of texts, which come some at a time: hashes of their prompts, as `texts.hash_texts` makes them, and the texts."""
    import numpy as np

    grown = Growing()
    for prompts, texts in some_at_a_time:
        grown.add(np.array(prompts, np.uint64), passages(texts)[0])
    return grown.index(name)


class Growing:
    """An index that some texts after others are added to, as hashes; it holds `MOST_PASSAGES` of them twice at most."""

    def __init__(self) -> None:
        self.asked: list[NDArray[np.uint64]] = []
        self.kept: list[NDArray[np.uint64]] = []
        self.halvings = self.waiting = 0

    def add(self, prompts: "NDArray[np.uint64]", found: "NDArray[np.uint64]") -> None:
        """Takes hashes of prompts, as `texts.hash_texts` makes them, and what `passages` found."""
        import numpy as np

        self.asked.append(prompts)
        self.kept.append(found[found <= np.uint64(LARGEST >> self.halvings)])
        self.waiting += len(self.kept[-1])
        if self.waiting > MOST_PASSAGES:  # not with each part: that took as many times longer as there are parts
            self.halvings, least = _smallest(self.kept, self.halvings)
            self.kept, self.waiting = [least], 0

    def index(self, name: str) -> Index:
        halvings, least = _smallest(self.kept, self.halvings)
        return Index(name, _distinct(self.asked), least, 0.5**halvings)


def _smallest(found: Sequence["NDArray[np.uint64]"], halvings: int) -> tuple[int, "NDArray[np.uint64]"]:
    """(how often the range of hashes is halved until there is room, those within it)."""
    import numpy as np

    kept = _distinct(found)
    while len(kept) > MOST_PASSAGES:
        halvings += 1
        kept = kept[: int(np.searchsorted(kept, np.uint64(LARGEST >> halvings), side="right"))]
    return halvings, kept


def _distinct(found: Sequence["NDArray[np.uint64]"]) -> "NDArray[np.uint64]":
    """All of them, sorted and once; `numpy.unique` takes six times as long for numbers of which most differ."""
    import numpy as np

    together = np.sort(np.concatenate([np.empty(0, np.uint64), *found]))
    is_first = np.ones(len(together), bool)
    is_first[1:] = together[1:] != together[:-1]
    return together[is_first]


def passages(texts: Sequence[str]) -> tuple["NDArray[np.uint64]", "NDArray[np.int64]"]:
    """Hashes of all passages, and the number of the text of each; a text of fewer words has none."""
    import numpy as np

    words, begins = word_hashes(texts)
    found, of = runs(words, begins, PASSAGE)
    long = (np.diff(begins) >= PASSAGE)[of]
    return found[long], of[long]


def shared(index: Index, table: "NDArray[np.bool_]", texts: Sequence[str]) -> "NDArray[np.bool_]":
    """Which texts share a passage with those of the index, [texts]."""
    import numpy as np

    found, of = passages(texts)
    maybe = table[(found >> np.uint64(64 - TABLE_BITS)).astype(np.int64)]
    found, of = found[maybe], of[maybe]
    is_shared = np.zeros(len(texts), bool)
    is_shared[of[stand_in(index.passages, found)]] = True
    return is_shared


def stand_in(known: "NDArray[np.uint64]", hashes: "NDArray[np.uint64]") -> "NDArray[np.bool_]":
    """Which hashes are among known ones, which are sorted: `numpy.isin` would sort them once more for each part."""
    import numpy as np

    if not len(known):
        return np.zeros(len(hashes), bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
    return found
