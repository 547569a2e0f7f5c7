"""LLaMA with all that an adapter may change, in plain float64 formulas for one sequence.

What the package's model, in any layout, and its gradients are compared with.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.model import Llama

Values = Mapping[str, Tensor]


def precise(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's parameters in float64, leaves of a graph of their own."""
    return {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}


def rotate(x: Tensor, theta: float) -> Tensor:
    """Neighbouring channels of x (T, heads, D) as complex numbers, turned by their position."""
    t, d = x.shape[0], x.shape[-1]
    frequency = theta ** -(torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones(()).double(), torch.arange(t)[:, None] * frequency)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


class PlainLlama:
    """softmax(tokens) + g_p softmax(prompt) + g_v softmax(images), layer by layer."""

    def __init__(self, model: Llama, adapter: Adapter | None, values: Values) -> None:
        """`values` are the adapter's parameters by name, from `precise`."""
        self.config, self.adapter, self.values = model.config, adapter, values
        self.weights = {n: w.detach().double() for n, w in model.state_dict().items()}

    def linear(self, name: str, x: Tensor, layer: int | None, *, prompt: bool = False) -> Tensor:
        """y = W x with the adapter's bias, scale and LoRA of this map; `prompt` is what x is."""
        place = "" if layer is None else f"layers.{layer}."
        place += {"w": "attention." if name in ("wq", "wk", "wv", "wo") else "feed_forward."}.get(
            name[0], ""
        )
        kinds = ("bias", "scale", "lora_a", "lora_b")
        found = {kind: self.values.get(f"{kind}_{name}") for kind in kinds}
        bias, scale, a, b = (v if v is None or layer is None else v[layer] for v in found.values())
        side = None if self.adapter is None else self.adapter.tuning.scale_side
        lora = None if self.adapter is None else self.adapter.tuning.lora
        if scale is not None and side == "input":
            x = x * scale
        weight = self.weights[f"{place}{name}.weight"]
        if a is not None and b is not None and lora is not None and (lora.prompts or not prompt):
            weight = weight + b @ a
        y = x @ weight.T
        y = y if bias is None else y + bias
        return y * scale if scale is not None and side == "output" else y

    def norm(self, name: str, x: Tensor, layer: int | None) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * w."""
        own = self.values.get(name)
        place = name if layer is None else f"layers.{layer}.{name}"
        w = self.weights[f"{place}.weight"] if own is None else own if layer is None else own[layer]
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * w

    def gate(self, gates: Tensor) -> Tensor:
        """Multipliers (H,) of one layer's gates."""
        assert self.adapter is not None
        tanh = self.adapter.config.gate_activation == "tanh"
        return (gates.tanh() if tanh else gates).expand(self.config.n_heads)

    def attention(self, x: Tensor, layer: int, visual: Tensor | None) -> Tensor:
        """All three segments of one layer, for normed tokens (T, C)."""
        h, g, d = self.config.n_heads, self.config.kv_heads, self.config.head_dim
        t = x.shape[0]

        def keys(rows: Tensor, prompt: bool = True) -> tuple[Tensor, Tensor]:
            k = self.linear("wk", rows, layer, prompt=prompt).view(-1, g, d)
            return k, self.linear("wv", rows, layer, prompt=prompt).view(-1, g, d)

        def soft(k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            k, v = (one.repeat_interleave(h // g, 1) for one in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(d)
            scores = scores if mask is None else scores.masked_fill(mask, -math.inf)
            return torch.einsum("hts,shd->thd", scores.softmax(-1), v)

        k, v = keys(x, prompt=False)
        theta = self.config.rope_theta
        q = rotate(self.linear("wq", x, layer).view(t, h, d), theta)
        out = soft(rotate(k, theta), v, torch.ones(t, t).triu(1).bool())
        adapter = self.adapter
        if adapter is not None and layer in adapter.layers:
            row = adapter.layers.index(layer)
            rows = self.values["prompts"][row]
            late = visual is not None and "visual_gates" not in self.values
            gate = self.gate(self.values["gates"][row])
            out = out + gate[:, None] * soft(*keys(rows + visual if late else rows))
        early = self.values.get("visual_gates", ())
        if visual is not None and layer < len(early):
            gate = self.gate(early[layer])
            out = out + gate[:, None] * soft(*keys(visual))
        return self.linear("wo", out.flatten(1), layer)

    def hidden(self, tokens: Tensor, visual: Tensor | None = None) -> Tensor:
        """Final normed states (T, C) of tokens (T,), with an image's token (C,) or (P_v, C).

        Late, where there are no gates of images, it is added to the prompt rows.
        """
        x = self.weights["tok_embeddings.weight"][tokens]
        for layer in range(self.config.n_layers):
            x = x + self.attention(self.norm("attention_norm", x, layer), layer, visual)
            y = self.norm("ffn_norm", x, layer)
            gated = torch.nn.functional.silu(self.linear("w1", y, layer))
            x = x + self.linear("w2", gated * self.linear("w3", y, layer), layer)
        return self.norm("norm", x, None)

    def logits(self, tokens: Tensor, visual: Tensor | None = None) -> Tensor:
        """(T, vocabulary)."""
        return self.linear("output", self.hidden(tokens, visual), None)
