"""Exit codes and the harmlessness of foreign text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from politune import errors
from politune.errors import PolituneError, safe


def test_each_leaf_has_its_exit_code() -> None:
    codes = {leaf.__name__: leaf.exit_code for leaf in PolituneError.__subclasses__() if leaf is not errors.Interrupted}
    assert codes == {
        "ConfigError": 2, "DataError": 3, "ModelError": 4, "MachineError": 5, "HubError": 6, "OutputError": 7, "TrainingError": 8,
    }  # fmt: skip
    assert errors.Interrupted("x", signal_number=2).exit_code == 130
    assert errors.Interrupted("x", signal_number=15).exit_code == 143


def test_a_message_is_made_of_its_parts() -> None:
    error = errors.ConfigError("beta is negative.", where="x.toml:3", why="it inverts the direction", fix="use 0.1")
    assert str(error) == "x.toml:3: beta is negative. it inverts the direction. use 0.1"


INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u180b\u180e\u200b\u2060\u2065\u2800\u3164\ufe00\ufe0f\ufeff\uffa0\ufff0\U000e0100"
    "\xa0\u2003\u3000"
)


@given(st.text())
def test_safe_text_holds_nothing_hidden(text: str) -> None:
    shown = safe(text)
    assert not any(unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for character in shown)
    assert {character for character in shown if unicodedata.category(character) == "Zs"} <= {" "}
    assert safe(shown, None) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[1m", r"a\x1b[1m"), ("\u202eabc", r"\u202eabc"), ("\ud800", r"\ud800"), ("naïve 中文", "naïve 中文")]
    + [(character, character.encode("unicode_escape").decode()) for character in INVISIBLE],
)
def test_what_hidden_characters_become(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_long_texts_are_cut() -> None:
    assert len(safe("x" * 500)) == errors.MAX_FOREIGN_CHARACTERS


@pytest.mark.parametrize(
    "login", ["hf_" + "a" * 34, "hf_oauth_" + "b" * 20 + ".c-d", "hf_jwt_" + "e" * 20, "://me:p@ssword@"]
)
def test_a_login_is_not_repeated(login: str) -> None:
    shown = errors.safe(f"https{login}host" if "://" in login else f"refused: {login}")
    assert "***" in shown
    assert not any(part in shown for part in ("aaaa", "bbbb", "c-d", "eeee", "ssword"))


def test_a_login_that_ends_with_a_line_break_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123\n")
    assert errors.safe("key 0123456789abcdef0123 refused") == "key *** refused"
