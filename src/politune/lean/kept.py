"""The base's rows, kept in the user's cache: every tuned version of one base is compared with the same ones.

Their key holds all that they depend on: weights, config, number format, machine, versions, code, and every token that
was put. A file's name holds the hash of what is in it, too. What cannot be read or written, or has changed, is measured again.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from politune import record
from politune.cache import user_cache
from politune.errors import PolituneError
from politune.hashes import sha256_of
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
        self.folder, self.key = cache / FOLDER if cache else None, name

    def fill(self, journal: rows.Journal) -> int:
        """Adds to a measurement what is kept and it lacks: how many blocks."""
        if (path := self._file()) is None:
            return 0
        try:
            kept = rows.read(path) if path == self._named(path) else None
            os.utime(path)
        except (PolituneError, OSError):
            kept = None
        if kept is None:
            with contextlib.suppress(OSError):
                path.unlink()
            return 0
        lacking = [block.name for block in self.asked if block.name in kept and block.name not in journal.rows]
        for name in lacking:
            journal.append(name, kept[name])
        return len(lacking)

    def keep(self, journal: rows.Journal) -> None:
        """Keeps a measurement's rows."""
        if self.folder is None or self._file() is not None:
            return
        with contextlib.suppress(OSError, PolituneError):
            self.folder.mkdir(parents=True, exist_ok=True)
            unnamed = self.folder / f".{self.key}-{os.getpid()}"
            try:
                rows.write(unnamed, {block.name: journal.rows[block.name] for block in self.asked})
                unnamed.replace(self._named(unnamed))
            finally:
                unnamed.unlink(missing_ok=True)
            oldest = sorted(self.folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
            left_by_the_killed = self.folder.glob(f".{self.key}-*")
            for path in (*oldest[:-MOST_FILES], *left_by_the_killed):
                path.unlink(missing_ok=True)

    def _file(self) -> Path | None:
        """Where the rows are kept, if they are."""
        with contextlib.suppress(OSError):
            return next(iter(sorted(self.folder.glob(f"{self.key}-*.jsonl"))), None) if self.folder else None
        return None

    def _named(self, path: Path) -> Path:
        """The name of a file with this content."""
        return path.with_name(f"{self.key}-{sha256_of(path)[:32]}.jsonl")
