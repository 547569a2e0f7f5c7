"""Semantic roles: lines with |||, CoNLL05's pairs of files, CoNLL12's columns; all made up."""

import random
from pathlib import Path

import pytest

from llama_adapter.tasks.spans import Span, spans_of, tags_of
from llama_adapter.tasks.srl_files import read_gold_conll, read_props, read_role_lines, read_roles

WORDS = """Ana
built
and
sold
boats
.

Rain
.

Boats
float
"""
PROPS = """-      (A0*)  (A0*)
build  (V*)   *
-      *      *
sell   *      (V*)
-      (A1*   (A1*)
-      *)     *

-
-

-      (A1*)
float  (V*)
"""
GOLD = """#begin document (made/up/0001); part 000
made/up/0001 0 0 She PRP (TOP(S(NP*) - - - Ana * (ARG0*) (ARG0*) (1)
made/up/0001 0 1 set VBD (VP* set 01 1 Ana * (V* * -
made/up/0001 0 2 up RP *) - - - Ana * *) * -
made/up/0001 0 3 and CC * - - - Ana * * * -
made/up/0001 0 4 sold VBD (VP* sell 01 1 Ana * * (V*) -
made/up/0001 0 5 red JJ (NP* - - - Ana * (ARG1* (ARG1* (2
made/up/0001 0 6 boats NNS *))) - - - Ana * *) *) 2)

made/up/0001 0 0 Rain NN (TOP*) - - - Ana * -

#end document
"""


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(
        "1 Ana built 3\u00a0boats . |||\tB-A0 B-V B-A1 O\n3 Ana built and sold ||| B-A0 O O B-V\n",
        "utf-8",
    )
    sentences, problems = read_roles(path)
    assert not problems
    assert sentences[0].words == ("Ana", "built", "3\u00a0boats", ".")
    assert sentences[0].tags == ("B-A0", "B-V", "B-A1", "O")
    assert [(one.predicate, one.at) for one in sentences] == [(1, 1), (3, 2)]


