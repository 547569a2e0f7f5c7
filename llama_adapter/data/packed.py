"""From examples to what the model takes: packed without padding, common beginnings computed once.

A micro-batch is as many examples as fit a number of tokens. What is computed does not depend on how
a batch is cut: losses and gradients are sums over its examples.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.template import prompt_text
from llama_adapter.packing import Packing, Shared
from llama_adapter.tokenizer import Tokenizer

Prefix = tuple[int, ...]
# of the images' paths, None for none: features (B, F), and which of them there are (B,)
Features = Callable[[Sequence[str | None]], tuple[Tensor, Tensor]]
# numbers of 8 bytes: as far apart as tensors of their own would be
_ALIGNMENT = 32
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
        features: (B, F), of the image of each sequence of `packing`; None where none has one.
        present: (B,) bool, which of them have one.
    """

    tokens: Tensor
    packing: Packing
    rows: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    features: Tensor | None = None
    present: Tensor | None = None


def prefix_of(example: Example, prefixes: Sequence[Prefix]) -> Prefix:
    """The longest of `prefixes` that an example begins with, none of it with loss; or ().

    None of an example with an image: its prompts are its own, and already the template's tokens
    attend to them.
    """
    if example.image is not None:
        return ()
    fitting = [
        prefix
        for prefix in prefixes
        if len(prefix) < len(example.tokens)
        and example.tokens[: len(prefix)] == prefix
        and all(label == IGNORE_INDEX for label in example.labels[: len(prefix) + 1])
    ]
    return max(fitting, key=len, default=())


@dataclass(frozen=True)
class Collated:
    """Examples packed in the host's memory, to be copied to a device at once.

    Attributes:
        examples: at least one.
        buffer: int64, all the numbers; pinned where the device is a GPU.
        sizes: of its parts: tokens, rows, targets, positions, cu_seqlens, then, if any beginnings
            are shared, their rows, and the index and the lengths of `Shared`.
        longest: of the packing.
        spans: first row and length of each shared beginning.
        counts: labels of each example.
        visual: `features` and `present` of the packed batch; None without images.
    """

    examples: tuple[Example, ...]
    buffer: Tensor
    sizes: tuple[int, ...]
    longest: int
    spans: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    visual: tuple[Tensor, Tensor] | None = None

    @property
    def computed(self) -> tuple[int, int]:
        """Rows that the model computes, and those of them that become logits."""
        return self.sizes[0], self.sizes[1]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on a device, in one copy, which the host does not wait for."""
        whole = self.buffer.to(device, non_blocking=True)
        parts, at = [], 0
        for size in self.sizes:
            parts.append(whole[at : at + size])
            at += _padded(size)
        tokens, rows, targets, positions, ends, *shared = parts
        packing = Packing(positions, _narrow(ends), self.longest)
        if shared:
            bank, index, lengths = shared
            bank = bank.view(len(self.spans), -1)
            shared = Shared(self.spans, bank, _narrow(index), _narrow(lengths))
            packing = replace(packing, shared=shared)
        visual = [x.to(device, non_blocking=True) for x in self.visual or ()]
        return PackedBatch(tokens, packing, rows, targets, self.counts, *visual)


def _narrow(part: Tensor) -> Tensor:
    """A part that holds int32 at its beginning."""
    return part.view(torch.int32)[: part.numel()]


def _padded(size: int) -> int:
    """Numbers from the start of a part to that of the next: kernels count on aligned tensors."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pack(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    prefixes: Sequence[Prefix] = (),
    features: Features | None = None,
) -> PackedBatch:
    """Put examples one after the other; those that begin with the same prefix share its rows.

    Args:
        examples: at least one.
        device: where the tensors go.
        prefixes: beginnings that may be shared, such as those of the prompt template.
        features: of images, where examples have some.

    Raises:
        ValueError: examples is empty, or there are images and no features.
    """
    return collate(examples, prefixes, features=features).to(device)


