"""Which languages texts are written in, by py3langid (Lui & Baldwin 2012, ACL demos): naive Bayes over byte sequences.

Chosen among the libraries for this: no compiled part, no model to be fetched or unpickled, 97 languages; it says how sure it is,
which is what short texts need. Time per row: benchmarks/BUILD.md.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

SURE = 0.8
"""From this probability on a language is named."""
UNCLEAR = "unclear"


def languages_of(texts: Sequence[str]) -> list[str]:
    """The language of each text as its ISO 639-1 code, or `UNCLEAR` where the text is too short or too mixed to tell."""
    identify = _identifier().classify
    return [code if sure >= SURE else UNCLEAR for code, sure in map(identify, texts)]


def forget_languages() -> None:
    """Gives back the memory of the model, which is loaded once more where it is needed again."""
    _identifier.cache_clear()


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
