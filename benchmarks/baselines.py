"""What computes attention with a prompt today beside our kernels, and the truth for all of them.

Each baseline is written from its formula, as its users run it: the official code's concatenations,
two library calls with glue between them, FlexAttention twice, the attention block that PEFT wraps.
One library call without a prompt is the floor. Letters are those of kernels/README.md.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.roofline import DTYPES, Shape

# "prompt" is the operation itself; "plain" lacks the prompt; "block" has the projections around it,
# without rotary embedding, which all would share
KINDS = ("prompt", "plain", "block")
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs of one kind at one shape.

    Attributes:
        kind: one of KINDS.
        shape: of the attention; T = S.
        leaves: by name what gets gradients. prompt: q (B,T,H,D), k and v (B,S,G,D), prompt_k and
            prompt_v (P,G,D), gate (H,) float32; plain: q, k, v; block: x (B,T,C), prompt (P,C),
            gate (1,) float32, as PEFT has one gate a layer; C = H D.
        weights: of a block, frozen: wq, wo (C,C), wk, wv (G D,C).
        dout: the gradient of the result, (B,T,H,D), or (B,T,C) of a block.
    """

    kind: str
    shape: Shape
    leaves: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    dout: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """A leaf or a weight."""
        return self.leaves[name] if name in self.leaves else self.weights[name]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """N(0, 1): a GPU clocks higher on zeros than on data."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def random_gates(heads: int, generator: torch.Generator) -> Tensor:
    """(H,) float32 gates of both signs, some above 1: a gate of 0 or 1 would hide mistakes."""
    gates = torch.rand(heads, generator=generator, device=generator.device) * 3 - 1.5
    gates[::4] = 1.25
    return gates


def problem(kind: str, shape: Shape, device: torch.device) -> Problem:
    """Random inputs, the same whenever they are drawn for a kind and a shape.

    Args:
        kind: one of KINDS.
        shape: with as many queries as keys.
        device: where the inputs are.

    Raises:
        ValueError: T differs from S, whose diagonals the libraries place differently.
    """
    if shape.tokens != shape.keys:
        raise ValueError(f"tokens must be keys = {shape.keys}, got {shape.tokens}")
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(_normal, dtype=DTYPES[shape.dtype], generator=generator)
    batch, length, heads, width = shape.batch, shape.tokens, shape.heads, shape.head_dim
    rows, keys = (batch, length, heads, width), (batch, length, shape.kv_heads, width)
    model = heads * width
    weights: dict[str, Tensor] = {}
    if kind == "block":
        leaves = {"x": normal((batch, length, model)), "prompt": normal((shape.prompt, model))}
        leaves["gate"] = random_gates(1, generator)
        for name, out in (
            ("wq", model), ("wk", keys[2] * width), ("wv", keys[2] * width), ("wo", model)
        ):  # fmt: skip
            weights[name] = normal((out, model)) * model**-0.5
        dout = normal((batch, length, model))
    else:
        leaves = {"q": normal(rows), "k": normal(keys), "v": normal(keys)}
        if kind == "prompt":
            prompt = (shape.prompt, *keys[2:])
            leaves |= {"prompt_k": normal(prompt), "prompt_v": normal(prompt)}
            leaves["gate"] = random_gates(heads, generator)
        dout = normal(rows)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return Problem(kind, shape, leaves, weights, dout)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the truth: float32 of half precisions, float64 of float32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _formula(parts: Mapping[str, Tensor], hidden: Tensor | None, scale: float) -> Tensor:
    """One head: softmax(scale q k^T + mask) v + gate softmax(scale q pk^T) pv."""
    scores = (parts["q"] * scale) @ parts["k"].mT
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1) @ parts["v"]
    if "gate" in parts:
        own = ((parts["q"] * scale) @ parts["prompt_k"].mT).softmax(-1)
        out = out + parts["gate"] * (own @ parts["prompt_v"])
    return out


def _attention_results(
    leaves: Mapping[str, Tensor], dout: Tensor, causal: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """out and every gradient in `dtype`, one head at a time: scores of all heads would not fit."""
    batch, length, heads, width = leaves["q"].shape
    group = heads // leaves["k"].shape[2]
    hidden = None
    if causal:
        hidden = torch.ones(length, length, dtype=torch.bool, device=dout.device).triu(1)
    sums = torch.promote_types(dtype, torch.float32)
    totals = {name: torch.zeros_like(leaf, dtype=sums) for name, leaf in leaves.items()}
    out = torch.zeros_like(leaves["q"], dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            g = h // group
            where = {"q": (b, slice(None), h), "gate": (h,)}
            where |= {name: (b, slice(None), g) for name in ("k", "v")}
            where |= {name: (slice(None), g) for name in ("prompt_k", "prompt_v")}
            parts = {
                name: leaf.detach()[where[name]].to(dtype).requires_grad_()
                for name, leaf in leaves.items()
            }
            head = _formula(parts, hidden, width**-0.5)
            pulled = dout[b, :, h].to(dtype)
            gradients = torch.autograd.grad(head, list(parts.values()), pulled)
            out[b, :, h] = head.detach()
            for name, gradient in zip(parts, gradients, strict=True):
                totals[name][where[name]] += gradient
    return {"out": out} | {f"d{name}": total.to(dtype) for name, total in totals.items()}


def _projected(x: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """x W^T with its last dimension cut into heads."""
    return F.linear(x, weight).unflatten(-1, (-1, head_dim))


def _block_results(given: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, dx, dprompt and dgate of a block, in `dtype`."""
    x, prompt = (given[name].detach().to(dtype).requires_grad_() for name in ("x", "prompt"))
    wq, wk, wv, wo = (given[name].to(dtype) for name in ("wq", "wk", "wv", "wo"))
    width = given.shape.head_dim
    made = {
        name: _projected(source, weight, width)
        for name, source, weight in (
            ("q", x, wq), ("k", x, wk), ("v", x, wv), ("prompt_k", prompt, wk),
            ("prompt_v", prompt, wv),
        )
    }  # fmt: skip
    dout = (given.dout.to(dtype) @ wo).unflatten(-1, (-1, width))
    gate = given["gate"].detach().to(dtype).expand(given.shape.heads)
    inner = _attention_results({**made, "gate": gate}, dout, given.shape.causal, dtype)
    pulled = [inner[f"d{name}"] for name in made]
    dx, dprompt = torch.autograd.grad(list(made.values()), (x, prompt), pulled)
    out = F.linear(inner["out"].flatten(-2), wo)
    return {"out": out, "dx": dx, "dprompt": dprompt, "dgate": inner["dgate"].sum(0, keepdim=True)}


