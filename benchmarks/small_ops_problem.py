"""The small operations of a layer: shapes, inputs, the truth, the bytes, and what else computes it.

A mode is an operation in one form. Each has its plain torch formula as a model's code has it, the
same through torch.compile, and torch's own operation where there is one. What a model makes once
for all layers, as angles in its own form and the slots of new tokens, is made before the timing. A
backward is timed below autograd, from the gradient of the result to those of the inputs, the
weight's left out; the loss of the head, which is no small operation but is made of rows too, with
the gradient of x by autograd, beside its matrix products alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_kernels import apply_rotary, linear_cross_entropy, rms_norm, swiglu, write_cache
from benchmarks import harness
from benchmarks.baselines import Provider, compiled
from benchmarks.decode_problem import READS, Memory
from benchmarks.harness import Expected
from benchmarks.roofline import DTYPES, Floor
from benchmarks.small_ops_formulas import (
    EPS,
    Formula,
    Parts,
    append,
    complex_backward,
    complex_formula,
    halves_formula,
    loss_dx_formula,
    loss_dx_products,
    loss_formula,
    loss_products,
    norm_backward_formula,
    norm_formula,
    pairs_backward,
    pairs_formula,
    swiglu_backward_formula,
    swiglu_formula,
    with_dx,
    with_sum,
    write_complex,
    write_pairs,
)

NORMS = ("rms_norm", "rms_norm_residual")
ROTARY = ("rotary_halves", "rotary_pairs")
WRITES = ("write_cache", "write_cache_paged")
# of a head: its loss alone, and with the gradient of x
LOSSES = ("linear_cross_entropy", "linear_cross_entropy_dx")
# of rows of width C, of width F, and of heads
OF_WIDTH = (*NORMS, "rms_norm_backward")
OF_HIDDEN = ("swiglu", "swiglu_backward")
OF_HEADS = (*ROTARY, "rotary_backward", *WRITES)
MODES = (*OF_WIDTH, *OF_HIDDEN, *OF_HEADS, *LOSSES)
# a kind of its own, as the reads are
PRODUCTS = "products"
# the inputs that are rows
ROWS = {
    "rms_norm": ("x",),
    "rms_norm_residual": ("x", "residual"),
    "rms_norm_backward": ("x", "dout", "dh"),
    "swiglu": ("gate", "up"),
    "swiglu_backward": ("gate", "up", "dout"),
}
# tokens of a prompt; so many or fewer are of one decoding step
PROMPT, MOST_SEQUENCES = 2048, 32
PAGE = 64
Call = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class SmallShape:
    """Where one small operation is measured.

    Attributes:
        tokens: of all sequences: a decoding step's, one each, or whole prompts.
        width: C, F, or of a head D.
        dtype: of the inputs.
        heads, groups: H and G of what has heads, else 0.
        vocabulary: V of a head's loss, else 0.
    """

    tokens: int
    width: int
    dtype: str
    heads: int = 0
    groups: int = 0
    vocabulary: int = 0

    @property
    def batch(self) -> int:
        """Sequences."""
        if self.tokens <= MOST_SEQUENCES:
            return self.tokens
        return self.tokens // PROMPT if self.tokens % PROMPT == 0 else 1

    def describe(self) -> str:
        """`B=1 T=2048 H=32 G=8 D=128 bfloat16`, `B=1 T=2048 width=4096 bfloat16`, or with V."""
        if self.vocabulary:
            return f"N={self.tokens} C={self.width} V={self.vocabulary} {self.dtype}"
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
            (B,T) int32, page_table, and the same places as row and column, int64; of a loss x
            (tokens,C), weight (V,C), labels (tokens,) int64, all of which count.
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
    if mode in LOSSES:
        # logits of a few units
        weight = normal(shape.vocabulary, width) * 2 * width**-0.5
        labels = torch.randint(shape.vocabulary, (tokens,), **on)
        rows = {"x": normal(tokens, width), "weight": weight, "labels": labels}
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
    "linear_cross_entropy": loss_formula,
    "linear_cross_entropy_dx": loss_dx_formula,
}
PRODUCTS_OF: dict[str, Formula] = dict(zip(LOSSES, (loss_products, loss_dx_products), strict=True))
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


def _our_loss(parts: Parts) -> dict[str, Tensor]:
    given = (parts[name] for name in ("x", "weight", "labels"))
    return {"loss": linear_cross_entropy(*given, ignore_index=None)}


def _ours(given: Problem) -> Call:
    parts = own_parts(given)
    if given.mode in LOSSES:
        alone = given.mode == "linear_cross_entropy"
        return partial(_our_loss, parts) if alone else partial(with_dx, _our_loss, parts)
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
    if formula is loss_dx_formula:
        # of the forward, whose backward torch.compile makes with it
        return partial(with_dx, compiled(loss_formula), model_parts(given))
    return partial(compiled(REAL.get(formula, formula)), model_parts(given))


def _torch_norm(given: Problem) -> Call:
    def call(parts: Parts) -> dict[str, Tensor]:
        h = parts["x"] if "residual" not in parts else parts["x"] + parts["residual"]
        out = F.rms_norm(h, (h.shape[-1],), parts["weight"], EPS)
        return with_sum(parts, out, h)

    return partial(call, own_parts(given))


def _two_calls(given: Problem) -> Call:
    def call(parts: Parts) -> dict[str, Tensor]:
        turned = _rotated(parts, interleaved=True)
        return {"q": turned["q"], **append(parts, turned["k"])}

    return partial(call, own_parts(given))


def _products(given: Problem) -> Call:
    return partial(PRODUCTS_OF[given.mode], given.parts)


def providers_of(mode: str) -> tuple[Provider, ...]:
    """What computes a mode, and the reads of the bandwidth, or the products of a loss alone."""
    found = [Provider("ours", mode, _ours), Provider("eager", mode, _eager)]
    found.append(Provider("compiled", mode, _compiled, devices=("cuda",), compiled=True))
    if mode in NORMS:
        found.append(Provider("torch", mode, _torch_norm))
    if mode in LOSSES:
        return (*found, Provider(PRODUCTS, PRODUCTS, _products))
    if mode in WRITES:
        found.append(Provider("two_calls", mode, _two_calls))
    return (*found, *READS)


def expected(given: Problem, kind: str) -> Mapping[str, Expected]:
    """The truth of a provider's results, by the kind of the provider."""
    if kind in given.memory.sums:
        return given.memory.sums[kind]
    if kind == PRODUCTS:
        products = PRODUCTS_OF[given.mode]
        truth = products(model_parts(given, torch.float64))
        return harness.expect(truth, products(given.parts))
    formula = FORMULAS[given.mode]
    truth = REAL.get(formula, formula)(model_parts(given, torch.float64))
    return harness.expect(truth, _eager(given)())


