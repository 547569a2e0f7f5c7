"""SQuAD's own files: what is read, what is refused and where, what SQuAD's scorers are given."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.tasks.squad_files import Question, read_squad, write_answers

CONTEXT = "The tower, 324 metres high, stands in Paris. It was built by Gustave Eiffel's firm."


def question(name: str, *answers: str, **more: Any) -> dict[str, Any]:
    found = [{"text": text, "answer_start": CONTEXT.index(text)} for text in answers]
    return {"id": name, "question": f"What about {name}?", "answers": found, **more}


def written(path: Path, *questions: Any, version: str = "1.1", **more: Any) -> Path:
    paragraph = {"context": CONTEXT, "qas": [*questions]}
    article = {"title": "Tower", "paragraphs": [paragraph]} | more
    path.write_text(json.dumps({"version": version, "data": [article]}), encoding="utf-8")
    return path


def test_version_1(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", question("1", "Paris", "in Paris"), question("2", "324"))
    found, problems = read_squad(path)
    assert not problems
    starts = CONTEXT.index("Paris"), CONTEXT.index("in Paris")
    assert found[0] == Question("1", "What about 1?", CONTEXT, ("Paris", "in Paris"), starts)
    assert [one.id for one in found] == ["1", "2"]


def test_version_2(tmp_path: Path) -> None:
    plausible = [{"text": "Paris", "answer_start": CONTEXT.index("Paris")}]
    path = written(
        tmp_path / "a.json",
        question("1", "Paris", is_impossible=False),
        question("2", is_impossible=True, plausible_answers=plausible),
        version="v2.0",
    )
    found, problems = read_squad(path)
    assert not problems
    assert [one.answers for one in found] == [("Paris",), ()]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    moved = question("2", "Paris")
    moved["answers"][0]["answer_start"] += 1
    before = question("3", "Paris")
    before["answers"][0]["answer_start"] = -3
    written(
        path,
        question("1", "Paris"),
        moved,
        before,
        question("1", "324"),
        {"id": "4", "question": "?"},
        question("5"),
        question("6", "Paris") | {"question": "  "},
        question("7", "Paris") | {"answers": ["Paris"]},
        question("8", "Paris") | {"answers": [{"text": "", "answer_start": 0}]},
        9,
    )
    found, problems = read_squad(path)
    assert [one.id for one in found] == ["1"]
    start = CONTEXT.index("Paris") + 1
    at = f"{path}: data 0 paragraphs 0 qas"
    assert sorted(map(str, problems)) == [
        f"{at} 1: answers 0: 'Paris' is not at character {start} of the context",
        f"{at} 2: answers 0: 'Paris' is not at character -3 of the context",
        f"{at} 3: id '1' occurs before",
        f"{at} 4: answers is missing",
        f"{at} 5: answers is empty, which version 2.0 alone allows",
        f"{at} 6: question is empty",
        f"{at} 7: answers 0: must be an object, got a string",
        f"{at} 8: answers 0: text is empty",
        f"{at} 9: must be an object, got a number",
    ]


def test_version_2_asks_for_answers_or_for_none(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.json",
        question("1", "Paris", is_impossible=True),
        question("2", is_impossible=False),
        question("3", is_impossible=1),
        question("4", "Paris"),
    )
    found, problems = read_squad(path)
    assert [one.id for one in found] == ["4"]
    assert [problem.reason for problem in problems] == [
        "answers must be empty where is_impossible is true, got 1",
        "answers must be there, or is_impossible, got 0",
        "is_impossible must be a boolean, got 1",
    ]
    asked, problems = read_squad(path, version_2=False)
    assert [one.id for one in asked] == ["1", "4"]
    assert len(problems) == 2


def test_articles_and_paragraphs_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = {"context": CONTEXT, "qas": [question("1", "Paris")]}
    data = [3, {"title": "x"}, {"paragraphs": [{"qas": []}, good, {"context": "", "qas": []}]}]
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    found, problems = read_squad(path)
    assert [one.id for one in found] == ["1"]
    assert [*map(str, problems)] == [
        f"{path}: data 0: must be an object, got a number",
        f"{path}: data 1: paragraphs is missing",
        f"{path}: data 2 paragraphs 0: context is missing",
        f"{path}: data 2 paragraphs 2: context is empty",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ("{}", 'must hold an object with a list "data", got null'),
        ('{"data": []}', "nothing in it can be used: it is empty"),
    ],
)
def test_files_without_questions(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_squad(path)


def test_predictions_are_those_that_squad_scores(tmp_path: Path) -> None:
    asked = [Question(name, "?", CONTEXT, (), ()) for name in ("a", "b")]
    write_answers(tmp_path, asked, [{"text": "Paris"}, {"text": "né"}])
    assert json.loads((tmp_path / "predictions.json").read_bytes()) == {"a": "Paris", "b": "né"}
    assert not (tmp_path / "null_odds.json").exists()
    odds = [{"text": "", "null_odds": 1.5, "span": "x"}, {"text": "y", "null_odds": -2.0}]
    write_answers(tmp_path, asked, odds)
    assert json.loads((tmp_path / "predictions.json").read_bytes()) == {"a": "", "b": "y"}
    assert json.loads((tmp_path / "null_odds.json").read_bytes()) == {"a": 1.5, "b": -2.0}
