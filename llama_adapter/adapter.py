"""The adapter: prompts and gates of the adapted layers, as data beside a frozen model.

With LLaMA-Adapter V2's groups also biases, scales and LoRA of linear maps, and norms; for images
the projector that makes tokens of their features, and gates where those are a prompt of their own;
for a task of another host its head.
An `Adapter` holds parameters and knows where they belong. `Llama.project` turns it into `Prompts`,
what the model's layers take; whoever calls the model owns the result, so training projects anew at
each step and inference once per adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.config import (
    PROMPT_KINDS,
    AdapterConfig,
    HeadConfig,
    HostConfig,
    LlamaConfig,
    VisualConfig,
    shape_of,
)
from llama_adapter.projector import make_projector
from llama_adapter.tuned_modules import TunedModules
from llama_adapter.tuning import GROUPS as TUNED
from llama_adapter.tuning import Tuning, tuned_group

# groups of parameters that text trains, and that images train (LLaMA-Adapter V2, section 4.2)
LANGUAGE = ("prompts", "gates", *TUNED)
VISUAL = ("projector", "visual_gates")


@dataclass(frozen=True)
class Rows:
    """What a layer projects for a prompt segment.

    Attributes:
        prompt: (P, C), or (B, P, C).
        gate: multipliers (H,), or (B, H).
        image: (B, C), added to all rows of a sequence, or (B, P, C); None adds nothing.
    """

    prompt: Tensor
    gate: Tensor
    image: Tensor | None = None


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
        visual: layer index to the segment of images fused early, k and v (B,P_v,G,D), gate (B,H).
        visual_index: (B,) int32, each sequence's row of `visual`, -1 for none; in a bank (A,).
    """

    layers: Mapping[int, LayerPrompt]
    adapter_index: Tensor | None = None
    prompt_lengths: Tensor | None = None
    tuned: TunedModules | None = None
    visual: Mapping[int, LayerPrompt] = field(default_factory=dict)
    visual_index: Tensor | None = None

    def of(self, adapter_index: Tensor) -> "Prompts":
        """A bank's prompts for a batch whose sequences have these rows (B,) int32."""
        images = self.visual_index
        if images is not None:
            own = images[adapter_index.long().clamp(min=0)]
            images = torch.where(adapter_index < 0, adapter_index, own)
        return replace(self, adapter_index=adapter_index, visual_index=images)

    def segments(self, layer: int) -> list[dict[str, Any]]:
        """A layer's prompt, then its images', as attention takes them; at least one of nothing."""
        held = (
            (self.layers, self.adapter_index, self.prompt_lengths),
            (self.visual, self.visual_index, None),
        )
        found = []
        for prompts, index, lengths in held:
            one = prompts.get(layer)
            if one is not None:
                segment = {"prompt_k": one.k, "prompt_v": one.v, "gate": one.gate}
                found.append(segment | {"adapter_index": index, "prompt_lengths": lengths})
        return found or [{}]


def prompt_shape(kind: str, length: int, model: Mapping[str, int]) -> tuple[int, ...]:
    """Of one layer's prompts: (P, C), or keys and values (2, P, G D).

    Args:
        kind: one of PROMPT_KINDS.
        length: P.
        model: the fields of SHAPE_FIELDS that it takes.
    """
    if kind == "hidden":
        return length, model["dim"]
    return 2, length, model["kv_heads"] * model["head_dim"]


def _empty_head(config: HeadConfig) -> nn.Module:
    """Parameters of a head by their names in it, all zero.

    Raises:
        ValueError: a name is no parameter's, or that of a part of the head as well.
    """
    head = nn.Module()
    for name, shape in config.shapes.items():
        module = head
        *path, leaf = name.split(".")
        try:
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
        except KeyError:
            raise ValueError(
                f"head shapes must be by names of parameters, got {name!r} among "
                f"{', '.join(map(repr, config.shapes))}"
            ) from None
    return head


