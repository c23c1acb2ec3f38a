"""Which files of the Hub's cache are taken; how long a Hub is waited for is in tests/faults."""

import hashlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

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
    assert fetching.sound(lambda: link, "owner/name", offline=True) == link


def test_a_wrong_file_is_removed_and_fetched_once_more(tmp_path: Path) -> None:
    bodies = [b"something else\n", BODY]
    fetch = lambda: in_cache(tmp_path, GIT, bodies.pop(0))  # noqa: E731
    assert fetching.sound(fetch, "owner/name", offline=False).read_bytes() == BODY
    with pytest.raises(HubError, match=r"what there is of owner/name is not what the Hub announced.*file.txt"):
        fetching.sound(lambda: in_cache(tmp_path, GIT, b"something else\n"), "owner/name", offline=False)
    assert not list((tmp_path / "blobs").iterdir())


def test_offline_a_wrong_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    link = in_cache(tmp_path, GIT, b"something else\n")
    with pytest.raises(HubError, match="without --offline"):
        fetching.sound(lambda: link, "owner/name", offline=True)
    assert link.read_bytes() == b"something else\n"


def test_what_was_removed_has_to_come_again(tmp_path: Path) -> None:
    """A Hub's client that is content with what is left would leave a tokenizer without its file."""
    in_cache(tmp_path, GIT, b"something else\n")
    with pytest.raises(HubError, match=r"file\.txt"):
        fetching.sound(lambda: tmp_path, "owner/name", offline=False)


def test_a_blob_kept_elsewhere_stays_there(tmp_path: Path) -> None:
    link = in_cache(tmp_path, GIT, b"")
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "blobs" / GIT).unlink()
    (tmp_path / "blobs" / GIT).symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(HubError):
        fetching.sound(lambda: link.parent, "owner/name", offline=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "blobs" / GIT).is_symlink()


def test_a_bit_that_rots_is_found_at_the_same_size_and_time(tmp_path: Path) -> None:
    link = in_cache(tmp_path, GIT, BODY)
    times = link.stat()
    assert fetching._is_as_announced(link)
    link.write_bytes(BODY.upper())
    os.utime(link, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not fetching._is_as_announced(link)


class Answer(SimpleNamespace):
    """What the Hub's client takes for one."""

    def read(self) -> bytes:
        return b""

    def iter_raw(self) -> None:
        pass

    def close(self) -> None:
        pass


def send(patience: fetching._Patience, answer: Answer) -> list[Answer]:
    """How often a request was made, by its answers."""
    asked = []

    def plain(request: object, **options: object) -> Answer:
        asked.append(answer)
        return answer

    patience.send(plain, SimpleNamespace(extensions={}))
    return asked


def test_a_request_is_made_once_where_it_is_answered_and_not_at_all_offline() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    well = Answer(status_code=200, headers={})
    assert send(fetching._Patience("owner/name", offline=False), well) == [well]
    with pytest.raises(OfflineModeIsEnabled):
        send(fetching._Patience("owner/name", offline=True), well)


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    patience = fetching._Patience("owner/name", offline=False)
    with pytest.raises(HubError, match=r"asked too often.*3600 seconds"):
        send(patience, Answer(status_code=429, headers={"retry-after": "3600"}))
    patience.since = time.monotonic() - 3600
    with pytest.raises(HubError, match=r"does not deliver owner/name.*next to nothing from it for 30 seconds"):
        send(patience, Answer(status_code=200, headers={}))
