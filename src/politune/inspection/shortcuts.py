"""What a preference set can be won on without its content: how well each cheap feature alone tells chosen from rejected.

Every estimate is an accuracy: the share of rows in which the feature points to the chosen side, a tie counted as half. 0.5 is
what guessing gives. A feature that is a number points to the side that has more of it (or less, whichever is chosen more
often); those that are fitted (opening and closing words, function words, all words, pairs of words) learn on other rows than
they are judged by: ten folds, which keep together what `group_rows` does, rows of one prompt or with one answer.

Intervals are those of `chance.estimate` over such groups. The test against 0.5 divides the sum over groups by the root of its sum
of squares, which under exchangeable sides is a sum of random signs; less half of the step that the smallest group makes (Yates
1934, JRSS Suppl. 1), without which four rows that agree would be called more than chance. P-values are Holm's over the features
that differ in any row: another one could not be found whichever side were the chosen one, and is no test (Tarone 1990, Biometrics
46).

What learns is tested by other points than it is judged by: each fold's by what the folds before it taught (progressive
validation, Blum, Kalai & Langford 1999, COLT). Cross-validated points depend on one another, for every fold learns from the
others' labels, and their sum is more often large than a sum of random signs is; those in turn are martingale differences, which
count the more, the more folds taught. The interval, which is around the cross-validated accuracy, is widened by a jackknife over
folds, as `chance.estimate` says; of words by a part of it (`JACKKNIFE_OF_WORDS`).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from politune.chance import Estimate, estimate, holm
from politune.data.texts import hash_texts
from politune.data.workers import one_thread
from politune.inspection.features import FUNCTION_WORD_SET, Text, features_of
from politune.inspection.groups import group_rows
from politune.report import Intervals, Lines, Section, Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Learner: TypeAlias = "Callable[[frozenset[int]], NDArray[Any]]"
"""What the rows of some folds teach: a weight for each column of the differences, [columns]."""

FOLDS = 10
FEWEST_PROMPTS = 50
LEVEL = 0.05
"""Of the family of features: in at most so many sets without a shortcut one is named."""
FEWEST_DOCUMENTS = 3
"""Texts that a word has to stand in, and rows in which it has to differ, to count among the words."""
STRENGTH = 0.3
"""C of the logistic regression over words: the inverse of its L2 penalty."""
JACKKNIFE_OF_WORDS = 0.75
"""What the jackknife of what learns from words is multiplied by. It overstates the variance where terms depend on several folds
(`chance.estimate`), and from the errors of one cross-validation no estimate is free of bias (Bengio & Grandvalet 2004, JMLR 5):
this is empirical, by benchmarks/JACKKNIFE.md."""
FEWEST_EFFECTIVE_ROWS = 50
"""Rows that a balanced set must be worth, for anything to be said of it."""
BALANCED_WITHIN = 0.005
OF_CONTENT = ("the most telling word", "words", "words and pairs of words")
"""Features that may well be the content itself: an upper bound, and no shortcut by themselves."""
SHOWN_ROWS = 5
SHOWN_FEATURES = 12


@dataclass(frozen=True)
class Pair:
    """One row of the forensics: what makes its prompt equal to another one, its two answers, and their lengths in tokens."""

    prompt: str
    chosen: str
    rejected: str
    tokens: tuple[int, int] | None = None


@dataclass(frozen=True)
class Shortcut:
    """How well one feature tells the sides apart.

    `chosen` completes a sentence that begins with "chosen"; `decided` is the share of rows in which the feature tells the sides
    apart; `p` is adjusted for the family of features that differ between the sides of any row, of which this one may be
    (`differs`).
    """

    feature: str
    chosen: str
    estimate: Estimate
    decided: float
    p: float
    is_fitted: bool
    differs: bool

    @property
    def is_found(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class Forensics:
    """The features in the order of their accuracy, and what is left of the words' accuracy when the shortcuts are balanced.

    `words` is the bag of words and pairs of words, the upper bound; `balanced` the same where rows are weighted so that none of
    the features named in `balanced_on` tells the sides apart, None where no weights do that. `driven` holds the numbers of the
    rows that the shortcuts give away most; `groups` is the number of those that `group_rows` makes.
    """

    rows: int
    groups: int
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
        shown = [each for each in self.shortcuts if each.differs]
        rows = tuple(
            (each.feature, f"chosen {each.chosen}", *_percents(each.estimate), f"{each.decided:.0%}", _p_text(each.p))
            for each in shown
        )
        columns = ("feature alone", "what tells", "accuracy", "low", "high", "rows decided", "p")
        alike = ", ".join(each.feature for each in self.shortcuts if not each.differs)
        note = (
            f"Share of the rows in which the feature points to the chosen side, a tie as half, with its 95 % interval over "
            f"{self.groups:,} groups that share no prompt or answer; 50 % is guessing. Words and openings learn on other groups "
            "than they are judged by. "
            "p is Holm's for the features of this table together."
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
def examine(pairs: Sequence[Pair], groups: "NDArray[np.intp] | None" = None) -> Forensics:
    """The forensics of pairs, whose order and number of processes change nothing.

    Args:
        groups: what `groups_of` says of the pairs, where that is known already.

    Raises:
        ValueError: fewer than `FEWEST_PROMPTS` groups, of which nothing can be said.
    """
    groups = groups_of(pairs) if groups is None else groups
    count = int(groups.max(initial=-1)) + 1
    if count < FEWEST_PROMPTS:
        raise ValueError(f"{count} prompts with answers of their own are too few")
    folds = _folds([pair.prompt for pair in pairs], groups)
    chosen = [Text(pair.chosen, pair.tokens and pair.tokens[0]) for pair in pairs]
    rejected = [Text(pair.rejected, pair.tokens and pair.tokens[1]) for pair in pairs]
    points_of_numbers, found = _measured(chosen, rejected, groups)
    fitted, differences = _fitted(chosen, rejected, folds)
    for name, (sentence, told) in fitted.items():
        found.append(_shortcut(name, sentence, told.points, groups, told))
    adjusted = iter(holm([each.p for each in found if each.differs]))
    found = [replace(each, p=next(adjusted) if each.differs else 1.0) for each in found]
    words = found[-1].estimate
    balanced, names = _balanced(found[: points_of_numbers.shape[1]], points_of_numbers, differences, groups, folds)
    ordered = sorted(found, key=lambda each: (-each.is_found, -each.estimate.accuracy, each.feature))
    return Forensics(len(pairs), count, tuple(ordered), words, balanced, names, _driven(found, points_of_numbers))


def groups_of(pairs: Sequence[Pair]) -> "NDArray[np.intp]":
    """The number of each row's group, as `group_rows` gives it, [rows]."""
    return group_rows([pair.prompt for pair in pairs], [(pair.chosen, pair.rejected) for pair in pairs])


