"""A study's file, its directory, its locks and its Slurm script; nothing is trained here."""

import errno
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from politune import locks
from politune.errors import ConfigError, Interrupted, OutputError, PolituneError
from politune.models import seal
from politune.study import run as studies
from politune.study import spec, work

SMALL = """
title = "A study"
seeds = [1, 2]
control = "placebo"

[measure]
preset = "quick"
instruments = ["politune-stances"]

[arms.left]
preset = "demo-left"

[arms.placebo]
preset = "demo-left"
set = { data = { direction = "shuffled" }, train = { learning_rate = 1e-4 } }
"""


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "do", None)


def write(tmp_path: Path, text: str = SMALL) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_every_run_of_a_study_is_a_plain_command(tmp_path: Path) -> None:
    tasks = spec.tasks(spec.load(str(write(tmp_path))), tmp_path / "out")
    assert [task.name for task in tasks] == ["left/seed-1", "placebo/seed-1", "left/seed-2", "placebo/seed-2"]
    placebo = tasks[3]
    assert placebo.resolved.run.data.direction == "shuffled"
    assert placebo.resolved.run.train.learning_rate == 1e-4
    assert placebo.resolved.run.train.seed == 2
    assert placebo.resolved.run.train.output_dir == str(tmp_path / "out" / "placebo" / "seed-2")
    again = subprocess.run(
        [sys.executable, "-m", "politune", *placebo.words, "--dry-run", "--json"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


def test_the_shipped_study_gives_its_arms_the_same() -> None:
    study = spec.load("demo")
    tasks = spec.tasks(study, Path("out"))
    assert len(tasks) == 9
    settings = []
    for task in tasks[:3]:
        values = task.resolved.run.model_dump()
        values["data"].pop("direction")
        values["train"].pop("output_dir")
        values.pop("title")
        settings.append(values)
    assert settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [1, 2]", "seeds = [1, 1]", "a seed is there twice"),
        ("seeds = [1, 2]", "seeds = []", "seeds"),
        ("seeds = [1, 2]", "seeds = [1, -2]", "seeds.1"),
        ('control = "placebo"', 'control = "nobody"', "control names no arm: nobody"),
        ("learning_rate", "seed = 3, learning_rate", "train.seed, which the study gives"),
        ("learning_rate", "lerning_rate", "did you mean train.learning_rate"),
        ("train = {", "training = {", "training, which is no group of settings"),
        ("[arms.left]", "[arms.Left]", "arms.Left"),
        ('preset = "quick"', 'preset = "slow"', "measure.preset"),
        ("politune-stances", "no-such-items", "there is no instrument no-such-items"),
        (
            '{ direction = "shuffled" }, train = { learning_rate = 1e-4 }',
            '{ direction = "left" }',
            "arms left and placebo",
        ),
        (
            '{ direction = "shuffled" }, train = { learning_rate = 1e-4 }',
            '{ direction = "left" }, tracking = { wandb_project = "other" }, train = { save_steps = 7 }',
            "arms left and placebo train the same",
        ),
        ("learning_rate = 1e-4", "learning_rate = 2026-11-23", "train.learning_rate"),
        ('["politune-stances"]', '["politune-open"]', "measure.instruments: preset quick asks nothing of these"),
        ('["politune-stances"]', '["politune-stances", "politune-stances"]', "two instruments have the same name"),
        ('preset = "quick"', 'preset = "quick"\nasker = []', "measure.asker"),
        ('title = "A study"', 'title = "A study', "is not TOML"),
        ('title = "A study"', 'title = "A study"\nsize = 3', "size"),
    ],
)
def test_what_is_wrong_in_a_study_is_said_before_anything_runs(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SMALL
    path = write(tmp_path, SMALL.replace(old, new))
    with pytest.raises(PolituneError) as caught:
        studies.study(str(path), tmp_path / "out", say=lambda line: None)
    assert said in str(caught.value)
    assert caught.value.exit_code in (2, 3)
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_nowhere_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no study .*nowhere") as caught:
        spec.load(str(tmp_path / "nowhere.toml"))
    assert "demo" in str(caught.value)


def test_a_study_is_a_small_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="is larger than"):
        patch.setattr(spec, "MAX_BYTES", 20)
        spec.load(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        spec.load(str(path))


def test_a_study_has_an_arm_and_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="arms"):
        spec.Study(title="A study", seeds=(1,), arms={})
    with pytest.raises(ValidationError, match="frozen"):
        spec.load(str(write(tmp_path))).title = "Another"  # type: ignore[misc]


def claimed(tmp_path: Path, text: str = SMALL) -> tuple[spec.Study, tuple[spec.Task, ...]]:
    study = spec.load(str(write(tmp_path, text)))
    tasks = spec.tasks(study, tmp_path / "out")
    work.claim(study, tasks, tmp_path / "out")
    return study, tasks


def test_arms_and_seeds_may_be_added_and_nothing_else_changed(tmp_path: Path) -> None:
    claimed(tmp_path)
    before = (tmp_path / "out" / work.PAPERS).read_bytes()
    claimed(tmp_path)
    assert (tmp_path / "out" / work.PAPERS).read_bytes() == before
    claimed(tmp_path, SMALL.replace("[1, 2]", "[1, 2, 3]"))
    claimed(tmp_path, SMALL.replace("[1, 2]", "[3]"))
    assert len(json.loads((tmp_path / "out" / work.PAPERS).read_text())["runs"]) == 6
    with pytest.raises(OutputError, match=r"placebo/seed-1 train\.learning_rate: 0\.0001 -> 0\.0002"):
        claimed(tmp_path, SMALL.replace("1e-4", "2e-4"))
    with pytest.raises(OutputError, match=r"measure\.preset"):
        claimed(tmp_path, SMALL.replace("quick", "full"))


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no study"):
        claimed(tmp_path)


