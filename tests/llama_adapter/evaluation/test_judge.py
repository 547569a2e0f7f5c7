"""The judge's files, prompts and parser, and counts of scripted judges worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.judge import (
    Verdict,
    aggregate,
    ask,
    load,
    load_questions,
    load_reviews,
    marks_of,
    prompt,
    score,
    verdict,
    write,
)
from llama_adapter.evaluation.runner import Item, evaluate

# as many of each category as the 80 questions have
CATEGORIES = (
    *(["generic"] * 10), *(["knowledge"] * 10), *(["roleplay"] * 10), *(["common-sense"] * 10),
    *(["fermi"] * 10), *(["counterfactual"] * 10), *(["coding"] * 7), *(["math"] * 3),
    *(["writing"] * 10),
)  # fmt: skip


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question_rows() -> list[dict[str, Any]]:
    return [
        {"question_id": i, "text": f"Question {i}?", "category": category}
        for i, category in enumerate(CATEGORIES, 1)
    ]


def answer_rows(model: str, good: Callable[[int], bool]) -> list[dict[str, Any]]:
    return [
        {
            "answer_id": f"{model}{i}", "question_id": i, "model_id": model,
            "text": f"{'good' if good(i) else 'poor'} answer", "metadata": {},
        }
        for i in range(1, 81)
    ]  # fmt: skip


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """160 items: ours is good on odd questions, the baseline on multiples of 4 and of 5."""
    found, problems = load(
        lines(tmp_path / "question.jsonl", question_rows()),
        lines(tmp_path / "a.jsonl", answer_rows("ours", lambda i: i % 2 == 1)),
        lines(tmp_path / "b.jsonl", answer_rows("base", lambda i: i % 4 == 0 or i % 5 == 0)),
    )
    assert problems == []
    return found


def lover_of_the_first(prompt_text: str) -> str:
    return "9 4\nThe first is better."


def honest(prompt_text: str) -> str:
    _, first, second = prompt_text.split("[Assistant ")
    marks = [8 if "good answer" in side else 5 for side in (first, second)]
    return f"{marks[0]} {marks[1]}\nbecause"


def test_every_question_is_asked_in_both_orders(items: list[Item]) -> None:
    assert len(items) == len({item["id"] for item in items}) == 160
    first, second = items[4:6]
    assert (first["id"], second["id"], second["swapped"]) == ("3-1", "3-2", True)
    assert (first["answer_ids"], second["answer_ids"]) == (["ours3", "base3"], ["base3", "ours3"])
    assert first["prompt"].index("good answer") < first["prompt"].index("poor answer")
    assert second["prompt"].index("good answer") > second["prompt"].index("poor answer")


def test_who_loves_the_first_position_is_found_out(items: list[Item]) -> None:
    # 9 to 4 in one order, 4 to 9 in the other: 80 wins, 80 losses, all ties when merged
    got = verdict(items, ask(lover_of_the_first)(items))
    assert got == Verdict(
        items={"win": 80, "tie": 0, "lose": 80},
        merged={"win": 0, "tie": 80, "lose": 0},
        malformed=0,
        win_rate=0.5,
        first_share=1.0,
        ratio=100.0,
    )


def test_an_honest_judge_agrees_with_itself(items: list[Item]) -> None:
    # ours good: the 40 odd; baseline: the 20 multiples of 4 and the 12 of 5 that are not of 4,
    # of which 8 are odd (5, 15, .., 75). Win: 40 - 8 = 32. Lose: 20 + 4 = 24. Tie: 80 - 56 = 24.
    # Marks: ours 40 * 8 + 40 * 5 = 520, baseline 32 * 8 + 48 * 5 = 496.
    got = verdict(items, ask(honest)(items))
    assert got.items == {"win": 64, "tie": 48, "lose": 48}
    assert got.merged == {"win": 32, "tie": 24, "lose": 24}
    assert (got.win_rate, got.first_share) == ((64 + 24) / 160, 0.5)
    assert got.ratio == pytest.approx(100 * 520 / 496)
    # V2's way: one order alone gives the same ratio, and questions for items
    one_order = [item for item in items if not item["swapped"]]
    single = verdict(one_order, ask(honest)(one_order))
    assert single.items == single.merged == got.merged
    assert single.ratio == pytest.approx(got.ratio)


def test_reviews_that_cannot_be_read_are_counted_apart(items: list[Item]) -> None:
    # question 1 (a win) loses one review, question 2 (a tie: neither is good) both
    reviews = ask(honest)(items)
    reviews[0], reviews[2], reviews[3] = "Both are fine.", "8", ""
    got = verdict(items, reviews)
    assert (got.items, got.malformed) == ({"win": 63, "tie": 46, "lose": 48}, 3)
    assert got.merged == {"win": 31, "tie": 23, "lose": 24}
    assert score(items[0], reviews[0]) == {"malformed": 1.0}
    with pytest.raises(ValueError, match="none of 160 reviews begins with two marks"):
        verdict(items, ["?"] * 160)


def test_scores_go_through_the_runner(items: list[Item]) -> None:
    got = evaluate(items, ask(honest), score)
    assert got.scores["win"] == 64 / 160
    assert got.scores["malformed"] == 0
    assert got.item_scores[1] == {
        "win": 1, "tie": 0, "lose": 0, "first_wins": 0, "marks": 8, "baseline_marks": 5,
        "malformed": 0,
    }  # fmt: skip
    assert aggregate(items, got.predictions) == pytest.approx({
        "items_win": 64, "items_tie": 48, "items_lose": 48, "merged_win": 32, "merged_tie": 24,
        "merged_lose": 24, "malformed": 0, "win_rate": 0.55, "first_share": 0.5,
        "ratio": 100 * 520 / 496,
    })  # fmt: skip
    assert "first_share" not in aggregate(items, ["5 5"] * 160)
    assert "ratio" not in aggregate(items, ["0 0"] * 160)


@pytest.mark.parametrize(
    ("review", "marks"),
    [
        ("8 9\nReasons 3 4", (8, 9)),
        ("8.5, 7\n", (8.5, 7)),
        ("8,7", (8, 7)),
        ("(8, 9)\nwhy", (8, 9)),
        ("[ 8 9 ]", (8, 9)),
        ("\n 8 9 \r\nwhy", (8, 9)),
        ("8 9 10", None),
        ("8", None),
        ("89", None),
        ("Assistant 1: 8, 9", None),
        ("8/10 9/10", None),
        ("(8, 9", None),
        ("nan inf", None),
        ("", None),
    ],
)
def test_marks(review: str, marks: tuple[float, float] | None) -> None:
    assert marks_of(review) == marks


def test_three_prompts_by_category() -> None:
    texts = {category: prompt("Q?", category, "A", "B") for category in CATEGORIES}
    assert len(set(texts.values())) == 3
    assert "program" in texts["coding"]
    assert "Solve" in texts["math"]
    for text in texts.values():
        assert "[Question]\nQ?\n" in text
        assert text.index("[Assistant 1]\nA\n") < text.index("[Assistant 2]\nB\n")
        assert "two numbers" in text


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    questions = lines(tmp_path / "q.jsonl", [*question_rows()[:4], {"question_id": 9}])
    own = answer_rows("ours", bool)[:3]
    other = answer_rows("base", bool)[:4]
    other[1]["text"] = None
    del other[0]["answer_id"]
    a, b = lines(tmp_path / "a.jsonl", [*own, own[0]]), lines(tmp_path / "b.jsonl", other)
    found, problems = load(questions, a, b)
    assert [item["id"] for item in found] == ["3-1", "3-2"]
    assert [*map(str, problems)] == [
        f"{questions}: line 5: text is missing",
        f"{a}: line 4: question_id 1 occurs before",
        f"{b}: line 1: answer_id is missing",
        f"{b}: line 2: text must be a string, got null",
        f"{questions}: question 0: question_id 1 has no usable answer in {b}",
        f"{questions}: question 1: question_id 2 has no usable answer in {b}",
        f"{questions}: question 3: question_id 4 has no usable answer in {a}",
    ]
    assert load_questions(questions)[0][0] == {
        "id": "1", "question": "Question 1?", "image": None, "category": "generic",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"q2\.jsonl: nothing in it can be used: \S+: line 1"):
        load_questions(lines(tmp_path / "q2.jsonl", [3]))


def test_reviews_are_written_and_read_as_json_lines(tmp_path: Path, items: list[Item]) -> None:
    few, path = items[:4], tmp_path / "review.jsonl"
    reviews = ["8 9\nso", "(7, 9)", "unclear", "1 2"]
    write(path, few, reviews, reviewer="scripted")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {
        "review_id": "1-2", "question_id": 1, "answer1_id": "base1", "answer2_id": "ours1",
        "text": "(7, 9)", "score": [7, 9], "reviewer_id": "scripted",
        "metadata": {"swapped": True, "models": ["base", "ours"]},
    }  # fmt: skip
    assert rows[2]["score"] == [-1, -1]
    assert load_reviews(path, few) == (few, reviews, [])
    lines(path, [rows[3], rows[3], {**rows[0], "question_id": 7}, {**rows[1], "text": 1}])
    found, texts, problems = load_reviews(path, few)
    assert (found, texts) == ([few[3]], ["1 2"])
    assert [*map(str, problems)] == [
        f"{path}: line 2: review of question 2 in this order occurs before",
        f"{path}: line 3: review of question 7 in this order is none of the items",
        f"{path}: line 4: text must be a string, got a number",
        f"{path}: item 0: item 1-1 has no usable review",
        f"{path}: item 1: item 1-2 has no usable review",
        f"{path}: item 2: item 2-1 has no usable review",
    ]


def test_reviews_of_answers_with_one_id_are_refused(tmp_path: Path) -> None:
    """Which answer a review saw first would be a guess."""
    files = [lines(tmp_path / "question.jsonl", question_rows())]
    for name, good in (("a", True), ("b", False)):
        rows = answer_rows("same", lambda i, good=good: good)
        files.append(lines(tmp_path / f"{name}.jsonl", rows))
    items, _ = load(*files)
    path = tmp_path / "review.jsonl"
    write(path, items, ask(honest)(items))
    message = r"review\.jsonl: the answers to question 1 must have different ids .* 'same1' twice"
    with pytest.raises(ValueError, match=message):
        load_reviews(path, items)