def _folds(prompts: Sequence[str], groups: "NDArray[Any]") -> "NDArray[np.intp]":
    """The fold of each row: by the rank of its group's smallest hash, so that every fold has its share and the rows' order
    changes nothing."""
    import numpy as np

    hashes = np.array(hash_texts(prompts), np.uint64)
    smallest = np.full(groups.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, groups, hashes)
    folds = np.empty(len(smallest), np.intp)
    folds[np.argsort(smallest, kind="stable")] = np.arange(len(smallest)) % FOLDS
    found: NDArray[np.intp] = folds[groups]
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def _measured(
    chosen: Sequence[Text], rejected: Sequence[Text], groups: "NDArray[Any]"
) -> tuple["NDArray[np.int8]", list[Shortcut]]:
    """(where each feature points, as `_shortcut` takes it, int8 [rows, features]; the shortcuts)."""
    import numpy as np

    features = features_of(chosen)
    points = np.empty((len(chosen), len(features)), np.int8)
    found = []
    for index, feature in enumerate(features):
        more, less = (np.array([feature.measure(text) for text in texts], float) for texts in (chosen, rejected))
        signs = np.sign(more - less)
        direction = 1 if signs.sum() >= 0 else -1
        points[:, index] = direction * signs
        sentence = feature.more if direction > 0 else feature.less
        found.append(_shortcut(feature.name, sentence, points[:, index], groups))
    return points, found


def _shortcut(
    name: str, sentence: str, points: "NDArray[Any]", groups: "NDArray[Any]", told: "Told | None" = None
) -> Shortcut:
    """From +1 where the feature points to the chosen side, -1 to the other and 0 where it does not tell; p is not adjusted.

    Args:
        told: of a feature that learns, what it is tested by, and how uncertain its accuracy is.
    """
    import numpy as np

    sums = np.bincount(groups, told.in_turn if told else points.astype(float))
    # One that is fitted may only be right; the direction of a number is chosen after the look.
    p = _signs_p(sums, one_sided=told is not None)
    judged = estimate(points.astype(float) / 2 + 0.5, groups, jackknifed=told.jackknifed if told else None)
    decided = float((points != 0).mean())
    return Shortcut(name, sentence, judged, decided, p, told is not None, told.differs if told else decided > 0)


