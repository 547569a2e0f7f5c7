"""What a provider must answer: greedy decoding without a cache, by another implementation.

PEFT's for one adapter, transformers' for none, PEFT's one sequence at a time for a bank; of
quantised weights our own without cache and engine, beside how far they move the logits. A token may
differ where the truth's two likeliest are closer than rounding; what follows is not compared.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.generate_problem import (
    ADAPTERS,
    PREFILL,
    TOKENS,
    Problem,
    Provider,
    adapters_of,
    prompts_of,
    sequences_of,
    their_model,
)
from benchmarks.harness import Expected

# the most that logits may be off, as a part of the largest, and that two likeliest may be apart
TOLERANCES = {"float32": (1e-3, 1e-3), "bfloat16": (5e-2, 0.25)}
# the most that quantised weights may move logits: a gate against mistakes, the row tells how far
DEVIATIONS = {"int8": 0.1, "int4": 0.5}


class Truth(NamedTuple):
    """Greedy decoding of a few sequences without a cache.

    Attributes:
        logits: (rows, V) float32, at the prompts' ends.
        tokens: (rows, TOKENS) int64.
        gaps: (rows, TOKENS) float32, of the two largest logits at each token.
    """

    logits: Tensor
    tokens: Tensor
    gaps: Tensor


@torch.inference_mode()
def greedy(last: Callable[[Tensor], Tensor], tokens: Tensor, count: int) -> Truth:
    """Decode with a function from tokens (rows, T) to the logits (rows, V) behind them."""
    chosen, gaps, first = [], [], None
    for _ in range(count):
        logits = last(tokens).float()
        first = logits if first is None else first
        top, ids = logits.topk(2)
        chosen.append(ids[:, 0])
        gaps.append(top[:, 0] - top[:, 1])
        tokens = torch.cat([tokens, ids[:, :1]], 1)
    assert first is not None
    return Truth(first, torch.stack(chosen, 1).cpu(), torch.stack(gaps, 1).cpu())


def _rows(given: Problem, kind: str) -> Tensor:
    return given.tokens[: sequences_of(kind, given.setting.batch)]


def own_truth(given: Problem, kind: str, weights: str | None, count: int) -> Truth:
    """Ours without cache and engine: what they must change nothing about."""
    rows, model = _rows(given, kind), given.models.model(weights)
    prompts = prompts_of(given, kind, weights, len(rows))
    return greedy(lambda x: model.logits(model.hidden(x, prompts)[:, -1]), rows, count)


def their_truth(given: Problem, kind: str, count: int) -> Truth:
    """transformers', or PEFT's; of a bank, one sequence after the other."""
    rows, theirs = _rows(given, kind), given.models.theirs
    last = their_model(given.models, kind).last_logits
    assert theirs is not None
    if ADAPTERS[kind] <= 1:
        return greedy(last, rows, count)
    alone = []
    for row, name in zip(rows, adapters_of(kind, len(rows)), strict=True):
        assert name is not None
        theirs.wear(given.models.adapter(name))
        alone.append(greedy(last, row[None], count))
    theirs.wear(given.models.adapter(0))
    return Truth(*(torch.cat(parts) for parts in zip(*alone, strict=True)))


def _relative(got: Tensor, truth: Tensor) -> Tensor:
    return (got - truth) / truth.abs().max()


def _differ(got: Tensor, truth: Tensor) -> Tensor:
    return got.to(truth.device) != truth


def _first_gaps(gaps: Tensor, got: Tensor, truth: Tensor) -> Tensor:
    """(rows,): the truth's gap at the first token that differs, 0 where none does."""
    differ = _differ(got, truth)
    first = differ.int().argmax(1, keepdim=True)
    return torch.where(differ.any(1), gaps.gather(1, first)[:, 0], 0.0)


def _sequences(got: Tensor, truth: Tensor) -> Tensor:
    """(1,): how many sequences differ."""
    return _differ(got, truth).any(1).sum()[None]


class Truths:
    """What the providers of a problem must answer, each truth computed when first asked for."""

    def __init__(self, given: Problem) -> None:
        """Compute nothing yet."""
        self._given = given
        self._found: dict[tuple[str, str | None], Truth] = {}

    def _truth(self, kind: str, weights: str | None) -> Truth:
        if (kind, weights) not in self._found:
            given, count = self._given, min(TOKENS, self._given.setting.new)
            if weights is None and given.models.theirs is not None:
                found = their_truth(given, kind, count)
            else:
                found = own_truth(given, kind, weights, count)
            self._found[kind, weights] = found
        return self._found[kind, weights]

    def expected(self, provider: Provider, mode: str) -> dict[str, Expected]:
        """What passes of a provider.

        Args:
            provider: with a kind of adapters.
            mode: DECODE, or PREFILL, which answers one token.
        """
        exact = self._truth(provider.kind, None)
        truth = self._truth(provider.kind, provider.weights)
        tokens = truth.tokens[:, : 1 if mode == PREFILL else None]
        off, apart = TOLERANCES[self._given.setting.dtype]
        if provider.weights is not None:
            off = DEVIATIONS[provider.weights]
        return {
            "logits": Expected(exact.logits, off, _relative),
            "tokens": Expected(tokens, apart, partial(_first_gaps, truth.gaps)),
            "differing": Expected(tokens, math.inf, _sequences),
        }
