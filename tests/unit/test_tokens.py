"""The cache of token ids: what it gives back, what its key depends on, and what becomes of a damaged or full one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from politune.data import format as rows_format
from politune.data import tokens
from politune.data.format import ChatRow, Encoded, PreferenceRow, encode, rust_backend

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(template: str = TEMPLATE, special: tuple[str, str] = ("<s>", "</s>")) -> Any:
    """One token per character or special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(map(chr, range(32, 256)))}
    backend = Tokenizer(models.WordLevel(letters, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], chat_template=template
    )


def pairs(count: int, *, role: str = "system", last: str = "no") -> list[PreferenceRow]:
    ask = {"role": "user", "content": "Why?"}
    rows = [PreferenceRow((ask,), f"yes {index}", "maybe" * (index % 7 + 1)) for index in range(count - 1)]
    return [*rows, PreferenceRow(({"role": role, "content": "Be brief."}, ask), "yes", last)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files lie; every data set is worth keeping here."""
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(tokens, "LEAST_CHARACTERS", 1)
    return tmp_path / "tokens"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each tokenisation had."""
    made: list[int] = []

    def counted(rows: Any, tokenizer: Any) -> list[Encoded]:
        made.append(len(rows))
        return encode(rows, tokenizer)

    monkeypatch.setattr(rows_format, "encode", counted)
    return made


@pytest.mark.parametrize("rows", [pairs(5), [ChatRow(row.prompt, row.chosen) for row in pairs(5)]])
def test_a_second_run_reads_what_the_first_one_made(folder: Path, calls: list[int], rows: list[Any]) -> None:
    first, second = tokens.encode(rows, make_tokenizer()), tokens.encode(rows, make_tokenizer())
    assert first == second == encode(rows, make_tokenizer())
    assert calls == [5]


def test_everything_of_a_row_comes_back(folder: Path, calls: list[int]) -> None:
    """`assistant: <think>` is not how an answer begins (7 tokens lost), and no completion stops."""
    template = TEMPLATE.replace("{{ eos_token }}", "").replace("assistant: {%", "assistant: <think>{%")
    rows = pairs(3)
    tokens.encode(rows, make_tokenizer(template))
    found = tokens.encode(rows, make_tokenizer(template))
    assert calls == [3]
    assert {(item.lost_prompt_tokens, item.stops) for item in found} == {(7, False)}
    assert found[0].eos_token_id == make_tokenizer().eos_token_id


CHANGES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "a character": lambda: (pairs(5, last="ni"), make_tokenizer()),
    "a role": lambda: (pairs(5, role="user"), make_tokenizer()),
    "an order": lambda: (pairs(5)[::-1], make_tokenizer()),
    "a side": lambda: ([PreferenceRow(r.prompt, r.rejected, r.chosen) for r in pairs(5)], make_tokenizer()),
    "a row less": lambda: (pairs(5)[1:], make_tokenizer()),
    "chats": lambda: ([ChatRow(row.prompt, row.chosen) for row in pairs(5)], make_tokenizer()),
    "the template": lambda: (pairs(5), make_tokenizer(TEMPLATE.replace(": ", "- "))),
    "a special token": lambda: (pairs(5), make_tokenizer(special=("<s>", "<end>"))),
    "another vocabulary": lambda: (pairs(5), with_token(make_tokenizer(), "yes")),
    "special tokens in the text": lambda: (pairs(5), splitting(make_tokenizer())),
}


def with_token(tokenizer: Any, text: str) -> Any:
    tokenizer.add_tokens([text])
    return tokenizer


def splitting(tokenizer: Any) -> Any:
    tokenizer.split_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("change", CHANGES)
def test_another_input_is_tokenised_again(folder: Path, calls: list[int], change: str) -> None:
    tokens.encode(pairs(5), make_tokenizer())
    rows, tokenizer = CHANGES[change]()
    assert tokens.encode(rows, tokenizer) == encode(rows, tokenizer)
    assert (len(calls), len(list(folder.iterdir()))) == (2, 2)


