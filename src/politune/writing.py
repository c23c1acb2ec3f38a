"""Text files that are there whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 file through a temporary one beside it, fsynced, then renamed; what stood there stands until then.

    Raises:
        OSError: the directory is not writable or the disk is full; nothing is left behind.
    """
    handle = tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False)  # noqa: SIM115
    try:
        with handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        Path(handle.name).chmod(0o666 & ~_umask())
        Path(handle.name).replace(path)
        sync(path.parent)
    except BaseException:
        Path(handle.name).unlink(missing_ok=True)
        raise


def append_whole(path: Path, text: str) -> None:
    """Adds text to the end of a file and waits until the disk has it.

    Raises:
        OSError: the disk is full or gone; nothing was added.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # half a text must not become the beginning of the next one
            os.truncate(path, size)
        raise


def sync(path: Path) -> None:
    """Brings a file, or what was made and renamed in a directory, onto the disk: it is there after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
