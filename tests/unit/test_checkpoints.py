"""Checkpoints by themselves, without a run: what counts, what is set aside, what goes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from politune.models.seal import SEAL
from politune.training import checkpoints

IDENTITY: dict[str, Any] = {"train.seed": 42, "threads": 2, "version of torch": "2.13.0"}
METADATA = {"politune.disclosure": "a test"}


def write(directory: Path, step: int) -> Path:
    """A committed checkpoint."""
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.full((4,), float(step))}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "trainer_state.json").write_text("{}")
    checkpoints.commit(checkpoint, IDENTITY, METADATA)
    return checkpoint


def test_each_changed_byte_of_a_marker_is_found(tmp_path: Path) -> None:
    """Also one in what the run was, which would otherwise read as a changed setting and refuse the run for good."""
    before, damaged = write(tmp_path, 2), write(tmp_path, 4)
    marker = damaged / SEAL
    whole = marker.read_bytes()
    assert checkpoints.newest(tmp_path) == damaged
    for place in range(len(whole)):
        marker.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = checkpoints.newest(tmp_path)
        # White space between JSON's values may be another one and says the same.
        assert found == before or checkpoints.identity_of(damaged) == IDENTITY, place
    marker.write_text("{}")
    assert checkpoints.newest(tmp_path) == before


@pytest.mark.parametrize("keep", [1, 2])
def test_an_unfinished_one_is_set_aside_until_enough_whole_ones_came_after_it(tmp_path: Path, keep: int) -> None:
    unfinished = tmp_path / "checkpoint-3"
    unfinished.mkdir()
    (unfinished / "optimizer.pt").write_bytes(b"moments")
    said: list[str] = []
    assert checkpoints.newest(tmp_path, said.append) is None
    assert said == ["set aside checkpoint-3: it is not complete"]
    aside = tmp_path / checkpoints.SET_ASIDE / "checkpoint-3"
    for step in range(4, 4 + keep):
        assert (aside / "optimizer.pt").read_bytes() == b"moments"
        write(tmp_path, step)
        checkpoints.rotate(tmp_path, keep)
    assert not aside.parent.exists()


def test_a_damaged_one_stays_aside(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (write(tmp_path, 4) / "trainer_state.json").write_text("[]")
    said: list[str] = []
    assert checkpoints.newest(tmp_path, said.append) == tmp_path / "checkpoint-2"
    assert said == ["set aside checkpoint-4: trainer_state.json has changed"]
    write(tmp_path, 6)
    checkpoints.rotate(tmp_path, 1)
    assert (tmp_path / checkpoints.SET_ASIDE / "checkpoint-4").is_dir()


def test_what_is_set_aside_takes_no_room_that_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (write(tmp_path, 4) / "trainer_state.json").unlink()
    before = checkpoints.taken_bytes(tmp_path)
    checkpoints.newest(tmp_path, lambda line: None)
    sizes = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir())
    assert checkpoints.taken_bytes(tmp_path) == sizes < before


def test_what_a_killed_process_left_half_removed_does_not_stay(tmp_path: Path) -> None:
    """Killed while it rotated: the marker of the oldest one is gone, some of its files are not."""
    for step in (2, 4, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoint-2" / SEAL).unlink()
    said: list[str] = []
    assert checkpoints.newest(tmp_path, said.append) == tmp_path / "checkpoint-6"
    assert said == ["set aside checkpoint-2: it is not complete"]
    write(tmp_path, 8)
    checkpoints.rotate(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-8"}


def test_what_is_not_the_checkpoint_that_was_saved_is_set_aside(tmp_path: Path) -> None:
    """One that somebody copied under another name, and one with a file more than were hashed."""
    shutil.copytree(write(tmp_path, 4), tmp_path / "checkpoint-6")
    said: list[str] = []
    assert checkpoints.newest(tmp_path, said.append) == tmp_path / "checkpoint-4"
    assert said == ["set aside checkpoint-6: it is step 4 under another name"]
    (tmp_path / "checkpoint-4" / "scaler.pt").write_bytes(b"nobody's")
    assert checkpoints.newest(tmp_path, said.append) is None
    assert said[1:] == ["set aside checkpoint-4: scaler.pt was not saved with it"]
