"""Side-tuning: a small network beside the frozen one, their features blended by a learnt weight."""

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.hosts.baselines.parts import (
    Generator,
    Installed,
    Part,
    Undo,
    after,
    before,
    initialise,
)


class SideNetwork(Installed):
    """y = alpha * host(e) + (1 - alpha) * up(layers(down(e))), e (B, T, C) the embeddings.

    The layers are torch's own encoder layers of width C / reduction, and see of the tokens what the
    host's see. alpha is trained; from 1 on the host's output does not change at first.

    Source: Side-Tuning, section 3, whose network for images is a small convolutional one; this one
    serves words as well.
    """

    def __init__(
        self, part: Part, reduction: int, depth: int, alpha: float, generator: Generator
    ) -> None:
        super().__init__()
        if not 1 <= reduction <= part.width:
            raise ValueError(f"reduction must be 1 to the width {part.width}, got {reduction}")
        width = part.width // reduction
        self.heads = math.gcd(width, part.config.num_attention_heads)
        self.down = nn.Linear(part.width, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, self.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.up = nn.Linear(width, part.width)
        initialise(self, generator)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        # what goes from the embeddings to the last layer, by thread
        self._carried: dict[int, Tensor] = {}

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) to the same; mask (B H, T, T) bool, True where a key is hidden."""
        inner = self.down(x.to(self.down.weight.dtype))
        for layer in self.layers:
            inner = layer(inner, src_mask=mask)
        return self.up(inner)

    def install(self, part: Part) -> list[Undo]:
        """Put the network beside an encoder."""
        sites, body = part.sites, part.body
        if not sites.runner:
            norm = body.get_submodule(sites.norm)
            return [
                after(part.embeddings, self._start),
                norm.register_forward_pre_hook(self._end_before).remove,
            ]
        runner = body.get_submodule(sites.runner)
        return [
            before(runner, self._start_masked),
            runner.register_forward_hook(self._end_after).remove,
        ]

    def _start(self, x: Tensor) -> Tensor:
        self._carried[threading.get_ident()] = self(x, None)
        return x

    def _start_masked(self, given: dict[str, Any]) -> dict[str, Any]:
        x = given["inputs_embeds"] if "inputs_embeds" in given else given["hidden_states"]
        mask = hidden_keys(
            given.get("attention_mask"), given.get("is_causal", False), x, self.heads
        )
        self._carried[threading.get_ident()] = self(x, mask)
        return given

    def _blend(self, x: Tensor) -> Tensor:
        side = self._carried.pop(threading.get_ident())
        return (self.alpha * x + (1 - self.alpha) * side).to(x.dtype)

    def _end_before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._blend(args[0]), *args[1:])

    def _end_after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        out.last_hidden_state = self._blend(out.last_hidden_state)
        return out


def hidden_keys(mask: Tensor | None, causal: bool, x: Tensor, heads: int) -> Tensor | None:
    """A mask of transformers' as torch's modules take it.

    Args:
        mask: (B, T) or (B or 1, 1, T, T), bool and True where a key is seen, or added to scores.
        causal: what no mask means.
        x: (B, T, C), what it is for.
        heads: H.

    Returns:
        (B H, T, T) bool, True where a key is hidden; None where all are seen.
    """
    rows, tokens = x.shape[:2]
    if mask is None:
        if not causal:
            return None
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)[None, None]
    elif mask.ndim == 2:
        hidden = mask[:, None, None, :] == 0
    else:
        hidden = ~mask if mask.dtype == torch.bool else mask < 0
    return hidden.expand(rows, heads, tokens, tokens).flatten(0, 1)
