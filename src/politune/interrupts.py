"""What a signal does before a command has begun: it ends the process, with one line and the code that a shell would show."""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

_USUAL: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL,
}  # fmt: skip


def leave_at_once() -> None:
    """SIGINT, SIGTERM and SIGUSR1, a queue's announcement of it, end the process.

    An exception could be dropped where one comes while a library is imported.
    """
    for number, handler in _USUAL.items():
        if signal.getsignal(number) == handler:  # else somebody has them ignored, as `nohup` does
            signal.signal(number, _leave)


def raise_again() -> None:
    """A command has begun, which may have something to put in order: what a signal does is Python's usual again."""
    for number, handler in _USUAL.items():
        if signal.getsignal(number) == _leave:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # nobody reads
        os.write(2, b"politune: interrupted\n")
    os._exit(128 + (signal.SIGTERM if number == signal.SIGUSR1 else number))
