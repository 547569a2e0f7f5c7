"""Zero-initialized attention as operations of torch: schemas, shapes of results, autograd.

Dense and packed attention are one operation with one backward; decoding, and the prompt segment
alone with its backward, are the others. Each takes the name of its backend, a module with functions
of the same names: reference_launch.py has them all. Arguments are trusted here: op.py checks them.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adapter_kernels.backend import LIBRARY, define, exact, refuse

from .layouts import Layout, Prefix, Prompts, wide


@cache
def launchers(backend: str) -> ModuleType:
    """The module of a backend, imported when first used: Triton's need not be installed."""
    return import_module(f".{backend}_launch", __package__)


_PROMPTS = (
    "Tensor? prompt_k, Tensor? prompt_v, Tensor? gate, Tensor? adapter_index, "
    "Tensor? prompt_lengths"
)
_PREFIX = "Tensor? prefix_k, Tensor? prefix_v, Tensor? prefix_index, Tensor? prefix_lengths"
_LAYOUT = (
    "Tensor? key_starts, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? page_table, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal"
)
_ATTENTION = (
    f"zero_init_attention(Tensor q, Tensor k, Tensor v, {_PROMPTS}, {_PREFIX}, {_LAYOUT}, "
    "float scale, str backend) -> (Tensor, Tensor, Tensor)"
)
_ATTENTION_BACKWARD = (
    "zero_init_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, "
    f"Tensor k, Tensor v, {_PROMPTS}, {_PREFIX}, {_LAYOUT}, float scale, str backend, "
    f"bool[8] needs) -> ({', '.join(['Tensor'] * 8)})"
)
_DECODE = (
    f"zero_init_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, {_PROMPTS}, "
    "Tensor cache_lengths, Tensor? page_table, Tensor? k_scale, Tensor? v_scale, float scale, "
    "str backend) -> Tensor"
)
_PROMPT = (
    f"gated_prompt_attention(Tensor q, {_PROMPTS}, Tensor? cu_seqlens_q, Tensor? out, "
    "float scale, str backend) -> Tensor"
)
_PROMPT_BACKWARD = (
    f"gated_prompt_attention_backward(Tensor dout, Tensor q, {_PROMPTS}, Tensor? cu_seqlens_q, "
    "float scale, str backend, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


# where q, k, v, prompt_k, prompt_v, gate, prefix_k and prefix_v stand among the tensors
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 8, 9)


def _prompts_first(flat: tuple[Any, ...]) -> tuple[Prompts, tuple[Any, ...]]:
    """The prompt arguments of a schema as a bundle, and what follows them."""
    count = len(Prompts._fields)
    return Prompts(*flat[:count]), flat[count:]


def _prefix_first(flat: tuple[Any, ...]) -> tuple[Prefix, tuple[Any, ...]]:
    """The prefix arguments of a schema as a bundle, and what follows them."""
    count = len(Prefix._fields)
    return Prefix(*flat[:count]), flat[count:]


def _layout_first(flat: tuple[Any, ...]) -> tuple[Layout, tuple[Any, ...]]:
    """The layout arguments of a schema as a bundle, and what follows them."""
    count = len(Layout._fields)
    return Layout(*flat[:count]), flat[count:]


