"""What rows share with other texts: passages of eight words and prompts, found through an index that is kept on disk."""

import random
from pathlib import Path

import pytest

from politune.data import leaks
from politune.data.texts import hash_texts

KNOWN = "the quick brown fox jumps over the lazy dog and then it sleeps"


def index(tmp_path: Path, *texts: str) -> Path:
    path = tmp_path / "index.npz"
    leaks.build("known", [(hash_texts(["Why, then?"]), texts)]).save(path)
    return path


@pytest.mark.parametrize(
    ("text", "is_shared"),
    [
        ("He said: The QUICK brown fox -- jumps over, the lazy... and so on", True),  # eight words in a row
        ("quick brown fox jumps over the lazy cat", False),  # seven
        ("the quick brown fox jumps above the lazy dog and then it", False),
        (KNOWN.upper(), True),
        ("", False),
        ("the quick brown fox", False),
    ],
)
def test_a_passage_of_eight_words_is_found(tmp_path: Path, text: str, is_shared: bool) -> None:
    found, table = leaks.load(index(tmp_path, KNOWN, "short"))
    assert leaks.shared(found, table, ["nothing of it at all in this text here", text]).tolist() == [False, is_shared]


def test_prompts_are_kept_sorted_and_once(tmp_path: Path) -> None:
    found, _ = leaks.load(index(tmp_path, KNOWN))
    assert found.prompts.tolist() == hash_texts(["Why, then?"])
    assert (found.name, found.share) == ("known", 1.0)


def test_of_a_large_text_a_known_share_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 500 of 4,000 passages an eighth is kept, or less; a whole copy of 200 words is still found."""
    monkeypatch.setattr(leaks, "MOST_PASSAGES", 500)
    draw = random.Random(1)
    texts = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(207)) for _ in range(20)]
    path = tmp_path / "large.npz"
    leaks.build("large", [((), texts[:10]), ((), texts[10:])]).save(path)
    found, table = leaks.load(path)
    assert found.share == pytest.approx(0.125)
    assert len(found.passages) <= 500
    assert leaks.shared(found, table, texts).all()
    assert not leaks.shared(found, table, [text[::-1] for text in texts]).any()


def test_parts_change_nothing_of_an_index_and_are_not_joined_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 parts of 100 passages with room for 1,000: joined whenever 1,000 more are waiting, at the end, and the prompts."""
    monkeypatch.setattr(leaks, "MOST_PASSAGES", 1000)
    draw = random.Random(3)
    texts = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(107)) for _ in range(200)]
    whole = leaks.build("whole", [(hash_texts(texts), texts)])
    joined: list[int] = []
    monkeypatch.setattr(leaks, "_distinct", lambda found, distinct=leaks._distinct: joined.append(1) or distinct(found))
    in_parts = leaks.build("parts", ((hash_texts([text]), [text]) for text in texts))
    assert in_parts.passages.tolist() == whole.passages.tolist()
    assert in_parts.prompts.tolist() == whole.prompts.tolist()
    assert in_parts.share == whole.share
    assert len(joined) <= 12


def test_an_index_of_nothing_shares_nothing(tmp_path: Path) -> None:
    found, table = leaks.load(index(tmp_path))
    assert not leaks.shared(found, table, [KNOWN]).any()
