"""Token ids as a host takes them: batches of sequences filled up, where its weights are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llama_adapter.tasks.running import beside

Item = TypeVar("Item")


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Runs of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def padded(rows: Sequence[Mapping[str, Any]], pad_id: int, model: nn.Module) -> dict[str, Tensor]:
    """Sequences of token ids of any lengths as one batch, filled up on the right.

    Args:
        rows: for every sequence its "input_ids" and whatever else has one number per token.
        pad_id: the token that fills up; other numbers are filled up with 0.
        model: the host that it is for: the batch goes where its weights are.

    Returns:
        For every name of a row a tensor (B, T), T the longest, and "attention_mask", 1 on the
        sequences and 0 where they were filled up.

    Raises:
        ValueError: the host has no position for a token.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    positions = positions_of(model)
    if positions is not None and longest > positions:
        raise ValueError(
            f"max_length must be at most {positions}, the host's positions, got {longest} tokens"
        )
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in rows[0]}
    batch["input_ids"].fill_(pad_id)
    batch["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        for name, values in row.items():
            batch[name][place, : len(values)] = torch.as_tensor(values)
        batch["attention_mask"][place, : len(row["input_ids"])] = 1
    return {name: beside(tensor, model) for name, tensor in batch.items()}


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a host's table of positions is for; None where it has no such table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts from behind the position of tokens that fill up
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None


def pad_id_of(tokenizer: Any) -> int:
    """The token that a tokenizer fills up with.

    Raises:
        ValueError: it has none, or gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer must be one of transformers' fast ones, which give offsets, got "
            f"{type(tokenizer).__name__}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token, got none")
    return int(tokenizer.pad_token_id)