def _plain(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results as compiled code was told that they lie, one row after the other."""
    return tuple(x.contiguous() for x in results)


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    prompts, rest = _prompts_first(rest)
    prefix, rest = _prefix_first(rest)
    layout, (scale, backend) = _layout_first(rest)
    with exact(q):
        return _plain(launchers(backend).attention(q, k, v, prompts, prefix, layout, scale))


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *batch, rows, heads, _ = q.shape
    lse = q.new_empty((*batch, heads, rows), dtype=wide(q.dtype))
    own = rest[-1] == "hybrid" and rest[0] is not None
    return q.new_empty(q.shape), lse, q.new_empty(q.shape if own else 0)


def _attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    qkv, (prompts, rest) = rest[:3], _prompts_first(rest[3:])
    prefix, rest = _prefix_first(rest)
    layout, (scale, backend, needs) = _layout_first(rest)
    with exact(out):
        gradients = launchers(backend).attention_backward(
            dout, dlse, out, lse, *qkv, prompts, prefix, layout, scale, tuple(needs)
        )
        return _plain(gradients)


def _gradients_fake(q: Tensor, inputs: Sequence[Any], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """A gradient like each input where it is needed, else an empty tensor."""
    return tuple(
        x.new_empty(x.shape) if need and x is not None else q.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients_fake(out, [rest[i] for i in _DIFFERENTIABLE], rest[-1])


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Tensor:
    prompts, (*cache, scale, backend) = _prompts_first(rest)
    with exact(q):
        out = launchers(backend).decode(q, k_cache, v_cache, prompts, *cache, scale)
        return out.contiguous()


def _prompt(q: Tensor, *rest: Any) -> Tensor:
    prompts, (cu_seqlens_q, out, scale, backend) = _prompts_first(rest)
    with exact(q):
        return launchers(backend).prompt(q, prompts, cu_seqlens_q, out, scale).contiguous()


def _prompt_backward(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    prompts, (cu_seqlens_q, scale, backend, needs) = _prompts_first(rest)
    with exact(q):
        gradients = launchers(backend).prompt_backward(
            dout, q, prompts, cu_seqlens_q, scale, tuple(needs)
        )
        return _plain(gradients)


def _prompt_backward_fake(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients_fake(q, (q, *rest[:3]), rest[-1])


def _like_queries(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


for _schema, _function, _fake in (
    (_ATTENTION, _attention, _attention_fake),
    (_ATTENTION_BACKWARD, _attention_backward, _attention_backward_fake),
    (_DECODE, _decode, _like_queries),
    (_PROMPT, _prompt, _like_queries),
    (_PROMPT_BACKWARD, _prompt_backward, _prompt_backward_fake),
):
    define(_schema, _function, _fake)

attention_op = torch.ops.adapter_kernels.zero_init_attention.default
attention_backward_op = torch.ops.adapter_kernels.zero_init_attention_backward.default
decode_op = torch.ops.adapter_kernels.zero_init_attention_decode.default
prompt_op = torch.ops.adapter_kernels.gated_prompt_attention.default
prompt_backward_op = torch.ops.adapter_kernels.gated_prompt_attention_backward.default


# q, k, v, five prompt arguments, four of the prefixes, and five of the layout, page_table last;
# numbers follow
_TENSORS = 17
# q, five prompt arguments, cu_seqlens_q; then out, which the backward does not need, and numbers
_PROMPT_TENSORS = 7


def _keep_attention(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    out, lse, own = output
    # the hybrid needs the tokens' own output, the others the whole one
    ctx.save_for_backward(own if own.shape == out.shape else out, lse, *inputs[:_TENSORS])
    ctx.plain = inputs[_TENSORS:]
    ctx.mark_non_differentiable(own)
    ctx.set_materialize_grads(False)


def _attention_gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, _down: None
) -> tuple[Any, ...]:
    out, lse, *inputs = ctx.saved_tensors
    if inputs[_TENSORS - 1] is not None:
        raise RuntimeError("zero_init_attention_varlen with page_table is forward only")
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dout is not None or dlse is not None:
        dout = torch.zeros_like(out) if dout is None else dout
        grads = attention_backward_op(dout, dlse, out, lse, *inputs, *ctx.plain, needs)
        for i, gradient, need in zip(_DIFFERENTIABLE, grads, needs, strict=True):
            found[i] = gradient if need else None
    return tuple(found)


def _keep_prompt(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_PROMPT_TENSORS])
    ctx.plain = inputs[_PROMPT_TENSORS + 1 :]


def _prompt_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = [None] * 4
    if any(needs):
        grads = prompt_backward_op(dout, *ctx.saved_tensors, *ctx.plain, needs)
    asked = (g if need else None for g, need in zip(grads, needs, strict=True))
    # `out` was only added to, so its gradient is that of the sum
    return *asked, None, None, None, dout if ctx.needs_input_grad[7] else None, None, None


for _name, _gradients, _keep in (
    ("zero_init_attention", _attention_gradients, _keep_attention),
    ("gated_prompt_attention", _prompt_gradients, _keep_prompt),
    (
        "zero_init_attention_decode",
        refuse("zero_init_attention_decode is forward only: train with zero_init_attention"),
        None,
    ),
    *(
        (f"{name}_backward", refuse(f"{name} cannot be differentiated twice"), None)
        for name in ("zero_init_attention", "gated_prompt_attention")
    ),
):
    torch.library.register_autograd(
        f"adapter_kernels::{_name}", _gradients, setup_context=_keep, lib=LIBRARY
    )
