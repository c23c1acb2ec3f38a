"""The base's rows, kept in the user's cache: every tuned version of one base is compared with the same ones.

Their key holds all that they depend on: weights, config, number format, machine, versions, code, and every token that
was put. What cannot be read or written is measured again.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from politune import record
from politune.cache import user_cache
from politune.errors import PolituneError
from politune.lean import rows
from politune.lean.plan import Block
from politune.plan.machine import count_cores

FOLDER, MOST_FILES = "rows", 64
DEPENDS_ON = ("politune", "base", "dtype", "use_4bit", "device", "code", "libraries")


class KeptRows:
    """The rows of one instrument's blocks.

    Args:
        document: what is measured, and with what.
        asked: the base's blocks.
    """

    def __init__(self, document: Mapping[str, Any], asked: Sequence[Block]) -> None:
        self.asked = asked
        facts = {key: document[key] for key in DEPENDS_ON}
        cache = user_cache()
        name = record.sha256_of_json([facts, count_cores(), repr(asked)])[:32]
        self.path = cache / FOLDER / f"{name}.jsonl" if cache else None

    def fill(self, journal: rows.Journal) -> int:
        """Adds to a measurement what is kept and it lacks: how many blocks."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            kept = rows.read(self.path)
            os.utime(self.path)
        except (PolituneError, OSError):
            with contextlib.suppress(OSError):
                self.path.unlink()
            return 0
        lacking = [block.name for block in self.asked if block.name in kept and block.name not in journal.rows]
        for name in lacking:
            journal.append(name, kept[name])
        return len(lacking)

    def keep(self, journal: rows.Journal) -> None:
        """Keeps a measurement's rows."""
        if self.path is None or self.path.exists():
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows.write(self.path, {block.name: journal.rows[block.name] for block in self.asked})
            oldest = sorted(self.path.parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
            for path in oldest[:-MOST_FILES]:
                path.unlink(missing_ok=True)
