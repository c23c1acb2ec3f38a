"""Runs that are killed, and go on."""

import random
import signal
import time
from collections.abc import Iterator

from faults.figures import Figure, count, side_by_side
from faults.lab import Lab
from tiny.small_runs import adapter_hash


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    yield _at_random(lab, 200 if whole else 4, seed=1)


def _at_random(lab: Lab, trials: int, seed: int) -> Figure:
    with lab.place("whole") as place:
        lab.run(lab.train(place / "run", train__save_steps=1))
        expected = adapter_hash(place / "run")
    draw = random.Random(seed)

    def trial(moment: float) -> str | None:
        with lab.place("kill") as place:
            argv = lab.train(place / "run", train__save_steps=1)
            child = lab.start(argv)
            time.sleep(moment)
            child.send(signal.SIGKILL)
            child.wait()
            again = lab.run([*argv, "--resume"] if (place / "run" / "run.json").exists() else argv)
            same = adapter_hash(place / "run") == expected
            return None if again.code == 0 and same else f"killed after {moment:.3f} s: {again.code} {again.last}"

    moments = [draw.uniform(0, 1.2) for _ in range(trials)]
    return count("killed at a random moment, then `--resume`: equal", side_by_side(trial, moments), seed=seed)
