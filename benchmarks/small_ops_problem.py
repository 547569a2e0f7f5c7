"""The small operations of a layer: shapes, inputs, the truth, the bytes, and what else computes it.

A mode is an operation in one form. Each has its plain torch formula as a model's code has it, the
same through torch.compile, and torch's own operation where there is one. What a model makes once
for all layers, as angles in its own form and the slots of new tokens, is made before the timing. A
backward is timed below autograd, from the gradient of the result to those of the inputs, the
weight's left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_kernels import apply_rotary, rms_norm, swiglu, write_cache
from benchmarks import harness
from benchmarks.baselines import Provider, compiled
from benchmarks.decode_problem import READS, Memory
from benchmarks.harness import Expected
from benchmarks.roofline import DTYPES

NORMS = ("rms_norm", "rms_norm_residual")
ROTARY = ("rotary_halves", "rotary_pairs")
WRITES = ("write_cache", "write_cache_paged")
# of rows of width C, of width F, and of heads
OF_WIDTH = (*NORMS, "rms_norm_backward")
OF_HIDDEN = ("swiglu", "swiglu_backward")
OF_HEADS = (*ROTARY, "rotary_backward", *WRITES)
MODES = (*OF_WIDTH, *OF_HIDDEN, *OF_HEADS)
# the inputs that are rows
ROWS = {
    "rms_norm": ("x",),
    "rms_norm_residual": ("x", "residual"),
    "rms_norm_backward": ("x", "dout", "dh"),
    "swiglu": ("gate", "up"),
    "swiglu_backward": ("gate", "up", "dout"),
}
EPS = 1e-5
# tokens of a prompt; so many or fewer are of one decoding step
PROMPT, MOST_SEQUENCES = 2048, 32
PAGE = 64
Parts = Mapping[str, Tensor]
Call = Callable[[], dict[str, Tensor]]
Formula = Callable[[Parts], dict[str, Tensor]]


@dataclass(frozen=True)
class SmallShape:
    """Where one small operation is measured.

    Attributes:
        tokens: of all sequences: a decoding step's, one each, or whole prompts.
        width: C, F, or of a head D.
        dtype: of the inputs.
        heads, groups: H and G of what has heads, else 0.
    """

    tokens: int
    width: int
    dtype: str
    heads: int = 0
    groups: int = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        if self.tokens <= MOST_SEQUENCES:
            return self.tokens
        return self.tokens // PROMPT if self.tokens % PROMPT == 0 else 1

    def describe(self) -> str:
        """`B=1 T=2048 H=32 G=8 D=128 bfloat16`, or `B=1 T=2048 width=4096 bfloat16`."""
        rows = f"B={self.batch} T={self.tokens // self.batch}"
        if not self.heads:
            return f"{rows} width={self.width} {self.dtype}"
        return f"{rows} H={self.heads} G={self.groups} D={self.width} {self.dtype}"


@dataclass(frozen=True)
class Problem:
    """Inputs of one mode at one shape.

    Attributes:
        mode: of MODES.
        shape: where.
        parts: rms_norm: x, residual where there is one, (tokens,C), weight (C,), of the backward
            dout, dh and rstd (tokens,1) float32; swiglu: gate, up (tokens,F), of the backward dout;
            with heads: q (B,T,H,D), k (B,T,G,D), of the backward their gradients, cos, sin
            (B,T,D/2) float32, and of write_cache v, k_cache, v_cache (B,S,G,D) or pages, positions
            (B,T) int32, page_table, and the same places as row and column, int64.
        memory: for the bandwidth.
    """

    mode: str
    shape: SmallShape
    parts: Parts
    memory: Memory


def problem(mode: str, shape: SmallShape, device: torch.device, memory: Memory) -> Problem:
    """Random inputs, the same whenever they are drawn for a mode and a shape.

    Args:
        mode: of MODES.
        shape: where.
        device: where the inputs are.
        memory: of that device.
    """
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    normal = partial(torch.randn, dtype=DTYPES[shape.dtype], **on)
    tokens, width = shape.tokens, shape.width
    if mode in ROWS:
        rows = {name: normal(tokens, width) for name in ROWS[mode]}
        if mode in OF_WIDTH:
            rows["weight"] = normal(width)
        if mode == "rms_norm_backward":
            rows["rstd"] = rows["x"].float().square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
        return Problem(mode, shape, rows, memory)
    lead = (shape.batch, tokens // shape.batch)
    angle = torch.rand(*lead, width // 2, **on) * 6
    parts = {
        "q": normal(*lead, shape.heads, width),
        "k": normal(*lead, shape.groups, width),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }
    if mode in WRITES:
        parts |= _cache(mode, shape, normal, on)
    return Problem(mode, shape, parts, memory)


def _cache(
    mode: str, shape: SmallShape, normal: Callable[..., Tensor], on: dict[str, Any]
) -> dict[str, Tensor]:
    """v, the caches, and where new tokens go: in a row from a slot drawn for each sequence."""
    batch, tokens = shape.batch, shape.tokens // shape.batch
    pages = -(-tokens // PAGE) + 3
    first = torch.randint(pages * PAGE - tokens + 1, (batch, 1), **on)
    positions = first + torch.arange(tokens, device=first.device)
    row, column = torch.arange(batch, device=first.device)[:, None], positions
    lead, more = (batch, pages * PAGE), {}
    if mode == "write_cache_paged":
        table = torch.randperm(batch * pages, **on).view(batch, pages)
        row, column = table.gather(1, positions // PAGE), positions % PAGE
        lead, more = (batch * pages, PAGE), {"page_table": table.int()}
    caches = {name: normal(*lead, shape.groups, shape.width) for name in ("k_cache", "v_cache")}
    v = normal(batch, tokens, shape.groups, shape.width)
    places = {"positions": positions.int(), "row": row.expand_as(column), "column": column}
    return {"v": v, **caches, **places, **more}


# the formulas as a model's code has them; in float64, on angles in that form, they are the truth
def norm_formula(parts: Parts) -> dict[str, Tensor]:
    """LlamaRMSNorm of transformers, after the residual addition where there is one."""
    h = parts["x"] if "residual" not in parts else parts["x"] + parts["residual"]
    precise = h.to(_precise(h.dtype))
    normalised = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + EPS)
    return _with_sum(parts, parts["weight"] * normalised.to(h.dtype), h)


def _with_sum(parts: Parts, out: Tensor, h: Tensor) -> dict[str, Tensor]:
    return {"out": out, "h": h} if "residual" in parts else {"out": out}


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def norm_backward_formula(parts: Parts) -> dict[str, Tensor]:
    """The gradient of norm_formula's h: what reaches it through out, and then its other uses."""
    rstd = parts["rstd"]
    x, dnormalised = parts["x"].to(rstd.dtype), parts["dout"] * parts["weight"]
    dnormalised = dnormalised.to(rstd.dtype)
    pull = (dnormalised * x).mean(-1, keepdim=True) * rstd.square()
    dx = (rstd * (dnormalised - x * pull)).to(parts["x"].dtype)
    return {"dx": dx + parts["dh"]}


