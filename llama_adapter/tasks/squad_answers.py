"""From a host's logits at the tokens of windows to one answer for each question.

Of every window the spans between the n best starts and the n best ends count: in the context, not
ending before they begin, of at most so many tokens. The best of all windows of a question answers
it; in version 2.0 nothing does where CLS, in the window where it scores least, scores better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter.tasks.squad_files import Question
from llama_adapter.tasks.squad_windows import context_of

# what answers a question of version 1.1 in none of whose windows a span counts
NO_SPAN = "empty"


@dataclass(frozen=True)
class Answering:
    """Which spans count, and when none is better than not to answer.

    Attributes:
        version_2: whether a question may have no answer.
        n_best: how many starts and how many ends of each window are looked at.
        max_answer: tokens of an answer, at most.
        threshold: what the odds of no answer must exceed for there to be none.
    """

    version_2: bool = False
    n_best: int = 20
    max_answer: int = 30
    threshold: float = 0.0


def answer(
    question: Question,
    encodings: Sequence[Any],
    starts: Sequence[Tensor],
    ends: Sequence[Tensor],
    cls: Sequence[int],
    how: Answering,
) -> dict[str, Any]:
    """The answer to one question.

    Args:
        question: what was asked.
        encodings: its windows.
        starts: for each window (T,) logits of a span that begins at each token.
        ends: likewise of one that ends there.
        cls: CLS of each window.
        how: which spans count.

    Returns:
        {"text"}; for version 2.0 also "null_odds", the score of no answer less that of the best
        span, and "span", the text of that one, which is the answer where the odds are lower.
    """
    top, text, worst = float("-inf"), None, float("inf")
    null = float("inf")
    for encoding, start, end, no_answer in zip(encodings, starts, ends, cls, strict=True):
        start, end = start.detach().cpu().float(), end.detach().cpu().float()
        null = min(null, float(start[no_answer] + end[no_answer]))
        worst = min(worst, float(start.min() + end.min()))
        found = _best_span(encoding, start, end, how)
        if found is not None and found[0] > top:
            top, (first, last) = found[0], found[1]
            offsets = encoding.offsets
            text = question.context[offsets[first][0] : offsets[last][1]]
    if not how.version_2:
        return {"text": NO_SPAN if text is None else text}
    if text is None:
        # the worst that a span could have scored
        return {"text": "", "null_odds": null - worst, "span": ""}
    odds = null - top
    return {"text": "" if odds > how.threshold else text, "null_odds": odds, "span": text}


def _best_span(
    encoding: Any, start: Tensor, end: Tensor, how: Answering
) -> tuple[float, tuple[int, int]] | None:
    """The highest score of a window's spans that count, and its first and last token."""
    context = context_of(encoding)
    firsts = start.topk(min(how.n_best, len(start))).indices
    lasts = end.topk(min(how.n_best, len(end))).indices
    inside = _inside(firsts, context)[:, None] & _inside(lasts, context)[None, :]
    length = lasts[None, :] - firsts[:, None] + 1
    scores = start[firsts][:, None] + end[lasts][None, :]
    scores = scores.masked_fill(~inside | (length < 1) | (length > how.max_answer), float("-inf"))
    place = int(scores.argmax())
    first, last = divmod(place, len(lasts))
    score = float(scores[first, last])
    if not score > float("-inf"):
        return None
    return score, (int(firsts[first]), int(lasts[last]))


def _inside(places: Tensor, context: range) -> Tensor:
    return torch.logical_and(places >= context.start, places < context.stop)
