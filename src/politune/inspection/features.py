"""Cheap features of an answer: what a model could learn instead of politics, each a number per text.

The phrases are English; in other languages their counts are zero, and the bag of words of `shortcuts` is what tells.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
"""A word: letters and digits, with apostrophes and hyphens inside."""

REFUSALS = re.compile(
    r"\b(?:I(?:'m| am) (?:sorry|unable|not able)|I (?:cannot|can't|can not|won't|will not) (?:\w+ )?"
    r"(?:help|assist|provide|answer|offer|take|give|express|share|comply)|as an AI|as a language model|I do(?:n't| not) have "
    r"(?:personal )?(?:opinions|beliefs|views))\b",
    re.IGNORECASE,
)
HEDGES = re.compile(
    r"\b(?:may|might|perhaps|possibly|maybe|could be|it depends|some (?:people|argue|say|believe)|others (?:argue|say|believe)|"
    r"on the other hand|arguably|in some cases|to some extent|tends? to|generally|likely|seems?|appears?)\b",
    re.IGNORECASE,
)
FUNCTION_WORDS = (  # noqa: SIM905 - a paragraph reads better than a list of 160
    "a about above after again against all also although always am among an and another any are around as at be because been "
    "before being between both but by can could did do does doing down during each either else even ever every few for from "
    "further had has have having he her here hers him his how however i if in instead into is it its itself just least less "
    "like many may me might mine more most much must my neither never no nor not now of off often on once one only or other "
    "our ours out over own per perhaps quite rather same shall she should since so some still such than that the their theirs "
    "them then there therefore these they this those though through thus to together too toward under until up upon us very "
    "was we were what when where whether which while who whom whose why will with within without would yet you your yours"
).split()
"""Words that carry grammar and no stance."""

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•–]|\d+[.)])[ \t]+\S", re.MULTILINE)
QUOTE = re.compile(r"[\"“”„«»]")
CONTRACTION = re.compile(r"\w['’](?:s|t|re|ve|ll|d|m)\b", re.IGNORECASE)
FIRST_PERSON = frozenset("i me my mine we us our ours".split())  # noqa: SIM905
SECOND_PERSON = frozenset("you your yours".split())  # noqa: SIM905
NEGATIONS = frozenset("no not never none neither nor nothing cannot".split())  # noqa: SIM905
FUNCTION_WORD_SET = frozenset(FUNCTION_WORDS)


class Text:
    """An answer, and what several features ask of it; `tokens` is its length in them, where a tokenizer is at hand."""

    def __init__(self, raw: str, tokens: int | None = None) -> None:
        self.raw, self.tokens = raw, tokens

    @cached_property
    def words(self) -> list[str]:
        """Its words in lower case, in their order; equal words are one object, which is half of the memory of the forensics."""
        return list(map(sys.intern, WORD.findall(self.raw.lower())))

    def rate(self, count: int) -> float:
        """A count per word, so that a longer text does not have more of everything."""
        return count / max(1, len(self.words))

    def rate_of(self, words: frozenset[str]) -> float:
        return self.rate(sum(map(words.__contains__, self.words)))

    def count_of(self, is_of_kind: Callable[[str], bool]) -> int:
        """How many of its characters are of a kind."""
        if not self.raw.isascii():
            return sum(map(is_of_kind, self.raw))
        return len(self.raw) - len(self.raw.encode().translate(None, _of_kind(is_of_kind)))


@cache
def _of_kind(is_of_kind: Callable[[str], bool]) -> bytes:
    """The characters of ASCII that are."""
    return bytes(code for code in range(128) if is_of_kind(chr(code)))


@dataclass(frozen=True)
class Feature:
    """A number per text; `more` completes "chosen ..." where the chosen text has the larger one.

    Args:
        name: as tables show it.
        more, less: what it means that a side has the larger, the smaller number.
        measure: the number.
    """

    name: str
    more: str
    less: str
    measure: Callable[[Text], float]


def _count(name: str, measure: Callable[[Text], float]) -> Feature:
    return Feature(name, f"has more {name}", f"has fewer {name}", measure)


def _share(name: str, measure: Callable[[Text], float], things: str | None = None) -> Feature:
    things = things or name
    return Feature(f"{name} per word", f"has more {things} per word", f"has fewer {things} per word", measure)


def _mark(name: str, has: str, measure: Callable[[Text], bool]) -> Feature:
    return Feature(name, f"more often {has}", f"less often {has}", lambda text: float(measure(text)))


FEATURES: tuple[Feature, ...] = (
    Feature("length in characters", "is longer", "is shorter", lambda text: len(text.raw)),
    Feature("length in words", "is longer in words", "is shorter in words", lambda text: len(text.words)),
    Feature(
        "length of a word", "has longer words", "has shorter words", lambda text: text.rate(sum(map(len, text.words)))
    ),
    _count("sentences", lambda text: len(re.findall(r"(?<![.!?…])[.!?…]++(?=\s|$)", text.raw))),
    _count("line breaks", lambda text: len(re.findall(r"\r\n|\r|\n", text.raw.strip()))),
    _mark("begins with a line break", "begins with a line break", lambda text: text.raw[:1] in ("\n", "\r")),
    _mark("ends with white space", "ends with white space", lambda text: text.raw[-1:].isspace()),
    _count("list items", lambda text: len(LIST_ITEM.findall(text.raw))),
    _count("marks of Markdown", lambda text: len(re.findall(r"\*\*|__|^#+ |`", text.raw, re.MULTILINE))),
    _count("quotation marks", lambda text: len(QUOTE.findall(text.raw))),
    _mark("stands in quotation marks", "begins with a quotation mark", lambda text: bool(QUOTE.match(text.raw.strip()))),
    _count("digits", lambda text: text.count_of(str.isdigit)),
    _count("exclamation marks", lambda text: text.raw.count("!")),
    _count("question marks", lambda text: text.raw.count("?")),
    _share("commas", lambda text: text.rate(text.raw.count(","))),
    _share("colons and semicolons", lambda text: text.rate(text.raw.count(":") + text.raw.count(";"))),
    _share("dashes", lambda text: text.rate(len(re.findall(r"[–—]| - ", text.raw)))),
    _share("brackets", lambda text: text.rate(len(re.findall(r"[()\[\]]", text.raw)))),
    _share("capitals", lambda text: text.rate(text.count_of(str.isupper))),
    _count("characters beyond ASCII", lambda text: 0 if text.raw.isascii() else sum(each > "\x7f" for each in text.raw)),
    _mark("ends without a full stop", "ends without a full stop", lambda text: text.raw.rstrip()[-1:] not in (*".!?…", '"', "”")),
    _share("contractions", lambda text: text.rate(len(CONTRACTION.findall(text.raw)))),
    _share("first person", lambda text: text.rate_of(FIRST_PERSON), "words of the first person"),
    _share("second person", lambda text: text.rate_of(SECOND_PERSON), "words of the second person"),
    _share("negations", lambda text: text.rate_of(NEGATIONS)),
    _share("function words", lambda text: text.rate_of(FUNCTION_WORD_SET)),
    _count("refusal phrases", lambda text: len(REFUSALS.findall(text.raw))),
    _share("hedges", lambda text: text.rate(len(HEDGES.findall(text.raw)))),
)  # fmt: skip
IN_TOKENS = Feature("length in tokens", "is longer in tokens", "is shorter in tokens", lambda text: text.tokens or 0)


def features_of(texts: Sequence[Text]) -> tuple[Feature, ...]:
    """The features that the texts have a number for."""
    return (*FEATURES, IN_TOKENS) if all(text.tokens is not None for text in texts) else FEATURES