class Adapter(nn.Module):
    """Prompts P_l ~ N(0, prompt_std) and gates g_l = 0 for the topmost L layers.

    Both are float32 whatever the model's dtype. Source: LLaMA-Adapter, sections 3.1 and 3.2.

    Attributes:
        prompts: (L, P, C), the rows prepended to a layer's tokens (equation 1), or with prompt_kind
            "kv" (L, 2, P, G D), their keys and values.
        gates: (L, H), or (L, 1) with gate_scope "layer" (equation 7); before the activation.
        layers: the L layer indices that the rows belong to, ascending; none with a tuning alone.
        tuning: which biases, scales, norms, LoRA there are besides; see `tuned_parameters`.
        projector: of an image's features; None without images.
        visual_gates: (K, H) or (K, 1), of the first K layers' images; None but with early fusion.
        prompt_kind: "hidden", rows that the layer projects, or "kv".
        host: the model that it belongs to.
        head: parameters of the host's task head, by their names there; None without one.
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
        prompt_kind: str = "hidden",
        host: HostConfig | None = None,
    ) -> None:
        """Create an untrained adapter.

        Args:
            config: prompt length, scale, gate convention and how many layers.
            model: the shape of the base model.
            layers: explicit layer indices in place of the topmost `config.n_layers`.
            generator: source of the prompts' random values.
            tuning: groups of biases (0 at first), scales (1), norms (1, not the base's own) and
                LoRA (A uniform within in ** -0.5, B 0, so that nothing changes at first).
            visual: the features of images that it takes; None takes none.
            prompt_kind: one of PROMPT_KINDS.
            host: the model that it belongs to; None is a LLaMA. A head is zero at first.

        Raises:
            ValueError: a layer index is repeated or outside the model, there is a projector
                without a prompt, more layers see the images than there are, or prompt_kind is
                unknown.
        """
        super().__init__()
        self.config = config
        early = 0 if visual is None else visual.layers
        if early > model.n_layers:
            raise ValueError(f"visual layers must be at most {model.n_layers}, got {early}")
        if layers is None:
            layers = config.layers_of(model.n_layers, *([early] if early else []))
        self.layers = tuple(layers)
        fits = all(0 <= layer < model.n_layers for layer in self.layers)
        self.tuning = Tuning() if tuning is None else tuning
        given = self.layers or self.tuning.groups
        if not given or sorted(set(self.layers)) != list(self.layers) or not fits:
            raise ValueError(
                f"layers must be ascending indices below {model.n_layers}, got {self.layers}"
            )
        count, heads = len(self.layers), model.n_heads if config.gate_scope == "head" else 1
        self.n_heads = model.n_heads
        if prompt_kind not in PROMPT_KINDS:
            raise ValueError(f"prompt_kind must be one of {PROMPT_KINDS}, got {prompt_kind!r}")
        self.prompt_kind, self.host = prompt_kind, HostConfig() if host is None else host
        shape = prompt_shape(prompt_kind, config.prompt_length, shape_of(model))
        shape = (count, *shape)
        self.prompts = nn.Parameter(torch.randn(shape, generator=generator) * config.prompt_std)
        self.gates = nn.Parameter(torch.zeros(count, heads))
        if visual is not None and not self.layers:
            raise ValueError("visual needs layers with prompts, got none")
        if visual is not None and not early and visual.tokens not in (1, config.prompt_length):
            raise ValueError(
                "visual tokens fused late must be 1 or one for each of the "
                f"{config.prompt_length} prompt rows, got {visual.tokens}"
            )
        self.projector = None
        if visual is not None:
            self.projector = make_projector(visual, model.dim, generator=generator)
        self.visual_gates = nn.Parameter(torch.zeros(early, heads)) if early else None
        shapes = self.tuning.shapes(shape_of(model))
        self._tuned = frozenset(shapes)
        for name, tuned_shape in shapes.items():
            value = torch.zeros if name.startswith(("bias_", "lora_b_")) else torch.ones
            parameter = nn.Parameter(value(tuned_shape))
            if name.startswith("lora_a_"):
                bound = tuned_shape[-1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            self.register_parameter(name, parameter)
        self.head = None if self.host.head is None else _empty_head(self.host.head)

    def multipliers(self) -> Tensor:
        """Gate multipliers (L, H) in float32."""
        return self._multipliers(self.gates)

    def _multipliers(self, gates: Tensor) -> Tensor:
        """Multipliers (n, H) of n layers' gates: the only place where tanh is applied to a gate."""
        gates = gates.float()
        if self.config.gate_activation == "tanh":
            gates = gates.tanh()
        return gates.expand(-1, self.n_heads)

    def prompt_rows(self, visual: Tensor | None = None) -> dict[int, Rows]:
        """What every adapted layer projects, by layer index.

        Args:
            visual: what `visual_tokens` returned, which late fusion adds to the rows
                (LLaMA-Adapter, equation 10).

        Raises:
            ValueError: visual has the form of another fusion, or the prompts are no rows.
        """
        if self.prompt_kind != "hidden":
            raise ValueError(
                f"prompt_kind must be 'hidden' in this model, got {self.prompt_kind!r}: such "
                "prompts run on models of transformers, through adapt of llama_adapter.hosts"
            )
        early = self.visual_gates is not None
        single = self.projector is None or self.projector.config.single
        if visual is not None and visual.ndim != (2 if single else 3):
            form = "(B, C)" if single else "(B, P, C)"
            kind = "early" if early else "late"
            raise ValueError(
                f"visual must have shape {form} for this {kind} fusion, got {(*visual.shape,)}"
            )
        gates, added = self.multipliers(), None if early else visual
        return {
            layer: Rows(self.prompts[i], gates[i], added) for i, layer in enumerate(self.layers)
        }

    def visual_rows(self, visual: Tensor | None = None) -> dict[int, Rows]:
        """What the first K layers project of images fused early, by layer index: none with late.

        Args:
            visual: (B, P_v, C), what `visual_tokens` returned: rows of their own.
        """
        if visual is None or self.visual_gates is None:
            return {}
        gates = self._multipliers(self.visual_gates)
        return {n: Rows(visual, gate.expand(len(visual), -1)) for n, gate in enumerate(gates)}

    def visual_index(self, visual: Tensor | None) -> Tensor | None:
        """(B,) int32: each sequence's own row of `visual_rows`, -1 for tokens that are all zero."""
        if visual is None or self.visual_gates is None:
            return None
        rows = torch.arange(len(visual), dtype=torch.int32, device=visual.device)
        return rows.masked_fill(~visual.detach().flatten(1).any(1), -1)

    def visual_tokens(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """What `Llama.project` takes for the images of a batch, differentiable in the projector.

        One token (B, C) each, or several (B, P_v, C); zeros where there is no image, which is how
        the model tells.

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
        absent = ~present
        found = self.projector(features.masked_fill(absent[:, None], 0.0))
        return found.masked_fill(absent.view(-1, *[1] * (found.ndim - 1)), 0.0)

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """The tuning's parameters by name: "bias_wq" (N, out), "norm" (C,), of N layers each."""
        return {
            name: parameter for name, parameter in self.named_parameters() if name in self._tuned
        }

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group name, as optimisers and checkpoints know them."""
        found = {"prompts": [self.prompts], "gates": [self.gates]} if self.layers else {}
        if self.projector is not None:
            found["projector"] = list(self.projector.parameters())
        if self.visual_gates is not None:
            found["visual_gates"] = [self.visual_gates]
        for group in self.tuning.groups:
            found[group] = [
                parameter
                for name, parameter in self.tuned_parameters().items()
                if tuned_group(name) == group
            ]
        if self.head is not None:
            found["head"] = list(self.head.parameters())
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a file of the adapter holds, by name; without prompts no gates either."""
        own = {name: value.detach() for name, value in self.state_dict().items()}
        return (
            own if self.layers else {n: v for n, v in own.items() if n in self.tuned_parameters()}
        )
