"""Attention of one new token over a KV cache: inputs, the truth, the bytes, and what others do.

All providers get the same cache and the same lengths, contiguous or in shuffled pages; some leave
the prompt out. The read bandwidth, which nothing here exceeds, is that of a large tensor reduced in
turns with them. Letters are those of kernels/README.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import harness
from benchmarks.baselines import (
    Call,
    Provider,
    compiled,
    flex_call,
    heads_first,
    library,
    official,
    random_gates,
    two_calls,
    two_flex_calls,
)
from benchmarks.harness import Expected
from benchmarks.roofline import DTYPES, Shape

PAGE = 64
# adapters by kind: each sequence takes one of a bank, with gates of its own
BANKS = {"bank_32": 32, "bank_1000": 1000}
# "prompt" is one for all sequences, "plain" none; a kind of READS only reads memory
KINDS = ("prompt", "plain", *BANKS)


class Prompts(NamedTuple):
    """The prompts of one kind: (P,G,D) and gate (H,), or (A,P,G,D), (A,H) and index (B,) int32."""

    k: Tensor | None = None
    v: Tensor | None = None
    gate: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """What the read bandwidth is measured on.

    Attributes:
        words: (N,) float32, far more than a cache of the device holds; N is even.
        sums: by kind of read, the truth of what it makes of the words.
    """

    words: Tensor
    sums: Mapping[str, Mapping[str, Expected]]


def memory_of(size: int, device: torch.device) -> Memory:
    """Random words of so many bytes."""
    generator = torch.Generator(device).manual_seed(1)
    words = torch.randn(size // 8 * 2, generator=generator, device=device)
    one, other = words.chunk(2)
    sums = {
        "read_sum": (words.sum(dtype=torch.float64), words.sum()),
        "read_dot": (torch.dot(one.double(), other.double()), torch.dot(one, other)),
    }
    return Memory(
        words,
        {
            name: harness.expect({"out": truth}, {"out": eager})
            for name, (truth, eager) in sums.items()
        },
    )


@dataclass(frozen=True)
class Problem:
    """Inputs at one shape.

    Attributes:
        shape: of the attention; T is 1, S the capacity of the cache.
        q: (B,1,H,D).
        k, v: the cache, (B,S,G,D), random past the lengths too.
        lengths: (B,) int32, from S / 2 to S, the first S.
        k_pages, v_pages: the same cache in shuffled pages, (B S / PAGE, PAGE, G, D).
        page_table: (B, S / PAGE) int32.
        prompts: by kind.
        memory: for the read bandwidth.
    """

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    prompts: Mapping[str, Prompts]
    memory: Memory

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors of the baselines, with the one prompt for all."""
        prompt_k, prompt_v, gate, _ = self.prompts["prompt"]
        assert prompt_k is not None
        assert prompt_v is not None
        assert gate is not None
        tokens = {"q": self.q, "k": self.k, "v": self.v}
        return {**tokens, "prompt_k": prompt_k, "prompt_v": prompt_v, "gate": gate}


def _paged(cache: Tensor, table: Tensor) -> Tensor:
    """A cache's pages where the table says that they are."""
    pages = cache.view(-1, PAGE, *cache.shape[2:])
    return torch.empty_like(pages).index_copy_(0, table.flatten().long(), pages)