def collate(
    examples: Sequence[Example],
    prefixes: Sequence[Prefix] = (),
    pinned: bool = False,
    multiple: int = 1,
    features: Features | None = None,
) -> Collated:
    """What `pack` does before a device takes part.

    Args:
        examples: at least one.
        prefixes: beginnings that may be shared.
        pinned: whether to use memory that a GPU copies from by itself.
        multiple: of which there are so many rows, and rows with loss: a sequence of its own that
            carries no loss fills them up, and labels that are ignored.
        features: of images, where examples have some.

    Raises:
        ValueError: examples is empty, or there are images and no features.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    begins = [prefix_of(example, prefixes) for example in examples]
    # a prefix that one example alone has is its own
    counted = Counter(begins)
    begins = [prefix if counted[prefix] > 1 else () for prefix in begins]
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
    if multiple > 1:
        add([0] * (-len(tokens) % multiple), 0)
        targets.extend([IGNORE_INDEX] * (-len(rows) % multiple))
        rows.extend([0] * (-len(rows) % multiple))
    # of each column the numbers, and whether they are int32
    columns: list[tuple[Sequence[int], bool]] = [
        (tokens, False), (rows, False), (targets, False), (positions, False), (ends, True),
    ]  # fmt: skip
    if alike:
        most = max(map(len, alike))
        bank = [start + min(i, size - 1) for start, size in spans for i in range(most)]
        number = {prefix: index for index, prefix in enumerate(alike)}
        index = [-1] * len(alike) + [number.get(prefix, -1) for prefix in begins]
        index += [-1] * (multiple > 1)
        columns += [(bank, False), (index, True), ([size for _, size in spans], True)]
    sizes = tuple(len(column) for column, _ in columns)
    total = sum(_padded(size) for size in sizes)
    buffer = torch.empty(total, dtype=torch.int64, pin_memory=pinned)
    numbers, at = buffer.numpy(), 0
    for column, narrow in columns:
        part = numbers[at : at + len(column)]
        # int32 lies at the beginning of its part
        part = part.view(np.int32)[: len(column)] if narrow else part
        part[:] = column
        at += _padded(len(column))
    # neither a beginning that is shared nor what fills up has an image
    filler = len(ends) - 1 - len(alike) - len(examples)
    images = [None] * len(alike) + [example.image for example in examples] + [None] * filler
    return Collated(
        examples=tuple(examples),
        buffer=buffer,
        sizes=sizes,
        longest=max(b - a for a, b in pairwise(ends)),
        spans=spans,
        counts=tuple(counts),
        visual=_visual(images, features, pinned),
    )


def _visual(
    images: Sequence[str | None], features: Features | None, pinned: bool
) -> tuple[Tensor, Tensor] | None:
    """Features of the images of a batch, if there are any."""
    given = next((image for image in images if image is not None), None)
    if given is None:
        return None
    if features is None:
        raise ValueError(f"examples must have no image without features, got {given}")
    found, present = features(images)
    return (found.pin_memory(), present.pin_memory()) if pinned else (found, present)


def micro_batches(
    examples: Iterable[Example], most_tokens: int, prefixes: Sequence[Prefix] = ()
) -> Iterator[list[Example]]:
    """Cut a batch, in its order, into parts of so many computed tokens; a longer example is alone.

    Args:
        examples: of one batch.
        most_tokens: of a part, shared beginnings counted once.
        prefixes: as `pack` takes them.

    Returns:
        The parts, each as soon as it is full.
    """
    part: list[Example] = []
    size, shared = 0, set[Prefix]()
    for example in examples:
        prefix = prefix_of(example, prefixes)
        cost = len(example.tokens) - (len(prefix) if prefix in shared else 0)
        if part and size + cost > most_tokens:
            yield part
            part, size, shared, cost = [], 0, set(), len(example.tokens)
        part.append(example)
        shared.add(prefix)
        size += cost
    if part:
        yield part