def test_malformed_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    lines = [
        "0 a b ||| B-V O",
        "0 a b ||| B-V",
        "2 a b ||| B-V O",
        "-1 a b ||| B-V O",
        "0 a b B-V O",
        "0 a b ||| V O",
        "x a b ||| B-V O",
        "0 a ||| b ||| B-V O",
        "||| B-V O",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    sentences, problems = read_role_lines(path)
    assert len(sentences) == 1
    index = "index must be that of one of 2 words, from 0, got"
    assert [*map(str, problems)] == [
        f"{path}: line 2: must have a tag for each of 2 words, got 1",
        f"{path}: line 3: {index} '2'",
        f"{path}: line 4: {index} '-1'",
        f"{path}: line 5: must be `index words ||| tags`, got 0 |||",
        f"{path}: line 6: tag must be O, B-TYPE or I-TYPE, got 'V'",
        f"{path}: line 7: {index} 'x'",
        f"{path}: line 8: must be `index words ||| tags`, got 2 |||",
        f"{path}: line 9: must be `index words ||| tags`, got 1 |||",
    ]


def test_conll05(tmp_path: Path) -> None:
    """A sentence with two predicates is there twice, one without any not at all."""
    words, props = tmp_path / "train.words", tmp_path / "train.props"
    words.write_text(WORDS, "utf-8")
    props.write_text(PROPS, "utf-8")
    sentences, problems = read_roles(words)
    assert not problems
    first = ("Ana", "built", "and", "sold", "boats", ".")
    assert [(one.words, one.predicate, one.at) for one in sentences] == [
        (first, 1, 1),
        (first, 3, 1),
        (("Boats", "float"), 1, 11),
    ]
    assert [one.tags for one in sentences] == [
        ("B-A0", "B-V", "O", "O", "B-A1", "I-A1"),
        ("B-A0", "O", "O", "B-V", "B-A1", "O"),
        ("B-A1", "B-V"),
    ]


def test_malformed_brackets(tmp_path: Path) -> None:
    words, props = tmp_path / "train.words", tmp_path / "train.props"
    words.write_text(WORDS, "utf-8")
    for old, new, line, reason in (
        ("(A0*)  (A0*)", "(A0*   (A0*)", 2, "column 2: opens V within A0"),
        ("(A0*)  (A0*)", "(A0*)   *)", 1, "column 3: closes what was not opened"),
        ("(A0*)  (A0*)", "(A0*)   A0", 1, "column 3: must be *, (ROLE*, *) or (ROLE*), got 'A0'"),
        ("(A0*)  (A0*)", "(A0*)", 1, "must have 3 columns, got 2"),
        ("(A1*   (A1*)", "(A1*   (A1*", 6, "column 3: A1 is not closed"),
        ("\n-\n-\n", "\n-\n", 8, f"must have 2 lines, as line 8 of {words} begins, got 1"),
    ):
        assert old in PROPS
        props.write_text(PROPS.replace(old, new), "utf-8")
        sentences, problems = read_props(words, props)
        assert [*map(str, problems)] == [f"{props}: line {line}: {reason}"]
        assert sentences[-1].words == ("Boats", "float")
    props.write_text(PROPS.split("\n\n")[0], "utf-8")
    with pytest.raises(ValueError, match=r"props: must hold 3 sentences, as .*words does, got 1"):
        read_props(words, props)


def test_brackets_of_random_roles_are_read_back(tmp_path: Path) -> None:
    rng = random.Random(8)
    words, props = tmp_path / "a.words", tmp_path / "a.props"
    wanted, texts, columns = [], [], []
    for _ in range(60):
        length = rng.randint(1, 9)
        tags = [rng.choice(["O", "B-A0", "I-A0", "B-AM-TMP", "I-V"]) for _ in range(length)]
        spans = spans_of(tags)
        verb = rng.randrange(length)
        cells = ["*"] * length
        for span in spans:
            cells[span.start] = f"({span.type}{cells[span.start]}"
            cells[span.end - 1] += ")"
        wanted.append((verb, tuple(tags_of(spans, length))))
        texts += [*(f"w{place}" for place in range(length)), ""]
        lemmas = ["-"] * length
        lemmas[verb] = "be"
        columns += [*map(" ".join, zip(lemmas, cells, strict=True)), ""]
    words.write_text("\n".join(texts), "utf-8")
    props.write_text("\n".join(columns), "utf-8")
    sentences, problems = read_roles(words)
    assert not problems
    assert [(one.predicate, one.tags) for one in sentences] == wanted


def test_conll12(tmp_path: Path) -> None:
    path = tmp_path / "made.v4_gold_conll"
    path.write_text(GOLD, "utf-8")
    sentences, problems = read_roles(path)
    assert not problems
    assert {one.words for one in sentences} == {("She", "set", "up", "and", "sold", "red", "boats")}
    assert [one.predicate for one in sentences] == [1, 4]
    assert spans_of(sentences[0].tags) == [Span(0, 1, "ARG0"), Span(1, 3, "V"), Span(5, 7, "ARG1")]
    assert spans_of(sentences[1].tags) == [Span(0, 1, "ARG0"), Span(4, 5, "V"), Span(5, 7, "ARG1")]
    assert sentences[0].at == 2


def test_malformed_conll12(tmp_path: Path) -> None:
    path = tmp_path / "made_gold_conll"
    path.write_text(GOLD.replace("* * (V*) -", "* * * -"), "utf-8")
    sentences, problems = read_gold_conll(path)
    assert [one.predicate for one in sentences] == [1]
    assert [*map(str, problems)] == [f"{path}: line 2: column 13 must have a role V, got none"]
    path.write_text(GOLD + GOLD.replace("Ana * * * -", "Ana * * -"), "utf-8")
    sentences, problems = read_gold_conll(path)
    assert len(sentences) == 2
    assert [*map(str, problems)] == [f"{path}: line 17: must have 14 columns, got 13"]
