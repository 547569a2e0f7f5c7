"""Keys of sequences that share a beginning: gathered, and their gradients summed in one order."""

import torch

from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.packed import pack
from llama_adapter.packing import Packing

BEGIN = (1, 4, 9, 7)


def packing_of(sharers: int) -> Packing:
    """A beginning, those that share it, and one that does not."""
    rest = [(*range(20, 23 + n % 3),) for n in range(sharers)]
    examples = [
        Example(n, (*BEGIN, *own), (*[IGNORE_INDEX] * 5, *own[1:])) for n, own in enumerate(rest)
    ]
    examples.append(Example(99, (1, 5, 6), (IGNORE_INDEX, 5, 6)))
    return pack(examples, prefixes=(BEGIN,)).packing


def test_every_sequence_sees_its_beginning_and_its_own() -> None:
    packing = packing_of(3)
    total = int(packing.cu_seqlens_q[-1])
    keys = packing.keys(torch.arange(total)[:, None, None].double())[:, 0, 0].tolist()
    ends_q, ends_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    begin = list(range(4))
    assert keys[: ends_k[1]] == begin, "the beginning is a sequence itself"
    for n in range(1, 4):
        own = list(range(ends_q[n], ends_q[n + 1]))
        assert keys[ends_k[n] : ends_k[n + 1]] == [*begin, *own]
    assert keys[ends_k[4] :] == list(range(ends_q[4], total))
    starts = [packing.positions[end].item() for end in ends_q[:-1]]
    assert starts == [0, 4, 4, 4, 0]
    assert (packing.longest_q, packing.longest_k) == (5, 9)


def test_gradients_are_those_of_the_gather() -> None:
    packing = packing_of(5)
    total = int(packing.cu_seqlens_q[-1])
    x = torch.randn(total, 2, 3, dtype=torch.float64, requires_grad=True)
    keys = packing.keys(x)
    dkeys = torch.randn_like(keys)
    assert packing.key_rows is not None
    (got,) = torch.autograd.grad(keys, x, dkeys)
    (expected,) = torch.autograd.grad(x[packing.key_rows], x, dkeys)
    torch.testing.assert_close(got, expected)


def test_many_small_gradients_are_not_lost_in_half_precision() -> None:
    packing = packing_of(300)
    x = torch.zeros(int(packing.cu_seqlens_q[-1]), 1, 8, dtype=torch.float16, requires_grad=True)
    keys = packing.keys(x)
    dkeys = torch.full_like(keys, 1.0)
    dkeys[:4] = 2048.0
    (got,) = torch.autograd.grad(keys, x, dkeys)
    # one by one, each would round to nothing
    assert got[:4].unique().tolist() == [2348.0]
