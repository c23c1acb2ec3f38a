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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from politune.errors import HubError, safe
from politune.hashes import sha256_once

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


def sound(fetch: Callable[[], Path], what: str, *, offline: bool) -> Path:
    """What `fetch` brings from the Hub's cache, a file or a directory, once its hashes are those that the Hub announced.

    A file with another hash, which may have lain there since an earlier run, is removed and fetched again, once; what is
    wrong again is removed, too. Offline, where nothing can be fetched, it is left alone.

    Raises:
        HubError: a file came again with another hash, or not at all; offline, one has another hash.
    """
    path = fetch()
    if wrong := _wrong(path):
        if not offline:
            for each in wrong:
                _remove(each)
            path = fetch()
            wrong = [each for each in wrong if not each.exists()] + _wrong(path)
            for each in wrong:
                _remove(each)
        if wrong:
            raise HubError(
                f"what there is of {safe(what)} is not what the Hub announced",
                why=f"another hash: {', '.join(safe(each.name) for each in wrong)}",
                fix="run it once without --offline, to fetch it again" if offline else "run it again later",
            )
    return path


def _wrong(path: Path) -> list[Path]:
    """The files at a path, or right below it, that are not what the Hub announced."""
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
    return [each for each in files if each.exists() and not _is_as_announced(each)]


def _remove(name: Path) -> None:
    """The name in a snapshot and what the cache keeps under its hash; a blob that is a link itself only as a link."""
    blob = _blob(name)
    if Path(os.path.normpath(blob)).parent.name == "blobs":
        blob.unlink(missing_ok=True)
    name.unlink(missing_ok=True)


def _blob(path: Path) -> Path:
    """What a name in a snapshot stands for, which may be a link itself."""
    return path.parent / os.readlink(path) if path.is_symlink() else path  # noqa: PTH115 - one step only


def _is_as_announced(path: Path) -> bool:
    """Whether a file has the hash that its name in the cache is: SHA-256, or git's of a small one.

    A mirror may name files by their SHA-1, or in a way that tells nothing of their bytes; those are taken as they are.
    """
    name = _blob(path).name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return sha256_once(path) == name
    if not re.fullmatch(r"[0-9a-f]{40}", name):
        return True
    body = path.read_bytes()
    heads = (b"blob %d\0" % len(body), b"")
    return name in {hashlib.sha1(head + body, usedforsecurity=False).hexdigest() for head in heads}
