"""What prompts are about: the topics that rows name, or groups of prompts and the words that set each apart.

Groups are k-means over the prompts' words (TF-IDF, 50 dimensions by truncated SVD: latent semantic analysis, Deerwester et al.
1990, JASIS 41). A group is named by the words that set it apart from all others: log odds with an informative Dirichlet prior
(Monroe, Colaresi & Quinn 2008, Political Analysis 16, eq. 22), the prior being the words of all texts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from politune.data.workers import one_thread
from politune.inspection.features import FUNCTION_WORDS, WORD

FEWEST_PROMPTS, MOST_PROMPTS = 50, 2000
"""Fewer are not grouped; of a larger sample so many are."""
MOST_TOPICS = 10
ROWS_OF_A_TOPIC = 25
"""Prompts that a group needs on average, for it to be one."""
DIMENSIONS = 50
NAMING_WORDS = 4
FEWEST_OF_A_NAME = 3
"""Prompts that a word has to stand in, to name a group."""
PRIOR_WORDS = 500.0
"""What the prior is worth, in words."""
SEED = 0
OTHER = "no common word"
NONE_NAMED = "none named"


@dataclass(frozen=True)
class Apart:
    """A word that stands in one group of texts more often than in another; z is its log odds over their standard error."""

    word: str
    z: float
    here: int
    there: int


def name_topics(prompts: Sequence[str], named: Sequence[str]) -> tuple[list[str], bool]:
    """The topic of each prompt; whether the rows named them.

    Args:
        prompts: [rows]
        named: what each row says its topic is, empty where it says nothing, [rows].
    """
    if any(named):
        return [name or NONE_NAMED for name in named], True
    if len(set(prompts)) < FEWEST_PROMPTS:
        return [OTHER] * len(prompts), False
    groups = _group(prompts)
    names = _names(prompts, groups)
    return [names[group] for group in groups], False


def over_all_rows(named: Counter[str], rows: int) -> Counter[str]:
    """The topics that rows name, and how many rows name none."""
    return named + Counter({NONE_NAMED: rows - named.total()})  # which leaves zeros out


@one_thread()
def _group(prompts: Sequence[str]) -> list[int]:
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    count = min(MOST_TOPICS, max(2, len(prompts) // ROWS_OF_A_TOPIC))
    vectors = TfidfVectorizer(
        token_pattern=WORD.pattern,
        stop_words=FUNCTION_WORDS,
        sublinear_tf=True,
        min_df=2,
        max_df=0.2,
        max_features=20_000,
    )
    try:
        words = vectors.fit_transform(prompts)
    except ValueError:  # no word stands in two prompts
        return [0] * len(prompts)
    if words.shape[1] > DIMENSIONS:
        words = normalize(TruncatedSVD(DIMENSIONS, random_state=SEED).fit_transform(words))
    else:
        words = words.toarray()
    count = min(count, len(np.unique(words.round(6), axis=0)))
    found: list[int] = KMeans(count, n_init=3, random_state=SEED).fit_predict(words).tolist()
    return found


def _names(prompts: Sequence[str], groups: Sequence[int]) -> dict[int, str]:
    counts: dict[int, Counter[str]] = {group: Counter() for group in set(groups)}
    for prompt, group in zip(prompts, groups, strict=True):
        counts[group].update(set(content_words(prompt)))
    together = sum(counts.values(), Counter[str]())
    common = {word for word, count in together.items() if count >= FEWEST_OF_A_NAME}
    names: dict[int, str] = {}
    for group, words in sorted(counts.items()):
        here = Counter({word: count for word, count in words.items() if word in common})
        there = Counter({word: together[word] - here[word] for word in common})
        best = words_apart(here, there)[:NAMING_WORDS]
        names[group] = ", ".join(each.word for each in best if each.z > 0) or OTHER
    return names


def content_words(text: str) -> list[str]:
    """The words of a text in lower case, function words left out."""
    return [word for word in WORD.findall(text.lower()) if word not in _FUNCTION_WORDS]


_FUNCTION_WORDS = frozenset(FUNCTION_WORDS)


def words_apart(here: Counter[str], there: Counter[str]) -> list[Apart]:
    """Words by how much more often they stand here than there, those that set apart most first.

    Args:
        here, there: how often each word stands in either group of texts.
    """
    both = here + there
    if len(both) < 2:  # a word that is all there is stands nowhere more often than elsewhere
        return []
    scale = PRIOR_WORDS / sum(both.values())
    n_here, n_there = sum(here.values()) + PRIOR_WORDS, sum(there.values()) + PRIOR_WORDS
    found = []
    for word, count in both.items():
        prior = count * scale
        one, other = here[word] + prior, there[word] + prior
        odds = math.log(one / (n_here - one)) - math.log(other / (n_there - other))
        found.append(Apart(word, odds / math.sqrt(1 / one + 1 / other), here[word], there[word]))
    return sorted(found, key=lambda each: (-each.z, each.word))
