"""Which files of the Hub's cache are taken; how long a Hub is waited for is in tests/faults."""

import hashlib
import os
from pathlib import Path

import pytest

from politune import fetching
from politune.errors import HubError

BODY = b"what the Hub announced\n"
GIT = hashlib.sha1(b"blob %d\0" % len(BODY) + BODY).hexdigest()


def in_cache(place: Path, name: str, body: bytes) -> Path:
    """A file of a snapshot, as a link to the blob of that name."""
    (place / "blobs").mkdir(exist_ok=True)
    (place / "blobs" / name).write_bytes(body)
    link = place / "file.txt"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("blobs") / name)
    return link


@pytest.mark.parametrize(
    "name", [GIT, hashlib.sha256(BODY).hexdigest(), hashlib.sha1(BODY).hexdigest(), "a-mirror's-own-name"]
)
def test_a_file_is_taken_by_any_hash_that_its_name_can_be(tmp_path: Path, name: str) -> None:
    link = in_cache(tmp_path, name, BODY)
    assert fetching.sound(lambda: link, "owner/name") == link


def test_a_wrong_file_is_removed_and_fetched_once_more(tmp_path: Path) -> None:
    bodies = [b"something else\n", BODY]
    assert fetching.sound(lambda: in_cache(tmp_path, GIT, bodies.pop(0)), "owner/name").read_bytes() == BODY
    with pytest.raises(HubError, match=r"what came of owner/name is not what the Hub announced.*file.txt"):
        fetching.sound(lambda: in_cache(tmp_path, GIT, b"something else\n"), "owner/name")
    assert not list((tmp_path / "blobs").iterdir())


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "politune"))
    monkeypatch.setattr(fetching, "LARGE_BYTES", 1)
    link = in_cache(tmp_path, hashlib.sha256(BODY).hexdigest(), BODY)
    times = link.stat()
    assert fetching._is_as_announced(link)
    link.write_bytes(BODY.upper())
    assert not fetching._is_as_announced(link)
    os.utime(link, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fetching._is_as_announced(link), "the same size and time: not read again"
