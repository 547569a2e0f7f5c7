"""The adapter: learnable prompts and gates of the adapted layers, as data beside a frozen model.

An `Adapter` holds parameters and knows which layers they belong to. `Llama.project` turns it into
`Prompts`, the keys, values and gate multipliers that attention takes; whoever calls the model owns
the result, so training projects anew at each step and inference once per adapter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_adapter.config import AdapterConfig, LlamaConfig


@dataclass(frozen=True)
class LayerPrompt:
    """One layer's prompt segment: k and v (P,G,D) or with a leading B or A; gate (H,) or (A,H)."""

    k: Tensor
    v: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Prompts:
    """Projected prompts of every adapted layer, by layer index.

    Attributes:
        layers: layer index to its prompt segment; layers that are absent have none.
        adapter_index: (B,) int32, each sequence's row of a bank of adapters, -1 for none.
        prompt_lengths: (A,) int32, prompt rows in use per adapter of a bank.
    """

    layers: dict[int, LayerPrompt]
    adapter_index: Tensor | None = None
    prompt_lengths: Tensor | None = None


class Adapter(nn.Module):
    """Prompts P_l ~ N(0, prompt_std) and gates g_l = 0 for the topmost L layers.

    Both are float32 whatever the model's dtype. Source: LLaMA-Adapter, sections 3.1 and 3.2.

    Attributes:
        prompts: (L, P, C), the rows prepended to a layer's tokens (equation 1).
        gates: (L, H), or (L, 1) with gate_scope "layer" (equation 7); before the activation.
        layers: the L layer indices that the rows belong to, ascending.
    """

    def __init__(
        self,
        config: AdapterConfig,
        model: LlamaConfig,
        *,
        layers: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create an untrained adapter.

        Args:
            config: prompt length, scale, gate convention and how many layers.
            model: the shape of the base model.
            layers: explicit layer indices in place of the topmost `config.n_layers`.
            generator: source of the prompts' random values.

        Raises:
            ValueError: a layer index is repeated or outside the model.
        """
        super().__init__()
        self.config = config
        self.layers = config.layers_of(model.n_layers) if layers is None else tuple(layers)
        fits = all(0 <= layer < model.n_layers for layer in self.layers)
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or not fits:
            raise ValueError(
                f"layers must be ascending indices below {model.n_layers}, got {self.layers}"
            )
        count, heads = len(self.layers), model.n_heads if config.gate_scope == "head" else 1
        self.n_heads = model.n_heads
        shape = (count, config.prompt_length, model.dim)
        self.prompts = nn.Parameter(torch.randn(shape, generator=generator) * config.prompt_std)
        self.gates = nn.Parameter(torch.zeros(count, heads))

    def multipliers(self) -> Tensor:
        """Gate multipliers (L, H) in float32: the only place where tanh is applied to a gate."""
        gates = self.gates.float()
        if self.config.gate_activation == "tanh":
            gates = gates.tanh()
        return gates.expand(-1, self.n_heads)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group name, as optimisers and checkpoints know them."""
        return {"prompts": [self.prompts], "gates": [self.gates]}
