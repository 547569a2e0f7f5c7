"""Logits become answers: against every span looked at one by one, and by hand."""

import random
from typing import Any

import pytest
import torch

from llama_adapter.tasks.squad_answers import NO_SPAN, Answering, answer
from llama_adapter.tasks.squad_files import Question
from llama_adapter.tasks.squad_windows import Windowing
from tests.llama_adapter.tasks.text_hosts import word_tokenizer

WORDS = [f"w{number}" for number in range(20, 50)]
QUESTION = Question("q", "w1 w2", " ".join(WORDS), (), ())


def windows(max_length: int = 16, stride: int = 4) -> list[Any]:
    [(_, encodings)] = Windowing(word_tokenizer(), max_length, stride).encoded([QUESTION])
    return encodings


def logits(encodings: list[Any], values: dict[tuple[int, int], float]) -> list[torch.Tensor]:
    """Logits of each window: -5 but for some tokens of some windows."""
    found = [torch.full((len(encoding.ids),), -5.0) for encoding in encodings]
    for (window, token), value in values.items():
        found[window][token] = value
    return found


def test_against_every_span() -> None:
    rng = random.Random(5)
    encodings = windows()
    assert len(encodings) > 3
    for trial in range(150):
        generator = torch.Generator().manual_seed(trial)
        starts, ends = (
            [torch.randn(len(one.ids), generator=generator) for one in encodings] for _ in "se"
        )
        how = Answering(True, rng.randint(1, 20), rng.randint(1, 8), rng.uniform(-3, 3))
        best, text = float("-inf"), ""
        for encoding, start, end in zip(encodings, starts, ends, strict=True):
            among = [
                {*sorted(range(len(row)), key=lambda place, row=row: -row[place])[: how.n_best]}
                for row in (start.tolist(), end.tolist())
            ]
            tokens = encoding.tokens
            for first in range(len(tokens)):
                for last in range(first, min(first + how.max_answer, len(tokens))):
                    outside = encoding.sequence_ids[first : last + 1] != [1] * (last - first + 1)
                    if outside or first not in among[0] or last not in among[1]:
                        continue
                    score = float(start[first] + end[last])
                    if score > best:
                        best, text = score, " ".join(tokens[first : last + 1])
        null = min(float(s[0] + e[0]) for s, e in zip(starts, ends, strict=True))
        found = answer(QUESTION, encodings, starts, ends, [0] * len(encodings), how)
        assert found["span"] == text
        if text:
            assert found["null_odds"] == pytest.approx(null - best, abs=1e-5)
            assert found["text"] == ("" if null - best > how.threshold else text)
        once = Answering(False, how.n_best, how.max_answer)
        found = answer(QUESTION, encodings, starts, ends, [0] * len(encodings), once)
        assert found == {"text": text or NO_SPAN}


def test_the_best_window_answers() -> None:
    encodings = windows()
    starts = logits(encodings, {(0, 5): 2.0, (1, 7): 3.0})
    ends = logits(encodings, {(0, 6): 2.0, (1, 8): 1.5})
    found = answer(QUESTION, encodings, starts, ends, [0] * len(encodings), Answering())
    assert found == {"text": " ".join(encodings[1].tokens[7:9])}


def test_no_span_that_counts() -> None:
    """The best start is in the question, or behind every end, or too far before it."""
    encodings = windows()[:1]
    for start, end in ((1, 6), (8, 5), (4, 12)):
        starts, ends = logits(encodings, {(0, start): 4.0}), logits(encodings, {(0, end): 4.0})
        one = Answering(n_best=1, max_answer=8)
        assert answer(QUESTION, encodings, starts, ends, [0], one) == {"text": "empty"}
        two = Answering(version_2=True, n_best=1, max_answer=8)
        found = answer(QUESTION, encodings, starts, ends, [0], two)
        # CLS has -10, and no span could have had less
        assert found == {"text": "", "null_odds": 0.0, "span": ""}


@pytest.mark.parametrize(
    ("threshold", "text"), [(0.0, ""), (0.4, ""), (0.6, "w20 w21"), (9.0, "w20 w21")]
)
def test_no_answer_scores_what_cls_has_in_its_least_window(threshold: float, text: str) -> None:
    encodings = windows()[:2]
    starts = logits(encodings, {(0, 4): 2.0, (0, 0): 9.0, (1, 0): 2.5})
    ends = logits(encodings, {(0, 5): 2.0, (0, 0): 9.0, (1, 0): 2.0})
    how = Answering(version_2=True, threshold=threshold)
    found = answer(QUESTION, encodings, starts, ends, [0, 0], how)
    assert found == {"text": text, "null_odds": 0.5, "span": "w20 w21"}
