"""Tags as spans, and how spans are scored: precision, recall and F1 over all of them together.

A tag is O, B-TYPE or I-TYPE. As conlleval reads them, and seqeval where it is given no scheme, a
span begins at B, at I after O and where the type changes; IOB2 read strictly knows spans that
begin with B alone. P = right / found, R = right / wanted, F1 = 2PR / (P + R), 0 where undefined.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
_TAG = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True, order=True)
class Span:
    """Words of one sentence, from `start` to before `end`, of a type."""

    start: int
    end: int
    type: str


def against_tag(tag: str) -> str | None:
    """Why a text is no tag, or None."""
    return None if _TAG.fullmatch(tag) else f"tag must be O, B-TYPE or I-TYPE, got {tag!r}"


def spans_of(tags: Sequence[str], *, strict: bool = False) -> list[Span]:
    """The spans of one sentence's tags, in order.

    Args:
        tags: O, B-TYPE or I-TYPE.
        strict: as IOB2 is defined: an I without a span of its type before it is in none.

    Raises:
        ValueError: a tag is none.
    """
    spans: list[Span] = []
    begun: tuple[int, str] | None = None
    for place, tag in enumerate([*tags, OUTSIDE]):
        reason = against_tag(tag)
        if reason is not None:
            raise ValueError(f"tags {place}: {reason}")
        kind = tag[2:]
        if begun is not None and (not tag.startswith("I") or kind != begun[1]):
            spans.append(Span(begun[0], place, begun[1]))
            begun = None
        if begun is None and (tag.startswith("B") or (tag.startswith("I") and not strict)):
            begun = place, kind
    return spans


def tags_of(spans: Iterable[Span], length: int) -> list[str]:
    """IOB2 tags of spans, none of which overlaps another.

    Args:
        spans: in any order.
        length: words of the sentence.

    Raises:
        ValueError: spans overlap or do not lie in the sentence.
    """
    tags = [OUTSIDE] * length
    end = 0
    for span in sorted(spans):
        if not end <= span.start < span.end <= length:
            raise ValueError(
                f"spans must lie in {length} words and not overlap, got {span.type} from "
                f"{span.start} to {span.end} behind one that ends at {end}"
            )
        end = span.end
        tags[span.start : end] = [f"B-{span.type}"] + [f"I-{span.type}"] * (end - span.start - 1)
    return tags


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same spans in IOB2: B begins each, whether the tags were IOB1 or IOB2."""
    return tags_of(spans_of(tags), len(tags))


def span_scores(
    wanted: Sequence[Sequence[str]],
    found: Sequence[Sequence[str]],
    *,
    strict: bool = False,
    without: Collection[str] = (),
) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of sentences' tags, and each type's F1, in per cent.

    Args:
        wanted: the right tags of every sentence.
        found: those predicted.
        strict: both are read as `spans_of` has it.
        without: types that do not count.

    Returns:
        precision, recall, f1, and "TYPE f1" for every type that occurs, in order of the types.

    Raises:
        ValueError: a sentence has not as many tags of the one as of the other.
    """
    right: dict[str, int] = {}
    there: dict[str, int] = {}
    claimed: dict[str, int] = {}
    for place, (truth, guess) in enumerate(zip(wanted, found, strict=True)):
        if len(truth) != len(guess):
            raise ValueError(
                f"tags of sentence {place} must be one for each of {len(truth)} words, "
                f"got {len(guess)}"
            )
        true, guessed = ({*spans_of(tags, strict=strict)} for tags in (truth, guess))
        for counts, spans in ((there, true), (claimed, guessed), (right, true & guessed)):
            for span in spans:
                if span.type not in without:
                    counts[span.type] = counts.get(span.type, 0) + 1
    totals = [sum(counts.values()) for counts in (right, claimed, there)]
    precision, recall, f1 = _ratios(*totals)
    scores = {"precision": precision, "recall": recall, "f1": f1}
    for kind in sorted({*there, *claimed}):
        counts = (right.get(kind, 0), claimed.get(kind, 0), there.get(kind, 0))
        scores[f"{kind} f1"] = _ratios(*counts)[2]
    return scores


def _ratios(right: int, claimed: int, there: int) -> tuple[float, float, float]:
    precision = 100 * right / claimed if claimed else 0.0
    recall = 100 * right / there if there else 0.0
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0
