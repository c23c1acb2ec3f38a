"""A signal asks once, however many processes hand it on; a second request leaves at once."""

import os
import signal
import time

import pytest

from politune.errors import Interrupted
from politune.training import signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_same_signal_handed_on_twice_is_one_request() -> None:
    with signals.caught("politune train") as request:
        request.inside_training = True
        for _ in range(3):
            send(signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM


def test_a_second_request_leaves_at_once() -> None:
    with pytest.raises(Interrupted) as caught, signals.caught("politune train") as request:
        request.inside_training = True
        send(signal.SIGINT)
        time.sleep(signals.SAME_REQUEST_SECONDS + 0.05)
        send(signal.SIGINT)
        pytest.fail("the second one was not heeded")
    assert caught.value.exit_code == 130


def test_another_signal_is_another_request() -> None:
    with pytest.raises(Interrupted) as caught, signals.caught("politune train") as request:
        request.inside_training = True
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_outside_of_training_the_first_one_leaves() -> None:
    with pytest.raises(Interrupted), signals.caught("politune train"):
        send(signal.SIGTERM)
        pytest.fail("it was not heeded")
