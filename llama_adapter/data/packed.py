"""From examples to what the model takes: packed without padding, common beginnings computed once.

A micro-batch is as many examples as fit a number of tokens. What is computed does not depend on how
a batch is cut: losses and gradients are sums over its examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.template import prompt_text
from llama_adapter.packing import Packing, Shared
from llama_adapter.tokenizer import Tokenizer

Prefix = tuple[int, ...]
# instructions that begin with every kind of character, so that none is taken for the template's
_BEGINNINGS = ("Write", "a", "9", "\n", " ", "é", "#", "\u4e2d", '"')


def template_prefixes(tokenizer: Tokenizer) -> tuple[Prefix, ...]:
    """The tokens that all prompts of the template begin with, without and with an input."""
    found = []
    for extra in ("", "x"):
        texts = [prompt_text(first, extra) for first in _BEGINNINGS]
        ids = [tokenizer.encode(text, bos=True) for text in texts]
        same = [len(set(column)) == 1 for column in zip(*ids, strict=False)]
        found.append(tuple(ids[0][: same.index(False) if False in same else len(same)]))
    return tuple(prefix for prefix in dict.fromkeys(found) if prefix)


@dataclass(frozen=True)
class PackedBatch:
    """Examples as the model takes them, without padding.

    Attributes:
        tokens: (total,) int64, those of one sequence after the other.
        packing: where the sequences lie.
        rows: (n,) int64, the rows whose next token carries loss, in the examples' order.
        targets: (n,) int64, those tokens.
        counts: how many of them each example has.
    """

    tokens: Tensor
    packing: Packing
    rows: Tensor
    targets: Tensor
    counts: tuple[int, ...]


def prefix_of(example: Example, prefixes: Sequence[Prefix]) -> Prefix:
    """The longest of `prefixes` that an example begins with, none of it with loss; or ()."""
    fitting = [
        prefix
        for prefix in prefixes
        if len(prefix) < len(example.tokens)
        and example.tokens[: len(prefix)] == prefix
        and all(label == IGNORE_INDEX for label in example.labels[: len(prefix) + 1])
    ]
    return max(fitting, key=len, default=())


def pack(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    prefixes: Sequence[Prefix] = (),
) -> PackedBatch:
    """Put examples one after the other; those that begin with the same prefix share its rows.

    Args:
        examples: at least one.
        device: where the tensors go.
        prefixes: beginnings that may be shared, such as those of the prompt template.

    Raises:
        ValueError: examples is empty.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    begins = [prefix_of(example, prefixes) for example in examples]
    # a prefix that one example alone has is its own
    begins = [prefix if begins.count(prefix) > 1 else () for prefix in begins]
    alike = [prefix for prefix in dict.fromkeys(begins) if prefix]
    tokens: list[int] = []
    positions: list[int] = []
    ends = [0]
    rows: list[int] = []
    targets: list[int] = []

    def add(ids: Sequence[int], first: int) -> None:
        """A sequence of these rows, from position `first`."""
        tokens.extend(ids)
        positions.extend(range(first, first + len(ids)))
        ends.append(len(tokens))

    for prefix in alike:
        add(prefix, 0)
    spans = tuple(zip(ends, map(len, alike), strict=False))
    counts = []
    for example, prefix in zip(examples, begins, strict=True):
        first = len(prefix)
        behind = len(tokens) - first
        add(example.tokens[first:], first)
        carrying = [i for i, label in enumerate(example.labels[1:]) if label != IGNORE_INDEX]
        rows.extend(behind + i for i in carrying)
        targets.extend(example.labels[i + 1] for i in carrying)
        counts.append(len(carrying))

    def whole(values: Sequence[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    shared = None
    if alike:
        most = max(map(len, alike))
        index = [-1] * len(alike) + [alike.index(p) if p else -1 for p in begins]
        shared = Shared(
            spans,
            whole([[start + min(i, size - 1) for i in range(most)] for start, size in spans]),
            whole(index, torch.int32),
            whole([size for _, size in spans], torch.int32),
        )
    packing = Packing(
        positions=whole(positions),
        cu_seqlens=whole(ends, torch.int32),
        longest=max(b - a for a, b in pairwise(ends)),
        shared=shared,
    )
    return PackedBatch(whole(tokens), packing, whole(rows), whole(targets), tuple(counts))


def micro_batches(
    examples: Sequence[Example], most_tokens: int, prefixes: Sequence[Prefix] = ()
) -> list[list[Example]]:
    """Cut a batch, in its order, into parts of so many computed tokens; a longer example is alone.

    Args:
        examples: of one batch.
        most_tokens: of a part, shared beginnings counted once.
        prefixes: as `pack` takes them.
    """
    parts: list[list[Example]] = []
    size, shared = 0, set[Prefix]()
    for example in examples:
        prefix = prefix_of(example, prefixes)
        cost = len(example.tokens) - (len(prefix) if prefix in shared else 0)
        if not parts or size + cost > most_tokens:
            parts.append([])
            size, shared, cost = 0, set(), len(example.tokens)
        parts[-1].append(example)
        shared.add(prefix)
        size += cost
    return parts