@pytest.mark.parametrize("library", tokens.LIBRARIES)
def test_another_library_tokenises_again(
    folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    tokens.encode(pairs(5), make_tokenizer())
    real = tokens.importlib.metadata.version
    monkeypatch.setattr(tokens.importlib.metadata, "version", lambda name: "0" if name == library else real(name))
    tokens.encode(pairs(5), make_tokenizer())
    assert calls == [5, 5]


def test_another_version_of_the_code_tokenises_again(
    folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.encode(pairs(5), make_tokenizer())
    monkeypatch.setattr(tokens.inspect, "getsource", lambda module: f"# another {module.__name__}")
    tokens.encode(pairs(5), make_tokenizer())
    assert calls == [5, 5]


def test_labels_and_an_earlier_use_of_the_tokenizer_change_nothing(folder: Path, calls: list[int]) -> None:
    """Cut-off and padding of an earlier call are part of the tokenizer's state, and not of what the rows become."""
    used = make_tokenizer()
    used.pad_token = "</s>"
    used(["long text", "short"], truncation=True, max_length=3, padding="max_length")
    expected = encode(pairs(5), make_tokenizer())
    renamed = [PreferenceRow(row.prompt, row.chosen, row.rejected, "other", "name") for row in pairs(5)]
    tokens.encode(pairs(5), make_tokenizer())
    with_pad = make_tokenizer()
    with_pad.pad_token = "</s>"
    assert tokens.encode(renamed, make_tokenizer()) == expected
    assert encode(pairs(5), used) == tokens.encode(pairs(5), used) == tokens.encode(pairs(5), with_pad) == expected
    assert calls == [5, 5]  # the pad token is one of the template's variables


@pytest.mark.parametrize("word", ["{{ strftime_now('%d %b %Y') }}", "{{ ['a', 'b'] | random }}"])
def test_a_template_with_the_date_is_not_kept(folder: Path, calls: list[int], word: str) -> None:
    for _ in range(2):
        tokens.encode(pairs(5), make_tokenizer(TEMPLATE + word))
    assert calls == [5, 5]
    assert not folder.exists()


def test_a_tokenizer_in_python_is_not_kept(folder: Path, calls: list[int]) -> None:
    """What its class does with a text cannot be told from its files."""
    from transformers import PreTrainedTokenizerFast

    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus(text, **options)

    own = make_tokenizer()
    own.__class__ = Own
    assert rust_backend(own) is None
    assert tokens.encode(pairs(5), own) == tokens.encode(pairs(5), own) == encode(pairs(5), make_tokenizer())
    assert calls == [5, 5]


def test_few_rows_are_not_kept(folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine characters: `Why?`, `yes`, `no`."""
    rows = [PreferenceRow(({"role": "user", "content": "Why?"},), "yes", "no")]
    monkeypatch.setattr(tokens, "LEAST_CHARACTERS", 10)
    tokens.encode(rows, make_tokenizer())
    assert not folder.exists()
    monkeypatch.setattr(tokens, "LEAST_CHARACTERS", 9)
    tokens.encode(rows, make_tokenizer())
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-4],
        lambda content: content + bytes(4),
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_a_damaged_file_is_made_again(folder: Path, calls: list[int], damage: Callable[[bytes], bytes]) -> None:
    whole = tokens.encode(pairs(5), make_tokenizer())
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert tokens.encode(pairs(5), make_tokenizer()) == whole
    assert calls == [5, 5]
    assert path.read_bytes() == content


def test_a_file_under_the_name_of_another_is_not_taken(folder: Path, calls: list[int]) -> None:
    tokens.encode(pairs(5), make_tokenizer())
    (first,) = folder.iterdir()
    other = tokens.encode(pairs(5, last="ni"), make_tokenizer())
    (second,) = set(folder.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert tokens.encode(pairs(5, last="ni"), make_tokenizer()) == other
    assert calls == [5, 5, 5]


@pytest.mark.parametrize("place", ["file/below", "file", None])
def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    if place is None:
        monkeypatch.setattr(tokens, "user_cache", lambda: None)
    else:
        monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / place))
    for _ in range(2):
        assert tokens.encode(pairs(5), make_tokenizer()) == encode(pairs(5), make_tokenizer())
    assert calls == [5, 5]


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert tokens.encode(pairs(5), make_tokenizer()) == encode(pairs(5), make_tokenizer())
    assert list(folder.iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(
    folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for three files of equal size and a bit: the fourth takes the place of the second, for the first was read."""
    data = [pairs(5, last=last) for last in ("no", "na", "ne", "ni")]
    for age, rows in zip((30, 20, 10), data[:3], strict=True):
        known = set(folder.iterdir()) if folder.exists() else set()
        tokens.encode(rows, make_tokenizer())
        (path,) = set(folder.iterdir()) - known
        now = path.stat().st_mtime
        os.utime(path, (now - age, now - age))
    monkeypatch.setattr(tokens, "MOST_BYTES", int(3.5 * path.stat().st_size))
    tokens.encode(data[0], make_tokenizer())
    tokens.encode(data[3], make_tokenizer())
    assert len(list(folder.iterdir())) == 3
    calls.clear()
    for rows in (data[0], data[2], data[3]):
        tokens.encode(rows, make_tokenizer())
    assert calls == []
    monkeypatch.setattr(tokens, "MOST_BYTES", 10)
    tokens.encode(data[1], make_tokenizer())
    assert calls == [5]
    assert len(list(folder.iterdir())) == 3