def test_a_run_has_one_owner_at_a_time(tmp_path: Path) -> None:
    _, tasks = claimed(tmp_path)
    holder = (
        "import sys; from pathlib import Path; from politune.study import spec, work\n"
        f"tasks = spec.tasks(spec.load({str(tmp_path / 'study.toml')!r}), Path({str(tmp_path / 'out')!r}))\n"
        f"with work.locked(tasks[0], Path({str(tmp_path / 'out')!r})) as lock:\n"
        "    print(type(lock).__name__, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "int"
        with work.locked(tasks[0], tmp_path / "out") as lock:
            assert f"process {process.pid} on " in str(lock)
        with work.locked(tasks[1], tmp_path / "out") as lock:
            assert isinstance(lock, int)
        process.kill()
        process.wait()
    with work.locked(tasks[0], tmp_path / "out") as lock:
        assert isinstance(lock, int), "the kernel drops the lock with its process"


def test_the_processes_of_a_run_hold_its_lock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is killed leaves them at work: nobody else may begin the run before they end."""
    _, tasks = claimed(tmp_path)
    child = "import time; time.sleep(60)"
    with work.locked(tasks[0], tmp_path / "out") as lock:
        assert isinstance(lock, int)
        process = subprocess.Popen([sys.executable, "-c", child], pass_fds=[lock])
    with work.locked(tasks[0], tmp_path / "out") as lock:
        assert isinstance(lock, str)
    process.kill()
    process.wait()
    with work.locked(tasks[0], tmp_path / "out") as lock:
        assert isinstance(lock, int)


def test_a_run_that_fails_gives_its_last_words(tmp_path: Path) -> None:
    _, tasks = claimed(tmp_path)
    with work.locked(tasks[0], tmp_path / "out") as lock:
        assert isinstance(lock, int)
        failure = work.run(tasks[0], ["presets", "show", "nowhere"], lock)
        assert work.run(tasks[0], ["--version"], lock) is None
    assert failure is not None
    assert failure.exit_code == 2
    assert "unknown preset 'nowhere'" in failure.words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_run_and_ends_the_study(tmp_path: Path, number: int) -> None:
    """A queue's announcement as it came: the run tells it from SIGTERM, which may follow it."""
    claimed(tmp_path)
    program = (
        "import os, signal, subprocess, sys; from pathlib import Path; from politune.study import spec, work\n"
        f"tasks = spec.tasks(spec.load({str(tmp_path / 'study.toml')!r}), Path({str(tmp_path / 'out')!r}))\n"
        "class Process(subprocess.Popen):\n"
        "    def __init__(self, command, **options):\n"
        "        child = 'import sys, time; sys.stderr.write(\"up\\\\n\"); sys.stderr.flush(); time.sleep(60)'\n"
        "        super().__init__([sys.executable, '-c', child], **options)\n"
        "subprocess.Popen = Process\n"
        "try:\n"
        "    work.run(tasks[0], [], 2)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.exit_code); sys.exit(0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().strip() == "up"
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert out.split() == [Interrupted.__name__, "143"]


def test_a_run_whose_adapter_has_changed_is_to_be_exported_again(tmp_path: Path) -> None:
    _, tasks = claimed(tmp_path)
    adapter = tasks[0].directory / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_text("a")
    (tasks[0].directory / "run.json").write_text('{"status": "done"}')
    seal.seal(adapter, {})
    assert work.state_of(tasks[0]) == "trained"
    (adapter / "weights").write_text("b")
    assert work.state_of(tasks[0]) == "missing"


def test_a_run_that_was_told_to_end_is_no_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tasks = claimed(tmp_path)
    child = "import os, signal, time; os.kill(os.getppid(), signal.SIGUSR1); time.sleep(60)"
    original = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: original([sys.executable, "-c", child], **options)
    )
    with pytest.raises(Interrupted) as caught:
        work.run(tasks[0], [], 2)
    assert caught.value.exit_code == 143


def test_the_slurm_script_runs_each_run_once(tmp_path: Path) -> None:
    path = write(tmp_path)
    script = studies.slurm_script(str(path), tmp_path / "100% out", offline=True)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-3" in lines
    words: list[Any] = shlex.split(next(line for line in lines if line.endswith("&")))
    assert words[:5] == [sys.executable, "-m", "politune", "study", str(path)]
    assert words[5:] == ["-o", str(tmp_path / "100% out"), "--offline", "--run", "$SLURM_ARRAY_TASK_ID", "&"]
    assert f'#SBATCH --output="{tmp_path}/100%% out/slurm-%A-%a.log"' in lines
    assert (tmp_path / "100% out" / work.PAPERS).exists(), "the jobs log into the directory before they begin"
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 4: the study has 4"):
        studies.study(str(write(tmp_path)), tmp_path / "out", only=4, say=lambda line: None)


def test_a_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with (
        locks.owned(tmp_path, OutputError("free")),
        pytest.raises(OutputError, match="busy"),
        locks.owned(tmp_path, OutputError("busy")),
    ):
        pass
    with pytest.raises(OutputError, match="cannot write to"), locks.owned(tmp_path / "nowhere", OutputError("busy")):
        pass


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that another process is at work, for which one would wait."""

    def flock(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with (
        pytest.raises(OutputError, match="file system keeps no locks: No locks available"),
        locks.owned(tmp_path, OutputError("busy")),
    ):
        pass
