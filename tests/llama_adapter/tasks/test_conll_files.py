"""CoNLL03's columns and both forms of CoNLL04's entities; what conlleval is given."""

import json
from pathlib import Path

import pytest

from llama_adapter.tasks.conll_files import (
    Sentence,
    read_columns,
    read_conll03,
    read_conll04,
    write_conlleval,
)

CONLL03 = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
Ana NNP B-NP B-PER
Paris NNP I-NP I-LOC

-DOCSTART- -X- -X- O

1996 CD I-NP O
"""


def test_conll03(tmp_path: Path) -> None:
    """IOB1 becomes IOB2: B where a span follows another, and where one begins."""
    path = tmp_path / "eng.train"
    path.write_text(CONLL03, encoding="utf-8")
    sentences, problems = read_conll03(path)
    assert not problems
    assert sentences == [
        Sentence(("EU", "rejects", "German", "call"), ("B-ORG", "O", "B-MISC", "O"), str(path), 3),
        Sentence(
            ("Peter", "Blackburn", "Ana", "Paris"),
            ("B-PER", "I-PER", "B-PER", "B-LOC"),
            str(path),
            8,
        ),
        Sentence(("1996",), ("O",), str(path), 15),
    ]


def test_a_document_parts_sentences_without_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\tX\tX\tO\r\n-DOCSTART- -X- O O\r\ntwo X X O\r\n \t\r\n\r\nthree X X O")
    sentences, _ = read_conll03(path)
    assert [one.words for one in sentences] == [("one",), ("two",), ("three",)]
    assert [one.at for one in sentences] == [1, 3, 6]


def test_words_may_hold_other_blanks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("10\u00a0000 X X O\n", encoding="utf-8")
    assert read_conll03(path)[0][0].words == ("10\u00a0000",)


def test_sentences_that_are_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "a X X O\nb X O\n\nc X X O\n\nd X X LOC\ne X X\n\nf X X E-LOC\n", encoding="utf-8"
    )
    sentences, problems = read_conll03(path)
    assert [one.words for one in sentences] == [("c",)]
    assert [*map(str, problems)] == [
        f"{path}: line 2: must have 4 columns, got 3",
        f"{path}: line 6: tag must be O, B-TYPE or I-TYPE, got 'LOC'",
        f"{path}: line 9: tag must be O, B-TYPE or I-TYPE, got 'E-LOC'",
    ]
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="nothing in it can be used: it is empty"):
        read_conll03(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_conll03(tmp_path / "absent")


def test_conll04_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("Ana x B-Peop\nRuiz x I-Peop\nwrote y O\n\nBilbao B-Loc\n\nO\n", "utf-8")
    sentences, problems = read_conll04(path)
    assert [(one.words, one.tags) for one in sentences] == [
        (("Ana", "Ruiz", "wrote"), ("B-Peop", "I-Peop", "O")),
        (("Bilbao",), ("B-Loc",)),
    ]
    assert [problem.reason for problem in problems] == ["must have 2 columns, got 1"]
    assert read_columns(path, columns=3)[0] == sentences[:1]


def entry(*entities: object, tokens: object = ("Ana", "Ruiz", "of", "Bilbao")) -> dict:
    return {"tokens": tokens, "entities": [*entities], "relations": [], "orig_id": 3}


def test_conll04_list(tmp_path: Path) -> None:
    path = tmp_path / "conll04_train.json"
    loc = {"type": "Loc", "start": 3, "end": 4}
    person = {"type": "Peop", "start": 0, "end": 2}
    rows = [
        entry(loc, person),
        entry(),
        entry(loc | {"end": 5}),
        entry(person, person | {"start": 1, "end": 3}),
        entry({"type": "Loc", "start": 1}),
        entry(tokens=["New York"]),
        entry(tokens=[]),
        {"tokens": ["x"]},
        entry(7),
        entry({"type": "New type", "start": 0, "end": 2}),
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    sentences, problems = read_conll04(path)
    words = ("Ana", "Ruiz", "of", "Bilbao")
    assert sentences == [
        Sentence(words, ("B-Peop", "I-Peop", "O", "B-Loc"), str(path), 0),
        Sentence(words, ("O",) * 4, str(path), 1),
    ]
    overlap = "spans must lie in 4 words and not overlap, got"
    # fields are looked at first
    assert sorted(map(str, problems)) == [
        f"{path}: entry 2: {overlap} Loc from 3 to 5 behind one that ends at 0",
        f"{path}: entry 3: {overlap} Peop from 1 to 3 behind one that ends at 2",
        f"{path}: entry 4: entities 0: end is missing",
        f"{path}: entry 5: tokens 0: must be a word, got 'New York'",
        f"{path}: entry 6: tokens is empty",
        f"{path}: entry 7: entities is missing",
        f"{path}: entry 8: entities 0: must be an object, got a number",
        f"{path}: entry 9: entities 0: type must be one word, got 'New type'",
    ]


def test_predictions_are_those_that_conlleval_takes(tmp_path: Path) -> None:
    path = tmp_path / "found.txt"
    sentences = [
        Sentence(("Ana", "Ruiz"), ("B-PER", "I-PER"), "a", 1),
        Sentence(("né",), ("O",), "a", 4),
    ]
    write_conlleval(path, sentences, [["B-PER", "O"], ["B-LOC"]])
    assert path.read_text("utf-8") == "Ana B-PER B-PER\nRuiz I-PER O\n\nné O B-LOC\n\n"
    found, _ = read_columns(path, columns=3)
    assert [one.tags for one in found] == [("B-PER", "O"), ("B-LOC",)]
    with pytest.raises(ValueError, match="zip"):
        write_conlleval(path, sentences, [["O", "O"], []])
