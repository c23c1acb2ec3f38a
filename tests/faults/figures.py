"""One line of docs/faults.md, and how often it is asked for."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
WORKERS = 2


@dataclass(frozen=True)
class Figure:
    """How many of the trials came out as they must.

    Args:
        what: the fault, and what must come of it.
        of: how many trials there were.
        failures: one line per trial that came out otherwise, with what makes it happen again.
        seed: of the trials' random choices, None where there are none.
        beside: what a reader compares it with, such as the same faults put to the libraries alone.
    """

    what: str
    of: int
    failures: tuple[str, ...]
    seed: int | None = None
    beside: str = ""

    @property
    def good(self) -> int:
        return self.of - len(self.failures)


def count(what: str, found: Iterable[str | None], *, seed: int | None = None, beside: str = "") -> Figure:
    """A figure of trials, each None where it came out well and else a line that says how it did not."""
    trials = list(found)
    return Figure(what, len(trials), tuple(line for line in trials if line is not None), seed, beside)


def side_by_side(trial: Callable[[T], str | None], cases: Iterable[T]) -> list[str | None]:
    """The trial of each case, as many at a time as the machine has cores for; what it raises is its failure."""

    def told(case: T) -> str | None:
        try:
            return trial(case)
        except Exception as error:
            return f"{case!r:.120}: {type(error).__name__}: {error}"

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(told, cases))
