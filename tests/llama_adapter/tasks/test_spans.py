"""Tags as spans and their scores: seqeval's, in both of its modes, on random and malformed tags."""

import random
import warnings

import pytest

from llama_adapter.tasks.spans import Span, span_scores, spans_of, tags_of, to_iob2

TYPES = ("LOC", "PER", "C-A1")
TAGS = ["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in TYPES)]


def random_tags(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(TAGS) for _ in range(length)]


@pytest.mark.parametrize(
    ("tags", "spans", "strict"),
    [
        ("O B-X I-X O", [(1, 3, "X")], [(1, 3, "X")]),
        ("B-X B-X I-X", [(0, 1, "X"), (1, 3, "X")], [(0, 1, "X"), (1, 3, "X")]),
        ("O I-X I-X", [(1, 3, "X")], []),
        ("B-X I-Y I-Y", [(0, 1, "X"), (1, 3, "Y")], [(0, 1, "X")]),
        ("I-X B-X", [(0, 1, "X"), (1, 2, "X")], [(1, 2, "X")]),
        ("B-X O I-X", [(0, 1, "X"), (2, 3, "X")], [(0, 1, "X")]),
        ("", [], []),
    ],
)
def test_spans_by_hand(tags: str, spans: list, strict: list) -> None:
    assert spans_of(tags.split()) == [Span(*span) for span in spans]
    assert spans_of(tags.split(), strict=True) == [Span(*span) for span in strict]


def test_scores_equal_seqeval() -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme")
    rng = random.Random(6)
    for _ in range(300):
        wanted = [random_tags(rng, rng.randint(1, 12)) for _ in range(rng.randint(1, 5))]
        found = [[tag if rng.random() < 0.7 else rng.choice(TAGS) for tag in row] for row in wanted]
        for strict in (False, True):
            mode = {"mode": "strict", "scheme": scheme.IOB2} if strict else {}
            ours = span_scores(wanted, found, strict=strict)
            with warnings.catch_warnings():
                # of scores that are 0 for want of spans
                warnings.simplefilter("ignore")
                for name in ("precision", "recall", "f1"):
                    theirs = getattr(metrics, f"{name}_score")(wanted, found, **mode)
                    assert ours[name] == pytest.approx(100 * theirs, abs=1e-9)
                report = metrics.classification_report(wanted, found, output_dict=True, **mode)
            by_type = {name: row["f1-score"] for name, row in report.items() if "avg" not in name}
            assert {f"{name} f1" for name in by_type} == {*ours} - {"precision", "recall", "f1"}
            for name, value in by_type.items():
                assert ours[f"{name} f1"] == pytest.approx(100 * value, abs=1e-9)


def test_scores_by_hand() -> None:
    """Of three spans two are found, one of them with a wrong type and one beside the mark."""
    wanted = [["B-LOC", "I-LOC", "O", "B-PER"], ["B-LOC", "O"]]
    found = [["B-LOC", "I-LOC", "O", "B-LOC"], ["O", "B-LOC"]]
    scores = span_scores(wanted, found)
    assert scores == {
        "precision": pytest.approx(100 / 3),
        "recall": pytest.approx(100 / 3),
        "f1": pytest.approx(100 / 3),
        "LOC f1": pytest.approx(40.0),
        "PER f1": 0.0,
    }
    without = span_scores(wanted, found, without=("PER",))
    assert without == {
        "precision": pytest.approx(100 / 3),
        "recall": 50.0,
        "f1": pytest.approx(40.0),
        "LOC f1": pytest.approx(40.0),
    }


def test_no_spans_at_all() -> None:
    assert span_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_iob2_has_the_same_spans() -> None:
    rng = random.Random(7)
    for _ in range(200):
        tags = random_tags(rng, rng.randint(0, 10))
        converted = to_iob2(tags)
        assert spans_of(converted) == spans_of(converted, strict=True) == spans_of(tags)
        assert to_iob2(converted) == converted
        assert tags_of(rng.sample(spans_of(tags), len(spans_of(tags))), len(tags)) == converted


def test_iob1_by_hand() -> None:
    """CoNLL03: B only where a span follows one of its own type."""
    iob1 = ["I-LOC", "I-LOC", "B-LOC", "O", "I-PER", "I-ORG"]
    assert to_iob2(iob1) == ["B-LOC", "I-LOC", "B-LOC", "O", "B-PER", "B-ORG"]


def test_what_is_no_tag_and_no_span() -> None:
    with pytest.raises(ValueError, match="tags 1: tag must be O, B-TYPE or I-TYPE, got 'S-LOC'"):
        spans_of(["O", "S-LOC"])
    with pytest.raises(ValueError, match="got 'B-'"):
        spans_of(["B-"])
    for spans in ([Span(0, 2, "X"), Span(1, 3, "Y")], [Span(2, 4, "X")], [Span(1, 1, "X")]):
        with pytest.raises(ValueError, match="spans must lie in 3 words and not overlap, got"):
            tags_of(spans, 3)
    with pytest.raises(ValueError, match="tags of sentence 0 must be one for each of 2 words, got"):
        span_scores([["O", "O"]], [["O"]])
