"""Command lines inside this very process, for trials that are too many for a process each."""

import contextlib
import io
import sys
import time
from collections.abc import Sequence

from faults.lab import Ended


def run_here(argv: Sequence[object]) -> Ended:
    """As `politune` with these arguments would end here, with all that it prints."""
    from politune import cli

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    words, sys.argv = sys.argv, ["politune", *map(str, argv)]
    started, code = time.monotonic(), 0
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = words
    out, err = (_text(stream) for stream in streams)
    return Ended(code, out, err, time.monotonic() - started)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]


def faults_of(ended: Ended, codes: Sequence[int]) -> list[str]:
    """What no command may do, whatever it is given: another exit code, a traceback, control characters for a terminal."""
    printed = ended.out + ended.err
    found = [] if ended.code in codes else [f"exit code {ended.code}: {ended.err.strip()[:300]!r}"]
    found += [f"says {word!r}" for word in ("Traceback", "a bug in politune") if word in printed]
    raw = {
        character for character in printed if (ord(character) < 32 and character != "\n") or 127 <= ord(character) < 160
    }
    return found + ([f"control characters {sorted(raw)!r}"] if raw else [])
