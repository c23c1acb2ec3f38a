"""Who owns a directory: one process at a time, by a lock that the kernel drops with it, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from politune.errors import PolituneError

LOCK = ".politune.lock"


@contextlib.contextmanager
def owned(directory: Path, busy: PolituneError) -> Iterator[None]:
    """Owns a directory while the block lasts.

    Raises:
        PolituneError: `busy`, where another process owns it.
    """
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise busy from error
        yield
    finally:
        os.close(handle)