def swiglu_formula(parts: Parts) -> dict[str, Tensor]:
    """The activation of LlamaMLP."""
    return {"out": F.silu(parts["gate"]) * parts["up"]}


def swiglu_backward_formula(parts: Parts) -> dict[str, Tensor]:
    """The gradients of swiglu_formula, as autograd has them."""
    gate, up, dout = (parts[name] for name in ROWS["swiglu_backward"])
    dgate = torch.ops.aten.silu_backward(dout * up, gate)
    return {"dgate": dgate, "dup": dout * F.silu(gate)}


def halves_formula(parts: Parts) -> dict[str, Tensor]:
    """apply_rotary_pos_emb of transformers: cos and sin (B,T,1,D) in the dtype of q."""
    found = {}
    for name in "qk":
        x = parts[name]
        a, b = x.chunk(2, -1)
        found[name] = x * parts["cos"] + torch.cat((-b, a), -1) * parts["sin"]
    return found


def pairs_formula(parts: Parts) -> dict[str, Tensor]:
    """apply_rotary_emb of gpt-fast: neighbours, in real numbers; cos and sin (B,T,1,D/2)."""
    found, cos, sin = {}, parts["cos"], parts["sin"]
    for name in "qk":
        a, b = parts[name].to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        found[name] = turned.to(parts[name].dtype)
    return found


