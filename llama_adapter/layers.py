"""The parts of a LLaMA layer that see one token at a time: linear maps, norms, feed-forward."""

import torch
from torch import Tensor, nn

from adapter_kernels import linear, rms_norm, swiglu
from llama_adapter.config import LlamaConfig


class Linear(nn.Linear):
    """The model's one linear map, y = W x; every projection of tokens and prompts passes here.

    Where an adapter has biases and scales, a `TunedLinear` of the same weight takes its place.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as allocated: `Llama` initialises or a checkpoint assigns it."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        return linear(input, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        return rms_norm(x, self.weight, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise x + residual; returns the norm and the sum."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))
