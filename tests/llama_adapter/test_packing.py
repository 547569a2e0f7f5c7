"""Where the rows of sequences lie that share a beginning, and where its gradients go."""

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
    assert packing.cu_seqlens.tolist() == [0, 4, 7, 11, 16, 19]
    assert packing.longest == 5
    starts = [packing.positions[end].item() for end in packing.cu_seqlens[:-1]]
    assert starts == [0, 4, 4, 4, 0]
    assert packing.shared is not None
    assert packing.shared.index.tolist() == [-1, 0, 0, 0, -1]
    assert packing.shared.lengths.tolist() == [4]
    k, v = torch.randn(2, 19, 2, 8)
    found = packing.arguments(k, v)
    for name, x in (("k", k), ("v", v)):
        assert torch.equal(found[name], x)
        assert torch.equal(found[f"prefix_{name}"], x[None, :4])


def test_gradients_of_the_bank_are_added_to_its_rows() -> None:
    longer = (*BEGIN, 11, 12)
    examples = [
        # a label behind a beginning would be the loss of its last row, which then is not shared
        Example(n, (*begin, 20, 21 + n), (*[IGNORE_INDEX] * (len(begin) + 1), 21 + n))
        for n, begin in enumerate((BEGIN, BEGIN, longer, longer))
    ]
    packing = pack(examples, prefixes=(BEGIN, longer)).packing
    assert packing.shared is not None
    assert packing.shared.spans == ((0, 4), (4, 6))
    total = int(packing.cu_seqlens[-1])
    x = torch.randn(total, 2, 8, dtype=torch.float64, requires_grad=True)
    found = packing.arguments(x, torch.randn_like(x))
    dk, dbank = torch.randn_like(found["k"]), torch.randn_like(found["prefix_k"])
    # a row of the bank past a beginning's end gets no gradient from attention, and passes none on
    expected = dk.clone()
    expected[:4] += dbank[0, :4]
    expected[4:10] += dbank[1]
    (got,) = torch.autograd.grad([found["k"], found["prefix_k"]], x, [dk, dbank])
    torch.testing.assert_close(got, expected)


def test_without_a_beginning_keys_are_the_rows() -> None:
    packing = pack([Example(0, (1, 5, 6), (IGNORE_INDEX, 5, 6))]).packing
    k, v = torch.randn(2, 3, 2, 8)
    assert packing.shared is None
    found = packing.arguments(k, v)
    assert found["k"] is k
    assert not any(name.startswith("prefix") for name in found)