def problem(shape: Shape, device: torch.device, memory: Memory) -> Problem:
    """Random inputs, the same whenever they are drawn for a shape.

    Args:
        shape: with one query and whole pages of keys.
        device: where the inputs are.
        memory: of that device.

    Raises:
        ValueError: T is not 1, or S no multiple of PAGE.
    """
    if shape.tokens != 1:
        raise ValueError(f"tokens must be 1, got {shape.tokens}")
    if shape.keys % PAGE:
        raise ValueError(f"keys must be a multiple of {PAGE}, got {shape.keys}")
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    normal = partial(torch.randn, dtype=DTYPES[shape.dtype], **on)
    heads, groups, width = shape.heads, shape.kv_heads, shape.head_dim
    cache = (shape.batch, shape.keys, groups, width)
    q, k, v = normal(shape.batch, 1, heads, width), normal(*cache), normal(*cache)
    lengths = torch.randint(shape.keys // 2, shape.keys + 1, (shape.batch,), **on).int()
    lengths[0] = shape.keys
    pages = shape.batch * shape.keys // PAGE
    table = torch.randperm(pages, **on).int().view(shape.batch, -1)
    one = (shape.prompt, groups, width)
    prompts = {"plain": Prompts()}
    prompts["prompt"] = Prompts(normal(*one), normal(*one), random_gates(heads, generator))
    for kind, adapters in BANKS.items():
        prompts[kind] = Prompts(
            normal(adapters, *one),
            normal(adapters, *one),
            random_gates(adapters * heads, generator).view(adapters, heads),
            torch.randint(adapters, (shape.batch,), **on).int(),
        )
    paged = _paged(k, table), _paged(v, table)
    return Problem(shape, q, k, v, lengths, *paged, table, prompts, memory)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of (G,R,D) with (S,G,D)."""
    return (q @ k.permute(1, 2, 0)).softmax(-1) @ v.transpose(0, 1)


def formula(given: Problem, kind: str, dtype: torch.dtype) -> Tensor:
    """The plain formula's result (B,1,H,D), computed in a dtype, one sequence at a time.

    Args:
        given: the problem.
        kind: one of KINDS.
        dtype: float64 gives the truth, the problem's own what plain code achieves.
    """
    prompt_k, prompt_v, gate, index = given.prompts[kind]
    rows = []
    for b, length in enumerate(given.lengths.tolist()):
        k, v = (x[b, :length].to(dtype) for x in (given.k, given.v))
        q = given.q[b, 0].to(dtype).unflatten(0, (k.shape[1], -1)) * given.shape.head_dim**-0.5
        out = _attend(q, k, v)
        if prompt_k is not None and prompt_v is not None and gate is not None:
            own = [x if index is None else x[index[b]] for x in (prompt_k, prompt_v, gate)]
            pk, pv, gates = (x.to(dtype) for x in own)
            out = out + gates.view(*out.shape[:2], 1) * _attend(q, pk, pv)
        rows.append(out.flatten(0, 1))
    return torch.stack(rows)[:, None]


def expected(given: Problem, kind: str) -> Mapping[str, Expected]:
    """The truth of a kind's result."""
    if kind in given.memory.sums:
        return given.memory.sums[kind]
    own = DTYPES[given.shape.dtype]
    truth, eager = (formula(given, kind, dtype) for dtype in (torch.float64, own))
    return harness.expect({"out": truth}, {"out": eager})


def bytes_of(given: Problem, kind: str) -> int:
    """What a kind must move: keys and values below the lengths, prompts in use once, q and out."""
    if kind in given.memory.sums:
        return given.memory.words.nbytes
    shape, (prompt_k, _, _, index) = given.shape, given.prompts[kind]
    token = 2 * shape.kv_heads * shape.head_dim * shape.element
    prompts = 0 if prompt_k is None else 1 if index is None else index.unique().numel()
    tokens = int(given.lengths.sum()) * token + prompts * shape.prompt_bytes
    return int(tokens + 2 * shape.query_bytes)


def _seen(given: Problem) -> Tensor | None:
    """Which keys are below the lengths, (B,1,1,S); None where all are, which is faster."""
    lengths, keys = given.lengths, given.shape.keys
    if bool((lengths == keys).all()):
        return None
    return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None]


# the masks are made once, not timed, as for all layers of a step
def _sdpa(given: Problem) -> Call:
    q, k, v = (heads_first(x) for x in (given.q, given.k, given.v))
    attend = partial(library, q, k, v, False, mask=_seen(given))
    return lambda: heads_first(attend())


def _two_sdpa(given: Problem) -> Call:
    return partial(two_calls, given.leaves, False, mask=_seen(given))


def _official(given: Problem) -> Call:
    seen, mask = _seen(given), None
    if seen is not None:
        mask = torch.zeros_like(seen, dtype=given.q.dtype).masked_fill(~seen, -torch.inf)
    return partial(official, given.leaves, mask)


def _flex_with(function: Callable[..., Tensor]) -> Callable[[Problem], Call]:
    def build(given: Problem) -> Call:
        lengths, shape = given.lengths, given.shape
        mask = create_block_mask(
            lambda b, h, i, j: j < lengths[b], shape.batch, None, 1, shape.keys, lengths.device.type
        )
        return partial(compiled(function), given.leaves, mask)

    return build


def _read_dot(given: Problem) -> Call:
    return partial(torch.dot, *given.memory.words.chunk(2))


_GPU: dict[str, Any] = {"devices": ("cuda",), "compiled": True}
# what a step of decoding is made of elsewhere, and the read bandwidth as the faster of two reads
OTHERS = (
    Provider("sdpa", "plain", _sdpa),
    Provider("two_sdpa", "prompt", _two_sdpa),
    # copies the whole cache, several times over with grouped heads: not where that would not fit
    Provider("official", "prompt", _official, devices=("cpu",)),
    Provider("flex", "plain", _flex_with(flex_call), **_GPU),
    Provider("two_flex", "prompt", _flex_with(two_flex_calls), **_GPU),
)
READS = (
    Provider("read_sum", "read_sum", lambda given: given.memory.words.sum),
    Provider("read_dot", "read_dot", _read_dot),
)
