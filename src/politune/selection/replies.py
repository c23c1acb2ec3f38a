"""What models replied, kept so that nothing is asked, or paid for, twice: in a directory's journal and in the user's cache.

Both are files of JSON lines that are only ever added to. A line that a killed process left half written, or that is damaged, is
passed over, and what it held is asked again.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune import record
from politune.cache import user_cache
from politune.errors import OutputError, safe
from politune.selection.endpoint import REJECTED, Reply, Request, Settings
from politune.writing import append_whole

JOURNAL = "replies.jsonl"


@dataclass(frozen=True)
class Kept:
    """A reply, and whether it came from the cache: then it cost nothing here."""

    reply: Reply
    cached: bool


class Replies:
    """The replies of one model with one set of settings, by request.

    Args:
        journal: of the directory; need not exist, and is written by `keep` alone.
        identity: of who answers.
        settings: of every request.
    """

    def __init__(self, journal: Path, identity: Mapping[str, Any], settings: Settings) -> None:
        self.journal = journal
        self._what = record.sha256_of_json({"who": dict(identity), **settings.__dict__})
        cache = user_cache()
        self._cache = None if cache is None else cache / "replies" / f"{self._what[:24]}.jsonl"
        self._elsewhere = {key: reply for key, reply, _ in _read(self._cache)} if self._cache else {}
        self._here = {key: Kept(reply, cached) for key, reply, cached in _read(journal)}

    def key(self, request: Request) -> str:
        """What a reply depends on, as a hash."""
        return record.sha256_of_json([self._what, request.prompt, request.seed])

    def find(self, request: Request) -> Kept | None:
        """A reply that is in the journal or in the cache."""
        key = self.key(request)
        elsewhere = self._elsewhere.get(key)
        return self._here.get(key) or (None if elsewhere is None else Kept(elsewhere, True))

    def is_here(self, request: Request) -> bool:
        """Whether the journal has it."""
        return self.key(request) in self._here

    @property
    def any_here(self) -> bool:
        """Whether anything was answered here."""
        return bool(self._here)

    def keep(self, replied: Sequence[tuple[Request, Reply]], *, cached: bool = False) -> None:
        """Writes replies into the cache, where they were not found there, and into the journal.

        What the endpoint rejected is kept in memory alone: it cost nothing, and may be answered another day.

        Raises:
            OutputError: the disk is full or gone.
        """
        self._here |= {self.key(request): Kept(reply, cached) for request, reply in replied}
        keyed = [(self.key(request), reply) for request, reply in replied if reply.finish != REJECTED]
        if not keyed:
            return
        if not cached and self._cache is not None:
            _share(self._cache, keyed)  # first: a directory's disk may be full, and what was paid for is there then
        try:
            append_whole(self.journal, _start(self.journal) + _line(keyed, cached))
        except OSError as error:
            raise OutputError(
                f"cannot write {safe(self.journal)}", why=error.strerror, fix="make room and run the same command again"
            ) from error


def _line(keyed: Iterable[tuple[str, Reply]], cached: bool) -> str:
    """One line for what was answered together, so that it is there or asked together."""
    found = [{"key": key, **reply.__dict__} for key, reply in keyed]
    return json.dumps({"cached": cached, "replies": found}, ensure_ascii=False) + "\n"


def _start(path: Path) -> str:
    """A line's end, where a killed process left half a line."""
    try:
        with path.open("rb") as file:
            file.seek(-1, 2)
            return "" if file.read() == b"\n" else "\n"
    except OSError:  # not there, or empty
        return ""


def _share(cache: Path, keyed: Sequence[tuple[str, Reply]]) -> None:
    """Adds to the cache, where it can be written to: several processes may, one after the other."""
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write((_start(cache) + _line(keyed, False)).encode())


def _read(path: Path) -> Iterator[tuple[str, Reply, bool]]:
    """(key, reply, whether it came from the cache) of every sound line."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            document = json.loads(line)
            for each in [dict(reply) for reply in document["replies"]]:
                key, text = each["key"], each["text"]
                if isinstance(key, str) and isinstance(text, str):
                    counts = each.get("prompt_tokens"), each.get("answer_tokens")
                    yield key, Reply.of(text, each.get("finish"), *counts), document["cached"] is True
