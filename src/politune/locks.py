"""Who owns a directory: one process at a time, by a lock that the kernel drops with it, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from politune.errors import OutputError, PolituneError, safe

LOCK = ".politune.lock"


@contextlib.contextmanager
def owned(directory: Path, busy: PolituneError) -> Iterator[None]:
    """Owns a directory while the block lasts.

    Raises:
        PolituneError: `busy`, where another process owns it.
        OutputError: it cannot be written to, or its file system keeps no locks.
    """
    try:
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(
            f"cannot write to {safe(directory)}", why=error.strerror, fix="choose another place"
        ) from error
    try:
        if not locked(handle, directory):
            raise busy
        yield
    finally:
        os.close(handle)


def locked(handle: int, directory: Path) -> bool:
    """Whether an open file could be locked now: not where another process has it.

    Raises:
        OutputError: the file system of `directory` keeps no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OutputError(
            f"{safe(directory)} cannot be shared",
            why=f"its file system keeps no locks: {error.strerror}",
            fix="choose another output directory",
        ) from error
    return True
