"""Which backend attends: what a call's device, dtype and layout allow, best first.

On a GPU the order is a table, never a timing at run time. It does not look at the prompt or the
gate, so a gate of 0 gives bitwise what attention without a prompt gives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.arch import capability_of
from adapter_kernels.backend import HAS_TRITON, INTERPRETED, runs_kernels

from .library_attention import LIBRARIES, Library

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rule:
    """When a GPU's calls go to a backend first, and why.

    Attributes:
        backend: "triton" or "hybrid".
        reason: the measurement, or "unmeasured" and what the choice rests on until there is one.
        library: of the hybrid.
        head_dim: D up to which the rule holds.
        keys: S from which on it holds.
        directions: "forward" (no gradient wanted) and "training".
    """

    backend: str
    reason: str
    library: str = "flash"
    head_dim: int = 256
    keys: int = 0
    directions: tuple[str, ...] = ("forward", "training")


# published rates (TFLOP/s, bf16, D = 128, 2,048 keys, causal) until `make gpu` has measured ours
_AMPERE = Rule(
    "triton",
    "unmeasured: two calls of FlashAttention 2, at 180 each, are beaten by one at 129 to 138; the "
    "backward pass is about even, and bitwise repeatable",
)
_SMALL = Rule("triton", "unmeasured: as sm_80, whose instructions it shares")
_LARGE_MMA = (
    Rule(
        "hybrid",
        "unmeasured: cuDNN at 534 forward and 402 backward against 330 to 430 and 250 to 300 of "
        "Triton's own attention",
        library="cudnn",
        head_dim=128,
        keys=1024,
    ),
    Rule("triton", "unmeasured: short rows are bound by launches, of which it needs fewest"),
)
RULES: dict[int, tuple[Rule, ...]] = {
    80: (_AMPERE,),
    86: (_SMALL,),
    89: (_SMALL,),
    90: _LARGE_MMA,
    100: _LARGE_MMA,
    120: (_SMALL,),
}


def rule_for(capability: int, head_dim: int, keys: int, direction: str) -> Rule:
    """The first rule of a GPU that holds for a call."""
    return next(
        rule
        for rule in RULES[capability]
        if head_dim <= rule.head_dim and keys >= rule.keys and direction in rule.directions
    )


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether a call is one of training."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def kernels_for(q: Tensor) -> tuple[str, ...]:
    """The backends of what no library computes, best first."""
    return ("triton", "reference") if runs_kernels(q) else ("reference",)


def cached_backends(q: Tensor, scale: float, eight_bits: bool = False) -> tuple[str, ...]:
    """The backends that attend to a cache, by pages or not, best first: on a CPU a library.

    Args:
        q: the queries.
        scale: of the scores.
        eight_bits: whether the cache holds numbers of 8 bits, which no library reads.
    """
    found = list(kernels_for(q))
    if q.device.type == "cpu" and scale > 0 and not eight_bits:
        found.insert(found.index("reference"), "hybrid")
    return tuple(found)


def has_library(
    q: Tensor, keys: int, scale: float, causal: bool, packed: bool, padded: bool
) -> bool:
    """Whether a library computes this: on a GPU it masks nothing but its own square's diagonal."""
    if scale <= 0 or q.device.type not in ("cpu", "cuda"):
        return False
    if q.device.type == "cpu":
        return True
    square = not causal or keys == q.shape[1]
    known = capability_of(q.device) is not None
    # cuDNN takes no sequence of one
    several = q.shape[1] > 1 and keys > 1
    return known and q.dtype in HALVES and square and several and not packed and not padded


def backends_for(
    q: Tensor, keys: int, scale: float, *, causal: bool, packed: bool, padded: bool, training: bool
) -> tuple[str, ...]:
    """The backends that compute an attention to tokens, best first.

    Args:
        q: the queries.
        keys: S, or the longest of packed sequences.
        scale: of the scores.
        causal, packed, padded: whether there is a diagonal, cu_seqlens, or key bounds.
        training: whether a gradient is wanted.
    """
    found = list(kernels_for(q))
    if has_library(q, keys, scale, causal, packed, padded):
        first = q.device.type == "cpu" and not INTERPRETED
        if q.device.type == "cuda":
            direction = "training" if training else "forward"
            capability = capability_of(q.device)
            assert capability is not None, "has_library says so"
            rule = rule_for(capability, q.shape[-1], keys, direction)
            first = rule.backend == "hybrid" or not HAS_TRITON
        found.insert(0 if first else found.index("reference"), "hybrid")
    return tuple(found)


def library_of(q: Tensor) -> Library:
    """The library that attends for these queries."""
    if q.device.type != "cuda":
        return LIBRARIES["cpu"]
    rules = RULES.get(capability_of(q.device) or 0, ())
    chosen = next((rule.library for rule in rules if rule.backend == "hybrid"), "flash")
    # cuDNN has no backward pass for wider heads, and promises equal bits to nobody
    flash = q.shape[-1] > 128 or torch.are_deterministic_algorithms_enabled()
    return LIBRARIES["flash" if flash else chosen]
