"""One line of docs/faults.md, and how often it is asked for."""

import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
WORKERS = 2


class Evidence(threading.local):
    """The directories of the trial that runs in this thread, to be removed once it came out well; None outside of trials."""

    places: list[Path] | None = None


EVIDENCE = Evidence()


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


def count(
    what: str, found: Iterable[str | None], *, seed: int | None = None, beside: str = "", at_least: int = 1
) -> Figure:
    """A figure of trials, each None where it came out well and else a line that says how it did not.

    Fewer trials than `at_least` are a failure of their own.
    """
    trials = list(found)
    if len(trials) < at_least:
        trials.append(f"only {len(trials)} trials, and {at_least} are asked for")
    return Figure(what, len(trials), tuple(line for line in trials if line is not None), seed, beside)


def side_by_side(trial: Callable[[T], R], cases: Iterable[T]) -> list[R | str]:
    """The trial of each case, as many at a time as the machine has cores for; what it raises is its failure.

    Its places (`Lab.place`) are removed where it found nothing wrong, and stay as evidence where it did.
    """

    def told(case: T) -> R | str:
        EVIDENCE.places = []
        try:
            found = trial(case)
        except Exception as error:
            return f"{case!r:.120}: {type(error).__name__}: {error}"
        if found is None or (isinstance(found, list | tuple) and not any(found)):
            for place in EVIDENCE.places:
                shutil.rmtree(place)
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(told, cases))
