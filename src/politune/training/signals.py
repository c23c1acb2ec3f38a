"""SIGINT, SIGTERM and SIGUSR1 as a request: finish the step, save, leave. A second one leaves at once.

A second Ctrl-C waits for no call into a library that lets go of Python's lock, as torch's do: Python's handlers wait, so a thread
watches for it.

SIGUSR1 is what a queue sends some time before SIGTERM (`sbatch --signal=USR1@120`); a time of one's own (`--stop-after`) asks
the same way. What follows either is no second request: it was announced.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from politune.errors import Interrupted, safe

SAME_REQUEST_SECONDS = 1.0
"""A scheduler signals all processes of a job, and the one that started this one hands it on: the same signal comes twice.

Not so Ctrl-C where nothing launched this process: who presses it twice means it.
"""
MOST_SECONDS_AFTER_TWO = 0.5
"""So long the process has to leave in good order after a second Ctrl-C."""


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
        may_be_handed_on = number != signal.SIGINT or _is_launched()
        return may_be_handed_on and time.monotonic() - self._came < SAME_REQUEST_SECONDS

    def interrupted(self, what: str) -> Interrupted:
        """The error that ends the run, with the command that resumes it."""
        number = self.signal_number or signal.SIGINT
        return Interrupted(what, signal_number=number, fix=f"go on with: {self.resume_words}")


def _is_launched() -> bool:
    return "RANK" in os.environ


class _SecondPress:
    """Ends the process a moment after a second SIGINT, whatever it is in: what the run has saved is whole all the same.

    The system's own handler writes a byte per signal at once, where Python's run when the call into a library is over.
    """

    def __init__(self, resume_words: str) -> None:
        self.words = f"stopped at once; go on with: {resume_words}\n"
        self.over = threading.Event()
        self.end, signalled = os.pipe()
        os.set_blocking(signalled, False)
        self.signalled, self.former = signalled, signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        presses = 0
        while not self.over.is_set() and presses < 2:
            presses += os.read(self.end, 64).count(signal.SIGINT)
        if presses > 1 and not self.over.wait(MOST_SECONDS_AFTER_TWO):
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0)[1]:  # not a full pipe, whose reader may have stopped
                    os.write(2, self.words.encode())
            os._exit(128 + signal.SIGINT)

    def close(self) -> None:
        signal.set_wakeup_fd(self.former)
        self.over.set()
        with contextlib.suppress(BlockingIOError):  # full: there is enough to read
            os.write(self.signalled, bytes(1))
        self.thread.join()
        os.close(self.end)
        os.close(self.signalled)


def _in_a_forked_child() -> None:
    """What is sent to a child is not to count as sent to its parent, whose pipe it has."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_a_forked_child)


@contextmanager
def caught(resume_words: str, *, stop_after: float | None = None) -> Iterator[StopRequest]:
    """Catches SIGINT, SIGTERM and SIGUSR1 while the block runs and puts the former handlers back afterwards.

    Outside the training loop a signal ends the block at once; inside it the loop is asked to save and stop.

    Args:
        stop_after: minutes from now after which the block is asked to end; in the main thread only.

    Raises:
        Interrupted: a signal ended the block.
    """
    resume_words = safe(resume_words, None)  # somebody may have typed what moves a cursor
    request = StopRequest(resume_words)
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if in_main_thread else ()
    former = {number: signal.signal(number, request) for number in numbers}
    second_press = _SecondPress(resume_words) if in_main_thread and not _is_launched() else None
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
        if second_press is not None:
            second_press.close()
        for number, handler in former.items():
            signal.signal(number, handler)