def complex_formula(parts: Parts) -> dict[str, Tensor]:
    """apply_rotary_emb of Meta: neighbours, as complex numbers; turn (B,T,1,D/2)."""
    found = {}
    for name in "qk":
        x = parts[name]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        found[name] = torch.view_as_real(pairs * parts["turn"]).flatten(-2).to(x.dtype)
    return found


def complex_backward(parts: Parts) -> dict[str, Tensor]:
    """complex_formula by the opposite angles."""
    return complex_formula({**parts, "turn": parts["turn"].conj()})


def pairs_backward(parts: Parts) -> dict[str, Tensor]:
    """pairs_formula by the opposite angles."""
    return pairs_formula({**parts, "sin": -parts["sin"]})


def append(parts: Parts, k: Tensor) -> dict[str, Tensor]:
    """Put turned keys, and values, into their places of the caches."""
    places = (parts["row"], parts["column"])
    parts["k_cache"].index_put_(places, k)
    parts["v_cache"].index_put_(places, parts["v"])
    return {name: parts[name] for name in ("k_cache", "v_cache")}


def write_pairs(parts: Parts) -> dict[str, Tensor]:
    """pairs_formula, and the caches' update of transformers."""
    turned = pairs_formula(parts)
    return {"q": turned["q"], **append(parts, turned["k"])}


def write_complex(parts: Parts) -> dict[str, Tensor]:
    """complex_formula, and the caches' update of transformers."""
    turned = complex_formula(parts)
    return {"q": turned["q"], **append(parts, turned["k"])}


def own_parts(given: Problem) -> dict[str, Tensor]:
    """The inputs with caches of one's own, where nobody else's results lie."""
    return {k: x.clone() if k.endswith("_cache") else x for k, x in given.parts.items()}


def model_parts(given: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """own_parts with angles in the form of a model's code; all of it in a wider dtype if given."""
    parts = own_parts(given)
    if dtype is not None:
        parts = {k: x.to(dtype) if x.is_floating_point() else x for k, x in parts.items()}
    if "cos" in parts:
        for name in ("cos", "sin"):
            x = parts[name].unsqueeze(2)
            parts[name] = torch.cat((x, x), -1) if given.mode == "rotary_halves" else x
        if given.mode == "rotary_halves":
            parts |= {name: parts[name].to(parts["q"].dtype) for name in ("cos", "sin")}
        else:
            parts["turn"] = torch.complex(parts["cos"], parts["sin"])
    return parts


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(NORMS, norm_formula),
    "rms_norm_backward": norm_backward_formula,
    "swiglu": swiglu_formula,
    "swiglu_backward": swiglu_backward_formula,
    "rotary_halves": halves_formula,
    "rotary_pairs": complex_formula,
    "rotary_backward": complex_backward,
    **dict.fromkeys(WRITES, write_complex),
}
# of complex numbers torch.compile fuses nothing: the same in real ones
REAL: dict[Formula, Formula] = {
    complex_formula: pairs_formula,
    complex_backward: pairs_backward,
    write_complex: write_pairs,
}


def _ours_backward(mode: str, parts: Parts) -> Call:
    """The operation that autograd calls, below it."""
    ops = torch.ops.adapter_kernels
    if mode == "rms_norm_backward":
        of_norm = (parts[name] for name in ("dout", "dh", "x", "weight", "rstd"))
        call, names = partial(ops.rms_norm_backward, *of_norm, True, False), ("dx",)
    elif mode == "swiglu_backward":
        of_swiglu = (parts[name] for name in ("dout", "gate", "up"))
        call, names = partial(ops.swiglu_backward, *of_swiglu, True, True), ("dgate", "dup")
    else:
        turned = (parts[name] for name in ("q", "k", "cos", "sin"))
        call, names = partial(ops.apply_rotary_backward, *turned, True), ("q", "k")
    return lambda: dict(zip(names, call(), strict=False))


