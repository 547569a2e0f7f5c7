"""Packed and shared is the same loss with the same gradients, and nobody sees a neighbour."""

import random
from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.adapter import Adapter
from llama_adapter.data.examples import IGNORE_INDEX, Example, encode_record
from llama_adapter.data.packed import (
    PackedBatch,
    Prefix,
    collate,
    micro_batches,
    pack,
    prefix_of,
    template_prefixes,
)
from llama_adapter.data.records import Record
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer

FIRST, SECOND = (1, 9, 9, 4, 11, 7, 5), (1, 9, 9, 8)


def example(index: int, begin: Prefix, rng: random.Random) -> Example:
    """Behind a beginning without labels: one more token without, and some with."""
    rest = [rng.randrange(3, 353) for _ in range(rng.randint(3, 19))]
    masked = rng.randint(1, len(rest) - 1)
    labels = (*[IGNORE_INDEX] * (len(begin) + masked), *rest[masked:])
    return Example(index, (*begin, *rest), labels)


def examples(seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    begins = [FIRST, SECOND, (1,), FIRST, FIRST, SECOND, FIRST, (1, 9), FIRST]
    return [example(index, begin, rng) for index, begin in enumerate(begins)]


def alone(model: Llama, adapter: Adapter, batch: Sequence[Example]) -> Tensor:
    """Sum of the losses, each example by itself in a call without packing."""
    prompts, total = model.project(adapter), torch.zeros(())
    for one in batch:
        logits = model(torch.tensor([one.tokens]), prompts)[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum")
    return total


def together(
    model: Llama, adapter: Adapter, batch: Sequence[Example], prefixes: Sequence[Prefix]
) -> Tensor:
    packed = pack(batch, prefixes=prefixes)
    hidden = model.hidden_packed(packed.tokens, packed.packing, model.project(adapter))
    logits = model.logits(hidden[packed.rows])
    return F.cross_entropy(logits, packed.targets, reduction="sum")


@pytest.mark.parametrize("prefixes", [(), (FIRST,), (FIRST, SECOND), (SECOND, FIRST, (1, 9))])
def test_loss_and_gradients_are_those_of_each_alone(
    prefixes: tuple[Prefix, ...], tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    other, batch = deepcopy(tiny_adapter), examples()
    expected, got = alone(tiny_model, other, batch), together(
        tiny_model, tiny_adapter, batch, prefixes
    )  # fmt: skip
    assert float((got - expected).abs()) <= 1e-6 * float(expected)
    expected.backward()
    got.backward()
    for (name, one), two in zip(tiny_adapter.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert float(two.grad.abs().max()) > 1e-3, name
        assert float((one.grad - two.grad).abs().max()) <= 1e-5 * float(two.grad.abs().max()), name


def test_a_beginning_is_computed_once(tiny_model: Llama) -> None:
    batch = examples()
    plain, shared = pack(batch), pack(batch, prefixes=(FIRST, SECOND))
    # five begin with the first, two with the second
    assert len(plain.tokens) - len(shared.tokens) == 4 * len(FIRST) + 1 * len(SECOND)
    assert torch.equal(plain.targets, shared.targets)
    assert plain.counts == shared.counts
    assert plain.packing.shared is None
    with torch.no_grad():
        one, other = (
            tiny_model.hidden_packed(packed.tokens, packed.packing)[packed.rows]
            for packed in (plain, shared)
        )
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_nobody_sees_a_neighbour(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    """Another neighbour changes no bit, and gets no gradient."""
    batch, rng = examples(), random.Random(5)
    changed = [*batch[:4], example(99, FIRST, rng), *batch[5:]]
    first = sum(pack(batch).counts[:4])
    with torch.no_grad():
        prompts = tiny_model.project(tiny_adapter)
        rows = []
        for one in (batch, changed):
            packed = pack(one, prefixes=(FIRST, SECOND))
            hidden = tiny_model.hidden_packed(packed.tokens, packed.packing, prompts)
            rows.append(hidden[packed.rows][:first])
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-6)


def test_gradients_of_those_that_share_are_equal_in_every_run(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    found = []
    for _ in range(3):
        adapter = deepcopy(tiny_adapter)
        together(tiny_model, adapter, examples(), (FIRST, SECOND)).backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_what_cannot_be_shared_is_not() -> None:
    labelled = Example(0, (*FIRST, 3, 4), (*[IGNORE_INDEX] * len(FIRST), 3, 4))
    assert prefix_of(labelled, (FIRST,)) == (), "its last token predicts one with loss"
    short = Example(0, FIRST, (*[IGNORE_INDEX] * 6, 5))
    assert prefix_of(short, (FIRST,)) == (), "nothing would be left"
    fine = Example(0, (*FIRST, 3, 4), (*[IGNORE_INDEX] * 8, 4))
    assert prefix_of(fine, ((1, 9), FIRST, SECOND)) == FIRST, "the longest"
    alone_with_it = pack([fine, Example(1, (1, 5, 6), (IGNORE_INDEX, 5, 6))], prefixes=(FIRST,))
    assert alone_with_it.packing.shared is None
    with pytest.raises(ValueError, match="examples must hold at least one example, got none"):
        pack([])


def parts_of(packed: PackedBatch) -> list[Tensor]:
    """Every tensor of a batch that shares beginnings."""
    packing = packed.packing
    assert packing.shared is not None
    found = [packed.tokens, packed.rows, packed.targets, packing.positions, packing.cu_seqlens]
    return [*found, packing.shared.rows, packing.shared.index, packing.shared.lengths]


def test_a_batch_is_one_buffer_of_aligned_parts() -> None:
    """One copy takes it to a device, where kernels count on tensors as aligned as others are."""
    made = collate(examples(), (FIRST, SECOND))
    parts = parts_of(made.to("cpu"))
    begins = [part.data_ptr() - made.buffer.data_ptr() for part in parts]
    assert begins == sorted(begins)
    assert all(begin % 256 == 0 for begin in begins)
    assert begins[-1] + parts[-1].numel() * 8 <= made.buffer.numel() * 8
    wide = [part.dtype == torch.int64 for part in parts]
    assert wide == [True] * 4 + [False, True, False, False]
    assert made.computed == (len(parts[0]), len(parts[1]))
    assert all(part.is_contiguous() for part in parts)


def test_rows_are_filled_up_to_a_multiple(tiny_model: Llama) -> None:
    plain, filled = (collate(examples(), (FIRST, SECOND), multiple=m).to("cpu") for m in (1, 64))
    assert len(plain.tokens) % 64
    assert len(filled.tokens) % 64 == len(filled.rows) % 64 == 0
    assert filled.counts == plain.counts
    count = len(plain.rows)
    assert torch.equal(filled.rows[:count], plain.rows)
    assert torch.equal(filled.targets[:count], plain.targets)
    assert set(filled.targets[count:].tolist()) == {IGNORE_INDEX}
    with torch.no_grad():
        one, other = (tiny_model.hidden_packed(x.tokens, x.packing) for x in (plain, filled))
    torch.testing.assert_close(other[: len(one)], one, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_gets_what_the_host_made() -> None:
    made = collate(examples(), (FIRST, SECOND), pinned=True)
    assert made.buffer.is_pinned()
    there, here = parts_of(made.to("cuda")), parts_of(made.to("cpu"))
    for one, other in zip(there, here, strict=True):
        assert one.is_cuda
        assert one.data_ptr() % 256 == 0
        assert torch.equal(one.cpu(), other)


def test_the_templates_beginnings_hold_for_any_instruction(tiny_tokenizer: Tokenizer) -> None:
    plain, paired = template_prefixes(tiny_tokenizer)
    assert len(plain) > 10
    assert len(paired) > len(plain)
    texts = [
        "Write the plural of bus.",
        "9 rivers",
        "\n\n",
        "éa",
        "### Instruction:",
        "river stone",
    ]
    for text in texts:
        for extra, prefix in (("", plain), ("stone river", paired)):
            record = Record(0, text, extra, "green")
            one = encode_record(record, tiny_tokenizer, 512)
            assert prefix_of(one, (plain, paired)) == prefix


def test_micro_batches_hold_so_many_computed_tokens_and_keep_the_order() -> None:
    batch = examples()
    for most in (1, 30, 60, 10**6):
        parts = list(micro_batches(batch, most, (FIRST, SECOND)))
        assert [one for part in parts for one in part] == batch
        for part in parts:
            size = len(pack(part, prefixes=(FIRST, SECOND)).tokens)
            assert size <= most or len(part) == 1
    assert len(list(micro_batches(batch, 1))) == len(batch)
    assert len(list(micro_batches(batch, 10**6))) == 1
