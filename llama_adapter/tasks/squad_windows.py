"""Questions as a host of transformers takes them: overlapping windows over the context.

A window is the whole question and a stretch of the context, at most max_length tokens; the next
one begins so that they share `stride` tokens of the context.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter.tasks.squad_files import Question
from llama_adapter.tasks.text_batches import batches

# questions that the tokenizer is given at once
_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Window:
    """Some of a question's tokens, with its answer among them.

    Attributes:
        inputs: "input_ids" and what else the tokenizer gives one of per token, (T,) each.
        start: the token that the answer begins with; that of CLS where it is not in the window.
        end: the token that the answer ends with, included; likewise.
    """

    inputs: dict[str, Tensor]
    start: int
    end: int


@dataclass(frozen=True)
class Windowing:
    """How questions are cut into windows.

    Attributes:
        tokenizer: one of transformers' fast ones.
        max_length: tokens of a window, special ones included.
        stride: tokens of the context that neighbouring windows share.
    """

    tokenizer: Any
    max_length: int = 384
    stride: int = 128

    def __post_init__(self) -> None:
        """Check that a window goes on where the one before it ended.

        Raises:
            ValueError: it does not, or is longer than the tokenizer's model takes.
        """
        if self.max_length > self.tokenizer.model_max_length:
            raise ValueError(
                f"max_length must be at most {self.tokenizer.model_max_length}, as the tokenizer "
                f"says of its model, got {self.max_length}"
            )
        if self.stride < 0 or self._for_questions() < 1:
            special = self.tokenizer.num_special_tokens_to_add(pair=True)
            raise ValueError(
                "stride must be at least 0 and leave tokens of max_length for the question and for "
                f"more of the context, got {self.stride} of {self.max_length}, {special} of which "
                "are special tokens"
            )

    def _for_questions(self) -> int:
        """How many tokens of a question leave a window one of the context more than stride."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        return self.max_length - special - self.stride - 1

    def encoded(self, questions: Sequence[Question]) -> Iterator[tuple[Question, list[Any]]]:
        """Every question with the tokenizer's encodings of its windows, in order."""
        for some in batches(questions, _AT_ONCE):
            # blanks before a question take the place of the context and mean nothing
            asked = self._shortened([question.question.lstrip() for question in some])
            found = self.tokenizer(
                asked,
                [question.context for question in some],
                truncation="only_second",
                max_length=self.max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )
            windows: list[list[Any]] = [[] for _ in some]
            for owner, encoding in zip(
                found["overflow_to_sample_mapping"], found.encodings, strict=True
            ):
                windows[owner].append(encoding)
            yield from zip(some, windows, strict=True)

    def _shortened(self, asked: Sequence[str]) -> list[str]:
        """Questions without the ends that would leave no room for the context."""
        most = self._for_questions()
        kept = []
        for text, offsets in zip(asked, self._offsets(asked), strict=True):
            shorter, tokens = text, min(most, len(offsets))
            # what is left of a word that was cut may be more tokens than it was before
            while len(offsets) > most and tokens and len(self._offsets([shorter])[0]) > most:
                shorter = text[: offsets[tokens - 1][1]]
                tokens -= 1
            kept.append(shorter)
        return kept

    def _offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        found = self.tokenizer([*texts], add_special_tokens=False, return_offsets_mapping=True)
        return found["offset_mapping"]

    def inputs(self, encoding: Any) -> dict[str, list[int]]:
        """What the host takes of an encoding: ids, and types where its tokenizer has them."""
        found = {"input_ids": encoding.ids}
        if "token_type_ids" in self.tokenizer.model_input_names:
            found["token_type_ids"] = encoding.type_ids
        return found

    def cls_of(self, encoding: Any) -> int:
        """The token that stands for no answer: CLS, the first one where the tokenizer has none."""
        token = self.tokenizer.cls_token_id
        return encoding.ids.index(token) if token in encoding.ids else 0

    def training(self, questions: Sequence[Question]) -> list[Window]:
        """All windows of questions, each with the first right answer where it is in it."""
        windows = []
        for question, encodings in self.encoded(questions):
            for encoding in encodings:
                span = None
                if question.answers:
                    first = question.starts[0]
                    span = tokens_of(encoding, first, first + len(question.answers[0]))
                cls = self.cls_of(encoding)
                start, end = (cls, cls) if span is None else span
                inputs = {
                    name: torch.tensor(values, dtype=torch.int32)
                    for name, values in self.inputs(encoding).items()
                }
                windows.append(Window(inputs, start, end))
        return windows


def context_of(encoding: Any) -> range:
    """The tokens of an encoding that are of the context: they stand together."""
    ids = encoding.sequence_ids
    places = [place for place, sequence in enumerate(ids) if sequence == 1]
    return range(places[0], places[-1] + 1) if places else range(0)


def tokens_of(encoding: Any, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of a stretch of the context.

    Args:
        encoding: a window.
        start: the stretch's first character in the context.
        end: the character behind its last one.

    Returns:
        Both tokens' places in the window, or None where the window does not hold all of it.
    """
    context, offsets = context_of(encoding), encoding.offsets
    if not context or offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return None
    # bytes of one character are tokens with the same offsets, so the first one that goes beyond
    # the stretch's start begins it, and the last one before its end ends it
    first = context[bisect_left(context, start + 1, key=lambda place: offsets[place][1])]
    last = context[bisect_left(context, end, key=lambda place: offsets[place][0]) - 1]
    return (first, last) if first <= last else None
