"""SIGINT and SIGTERM as a request: finish the step, save, leave. A second one leaves at once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from politune.errors import Interrupted

SAME_REQUEST_SECONDS = 1.0
"""A scheduler signals all processes of a job, and the one that started this one hands it on: the same signal comes twice."""


class StopRequest:
    """Whether a signal asked the run to stop, and which one."""

    def __init__(self, resume_words: str) -> None:
        self.resume_words = resume_words
        self.signal_number: int | None = None
        self.inside_training = False
        self._came = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again = self.signal_number is not None
        if number == self.signal_number and time.monotonic() - self._came < SAME_REQUEST_SECONDS:
            return
        self.signal_number, self._came = number, time.monotonic()
        if again or not self.inside_training:
            # Not an Exception: a library that catches those, while it loads a model, would go on or blame the file.
            raise KeyboardInterrupt

    def interrupted(self, what: str) -> Interrupted:
        """The error that ends the run, with the command that resumes it."""
        number = self.signal_number or signal.SIGINT
        return Interrupted(what, signal_number=number, fix=f"go on with: {self.resume_words}")


@contextmanager
def caught(resume_words: str) -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM while the block runs and puts the former handlers back afterwards.

    Outside the training loop a signal ends the block at once; inside it the loop is asked to save and stop.

    Raises:
        Interrupted: a signal ended the block.
    """
    request = StopRequest(resume_words)
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    former = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    except KeyboardInterrupt:
        raise request.interrupted("interrupted") from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
