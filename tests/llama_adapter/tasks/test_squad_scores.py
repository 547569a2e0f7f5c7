"""SQuAD's scores: equal to torchmetrics' for 1.1, counted by hand for 2.0."""

import random
from itertools import pairwise

import pytest

from llama_adapter.tasks.squad_files import Question
from llama_adapter.tasks.squad_scores import (
    best_threshold,
    exact_match,
    f1,
    normalise,
    squad_scores,
)

WORDS = [
    "the",
    "The",
    "a",
    "an",
    "theatre",
    "tower",
    "Tower,",
    "U.S.",
    "in",
    "1889",
    "-",
    "né",
    "o",
]


def asked(*answers: str, name: str = "q") -> Question:
    return Question(name, "?", "context", answers, tuple(0 for _ in answers))


def random_text(rng: random.Random, least: int = 0) -> str:
    return rng.choice([" ", "  ", "\t"]).join(rng.choices(WORDS, k=rng.randint(least, 5)))


def with_words(rng: random.Random) -> str:
    """A random text of which something is left after `normalise`."""
    return f"{random_text(rng)} {rng.choice(['tower', 'U.S.', 'né'])}"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  U.S. tower, a theatre", "us tower theatre"),
        ("An apple; THE end.", "apple end"),
        ("it's a-b", "its ab"),
        ("“the” quotes", "“ ” quotes"),
        ("a the an", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_version_1_equals_torchmetrics() -> None:
    """But for two texts without a word, whose F1 is 0 in SQuAD's own scorer and 1 in theirs."""
    metrics = pytest.importorskip("torchmetrics.functional.text")
    rng = random.Random(1)
    for _ in range(60):
        questions, texts = [], []
        for number in range(rng.randint(1, 5)):
            answers = [with_words(rng) for _ in range(rng.randint(1, 3))]
            questions.append(asked(*answers, name=str(number)))
            texts.append(rng.choice([random_text(rng), rng.choice(answers)]))
        wanted = metrics.squad(
            [
                {"id": one.id, "prediction_text": text}
                for one, text in zip(questions, texts, strict=True)
            ],
            [
                {"id": one.id, "answers": {"text": [*one.answers], "answer_start": [*one.starts]}}
                for one in questions
            ],
        )
        found = squad_scores(questions, texts, version_2=False)
        assert found["exact"] == pytest.approx(float(wanted["exact_match"]), abs=1e-4)
        assert found["f1"] == pytest.approx(float(wanted["f1"]), abs=1e-4)


def test_texts_without_a_word_have_no_words_in_common_in_version_1() -> None:
    """SQuAD's evaluate-v1.1.py: F1 0 where no word is in common, exact where both are the same."""
    found = squad_scores([asked("the"), asked("a tower")], ["an", "tower"], version_2=False)
    assert found == {"exact": 100.0, "f1": 50.0}
    assert squad_scores([asked("the", "an hour")], ["hour a"], version_2=False)["f1"] == 100
    assert squad_scores([asked("the")], ["an"], version_2=True)["f1"] == 100


def test_f1_of_words() -> None:
    assert f1("the red tower", "a tower in Paris") == pytest.approx(2 / 5)
    assert f1("tower tower", "tower") == pytest.approx(2 / 3)
    assert f1("", "the") == exact_match("", "the") == 1
    assert f1("", "tower") == f1("tower", "") == 0


def test_version_2_by_hand() -> None:
    """Answered right and in part, left out; unanswerable with no text and with one."""
    questions = [asked("the tower"), asked("in Paris", "Paris"), asked("1889"), asked(), asked()]
    found = squad_scores(questions, ["Tower!", "Paris, France", "", "", "Paris"], version_2=True)
    of_paris = 2 / 3
    assert found == {
        "exact": pytest.approx(40.0),
        "f1": pytest.approx(20 * (1 + of_paris + 0 + 1 + 0)),
        "HasAns_exact": pytest.approx(100 / 3),
        "HasAns_f1": pytest.approx(100 * (1 + of_paris) / 3),
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
    }


def test_version_2_drops_right_answers_without_words() -> None:
    question = asked("the", "tower")
    assert squad_scores([question], ["a"], version_2=False)["exact"] == 100
    assert squad_scores([question], ["a"], version_2=True)["exact"] == 0
    assert squad_scores([asked("the")], [""], version_2=True)["f1"] == 100


def test_scores_of_a_kind_that_does_not_occur_are_left_out() -> None:
    assert [*squad_scores([asked("x")], ["x"], version_2=True)] == [
        "exact",
        "f1",
        "HasAns_exact",
        "HasAns_f1",
    ]


def test_the_best_threshold_is_the_best_of_all() -> None:
    rng = random.Random(2)
    for _ in range(200):
        count = rng.randint(1, 7)
        questions = [
            asked(*([random_text(rng, 1)] if rng.random() < 0.6 else [])) for _ in range(count)
        ]
        texts = [
            one.answers[0] if one.answers and rng.random() < 0.5 else random_text(rng, 1)
            for one in questions
        ]
        # of few values, so that some are equal
        odds = [rng.choice([-1.5, -0.5, 0.0, 0.5, 2.0]) for _ in questions]
        values = sorted(odds)
        between = [(low + high) / 2 for low, high in pairwise(values)]
        for measure, name in ((exact_match, "exact"), (f1, "f1")):
            by_threshold = {
                threshold: squad_scores(
                    questions,
                    [t if o <= threshold else "" for t, o in zip(texts, odds, strict=True)],
                    version_2=True,
                )[name]
                for threshold in (values[0] - 1, *values, *between, values[-1] + 1)
            }
            best, threshold = best_threshold(questions, texts, odds, measure)
            assert best == pytest.approx(max(by_threshold.values()))
            assert threshold in (0.0, *odds)
            if threshold in by_threshold and threshold in odds and threshold:
                assert by_threshold[threshold] == pytest.approx(best)


def their_threshold(
    has: list[bool], texts: list[str], scores: list[float], odds: list[float]
) -> tuple[float, float]:
    """As SQuAD's evaluate-v2.0.py describes it: from no answer at all, answers by rising odds."""
    total = top = float(has.count(False))
    found = 0.0
    for place in sorted(range(len(has)), key=lambda place: odds[place]):
        total += scores[place] if has[place] else (-1.0 if texts[place] else 0.0)
        if total > top:
            top, found = total, odds[place]
    return 100 * top / len(has), found


def test_the_best_threshold_is_squads_own() -> None:
    rng = random.Random(3)
    for _ in range(200):
        answers = [[with_words(rng)] * (rng.random() < 0.6) for _ in range(rng.randint(1, 8))]
        questions = [asked(*one) for one in answers]
        texts = [one[0] if one and rng.random() < 0.5 else with_words(rng) for one in answers]
        odds = [rng.uniform(-3, 3) for _ in answers]
        for measure in (exact_match, f1):
            scores = [
                measure(text, one[0]) if one else 0.0
                for text, one in zip(texts, answers, strict=True)
            ]
            theirs = their_threshold([bool(one) for one in answers], texts, scores, odds)
            assert best_threshold(questions, texts, odds, measure) == pytest.approx(theirs)


def test_a_threshold_by_hand() -> None:
    """Right at odds -3, wrong where there is no answer at 1, right at 2, no answer at 4."""
    questions = [asked("x"), asked(), asked("z"), asked()]
    odds = [-3.0, 1.0, 2.0, 4.0]
    assert best_threshold(questions, ["x", "y", "z", "w"], odds, exact_match) == (75.0, -3.0)
    assert best_threshold(questions, ["v", "y", "z", "w"], odds, exact_match) == (50.0, 0.0)
