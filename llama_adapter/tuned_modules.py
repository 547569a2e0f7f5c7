"""A model's layers as an adapter's biases, scales, norms and LoRA make them, beside the model.

Every module on the way to a changed leaf is copied shallowly: the copies share the model's weights
and its code, and only the changed leaves are others. The model without an adapter runs as before.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from adapter_kernels import linear
from llama_adapter.tuning import LAYER_NORMS


class TunedLinear(nn.Module):
    """y = V (s * x) + b, or y = s * (V x + b) with the scale on the output side; V = W + B A."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        scale_side: str | None = None,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
    ) -> None:
        """Share `weight` W (N, C); all else is cast to its dtype.

        Args:
            weight: the frozen one.
            bias: (N,).
            scale: (C,) or (N,).
            scale_side: "input" or "output".
            lora_a, lora_b: A (r, C) and B (N, r), whose product is never formed.
        """
        super().__init__()
        self.weight, self.scale_side = weight, scale_side
        self.bias, self.scale, self.lora_a, self.lora_b = (
            None if x is None else x.to(weight.dtype) for x in (bias, scale, lora_a, lora_b)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., N)."""
        if self.scale is not None and self.scale_side == "input":
            x = x * self.scale
        y = linear(x, self.weight)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + linear(linear(x, self.lora_a), self.lora_b)
        if self.bias is not None:
            y = y + self.bias
        if self.scale is not None and self.scale_side == "output":
            y = y * self.scale
        return y


@dataclass(frozen=True)
class TunedModules:
    """The tuned layers, the tuned last norm, and the tuned projection to logits if it is one."""

    layers: list[nn.Module]
    norm: nn.Module
    output: TunedLinear | None


def tune(
    model: nn.Module,
    output_weight: Tensor,
    parameters: Mapping[str, Tensor],
    scale_side: str | None,
) -> TunedModules:
    """The modules of a model with an adapter's parameters in place, differentiable in them.

    Args:
        model: has `layers`, of attention, feed_forward and two norms, and `norm`.
        output_weight: (vocabulary, C) of the logits.
        parameters: "bias_wq" (n_layers, out), "scale_wq", "lora_a_wq" (n_layers, r, in),
            "attention_norm" (n_layers, C), "norm" (C,), "bias_output" (vocabulary,) and so on,
            those that there are.
        scale_side: "input" or "output" of the linear maps; None without scales.
    """
    # at once: the gradient of a row by itself is as large as all rows are
    rows = {
        name: value.unbind()
        for name, value in parameters.items()
        if name != "norm" and not name.endswith("_output")
    }

    def linear_of(name: str, weight: Tensor, row: int | None) -> TunedLinear | None:
        found: dict[str, Tensor] = {}
        for kind in ("bias", "scale", "lora_a", "lora_b"):
            full = f"{kind}_{name}"
            if full in parameters:
                found[kind] = parameters[full] if row is None else rows[full][row]
        return TunedLinear(weight, scale_side=scale_side, **found) if found else None

    def tuned(module: nn.Module, row: int) -> nn.Module:
        changed: dict[str, nn.Module | None] = {}
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                new = linear_of(name, child.weight, row)
            elif name in rows:
                new = _norm(child, rows[name][row])
            else:
                new = tuned(child, row)
            changed[name] = child if new is None else new
        twin = copy.copy(module)
        twin._modules = changed
        return twin

    layers, norm = cast(nn.ModuleList, model.layers), cast(nn.Module, model.norm)
    return TunedModules(
        [tuned(layer, row) for row, layer in enumerate(layers)],
        _norm(norm, parameters["norm"]) if "norm" in parameters else norm,
        linear_of("output", output_weight, None),
    )


@torch.no_grad()
def copy_norms(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Let an adapter's norms begin as the model's own.

    Args:
        model: has `layers`, of two norms each, and `norm`.
        parameters: the adapter's; those that are norms are written.
    """
    if "norm" not in parameters:
        return
    layers = cast(nn.ModuleList, model.layers)
    for name in LAYER_NORMS:
        own = [cast(Tensor, getattr(layer, name).weight) for layer in layers]
        parameters[name].copy_(torch.stack(own))
    parameters["norm"].copy_(cast(Tensor, cast(nn.Module, model.norm).weight))


def _norm(module: nn.Module, weight: Tensor) -> nn.Module:
    """The norm with another weight (C,), which stays float32: its product is."""
    twin = copy.copy(module)
    twin._parameters = {}
    twin.weight = weight.view(-1)
    return twin
