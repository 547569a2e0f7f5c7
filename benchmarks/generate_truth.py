"""What a provider must answer: greedy decoding without a cache, by another implementation.

PEFT's for one adapter, transformers' for none, PEFT's one sequence at a time for a bank, all in a
wider dtype; their own answer in the benchmark's dtype tells how far off rounding may be. Of
quantised weights it is our own without cache and engine, beside how far they move the logits. A
token may differ where the truth's two likeliest are closer than rounding; what follows is not
compared.
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
)
from benchmarks.harness import Expected, expect
from benchmarks.roofline import DTYPES
from llama_adapter.adapter import Adapter


class Truth(NamedTuple):
    """Greedy decoding of a few sequences without a cache.

    Attributes:
        logits: (rows, V), at the prompts' ends, in float32 or a wider dtype.
        tokens: (rows, TOKENS) int64.
        gaps: (rows, TOKENS), of the two largest logits at each token.
        off: how far logits may be off, as a part of the largest.
    """

    logits: Tensor
    tokens: Tensor
    gaps: Tensor
    off: float = 0.0


@torch.inference_mode()
def greedy(last: Callable[[Tensor], Tensor], tokens: Tensor, count: int) -> Truth:
    """Decode with a function from tokens (rows, T) to the logits (rows, V) behind them."""
    chosen, gaps, first = [], [], None
    for _ in range(count):
        logits = last(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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


def alone(given: Problem, kind: str, count: int, wide: bool) -> Truth:
    """transformers' or PEFT's, or ours where they are missing; of a bank, one sequence at a time.

    Args:
        given: the problem.
        kind: of adapters.
        count: tokens.
        wide: whether the weights are in a wider dtype, ours in float32, by a copy that lives as
            long as this call.
    """
    rows, models = _rows(given, kind), given.models
    theirs = models.wider_theirs() if wide else models.theirs
    if theirs is not None:
        last = theirs.adapted.last_logits if ADAPTERS[kind] else theirs.plain.last_logits
        wear = theirs.wear
    else:
        model, worn = models.wider_base() if wide else models.base, {}

        def wear(adapter: Adapter) -> None:
            worn["prompts"] = model.project(adapter)

        def last(tokens: Tensor) -> Tensor:
            return model.logits(model.hidden(tokens, worn.get("prompts"))[:, -1])

    if ADAPTERS[kind] <= 1:
        if ADAPTERS[kind]:
            wear(models.adapter(0))
        return greedy(last, rows, count)
    found = []
    for row, name in zip(rows, adapters_of(kind, len(rows)), strict=True):
        assert name is not None
        wear(models.adapter(name))
        found.append(greedy(last, row[None], count))
    wear(models.adapter(0))
    logits, tokens, gaps, _ = zip(*found, strict=True)
    return Truth(torch.cat(logits), torch.cat(tokens), torch.cat(gaps))


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
            if weights is None:
                found = alone(given, kind, count, wide=True)
                own = alone(given, kind, 1, wide=False).logits.to(DTYPES[given.setting.dtype])
                bound = expect({"logits": found.logits}, {"logits": own})["logits"].bound
                found = found._replace(off=bound / float(found.logits.abs().max()))
            else:
                found = own_truth(given, kind, weights, count)
                found = found._replace(off=self._truth(kind, None).off)
            self._found[kind, weights] = found
        return self._found[kind, weights]

    def expected(self, provider: Provider, mode: str) -> dict[str, Expected]:
        """What passes of a provider.

        Args:
            provider: with a kind of adapters.
            mode: DECODE, or PREFILL, which answers one token.
        """
        truth = self._truth(provider.kind, provider.weights)
        tokens = truth.tokens[:, : 1 if mode == PREFILL else None]
        # two logits, each as far off as it may be
        apart = 2 * truth.off * float(truth.logits.abs().max())
        found = {
            "logits": Expected(truth.logits, truth.off, _relative),
            "tokens": Expected(tokens, apart, partial(_first_gaps, truth.gaps)),
            "differing": Expected(tokens, math.inf, _sequences),
        }
        if provider.weights is not None:
            exact = self._truth(provider.kind, None)
            found["moved"] = Expected(exact.logits, math.inf, _relative)
        return found
