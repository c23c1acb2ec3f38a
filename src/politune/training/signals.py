"""SIGINT, SIGTERM and SIGUSR1 as a request: finish the step, save, leave. A second one leaves at once.

SIGUSR1 is what a queue sends some time before SIGTERM (`sbatch --signal=USR1@120`); a time of one's own (`--stop-after`) asks
the same way. What follows either is no second request: it was announced.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from politune.errors import Interrupted

SAME_REQUEST_SECONDS = 1.0
"""A scheduler signals all processes of a job, and the one that started this one hands it on: the same signal comes twice.

Not so Ctrl-C where nothing launched this process: who presses it twice means it.
"""


class Stop(KeyboardInterrupt):
    """Not an Exception: a library that catches those, while it loads a model, would go on or blame the file.

    And no plain KeyboardInterrupt: of one that passes through an `exec` of text, as data classes are made by, CPython remembers
    that it came, and ends the process by SIGINT whatever its exit code is to be.
    """


class StopRequest:
    """Whether a signal asked the run to stop, and which one: an announced end counts as SIGTERM."""

    def __init__(self, resume_words: str) -> None:
        self.resume_words = resume_words
        self.signal_number: int | None = None
        self.inside_training = False
        self._came = 0.0
        self._announced = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again = self.signal_number is not None
        announces = number == signal.SIGUSR1
        number = signal.SIGTERM if announces else number
        if again and (announces or (number == self.signal_number and (self._announced or self._is_same(number)))):
            return
        self._announced = announces
        self.signal_number, self._came = number, time.monotonic()
        if again or not self.inside_training:
            raise Stop

    def _is_same(self, number: int) -> bool:
        may_be_handed_on = number != signal.SIGINT or "RANK" in os.environ
        return may_be_handed_on and time.monotonic() - self._came < SAME_REQUEST_SECONDS

    def interrupted(self, what: str) -> Interrupted:
        """The error that ends the run, with the command that resumes it."""
        number = self.signal_number or signal.SIGINT
        return Interrupted(what, signal_number=number, fix=f"go on with: {self.resume_words}")


@contextmanager
def caught(resume_words: str, *, stop_after: float | None = None) -> Iterator[StopRequest]:
    """Catches SIGINT, SIGTERM and SIGUSR1 while the block runs and puts the former handlers back afterwards.

    Outside the training loop a signal ends the block at once; inside it the loop is asked to save and stop.

    Args:
        stop_after: minutes from now after which the block is asked to end; in the main thread only.

    Raises:
        Interrupted: a signal ended the block.
    """
    request = StopRequest(resume_words)
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if in_main_thread else ()
    former = {number: signal.signal(number, request) for number in numbers}
    clock = None
    if stop_after is not None and in_main_thread:
        clock = threading.Timer(stop_after * 60, os.kill, (os.getpid(), signal.SIGUSR1))
        clock.daemon = True
        clock.start()
    try:
        yield request
    except KeyboardInterrupt:
        raise request.interrupted("interrupted") from None
    finally:
        if clock is not None:
            clock.cancel()
            clock.join()  # nothing may come when the handlers are gone
        for number, handler in former.items():
            signal.signal(number, handler)
