"""A signal asks once, however many processes hand it on; a second request leaves at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_an_announced_end_is_one_request_with_what_follows() -> None:
    """A queue sends SIGUSR1, and SIGTERM when its patience ends; the run leaves as after SIGTERM."""
    with signals.caught("politune train") as request:
        request.inside_training = True
        send(signal.SIGUSR1)
        assert request.signal_number == signal.SIGTERM
        time.sleep(signals.SAME_REQUEST_SECONDS + 0.05)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
    with signals.caught("politune train") as request:
        request.inside_training = True
        send(signal.SIGINT)
        send(signal.SIGUSR1)  # nobody pressed twice
    with pytest.raises(Interrupted) as caught, signals.caught("politune train") as request:
        request.inside_training = True
        send(signal.SIGUSR1)
        send(signal.SIGINT)
        pytest.fail("somebody wants it to leave now")
    assert caught.value.exit_code == 130


def test_a_time_of_ones_own_asks_once_and_not_afterwards() -> None:
    with signals.caught("politune train", stop_after=0.2 / 60) as request:
        request.inside_training = True
        time.sleep(0.5)
        assert request.signal_number == signal.SIGTERM
    before = signal.getsignal(signal.SIGUSR1)
    with signals.caught("politune train", stop_after=0.2 / 60) as request:
        request.inside_training = True
    time.sleep(0.5)
    assert request.signal_number is None
    assert signal.getsignal(signal.SIGUSR1) == before


IN_A_LIBRARY = """
import hashlib
from politune.training.signals import caught

with caught("politune train --resume") as request:
    request.inside_training = True
    print("up", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""


@pytest.mark.parametrize(("presses", "code"), [(1, None), (2, 130)])
def test_a_second_ctrl_c_waits_for_no_call_into_a_library(presses: int, code: int | None) -> None:
    """The call lasts half a minute and more; Python's own handlers run when it is over."""
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_LIBRARY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        for _ in range(presses):
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        try:
            _, err = process.communicate(timeout=signals.MOST_SECONDS_AFTER_TWO + 2)
        except subprocess.TimeoutExpired:
            process.kill()
            assert code is None, "the second one was not heeded"
        else:
            assert process.returncode == code
            assert err == "stopped at once; go on with: politune train --resume\n"


def test_what_a_child_gets_is_none_of_its_parents() -> None:
    with signals.caught("politune train") as request:
        request.inside_training = True
        send(signal.SIGINT)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, lambda *_: None)
            send(signal.SIGINT)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(signals.MOST_SECONDS_AFTER_TWO + 0.2)
    assert request.signal_number == signal.SIGINT


def test_outside_of_training_an_announced_end_leaves() -> None:
    with pytest.raises(Interrupted) as caught, signals.caught("politune train"):
        send(signal.SIGUSR1)
        pytest.fail("it was not heeded")
    assert caught.value.exit_code == 143


COMMAND = """
import sys
from politune.errors import Interrupted
from politune.training.signals import caught

try:
    with caught("politune"):
        exec("import os, signal; os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(1000)]")
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def test_a_signal_while_a_text_is_executed_has_its_exit_code(tmp_path: Path) -> None:
    """As data classes are, while a library is imported. `python -m` would end by SIGINT, had a KeyboardInterrupt been raised."""
    (tmp_path / "command.py").write_text(COMMAND)
    ended = subprocess.run([sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (143, "")