def formula_results(given: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain formula's "out", and "d" and its name for each leaf, computed in a dtype.

    Args:
        given: the problem.
        dtype: `wider` gives the truth, the problem's own what plain code achieves.
    """
    if given.kind == "block":
        return _block_results(given, dtype)
    return _attention_results(given.leaves, given.dout, given.shape.causal, dtype)


def _only(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    return nullcontext() if backend is None else sdpa_kernel([backend])


def heads_first(x: Tensor) -> Tensor:
    """(B,T,H,D) as (B,H,T,D), or back, without a copy."""
    return x.transpose(1, 2)


def library(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    backend: SDPBackend | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """torch's attention on (B,H,T,D), with a diagonal or with a mask of what is seen."""
    grouped = q.shape[1] != k.shape[1]
    with _only(backend):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )


def _of_every_sample(prompt: Tensor, batch: int) -> Tensor:
    """(P,G,D) as (B,G,P,D), a copy for each sample, which any library reads."""
    return heads_first(prompt.repeat(batch, 1, 1, 1))


def _add_gated(tokens: Tensor, prompt: Tensor, gate: Tensor) -> Tensor:
    """tokens + gate * prompt, from heads first to (B,T,H,D)."""
    return heads_first(tokens + gate.to(tokens.dtype)[:, None, None] * prompt)