def _signs_p(sums: "NDArray[Any]", *, one_sided: bool) -> float:
    """P of a sum of numbers with random signs, by the normal distribution, less half of the sum's smallest step."""
    import numpy as np

    spread = math.sqrt(float((sums**2).sum()))
    total = float(sums.sum()) if one_sided else abs(float(sums.sum()))
    half_step = float(np.abs(sums[sums != 0]).min()) if spread else 0.0
    tail = math.erfc((total - half_step) / spread / math.sqrt(2)) if spread else 1.0
    return tail / 2 if one_sided else min(1.0, tail)


# --- what is fitted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """Where a feature that learns points, [rows]: to the chosen side (+1), the other (-1) or neither (0).

    `points` are by what all other folds teach, `in_turn` by what the folds before teach, times their number; `jackknifed` is the
    variance of the accuracy by leaving out one fold, both as rows that teach and as rows that are judged, or a part of it;
    `differs` says whether there is anything to learn from in any row, whichever side is the chosen one.
    """

    points: "NDArray[Any]"
    in_turn: "NDArray[Any]"
    jackknifed: float
    differs: bool


def _fitted(
    chosen: Sequence[Text], rejected: Sequence[Text], folds: "NDArray[Any]"
) -> tuple[dict[str, tuple[str, Told]], Any]:
    """By the feature's name (what completes "chosen ...", where it points); and the differences in words and pairs of words."""
    openings: dict[str, Callable[[Text], str]] = {
        "opening word": lambda text: " ".join(text.words[:1]),
        "opening three words": lambda text: " ".join(text.words[:3]),
        "closing word": lambda text: " ".join(text.words[-1:]),
        "opening and closing mark": lambda text: _edge(text.raw[:1]) + _edge(text.raw[-1:]),
    }
    differences, names = _differences(chosen, rejected)
    words = _columns(differences, [" " not in name for name in names])
    function_words = _columns(differences, [name in FUNCTION_WORD_SET for name in names])
    found = {}
    for name, of in openings.items():
        categories = _categories(list(map(of, chosen)), list(map(of, rejected)))
        found[name] = (f"has another {name}", _told(categories, _by_category(categories, folds), folds))
    found["function words"] = ("has other function words", _told_by_words(function_words, folds))
    found["the most telling word"] = ("has or lacks it", _told_by_one_word(words, folds))
    found["words"] = ("has other words", _told_by_words(words, folds))
    found["words and pairs of words"] = ("has other words and pairs of words", _told_by_words(differences, folds))
    return found, differences


def _told(
    differences: Any,
    learn: Learner,
    folds: "NDArray[Any]",
    weights: "NDArray[Any] | None" = None,
    factor: float = 1.0,
) -> Told:
    """Has every fold judged by what others teach.

    Args:
        differences: of the chosen side from the rejected one, sparse [rows, columns].
        weights: of the rows in the jackknife; None for equal ones.
        factor: what the jackknife is multiplied by.
    """
    import numpy as np

    every = frozenset(range(FOLDS))
    rows = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    parts = [differences[each] for each in rows]
    weights = np.full(len(folds), 1 / len(folds)) if weights is None else weights
    held = np.array([weights[each].sum() for each in rows])

    def points(fold: int, taught: "NDArray[Any]") -> "NDArray[Any]":
        found: NDArray[Any] = np.sign(np.round(parts[fold] @ taught, 9))
        return found

    held_out, in_turn = np.zeros(len(folds)), np.zeros(len(folds))
    for fold in range(FOLDS):
        held_out[rows[fold]] = points(fold, learn(every - {fold}))
        if fold:
            in_turn[rows[fold]] = fold * points(fold, learn(frozenset(range(fold))))
    sums = np.zeros(FOLDS)
    for one, other in combinations(range(FOLDS), 2):
        taught = learn(every - {one, other})
        sums[one] += weights[rows[other]] @ points(other, taught)
        sums[other] += weights[rows[one]] @ points(one, taught)
    accuracies = sums / (1 - held) / 2 + 0.5
    jackknifed = factor * (FOLDS - 1) / FOLDS * float(((accuracies - accuracies.mean()) ** 2).sum())
    return Told(held_out, in_turn, jackknifed, differences.nnz > 0)


