"""A model's layers as an adapter's biases, scales and norms make them, without touching the model.

Every module on the way to a changed leaf is copied shallowly: the copies share the model's weights
and its code, and only the changed leaves are others. The model without an adapter runs as before.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from adapter_kernels import linear


class TunedLinear(nn.Module):
    """y = W (s * x) + b, or y = s * (W x + b) with the scale on the output side."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scale: Tensor | None, scale_side: str | None
    ) -> None:
        """Share `weight` (N, C); bias (N,), scale (C,) or (N,) are cast to its dtype."""
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.scale = None if scale is None else scale.to(weight.dtype)
        self.scale_side = scale_side

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., N)."""
        if self.scale is not None and self.scale_side == "input":
            x = x * self.scale
        y = linear(x, self.weight)
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
        parameters: "bias_wq" (n_layers, out), "scale_wq", "attention_norm" (n_layers, C), "norm"
            (C,), "bias_output" (vocabulary,) and so on, those that there are.
        scale_side: "input" or "output" of the linear maps; None without scales.
    """

    def linear_of(name: str, weight: Tensor, row: int | None) -> TunedLinear | None:
        found = [parameters.get(f"{kind}_{name}") for kind in ("bias", "scale")]
        if found == [None, None]:
            return None
        bias, scale = (x if x is None or row is None else x[row] for x in found)
        return TunedLinear(weight, bias, scale, scale_side)

    def tuned(module: nn.Module, row: int) -> nn.Module:
        changed: dict[str, nn.Module | None] = {}
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                new = linear_of(name, child.weight, row)
            elif name in parameters:
                new = _norm(child, parameters[name][row])
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


def _norm(module: nn.Module, weight: Tensor) -> nn.Module:
    """The norm with another weight (C,), which stays float32: its product is."""
    twin = copy.copy(module)
    twin._parameters = {}
    twin.weight = weight.view(-1)
    return twin
