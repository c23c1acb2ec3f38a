"""Files from the Hub: waited for with an end to it, and used only where they are what the Hub announced.

`huggingface_hub` goes on for as long as a byte comes now and then, sleeps for as long as a server tells it to, asks for a
look-up once and without a time limit, and compares the length of a file with what was announced, but not its hash.
"""

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from politune.cache import user_cache
from politune.errors import HubError, safe
from politune.writing import write_whole

HUB_LOGIN = "Hugging Face login"
"""The line of `politune doctor` on it."""

PAUSES = (1.0, 2.0)
"""Seconds before a request is made again, on top of what the Hub's client tries for some of them."""

LEAST_BYTES = 32_768
"""What an answer has to bring in the time that the Hub is waited for: a kilobyte per second."""

WAITS = 3
"""How many time limits of one request may go by without it; the limit is HF_HUB_DOWNLOAD_TIMEOUT, 10 seconds."""

STORAGE_LIMITS = {
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "10s",
    "HF_XET_CLIENT_READ_TIMEOUT": "10s",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
}
"""The same for the storage of large files, which a library of its own speaks to: it would try for three minutes."""

BUSY = (408, 429, 500, 502, 503, 504)
LARGE_BYTES = 10_000_000
"""From this size on it is remembered that a file was right, and not read again."""


@contextmanager
def asking(what: str, *, offline: bool = False) -> Iterator[None]:
    """Inside, each request to the Hub has a time limit and is made again if it fails, until patience is at its end.

    It ends when nothing, or next to nothing, comes for half a minute; a file that does come may take its time.

    Args:
        what: the name of the repository, for the error.
        offline: no request is made.

    Raises:
        HubError: patience is at its end, or the Hub asks to be left alone for longer.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    for name, value in STORAGE_LIMITS.items():
        os.environ.setdefault(name, value)
    patience = _Patience(what, offline)

    def patient_client() -> Any:
        client = default_client_factory()
        client.send = functools.partial(patience.send, client.send)
        return client

    set_client_factory(patient_client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


class _Patience:
    """What all requests for one repository share: since when there has been no answer to any."""

    def __init__(self, what: str, offline: bool) -> None:
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

        self.what, self.offline = what, offline
        self.limit = float(HF_HUB_DOWNLOAD_TIMEOUT)
        self.since: float | None = None

    def send(self, plain: Callable[..., Any], request: Any, *, stream: bool = False, **options: Any) -> Any:
        """In place of the client's own `send`."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        if self.offline:
            raise OfflineModeIsEnabled("politune is offline")
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            name: min(limits.get(name) or self.limit, self.limit) for name in ("connect", "read", "write", "pool")
        }
        for pause in PAUSES:
            self._wait()
            try:
                response = self._ask(plain, request, stream, options)
            except HTTPError:
                time.sleep(pause)
                continue
            if response.status_code not in BUSY:
                return response
            response.close()
            time.sleep(max(pause, self._asked_to_wait(response.headers)))
        self._wait()
        return self._ask(plain, request, stream, options)

    def _ask(self, plain: Callable[..., Any], request: Any, stream: bool, options: dict[str, Any]) -> Any:
        response = plain(request, stream=True, **options)
        if response.status_code not in BUSY:
            response.iter_raw = functools.partial(self._watch, response.iter_raw)
        if not stream:
            try:
                response.read()
            except BaseException:
                response.close()
                raise
        return response

    def _watch(self, plain: Callable[..., Iterator[bytes]], *size: int | None, **sizes: int | None) -> Iterator[bytes]:
        """The body of an answer, as it comes: each has to bring its least by itself."""
        since, count = time.monotonic(), 0
        for part in plain(*size, **sizes):
            count += len(part)
            if count >= LEAST_BYTES:
                since, count, self.since = time.monotonic(), 0, None
            self._check(since)
            yield part
        self.since = None

    def _wait(self) -> None:
        self.since = self.since or time.monotonic()
        self._check(self.since)

    def _check(self, since: float) -> None:
        if time.monotonic() - since > WAITS * self.limit:
            raise HubError(
                f"the Hub does not deliver {safe(self.what)}",
                why=f"there was next to nothing from it for {WAITS * self.limit:.0f} seconds",
                fix="try again in a while; HF_HUB_DOWNLOAD_TIMEOUT=60 makes politune wait six times as long",
            )

    def _asked_to_wait(self, headers: Any) -> float:
        """The seconds that a Hub asks not to be asked again for, by either of the two headers for it."""
        spent = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("ratelimit", ""))
        after = re.fullmatch(r"\d+", headers.get("retry-after", "").strip())
        seconds = max(float(spent[1]) if spent else 0.0, float(after[0]) if after else 0.0)
        if seconds > WAITS * self.limit:
            raise HubError(
                f"the Hub is asked too often, for {safe(self.what)} or before",
                fix=f"it asks to wait for {seconds:.0f} seconds; --offline uses what an earlier run fetched",
            )
        return seconds


def sound(fetch: Callable[[], Path], what: str) -> Path:
    """What `fetch` brings into the Hub's cache, a file or a directory, once its hashes are those that the Hub announced.

    A file with another hash is removed and fetched again, once: it may have lain there since an earlier run.

    Raises:
        HubError: what came has another hash, too, and is removed.
    """
    path = fetch()
    if _remove_wrong(path):
        path = fetch()
        if wrong := _remove_wrong(path):
            raise HubError(
                f"what came of {safe(what)} is not what the Hub announced",
                why=f"another hash, and removed: {', '.join(safe(name) for name in wrong)}",
                fix="run it again later, and not --offline",
            )
    return path


def _remove_wrong(path: Path) -> list[str]:
    """Removes the files at a path, or right below it, that are not what the Hub announced; their names."""
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
    wrong = [each for each in files if each.exists() and not _is_as_announced(each)]
    for name in wrong:
        for each in (name.resolve(), _blob(name), name):
            each.unlink(missing_ok=True)
    return [name.name for name in wrong]


def _blob(path: Path) -> Path:
    """What a name in a snapshot stands for, which may be a link itself."""
    return path.parent / os.readlink(path) if path.is_symlink() else path  # noqa: PTH115 - one step only


def _is_as_announced(path: Path) -> bool:
    """Whether a file has the hash that its name in the cache is: SHA-256, or git's of a small one.

    A mirror may name files by their SHA-1, or in a way that tells nothing of their bytes; those are taken as they are.
    """
    name, found = _blob(path).name, path.stat()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
        return True
    state, stamp = f"{found.st_size} {found.st_mtime_ns}", _stamp(name)
    if found.st_size >= LARGE_BYTES and stamp and stamp.exists() and stamp.read_text(encoding="utf-8") == state:
        return True
    with path.open("rb") as file:
        if len(name) == 64:
            right = hashlib.file_digest(file, "sha256").hexdigest() == name
        else:
            body = file.read()
            heads = (b"blob %d\0" % len(body), b"")
            right = name in {hashlib.sha1(head + body, usedforsecurity=False).hexdigest() for head in heads}
    if right and found.st_size >= LARGE_BYTES and stamp:
        with suppress(OSError):
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_whole(stamp, state)
    return right


def _stamp(name: str) -> Path | None:
    """Where it is remembered that a large file was right, and its size and time then."""
    cache = user_cache()
    return cache / "hub" / name if cache else None
