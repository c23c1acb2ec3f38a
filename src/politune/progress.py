"""How far a phase has come: a line every few seconds, to whoever takes lines."""

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 5.0


class Phase:
    """Says how much of a phase is done, how fast, and how long the rest will take; the last line says that all of it is.

    Args:
        name: of the phase.
        unit: what is counted.
        say: takes one line.
    """

    def __init__(self, name: str, unit: str, say: Callable[[str], None]) -> None:
        self.name, self.unit, self.say = name, unit, say
        self.started = self.told = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        """Takes how much of how much is done; None where nobody knows of how much."""
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES and (total is None or done < total):
            return
        self.told = now
        rate = done / max(1e-9, now - self.started)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        of = f"/{total:,}" if total else ""
        left = f"  {(total - done) / rate / 60:.1f} min left" if total else ""
        self.say(f"{self.name} {done:,}{of} {self.unit}  {shown}/s{left}")