def _ours(given: Problem) -> Call:
    parts = own_parts(given)
    if given.mode.endswith("_backward"):
        return _ours_backward(given.mode, parts)
    if given.mode in NORMS:
        call = partial(rms_norm, parts["x"], parts["weight"], eps=EPS)
        if given.mode == "rms_norm":
            return lambda: {"out": call()}
        both = partial(call, residual=parts["residual"])
        return lambda: dict(zip(("out", "h"), both(), strict=True))
    if given.mode == "swiglu":
        return lambda: {"out": swiglu(parts["gate"], parts["up"])}
    if given.mode in ROTARY:
        return partial(_rotated, parts, given.mode == "rotary_pairs")
    k, v, q, cos, sin, positions = (
        parts[name] for name in ("k", "v", "q", "cos", "sin", "positions")
    )
    caches = {name: parts[name] for name in ("k_cache", "v_cache")}
    places = {"positions": positions, "page_table": parts.get("page_table")}
    return lambda: {
        "q": write_cache(k, v, *caches.values(), **places, cos=cos, sin=sin, q=q),
        **caches,
    }


def _rotated(parts: Parts, interleaved: bool) -> dict[str, Tensor]:
    q, k, cos, sin = (parts[name] for name in ("q", "k", "cos", "sin"))
    return dict(zip("qk", apply_rotary(q, k, cos, sin, interleaved=interleaved), strict=True))


def _eager(given: Problem) -> Call:
    return partial(FORMULAS[given.mode], model_parts(given))


def _compiled(given: Problem) -> Call:
    formula = FORMULAS[given.mode]
    return partial(compiled(REAL.get(formula, formula)), model_parts(given))


def _torch_norm(given: Problem) -> Call:
    def call(parts: Parts) -> dict[str, Tensor]:
        h = parts["x"] if "residual" not in parts else parts["x"] + parts["residual"]
        out = F.rms_norm(h, (h.shape[-1],), parts["weight"], EPS)
        return _with_sum(parts, out, h)

    return partial(call, own_parts(given))


def _two_calls(given: Problem) -> Call:
    def call(parts: Parts) -> dict[str, Tensor]:
        turned = _rotated(parts, interleaved=True)
        return {"q": turned["q"], **append(parts, turned["k"])}

    return partial(call, own_parts(given))


def providers_of(mode: str) -> tuple[Provider, ...]:
    """What computes a mode, and the reads of the bandwidth."""
    found = [Provider("ours", mode, _ours), Provider("eager", mode, _eager)]
    found.append(Provider("compiled", mode, _compiled, devices=("cuda",), compiled=True))
    if mode in NORMS:
        found.append(Provider("torch", mode, _torch_norm))
    if mode in WRITES:
        found.append(Provider("two_calls", mode, _two_calls))
    return (*found, *READS)


def expected(given: Problem, kind: str) -> Mapping[str, Expected]:
    """The truth of a provider's results, by the kind of the provider."""
    if kind in given.memory.sums:
        return given.memory.sums[kind]
    formula = FORMULAS[given.mode]
    truth = REAL.get(formula, formula)(model_parts(given, torch.float64))
    return harness.expect(truth, _eager(given)())


def bytes_of(given: Problem, kind: str) -> int:
    """What a kind must move: every input read once, every result written once."""
    if kind in given.memory.sums:
        return given.memory.words.nbytes
    parts, mode = given.parts, given.mode
    if mode in OF_WIDTH:
        more = parts["rstd"].nbytes if mode == "rms_norm_backward" else 0
        passes = 2 if mode == "rms_norm" else 4
        return passes * parts["x"].nbytes + parts["weight"].nbytes + more
    if mode in OF_HIDDEN:
        return (3 if mode == "swiglu" else 5) * parts["gate"].nbytes
    moved = parts["q"].nbytes + parts["k"].nbytes + (parts["v"].nbytes if mode in WRITES else 0)
    places = parts["positions"].nbytes if mode in WRITES else 0
    return 2 * moved + parts["cos"].nbytes + parts["sin"].nbytes + places