def _columns(differences: Any, wanted: Sequence[bool]) -> Any:
    """Some columns; one of zeros where there is none."""
    import numpy as np
    from scipy.sparse import csr_matrix

    found = differences[:, np.flatnonzero(wanted)]
    return found if found.shape[1] else csr_matrix((differences.shape[0], 1), dtype=float)


def _edge(character: str) -> str:
    """Letters and digits are no mark."""
    return "a" if re.match(r"\w", character) else character


def _categories(chosen: Sequence[str], rejected: Sequence[str]) -> Any:
    """The category of the chosen text, 1, and of the rejected one, -1, where they differ, sparse [rows, categories]."""
    import numpy as np
    from scipy.sparse import csr_matrix

    number = {category: index for index, category in enumerate(sorted({*chosen, *rejected}))}
    rows = np.arange(len(chosen))
    columns = [number[category] for category in (*chosen, *rejected)]
    found = csr_matrix((np.repeat([1.0, -1.0], len(rows)), (np.tile(rows, 2), columns)), (len(rows), len(number)))
    found.eliminate_zeros()
    return found


def _by_category(categories: Any, folds: "NDArray[Any]") -> Learner:
    """The log odds of each category among the rows that teach, with one added to every count."""
    import numpy as np

    more, less = _sums(categories.maximum(0), folds), _sums((-categories).maximum(0), folds)

    def learn(teaching: frozenset[int]) -> "NDArray[Any]":
        given = sorted(teaching)
        odds: NDArray[Any] = np.log((more[given].sum(0) + 1) / (less[given].sum(0) + 1))
        return odds

    return learn


def _sums(columns: Any, folds: "NDArray[Any]") -> "NDArray[Any]":
    """Of each column over the rows of each fold, [folds, columns]."""
    import numpy as np

    return np.stack([np.asarray(columns[np.flatnonzero(folds == fold)].sum(0)).ravel() for fold in range(FOLDS)])


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


def _by_one_word(differences: Any, folds: "NDArray[Any]") -> Learner:
    """The word that stands most unevenly on the sides that teach: the largest sum of signs over its root."""
    import numpy as np

    signs, counts = _sums(differences, folds), _sums(abs(differences), folds)

    def learn(teaching: frozenset[int]) -> "NDArray[Any]":
        given = sorted(teaching)
        uneven = signs[given].sum(0) / np.sqrt(np.maximum(1, counts[given].sum(0)))
        word = int(np.argmax(np.abs(uneven)))
        only = np.zeros(len(uneven))
        only[word] = np.sign(uneven[word])
        return only

    return learn


def _told_by_one_word(differences: Any, folds: "NDArray[Any]") -> Told:
    """By whether the word is there that stands most unevenly on the sides that teach."""
    return _told(differences, _by_one_word(differences, folds), folds, factor=JACKKNIFE_OF_WORDS)


def _told_by_words(differences: Any, folds: "NDArray[Any]", weights: "NDArray[Any] | None" = None) -> Told:
    """By a logistic regression without intercept."""
    return _told(differences, _by_words(differences, folds, weights), folds, weights, JACKKNIFE_OF_WORDS)


def _by_words(differences: Any, folds: "NDArray[Any]", weights: "NDArray[Any] | None") -> Learner:
    """The weights of a logistic regression without intercept, each of whose rows is turned round or not by its number."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    rows = differences.shape[0]

    def learn(teaching: frozenset[int]) -> "NDArray[Any]":
        learned = np.flatnonzero(np.isin(folds, sorted(teaching)))
        turned = np.where(np.arange(len(learned)) % 2, -1.0, 1.0)
        seen = differences[learned].multiply(turned[:, None]).tocsr()
        model = LogisticRegression(C=STRENGTH, fit_intercept=False, max_iter=200, tol=1e-3)
        model.fit(seen, turned, None if weights is None else weights[learned] * rows)
        found: NDArray[Any] = model.coef_[0]
        return found

    return learn


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
    told = _told_by_words(differences, folds, weights)
    return estimate(told.points / 2 + 0.5, groups, weights, told.jackknifed), names


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
    for index, each in enumerate(found[: points_of_numbers.shape[1]]):
        if each.is_found:
            accuracy = min(each.estimate.accuracy, 0.999)
            said += points_of_numbers[:, index] * math.log(accuracy / (1 - accuracy))
    order = np.lexsort((np.arange(len(said)), -said))
    return tuple(int(row) for row in order[:SHOWN_ROWS] if said[row] > 0)
