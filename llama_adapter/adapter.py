"""The adapter: prompts and gates of the adapted layers, as data beside a frozen model.

With LLaMA-Adapter V2's groups also biases and scales of linear maps, and norms; for images the
projector that makes a token of their features. An `Adapter` holds
parameters and knows where they belong. `Llama.project` turns it into `Prompts`, what the model's
layers take; whoever calls the model owns the result, so training projects anew at each step and
inference once per adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_adapter.config import AdapterConfig, LlamaConfig, Tuning, VisualConfig, shape_of
from llama_adapter.projector import Projector
from llama_adapter.tuned_modules import TunedModules


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
        tuned: the layers as an adapter's biases, scales and norms make them, for the whole batch;
            None leaves the model's own.
    """

    layers: Mapping[int, LayerPrompt]
    adapter_index: Tensor | None = None
    prompt_lengths: Tensor | None = None
    tuned: TunedModules | None = None

    def of(self, adapter_index: Tensor) -> "Prompts":
        """A bank's prompts for a batch whose sequences have these rows (B,) int32."""
        return Prompts(self.layers, adapter_index, self.prompt_lengths, self.tuned)


class Adapter(nn.Module):
    """Prompts P_l ~ N(0, prompt_std) and gates g_l = 0 for the topmost L layers.

    Both are float32 whatever the model's dtype. Source: LLaMA-Adapter, sections 3.1 and 3.2.

    Attributes:
        prompts: (L, P, C), the rows prepended to a layer's tokens (equation 1).
        gates: (L, H), or (L, 1) with gate_scope "layer" (equation 7); before the activation.
        layers: the L layer indices that the rows belong to, ascending; none with a tuning alone.
        tuning: which biases, scales and norms there are besides; see `tuned_parameters`.
        projector: of an image's features; None without images.
    """

    def __init__(
        self,
        config: AdapterConfig,
        model: LlamaConfig,
        *,
        layers: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        tuning: Tuning | None = None,
        visual: VisualConfig | None = None,
    ) -> None:
        """Create an untrained adapter.

        Args:
            config: prompt length, scale, gate convention and how many layers.
            model: the shape of the base model.
            layers: explicit layer indices in place of the topmost `config.n_layers`.
            generator: source of the prompts' random values.
            tuning: groups of biases (0 at first), scales (1) and norms (1, not the base's own).
            visual: the features of images that it takes; None takes none.

        Raises:
            ValueError: a layer index is repeated or outside the model, or there is a projector
                without a prompt.
        """
        super().__init__()
        self.config = config
        self.layers = config.layers_of(model.n_layers) if layers is None else tuple(layers)
        fits = all(0 <= layer < model.n_layers for layer in self.layers)
        self.tuning = Tuning() if tuning is None else tuning
        given = self.layers or self.tuning.groups
        if not given or sorted(set(self.layers)) != list(self.layers) or not fits:
            raise ValueError(
                f"layers must be ascending indices below {model.n_layers}, got {self.layers}"
            )
        count, heads = len(self.layers), model.n_heads if config.gate_scope == "head" else 1
        self.n_heads = model.n_heads
        shape = (count, config.prompt_length, model.dim)
        self.prompts = nn.Parameter(torch.randn(shape, generator=generator) * config.prompt_std)
        self.gates = nn.Parameter(torch.zeros(count, heads))
        if visual is not None and not self.layers:
            raise ValueError("visual needs layers with prompts, got none")
        self.projector = None
        if visual is not None:
            self.projector = Projector(visual, model.dim, generator=generator)
        for name, tuned_shape in self.tuning.shapes(shape_of(model)).items():
            value = torch.zeros if name.startswith("bias_") else torch.ones
            self.register_parameter(name, nn.Parameter(value(tuned_shape)))

    def multipliers(self) -> Tensor:
        """Gate multipliers (L, H) in float32: the only place where tanh is applied to a gate."""
        gates = self.gates.float()
        if self.config.gate_activation == "tanh":
            gates = gates.tanh()
        return gates.expand(-1, self.n_heads)

    def visual_tokens(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """Each sequence's token (B, C) for `Llama.project`, differentiable in the projector.

        Args:
            features: (B, F) of an image each; anything where there is none.
            present: (B,) bool, which sequences have an image; None where all have.

        Raises:
            ValueError: the adapter takes no images, or other features.
        """
        if self.projector is None:
            raise ValueError("features must be left out: this adapter has no projector")
        wanted = self.projector.config.features
        if features.ndim != 2 or features.shape[1] != wanted:
            raise ValueError(f"features must have shape (B, {wanted}), got {(*features.shape,)}")
        if present is None:
            return self.projector(features)
        # not by a product: what stands for an image that is not there may be NaN
        absent = ~present[:, None]
        return self.projector(features.masked_fill(absent, 0.0)).masked_fill(absent, 0.0)

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """The tuning's parameters by name: "bias_wq" (N, out), "norm" (C,), of N layers each."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name not in ("prompts", "gates") and not name.startswith("projector.")
        }

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group name, as optimisers and checkpoints know them."""
        found = {"prompts": [self.prompts], "gates": [self.gates]} if self.layers else {}
        if self.projector is not None:
            found["projector"] = list(self.projector.parameters())
        for group in self.tuning.groups:
            found[group] = [
                parameter
                for name, parameter in self.tuned_parameters().items()
                if (name.partition("_")[0] if name.startswith(("bias_", "scale_")) else "norm")
                == group
            ]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a file of the adapter holds, by name; without prompts no gates either."""
        own = {name: value.detach() for name, value in self.state_dict().items()}
        return (
            own if self.layers else {n: v for n, v in own.items() if n in self.tuned_parameters()}
        )