def two_calls(
    leaves: Mapping[str, Tensor],
    causal: bool,
    backend: SDPBackend | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Two library calls, the prompt's and the tokens', and the gated sum.

    Args:
        leaves: of a problem with a prompt.
        causal, backend, mask: of the tokens' call.
    """
    q, k, v = (heads_first(leaves[name]) for name in ("q", "k", "v"))
    pk, pv = (_of_every_sample(leaves[name], q.shape[0]) for name in ("prompt_k", "prompt_v"))
    tokens = library(q, k, v, causal, backend, mask)
    prompt = library(q, pk, pv, False, backend)
    return _add_gated(tokens, prompt, leaves["gate"])


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


def flex_call(leaves: Mapping[str, Tensor], mask: Any) -> Tensor:
    """FlexAttention over the tokens alone; mask is its block mask."""
    q, k, v = (heads_first(leaves[name]) for name in ("q", "k", "v"))
    return heads_first(_flex(q, k, v, mask))


def two_flex_calls(leaves: Mapping[str, Tensor], mask: Any) -> Tensor:
    """FlexAttention over the tokens and over the prompt, and the gated sum."""
    q, k, v = (heads_first(leaves[name]) for name in ("q", "k", "v"))
    pk, pv = (_of_every_sample(leaves[name], q.shape[0]) for name in ("prompt_k", "prompt_v"))
    return _add_gated(_flex(q, k, v, mask), _flex(q, pk, pv, None), leaves["gate"])


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a baseline."""
    # one shape at a time, with nothing left to an interpreter: the strongest form
    return torch.compile(function, fullgraph=True, dynamic=False)


def official(leaves: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """One score matrix over [prompt; tokens], two softmaxes in float32, one product with values.

    Args:
        leaves: of a problem with a prompt.
        mask: added to the tokens' scores (B,H,T,S).
    """
    q = leaves["q"]
    batch, _, heads, width = q.shape
    rows = leaves["prompt_k"].shape[0]
    pairs = (("prompt_k", "k"), ("prompt_v", "v"))
    keys, values = (
        heads_first(
            torch.cat([leaves[prompt].expand(batch, -1, -1, -1), leaves[tokens]], 1)
            .repeat_interleave(heads // leaves["k"].shape[2], 2)
        )
        for prompt, tokens in pairs
    )  # fmt: skip
    scores = (heads_first(q) @ keys.mT) / width**0.5
    if mask is not None:
        scores = scores + F.pad(mask, (rows, 0))
    prompt, tokens = (
        part.float().softmax(-1).to(q.dtype) for part in (scores[..., :rows], scores[..., rows:])
    )
    gate = leaves["gate"].to(q.dtype)[:, None, None]
    return heads_first(torch.cat([gate * prompt, tokens], -1) @ values).contiguous()


def _peft_block(given: Problem) -> Tensor:
    """The base's attention, then q once more (and v, for its shape), prompt part, o once more."""
    x, gate, width = given["x"], given["gate"], given.shape.head_dim
    wq, wk, wv, wo = (given[name] for name in ("wq", "wk", "wv", "wo"))
    q, k, v = (heads_first(_projected(x, weight, width)) for weight in (wq, wk, wv))
    attended = heads_first(library(q, k, v, given.shape.causal, None))
    base = F.linear(attended.flatten(-2), wo)
    q = heads_first(_projected(x, wq, width))
    F.linear(x, wv)
    repeats = given.shape.heads // given.shape.kv_heads
    pk, pv = (
        _of_every_sample(_projected(given["prompt"], weight, width), x.shape[0])
        .repeat_interleave(repeats, 1)
        for weight in (wk, wv)
    )  # fmt: skip
    scores = (q @ pk.mT) / width**0.5
    weights = gate * scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    added = F.linear(heads_first(weights.to(q.dtype) @ pv).flatten(-2), wo)
    return (base + added).to(x.dtype)


@dataclass(frozen=True)
class Provider:
    """One way to compute a kind of problem; all take fewer key heads than query heads.

    Attributes:
        name: of the provider.
        kind: of its problem, one of KINDS where it is a Problem.
        build: from a problem to the call that is timed, of one result or several by name; what it
            prepares is not.
        devices: where it runs.
        dtypes: what it computes in.
        compiled: whether its first call compiles, for seconds.
    """

    name: str
    kind: str
    build: Callable[[Any], Callable[[], Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    compiled: bool = False

    def supports(self, shape: Shape, device: torch.device) -> bool:
        """Whether it claims a shape on a device; it may still fail, and is then a row saying so."""
        return device.type in self.devices and shape.dtype in self.dtypes


def _official_call(given: Problem) -> Call:
    shape, mask = given.shape, None
    if shape.causal:
        # made once for all layers by the official code
        mask = torch.full((shape.tokens, shape.keys), -torch.inf, device=given.dout.device)
        mask = mask.triu(1).to(given.dout.dtype)
    return partial(official, given.leaves, mask)


def _flex_call(given: Problem) -> Call:
    shape, mask = given.shape, None
    if shape.causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, shape.tokens, shape.keys, given.dout.device.type
        )
    return partial(compiled(two_flex_calls), given.leaves, mask)


def _two_calls_with(backend: SDPBackend | None) -> Callable[[Problem], Call]:
    return lambda given: partial(two_calls, given.leaves, given.shape.causal, backend)


def _one_call_with(backend: SDPBackend | None) -> Callable[[Problem], Call]:
    def call(given: Problem) -> Tensor:
        q, k, v = (heads_first(given[name]) for name in ("q", "k", "v"))
        return heads_first(library(q, k, v, given.shape.causal, backend))

    return lambda given: partial(call, given)


_GPU: dict[str, Any] = {"devices": ("cuda",), "dtypes": ("bfloat16", "float16")}
BASELINES = (
    Provider("official", "prompt", _official_call),
    Provider("two_sdpa", "prompt", _two_calls_with(None)),
    Provider("two_flash", "prompt", _two_calls_with(SDPBackend.FLASH_ATTENTION), **_GPU),
    Provider("two_cudnn", "prompt", _two_calls_with(SDPBackend.CUDNN_ATTENTION), **_GPU),
    Provider(
        "two_sdpa_compiled",
        "prompt",
        lambda given: partial(compiled(two_calls), given.leaves, given.shape.causal),
        compiled=True,
    ),
    Provider("two_flex", "prompt", _flex_call, compiled=True, **_GPU),
    Provider("sdpa", "plain", _one_call_with(None)),
    Provider("flash", "plain", _one_call_with(SDPBackend.FLASH_ATTENTION), **_GPU),
    Provider("cudnn", "plain", _one_call_with(SDPBackend.CUDNN_ATTENTION), **_GPU),
    Provider("peft_block", "block", lambda given: partial(_peft_block, given)),
)
