"""What a preference set can be won on without its content: how well each cheap feature alone tells chosen from rejected.

Every estimate is an accuracy: the share of rows in which the feature points to the chosen side, a tie counted as half. 0.5 is
what guessing gives. A feature that is a number points to the side that has more of it (or less, whichever is chosen more
often); those that are fitted (opening and closing words, function words, all words, pairs of words) learn on other prompts than
they are judged by: ten folds by prompt.

Intervals are those of `chance.estimate`: equal prompts are no independent rows. The test against 0.5 divides the sum over prompts
by the root of its sum of squares, which under exchangeable sides is a sum of random signs; p-values are Holm's over all features.

What learns is tested by other points than it is judged by: each fold's by what the folds before it taught (progressive
validation, Blum, Kalai & Langford 1999, COLT). Cross-validated points depend on one another, for every fold learns from the
others' labels, and their sum is more often large than a sum of random signs is; those in turn are martingale differences.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from politune.chance import Estimate, estimate, holm
from politune.data.workers import one_thread
from politune.inspection.features import FEATURES, FUNCTION_WORD_SET, Text
from politune.report import Intervals, Lines, Section, Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split: TypeAlias = "tuple[NDArray[np.intp], NDArray[np.intp]]"
"""Numbers of the rows that teach, and of those that are judged."""

FOLDS = 10
FEWEST_PROMPTS = 50
LEVEL = 0.05
"""Of the family of features: in at most so many sets without a shortcut one is named."""
FEWEST_DOCUMENTS = 3
"""Texts that a word has to stand in, and rows in which it has to differ, to count among the words."""
STRENGTH = 0.3
"""C of the logistic regression over words: the inverse of its L2 penalty."""
FEWEST_EFFECTIVE_ROWS = 50
"""Rows that a balanced set must be worth, for anything to be said of it."""
BALANCED_WITHIN = 0.005
OF_CONTENT = ("the most telling word", "words", "words and pairs of words")
"""Features that may well be the content itself: an upper bound, and no shortcut by themselves."""
SHOWN_ROWS = 5
SHOWN_FEATURES = 12


@dataclass(frozen=True)
class Pair:
    """One row of the forensics: what makes its prompt equal to another one, and its two answers."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Shortcut:
    """How well one feature tells the sides apart.

    `chosen` completes a sentence that begins with "chosen"; `decided` is the share of rows in which the feature differs between
    the sides; `p` is adjusted for the family of features.
    """

    feature: str
    chosen: str
    estimate: Estimate
    decided: float
    p: float
    is_fitted: bool

    @property
    def is_found(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class Forensics:
    """The features in the order of their accuracy, and what is left of the words' accuracy when the shortcuts are balanced.

    `words` is the bag of words and pairs of words, the upper bound; `balanced` the same where rows are weighted so that none of
    the features named in `balanced_on` tells the sides apart, None where no weights do that. `driven` holds the numbers of the
    rows that the shortcuts give away most.
    """

    rows: int
    prompts: int
    shortcuts: tuple[Shortcut, ...]
    words: Estimate
    balanced: Estimate | None
    balanced_on: tuple[str, ...]
    driven: tuple[int, ...]

    @property
    def found(self) -> tuple[Shortcut, ...]:
        """The features that tell the sides apart."""
        return tuple(each for each in self.shortcuts if each.is_found)

    @property
    def without_content(self) -> tuple[Shortcut, ...]:
        """Those of them that know no word of the content: what a run could learn instead of it."""
        return tuple(each for each in self.found if each.feature not in OF_CONTENT)

    def sections(self) -> tuple[Section, ...]:
        """The features that tell the sides apart as a plot, all of them as a table, and what the words tell without them."""
        plot = Intervals(
            "What tells chosen from rejected, in points above guessing",
            tuple((each.feature, *_above_guessing(each.estimate)) for each in self.found[:SHOWN_FEATURES]),
            "percentage points above 50 %",
        )
        shown = [each for each in self.shortcuts if each.decided > 0]
        rows = tuple(
            (each.feature, f"chosen {each.chosen}", *_percents(each.estimate), f"{each.decided:.0%}", _p_text(each.p))
            for each in shown
        )
        columns = ("feature alone", "what tells", "accuracy", "low", "high", "rows decided", "p")
        alike = ", ".join(each.feature for each in self.shortcuts if not each.decided)
        note = (
            f"Share of the rows in which the feature points to the chosen side, a tie as half, with its 95 % interval over "
            f"{self.prompts:,} prompts; 50 % is guessing. Words and openings learn on other prompts than they are judged by. "
            f"p is Holm's for all {len(self.shortcuts)} features."
        ) + (f" Alike on both sides of every row: {alike}." if alike else "")
        table = Table("Shortcuts", columns, rows, note)
        return (*([plot] if self.found else []), table, Lines("What the words tell", (self.words_line,)))

    @property
    def words_line(self) -> str:
        """What all words tell, and what of it is left when the rows are weighted so that no number tells the sides apart."""
        said = f"words and pairs of words tell chosen from rejected in {_percent(self.words)} of the rows"
        if not self.balanced_on:
            return f"{said}; no number does, so nothing is to be balanced"
        if self.balanced is None:
            return f"{said}; no weights balance the {len(self.balanced_on)} features that are numbers and shortcuts"
        worth = f"on rows worth {self.balanced.rows:,.0f} independent ones without ties"
        shortcuts = "1 shortcut" if len(self.balanced_on) == 1 else f"{len(self.balanced_on)} shortcuts"
        return f"{said}; with {shortcuts} balanced in {_percent(self.balanced)}, {worth}"


def _percents(estimate: Estimate) -> tuple[str, str, str]:
    return f"{estimate.accuracy:.1%}", f"{estimate.low:.1%}", f"{estimate.high:.1%}"


def _p_text(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.accuracy:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _above_guessing(estimate: Estimate) -> tuple[float, float, float]:
    return tuple(round(100 * each - 50, 2) for each in (estimate.accuracy, estimate.low, estimate.high))  # type: ignore[return-value]


@one_thread()
def examine(pairs: Sequence[Pair]) -> Forensics:
    """The forensics of pairs, whose order and number of processes change nothing.

    Raises:
        ValueError: fewer than `FEWEST_PROMPTS`, of which nothing can be said.
    """
    import numpy as np

    keys = sorted({pair.prompt for pair in pairs})
    if len(keys) < FEWEST_PROMPTS:
        raise ValueError(f"{len(keys)} prompts are too few")
    number = {key: index for index, key in enumerate(keys)}
    groups = np.array([number[pair.prompt] for pair in pairs])
    folds = _folds(keys)[groups]
    chosen, rejected = [Text(pair.chosen) for pair in pairs], [Text(pair.rejected) for pair in pairs]
    points_of_numbers, found = _measured(chosen, rejected, groups)
    fitted, differences = _fitted(chosen, rejected, folds)
    for name, (sentence, points, in_turn) in fitted.items():
        found.append(_shortcut(name, sentence, points, groups, in_turn=in_turn))
    found = [replace(each, p=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]
    words = found[-1].estimate
    balanced, names = _balanced(found[: len(FEATURES)], points_of_numbers, differences, groups, folds)
    ordered = sorted(found, key=lambda each: (-each.is_found, -each.estimate.accuracy, each.feature))
    return Forensics(len(pairs), len(keys), tuple(ordered), words, balanced, names, _driven(found, points_of_numbers))


def _folds(keys: Sequence[str]) -> "NDArray[np.intp]":
    """The fold of each prompt: by the rank of its hash, so that every fold has its share and the rows' order changes nothing."""
    import numpy as np

    hashes = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys]
    folds = np.empty(len(keys), np.intp)
    folds[sorted(range(len(keys)), key=hashes.__getitem__)] = np.arange(len(keys)) % FOLDS
    return folds


# --- numbers ---------------------------------------------------------------------------------------------------------


def _measured(
    chosen: Sequence[Text], rejected: Sequence[Text], groups: "NDArray[Any]"
) -> tuple["NDArray[np.int8]", list[Shortcut]]:
    """(where each feature points, as `_shortcut` takes it, int8 [rows, features]; the shortcuts)."""
    import numpy as np

    points = np.empty((len(chosen), len(FEATURES)), np.int8)
    found = []
    for index, feature in enumerate(FEATURES):
        more, less = (np.array([feature.measure(text) for text in texts], float) for texts in (chosen, rejected))
        signs = np.sign(more - less)
        direction = 1 if signs.sum() >= 0 else -1
        points[:, index] = direction * signs
        sentence = feature.more if direction > 0 else feature.less
        found.append(_shortcut(feature.name, sentence, points[:, index], groups))
    return points, found


def _shortcut(
    name: str, sentence: str, points: "NDArray[Any]", groups: "NDArray[Any]", *, in_turn: "NDArray[Any] | None" = None
) -> Shortcut:
    """From +1 where the feature points to the chosen side, -1 to the other and 0 where it does not tell; p is not adjusted.

    Args:
        in_turn: of a feature that learns, where it points by what came before: what it is tested by.
    """
    import numpy as np

    is_fitted = in_turn is not None
    sums = np.bincount(groups, in_turn if is_fitted else points.astype(float))
    spread = math.sqrt(float((sums**2).sum()))
    z = float(sums.sum()) / spread if spread else 0.0
    # One that is fitted may only be right; the direction of a number is chosen after the look.
    p = math.erfc(z / math.sqrt(2)) / 2 if is_fitted else math.erfc(abs(z) / math.sqrt(2))
    judged = estimate(points.astype(float) / 2 + 0.5, groups)
    return Shortcut(name, sentence, judged, float((points != 0).mean()), p, is_fitted)


# --- what is fitted --------------------------------------------------------------------------------------------------


def _fitted(
    chosen: Sequence[Text], rejected: Sequence[Text], folds: "NDArray[Any]"
) -> tuple[dict[str, tuple[str, "NDArray[Any]", "NDArray[Any]"]], Any]:
    """By the feature's name (what completes "chosen ...", where it points on prompts that it did not learn from, where by what
    the folds before taught); and the differences in words and pairs of words."""
    openings: dict[str, Callable[[Text], str]] = {
        "opening word": lambda text: " ".join(text.words[:1]),
        "opening three words": lambda text: " ".join(text.words[:3]),
        "closing word": lambda text: " ".join(text.words[-1:]),
        "opening and closing mark": lambda text: _edge(text.raw[:1]) + _edge(text.raw[-1:]),
    }
    differences, names = _differences(chosen, rejected)
    words = _columns(differences, [" " not in name for name in names])
    function_words = _columns(differences, [name in FUNCTION_WORD_SET for name in names])
    learners: dict[str, tuple[str, Callable[[Sequence[Split]], NDArray[Any]]]] = {
        name: (f"has another {name}", partial(_by_category, list(map(of, chosen)), list(map(of, rejected))))
        for name, of in openings.items()
    }
    learners |= {
        "function words": ("has other function words", partial(_by_words, function_words)),
        "the most telling word": ("has or lacks it", partial(_by_one_word, words)),
        "words": ("has other words", partial(_by_words, words)),
        "words and pairs of words": ("has other words and pairs of words", partial(_by_words, differences)),
    }
    held_out, in_turn = _held_out(folds), _in_turn(folds)
    return {
        name: (sentence, learn(held_out), learn(in_turn)) for name, (sentence, learn) in learners.items()
    }, differences


def _held_out(folds: "NDArray[Any]") -> list[Split]:
    """Each fold, to be judged by what the others teach."""
    return _split(folds, lambda fold: folds != fold)


def _in_turn(folds: "NDArray[Any]") -> list[Split]:
    """Each fold, to be judged by what the ones before it teach."""
    return _split(folds, lambda fold: folds < fold)


def _split(folds: "NDArray[Any]", teaches: Callable[[int], Any]) -> list[Split]:
    import numpy as np

    found = [(np.flatnonzero(teaches(fold)), np.flatnonzero(folds == fold)) for fold in range(FOLDS)]
    return [(learned, asked) for learned, asked in found if len(learned) > 1 and len(asked)]


def _columns(differences: Any, wanted: Sequence[bool]) -> Any:
    """Some columns; one of zeros where there is none."""
    import numpy as np
    from scipy.sparse import csr_matrix

    found = differences[:, np.flatnonzero(wanted)]
    return found if found.shape[1] else csr_matrix((differences.shape[0], 1), dtype=float)


def _edge(character: str) -> str:
    """Letters and digits are no mark."""
    return "a" if re.match(r"\w", character) else character


def _by_category(chosen: Sequence[str], rejected: Sequence[str], splits: Sequence[Split]) -> "NDArray[Any]":
    """Points by the log odds of each text's category among the texts that teach, with one added to every count."""
    import numpy as np

    points = np.zeros(len(chosen))
    for teaching, judged in splits:
        learned, asked = teaching.tolist(), judged.tolist()
        more, less = Counter(chosen[row] for row in learned), Counter(rejected[row] for row in learned)
        odds = {each: math.log((more[each] + 1) / (less[each] + 1)) for each in {*chosen, *rejected}}
        for row in asked:
            points[row] = np.sign(odds[chosen[row]] - odds[rejected[row]])
    return points


def _differences(chosen: Sequence[Text], rejected: Sequence[Text]) -> tuple[Any, list[str]]:
    """(which words and pairs of words stand in the chosen text alone, 1, and in the rejected one alone, -1, sparse
    [rows, words]; the words): such as differ in `FEWEST_DOCUMENTS` rows or more."""
    import numpy as np
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, analyzer=_words_and_pairs, min_df=FEWEST_DOCUMENTS)
    try:
        counted = counter.fit_transform([*chosen, *rejected])
    except ValueError:  # no word stands in as many texts
        return csr_matrix((len(chosen), 1), dtype=float), [""]
    differences = (counted[: len(chosen)].astype(float) - counted[len(chosen) :].astype(float)).tocsr()
    telling = np.flatnonzero(np.asarray(abs(differences).sum(axis=0)).ravel() >= FEWEST_DOCUMENTS)
    if not len(telling):
        return csr_matrix((len(chosen), 1), dtype=float), [""]
    return differences[:, telling], counter.get_feature_names_out()[telling].tolist()


def _words_and_pairs(text: Text) -> list[str]:
    return [*text.words, *map(" ".join, pairwise(text.words))]


def _by_one_word(differences: Any, splits: Sequence[Split]) -> "NDArray[Any]":
    """Points by the word that stands most unevenly on the sides that teach: the largest sum of signs over its root."""
    import numpy as np

    points = np.zeros(differences.shape[0])
    for teaching, asked in splits:
        learned = differences[teaching]
        sums = np.asarray(learned.sum(axis=0)).ravel()
        uneven = sums / np.sqrt(np.maximum(1, np.asarray(abs(learned).sum(axis=0)).ravel()))
        word = int(np.argmax(np.abs(uneven)))
        points[asked] = np.sign(uneven[word]) * differences[asked][:, [word]].toarray().ravel()
    return points


def _by_words(differences: Any, splits: Sequence[Split], weights: "NDArray[Any] | None" = None) -> "NDArray[Any]":
    """Points by a logistic regression without intercept, each of whose rows is turned round or not by its number."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    rows = differences.shape[0]
    points = np.zeros(rows)
    for learned, asked in splits:
        turned = np.where(np.arange(len(learned)) % 2, -1.0, 1.0)
        seen = differences[learned].multiply(turned[:, None]).tocsr()
        model = LogisticRegression(C=STRENGTH, fit_intercept=False, max_iter=200, tol=1e-3)
        model.fit(seen, turned, None if weights is None else weights[learned] * rows)
        points[asked] = np.sign(np.round(differences[asked] @ model.coef_[0], 9))
    return points


# --- with the shortcuts balanced -------------------------------------------------------------------------------------


def _balanced(
    numbers: Sequence[Shortcut],
    points_of_numbers: "NDArray[Any]",
    differences: Any,
    groups: "NDArray[Any]",
    folds: "NDArray[Any]",
) -> tuple[Estimate | None, tuple[str, ...]]:
    """What the words tell where no number does: rows weighted by entropy balancing (Hainmueller 2012, Political Analysis 20)."""
    found = [index for index, each in enumerate(numbers) if each.is_found]
    names = tuple(numbers[index].feature for index in found)
    if not found:
        return None, ()
    weights = balancing_weights(points_of_numbers[:, found])
    if weights is None:
        return None, names
    points = _by_words(differences, _held_out(folds), weights)
    return estimate(points / 2 + 0.5, groups, weights), names


def balancing_weights(signs: "NDArray[Any]") -> "NDArray[Any] | None":
    """Weights with sum 1 under which every column has the mean 0, and that are otherwise as equal as they can be.

    Args:
        signs: [rows, features]

    Returns:
        [rows], or None where no weights do it, or only such as leave fewer than `FEWEST_EFFECTIVE_ROWS`.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    columns = signs.astype(float)
    if (np.abs(columns.sum(axis=0)) == len(columns)).any():  # one side has more in every row
        return None

    def dual(tilt: "NDArray[Any]") -> tuple[float, "NDArray[Any]"]:
        scores = columns @ tilt
        return float(logsumexp(scores)), columns.T @ softmax(scores)

    solved = minimize(
        dual, np.zeros(columns.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500, "maxfun": 1000}
    )
    weights: NDArray[Any] = softmax(columns @ solved.x)
    is_balanced = bool((np.abs(weights @ columns) < BALANCED_WITHIN).all())
    return weights if is_balanced and 1 / float((weights**2).sum()) >= FEWEST_EFFECTIVE_ROWS else None


def _driven(found: Sequence[Shortcut], points_of_numbers: "NDArray[Any]") -> tuple[int, ...]:
    """The rows for whose chosen side the most is to be said by the numbers, each as the log odds of its accuracy."""
    import numpy as np

    said = np.zeros(len(points_of_numbers))
    for index, each in enumerate(found[: len(FEATURES)]):
        if each.is_found:
            accuracy = min(each.estimate.accuracy, 0.999)
            said += points_of_numbers[:, index] * math.log(accuracy / (1 - accuracy))
    order = np.lexsort((np.arange(len(said)), -said))
    return tuple(int(row) for row in order[:SHOWN_ROWS] if said[row] > 0)
