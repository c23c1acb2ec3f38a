"""What prompts are about: groups that are there are found, and none is made up where prompts are alike."""

import random
import warnings
from collections import Counter

from politune.inspection.topics import OTHER, name_topics, words_apart

WORDS = {
    "tax": "income budget revenue owed levy duty wealth cuts rates brackets".split(),  # noqa: SIM905
    "school": "teacher pupil lesson exam class grades books reading staff marks".split(),  # noqa: SIM905
}


def about(topic: str, seed: int) -> str:
    draw = random.Random(seed)
    return f"the {' '.join(draw.sample(WORDS[topic], k=3))}, number {seed}x"


def test_groups_are_named_by_their_words() -> None:
    prompts = [about("tax" if number % 2 else "school", number) for number in range(60)]
    names, are_named = name_topics(prompts, [""] * 60)
    assert not are_named
    groups = [set(name.split(", ")) for name in set(names)]
    assert len(groups) == 2
    assert all(group <= set(WORDS["tax"]) or group <= set(WORDS["school"]) for group in groups)
    assert names[0] != names[1]


def test_prompts_of_one_template_are_one_topic() -> None:
    """Without the number there is one word, and no group to tell from another; nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names, are_named = name_topics([f"Question {number}" for number in range(60)], [""] * 60)
        few, _ = name_topics([f"{'red green blue'.split()[number % 3]} {number}" for number in range(300)], [""] * 300)  # noqa: SIM905
    assert (set(names), are_named) == ({OTHER}, False)
    assert len(set(few)) <= 3


def test_a_word_that_is_all_there_is_sets_nothing_apart() -> None:
    assert words_apart(Counter({"p": 60}), Counter({"p": 40})) == []
    assert words_apart(Counter({"p": 60}), Counter()) == []
    more, less = words_apart(Counter({"tax": 60, "school": 2}), Counter({"tax": 2, "school": 60}))
    assert (more.word, less.word) == ("tax", "school")
    assert more.z > 3 > -3 > less.z
