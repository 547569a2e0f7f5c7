"""Prompts among the tokens: VPT, shallow and deep, for images, and prompt tuning for words.

Both are queries, keys and values like any token, and leave the sequence behind the last layer.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama_adapter.hosts.baselines.parts import (
    Generator,
    Installed,
    Part,
    Undo,
    after,
    before,
    before_layer,
    normal,
    show_rows,
    uniform,
    without_rows,
)


class VisualPrompts(Installed):
    """VPT: K rows between CLS and the patches; with `deep`, each layer takes rows of its own.

        shallow: x_1 = layer_1([CLS, P, patches])
        deep:    [CLS_i, _, patches_i] = layer_i([CLS_{i-1}, P_{i-1}, patches_{i-1}])

    prompts is (1, K, C) or (layers, K, C), from ±sqrt(6 / (channels * patch^2 + C)).

    Source: Visual Prompt Tuning, section 3.2, and its code for the initial values.
    """

    def __init__(self, part: Part, length: int, deep: bool, generator: Generator) -> None:
        super().__init__()
        config, size = part.config, part.config.patch_size
        area = math.prod(size) if isinstance(size, tuple | list) else size**2
        bound = math.sqrt(6 / (config.num_channels * area + part.width))
        rows = len(part.layers()) if deep else 1
        self.prompts = uniform((rows, length, part.width), bound, generator)

    def install(self, part: Part) -> list[Undo]:
        """Put the prompts into an encoder."""
        layers, length = part.layers(), self.prompts.shape[1]
        undo = [
            show_rows(part, 1, length),
            after(part.embeddings, partial(self._put, 0, 0)),
            after(layers[-1], partial(without_rows, 1, length)),
        ]
        for row in range(1, len(self.prompts)):
            undo.append(before_layer(layers[row], partial(self._put, row, length)))
        return undo

    def _put(self, row: int, replaced: int, x: Tensor) -> Tensor:
        """(B, T, C) with the prompts of a row behind CLS, for the `replaced` rows there."""
        prompts = self.prompts[row].to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, 1 + replaced :]], 1)


class WordPrompts(Installed):
    """Prompt tuning: K rows in front of the word embeddings, before positions and LayerNorm.

    The prompts have the first K positions, the tokens those behind, as in PEFT's, which takes the
    model's place and so is not used here. prompts is (K, C), normally distributed.

    Source: The Power of Scale for Parameter-Efficient Prompt Tuning, section 2.
    """

    def __init__(self, part: Part, length: int, std: float, generator: Generator) -> None:
        super().__init__()
        self.prompts = normal((length, part.width), std, generator)

    def install(self, part: Part) -> list[Undo]:
        """Put the prompts into an encoder."""
        length = len(self.prompts)
        return [
            show_rows(part, 0, length),
            before(part.embeddings, partial(self._put, part.embeddings)),
            after(part.layers()[-1], partial(without_rows, 0, length)),
        ]

    def _put(self, embeddings: Any, given: dict[str, Any]) -> dict[str, Any]:
        words, ids, length = given.get("inputs_embeds"), given.get("input_ids"), len(self.prompts)
        if given.get("position_ids") is not None:
            raise ValueError("position_ids must be left to the host with prompt_tuning")
        if words is None:
            words = embeddings.word_embeddings(ids)
        table = embeddings.position_embeddings
        # RoBERTa's positions begin behind that of its padding
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        rows, tokens = words.shape[:2]
        if first + length + tokens > table.num_embeddings:
            raise ValueError(
                f"tokens must be at most {table.num_embeddings - first - length} beside "
                f"{length} prompts, got {tokens}"
            )
        positions = torch.arange(first, first + length + tokens, device=words.device)
        positions = positions.expand(rows, -1)
        if ids is not None and first:
            own = embeddings.create_position_ids_from_input_ids(ids, first - 1, length)
            positions = torch.cat([positions[:, :length], own], 1)
        types = given.get("token_type_ids")
        if types is not None:
            types = torch.cat([types.new_zeros(rows, length), types], 1)
        prompts = self.prompts.to(words.dtype).expand(rows, -1, -1)
        return given | {
            "input_ids": None,
            "inputs_embeds": torch.cat([prompts, words], 1),
            "position_ids": positions,
            "token_type_ids": types,
        }