def loss_floor(shape: SmallShape, mode: str) -> Floor:
    """The least of a loss: its one or two products, x, weight and labels read, the rest written."""
    products = 1 + LOSSES.index(mode)
    element = DTYPES[shape.dtype].itemsize
    flops = 2.0 * products * shape.tokens * shape.width * shape.vocabulary
    rows = products * shape.tokens * shape.width * element
    labels = shape.tokens * torch.int64.itemsize
    size = rows + shape.vocabulary * shape.width * element + labels + torch.float32.itemsize
    return Floor(mode, flops, size)


def bytes_of(given: Problem, kind: str) -> int:
    """What a kind must move: every input read once, every result written once."""
    if kind in given.memory.sums:
        return given.memory.words.nbytes
    parts, mode = given.parts, given.mode
    if mode in LOSSES:
        return int(loss_floor(given.shape, mode).bytes)
    if mode in OF_WIDTH:
        more = parts["rstd"].nbytes if mode == "rms_norm_backward" else 0
        passes = 2 if mode == "rms_norm" else 4
        return passes * parts["x"].nbytes + parts["weight"].nbytes + more
    if mode in OF_HIDDEN:
        return (3 if mode == "swiglu" else 5) * parts["gate"].nbytes
    moved = parts["q"].nbytes + parts["k"].nbytes + (parts["v"].nbytes if mode in WRITES else 0)
    places = parts["positions"].nbytes if mode in WRITES else 0
    return 2 * moved + parts["cos"].nbytes + parts["sin"].nbytes + places
