"""P-tuning v2, the ordinary prefix: each layer's keys and values in one softmax with the tokens."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.hosts.attention import restore_configs, separate_configs
from llama_adapter.hosts.baselines.parts import Generator, Installed, Part, Undo, before, normal
from llama_adapter.hosts.task_head import shift_by

NAME = "llama_adapter_prefix"
KEYWORD = "llama_adapter_prefix_pair"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa over [prefix; tokens], where no mask hides the prefix.

        out = softmax(q [k_prefix; k]^T / sqrt(D) + mask) [v_prefix; v]

    Args:
        module: the attention that calls.
        query: (B, H, T, D).
        key, value: (B, H, S, D).
        attention_mask: (B or 1, 1, T, S) bool or added, or None.
        **kwargs: the prefix (2, K, H D) or (B, 2, K, H D) under KEYWORD, and what sdpa takes.

    Returns:
        (B, T, H, D) and None for the probabilities.
    """
    from transformers import AttentionInterface

    prefix = kwargs.pop(KEYWORD, None)
    if prefix is not None:
        pair = prefix.to(query.dtype).unflatten(-1, (-1, query.shape[-1])).transpose(-3, -2)
        k, v = (x.expand(len(query), -1, -1, -1) for x in pair.unbind(-4))
        given = kwargs.pop("is_causal", None)
        causal = getattr(module, "is_causal", False) if given is None else given
        if attention_mask is None and causal:
            tokens = query.shape[2]
            attention_mask = torch.ones(
                1, 1, tokens, tokens, dtype=torch.bool, device=query.device
            ).tril()
        if attention_mask is not None:
            shape = (*attention_mask.shape[:-1], k.shape[2])
            seen = attention_mask.new_zeros(shape)
            seen = ~seen if seen.dtype == torch.bool else seen
            attention_mask = torch.cat([seen, attention_mask], -1)
        key, value = torch.cat([k, key], 2), torch.cat([v, value], 2)
        kwargs["is_causal"] = False
    out, _ = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return out, None


class Prefix(Installed):
    """Keys and values of K prefix rows in each of the topmost layers.

    prefix is (layers, 2, K, C), normally distributed; while training, a part of its numbers is
    dropped, of every sequence of a batch another. With `shift` the tokens' positions begin behind
    the prefix, as in P-tuning v2's code.

    Source: P-Tuning v2, section 3.2; PEFT's form takes the model's place and knows no ViT.
    """

    def __init__(
        self, part: Part, length: int, layers: range, std: float, dropout: float, shift: bool,
        generator: Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        if shift and not part.tower.host.embeddings:
            raise ValueError(
                f"shift_positions must be False for a {part.tower.host.kind}: bert and roberta "
                "can shift"
            )
        self.layers, self.shift = layers, shift
        self.prefix = normal((len(layers), 2, length, part.width), std, generator)
        self.dropout = nn.Dropout(dropout)

    def install(self, part: Part) -> list[Undo]:
        """Put the prefix into an encoder, whose attention is transformers' sdpa then."""
        _register()
        configs = separate_configs(part.body)
        part.config._attn_implementation = NAME
        undo: list[Undo] = [partial(restore_configs, part.body, configs)]
        attentions = part.tower.attentions()
        for row, layer in enumerate(self.layers):
            undo.append(before(attentions[layer], partial(self._give, row)))
        if self.shift:
            undo.append(shift_by(part.tower, self.prefix.shape[2]).remove)
        return undo

    def _give(self, row: int, given: dict[str, Any]) -> dict[str, Any]:
        prefix = self.prefix[row]
        if self.training:
            prefix = prefix.expand(len(given["hidden_states"]), -1, -1, -1)
        return given | {KEYWORD: self.dropout(prefix)}
