"""The linear map, on a CPU at the speed of memory where its rows are few."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by the rows of a weight, as torch.nn.functional.linear without bias.

        out[..., n] = sum over c of x[..., c] weight[n, c]

    Up to 8 rows in float32 on a CPU are native.cpp's where `load_native` succeeded: it reads the
    weight as fast as memory allows, and a row's result does not depend on the others. All else,
    and every gradient, is torch's.

    Args:
        x: (..., C).
        weight: (N, C), like x; a quantised weight's own dtype decides what torch computes.

    Returns:
        out (..., N).

    Raises:
        RuntimeError: by torch, where shapes, dtypes or devices do not fit.

    Source: Touvron et al., LLaMA, section 2.2: every projection is one, without bias.
    """
    done = None if torch.compiler.is_compiling() else native.linear(x, weight)
    return F.linear(x, weight) if done is None else done
