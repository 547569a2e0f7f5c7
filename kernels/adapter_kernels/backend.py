"""Which implementation runs an operation: the argument `backend`, and what this build has.

`backend=None` chooses the best implementation present; a name forces one and is an error where it
is missing. Running the reference on a CUDA tensor warns once per operation, because it is correct
there but slow. A call that torch.compile traces does not warn: it would break the graph.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arch import capability_of

# every op of this package is defined in this one namespace: torch.ops.adapter_kernels.*
LIBRARY = torch.library.Library("adapter_kernels", "DEF")

# Triton reads the same variable when it is imported; kernels then run on the CPU, in numpy
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

HAS_TRITON = find_spec("triton") is not None

BACKENDS = ("triton", "native", "hybrid", "reference")
_warned: set[str] = set()


def refuse(message: str) -> Callable[..., NoReturn]:
    """A rule that raises RuntimeError: for what an operation does not do."""

    def rule(*args: Any) -> NoReturn:
        raise RuntimeError(message)

    return rule


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operation of the package, `adapter_kernels::NAME`.

    Args:
        schema: `NAME(Tensor x, ...) -> ...`.
        function: what computes it, below autograd, on every device.
        fake: what gives its results' shapes and dtypes without computing.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adapter_kernels::{name}", fake, lib=LIBRARY)
    message = (
        f"torch.vmap over {name} is not supported: make the mapped dimension part of the batch"
    )
    torch.library.register_vmap(f"adapter_kernels::{name}", refuse(message), lib=LIBRARY)


def exact(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off where x lies: it would round the float32 inside an operation."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton kernels run where x lies; the interpreter computes nonsense in bfloat16."""
    if x.dtype == torch.float64:
        return False
    if x.device.type == "cuda":
        return HAS_TRITON and capability_of(x.device) is not None
    return INTERPRETED and x.device.type == "cpu" and x.dtype != torch.bfloat16


def choose_backend(
    op: str,
    requested: str | None,
    device: torch.device,
    implemented: tuple[str, ...],
    *differentiable: Tensor | None,
) -> str:
    """Name the implementation of `op` that runs on `device`.

    Args:
        op: the public function's name, for messages.
        requested: the caller's `backend` argument; None takes the first of `implemented`.
        device: where the tensors are.
        implemented: the names `op` has on that device, best first.
        differentiable: the inputs that have a gradient. No implementation has forward mode, and
            torch would drop a tangent of theirs without a word.

    Returns:
        One of `implemented`.

    Raises:
        ValueError: `requested` is no backend, or one that `op` does not have on `device`.
        RuntimeError: an input has a forward-mode tangent.
    """
    # without a level there are no tangents
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        for tensor in differentiable:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{op} has no forward-mode derivative (jvp): use backward")
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {requested!r}")
    chosen = implemented[0] if requested is None else requested
    if chosen not in implemented:
        raise ValueError(
            f"backend {chosen!r} is not available for {op} on {device.type}; "
            f"available: {', '.join(implemented)}"
        )
    if chosen == "reference" and device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_once(op, "it was asked for" if requested else "no kernel is implemented for it yet")
    return chosen


def _warn_once(op: str, why: str) -> None:
    if op not in _warned:
        _warned.add(op)
        # the frame that called the public function
        warnings.warn(
            f"{op} runs its reference implementation on CUDA, which is correct but slow: {why}",
            stacklevel=4,
        )
