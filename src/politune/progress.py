"""How far a phase has come: a line every few seconds, to whoever takes lines."""

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 5.0


class Phase:
    """Says how much of a phase is done and how long the rest will take; the last line says that all of it is.

    Args:
        name: of the phase.
        unit: what is counted.
        say: takes one line.
    """

    def __init__(self, name: str, unit: str, say: Callable[[str], None]) -> None:
        self.name, self.unit, self.say = name, unit, say
        self.started = self.told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Takes how much of how much is done."""
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES and done < total:
            return
        self.told = now
        left = (now - self.started) / done * (total - done)
        self.say(f"{self.name} {done:,}/{total:,} {self.unit}  {left / 60:.1f} min left")


class Rate:
    """Says every few seconds how many of something are done, how many in a second, and how long the rest will take.

    Args:
        name: of the phase.
        unit: what is counted.
        say: takes one line.
    """

    def __init__(self, name: str, unit: str, say: Callable[[str], None]) -> None:
        self.name, self.unit, self.say = name, unit, say
        self.started = self.told = time.monotonic()

    def __call__(self, done: int, share: float | None) -> None:
        """Takes how much is done, and which share of all that is, where it is known."""
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES or share == 1:
            return
        self.told = now
        seconds = now - self.started
        left = f", {seconds / share * (1 - share):.0f} s left" if share else ""
        self.say(f"{self.name}: {done:,} {self.unit}, {done / seconds:,.0f} a second{left}")
