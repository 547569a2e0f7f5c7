"""Sequences of any lengths as one batch."""

from itertools import chain

import pytest
import torch
from torch import nn

from llama_adapter.tasks.text_batches import batches, pad_id_of, padded, positions_of
from tests.llama_adapter.tasks.text_hosts import bert_tokenizer, host, roberta_tokenizer


def test_batches_are_runs_in_order() -> None:
    items = [*range(7)]
    assert [len(some) for some in batches(items, 3)] == [3, 3, 1]
    assert [*chain(*batches(items, 3))] == items
    assert [*batches([], 3)] == []


def test_sequences_are_filled_up_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1]},
        {"input_ids": torch.tensor([8], dtype=torch.int32), "token_type_ids": torch.tensor([1])},
    ]
    found = padded(rows, 3, nn.Linear(1, 1))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "token_type_ids": [[0, 1, 1], [1, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert {tensor.dtype for tensor in found.values()} == {torch.long}


@pytest.mark.parametrize("make", [roberta_tokenizer, bert_tokenizer])
def test_a_batch_is_what_the_tokenizer_pads(make: object) -> None:
    assert callable(make)
    tokenizer = make()
    texts = ["The tower in Paris", "a", "1889 words"]
    names = tokenizer.model_input_names
    rows = [
        {name: tokenizer(text)[name] for name in names if name != "attention_mask"}
        for text in texts
    ]
    found = padded(rows, pad_id_of(tokenizer), nn.Linear(1, 1))
    wanted = tokenizer(texts, padding=True, return_tensors="pt")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_tokenizers_that_will_not_do() -> None:
    tokenizer = bert_tokenizer()
    assert pad_id_of(tokenizer) == 0
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a padding token, got none"):
        pad_id_of(tokenizer)
    with pytest.raises(ValueError, match=r"must be one of transformers' fast ones.* got object"):
        pad_id_of(object())


def test_a_batch_goes_where_the_host_is() -> None:
    found = padded([{"input_ids": [5]}], 3, nn.Linear(1, 1, device="meta"))
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


@pytest.mark.parametrize(("make", "most"), [(roberta_tokenizer, 158), (bert_tokenizer, 160)])
def test_sequences_that_the_host_has_no_positions_for(make: object, most: int) -> None:
    """What fits is looked at, and one token more is refused before torch does."""
    assert callable(make)
    model = host(make())
    assert positions_of(model) == most
    with torch.no_grad():
        model(**padded([{"input_ids": [7] * most}], 0, model))
    message = f"max_length must be at most {most}, the host's positions, got {most + 1} tokens"
    with pytest.raises(ValueError, match=message):
        padded([{"input_ids": [7] * (most + 1)}], 0, model)
    assert positions_of(nn.Linear(1, 1)) is None
