"""Which forms do the shipped kernels take, and which of them are compiled in the tests?

A specialisation is everything that makes triton compile a kernel anew. The tests compile a choice
in which every two values of any two properties occur together; `make aot-all` the table's rows.
"""

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from itertools import combinations, product

import torch
from torch import Tensor

from adapter_kernels.launch import Launch
from adapter_kernels.zero_init_attention.backward_dkv import chunks_of, key_launch
from adapter_kernels.zero_init_attention.backward_dq import query_launch
from adapter_kernels.zero_init_attention.configs import (
    CAPABILITIES,
    DIRECTIONS,
    HEAD_DIMS,
    TileConfig,
    tile,
)
from adapter_kernels.zero_init_attention.forward import forward_launch, prompt_forward_launch
from adapter_kernels.zero_init_attention.kernel_arguments import has_many_tiles
from adapter_kernels.zero_init_attention.layouts import Layout, Prompts

BATCH, TOKENS, HEADS = 4, 2048, 32
CHOICES: dict[str, tuple] = {
    "capability": (80, 90),
    "direction": DIRECTIONS,
    "head_dim": (8, 16, 32, 40, 64, 80, 96, 128, 256),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "form": ("none", "shared", "sample", "bank"),
    "rows": (1, 10, 16, 17, 64, 65, 300),
    "layout": ("causal", "bidirectional", "padded", "packed"),
    "group": (1, 4, 32),
    "only": ("all", "some"),
}


@dataclass(frozen=True)
class Specialisation:
    """One form of a kernel.

    Attributes:
        capability: of the chip, major * 10 + minor.
        direction: of configs.DIRECTIONS.
        head_dim: D.
        dtype: of q.
        form: of the prompt.
        rows: P.
        layout: of the sequences.
        group: H / G.
        only: "some" leaves out dlse, and of the gradients dk and dprompt_v.
    """

    capability: int
    direction: str
    head_dim: int
    dtype: torch.dtype
    form: str
    rows: int
    layout: str
    group: int
    only: str

    def __str__(self) -> str:
        names = (str(value).removeprefix("torch.") for value in astuple(self))
        return "-".join(names)


def valid(spec: Specialisation) -> bool:
    """Whether there is such a kernel: the prompt's own has no keys, grouped heads are grouped."""
    if spec.direction.startswith("backward_dkv") and (
        (spec.group > 1) != (spec.direction == "backward_dkv_grouped")
    ):
        return False
    if spec.direction == "prompt_forward":
        return spec.form != "none" and spec.layout in ("causal", "packed")
    return spec.form != "none" or spec.rows == 1


def pairwise(seed: int = 0) -> list[Specialisation]:
    """Few specialisations in which every valid pair of values of two properties occurs."""
    names = [spec.name for spec in fields(Specialisation)]
    every = [Specialisation(*values) for values in product(*CHOICES.values())]
    every = [spec for spec in every if valid(spec)]

    def pairs(spec: Specialisation) -> set[tuple]:
        values = [(name, getattr(spec, name)) for name in names]
        return set(combinations(values, 2))

    missing = set().union(*(pairs(spec) for spec in every))
    rng, chosen = random.Random(seed), []
    while missing:
        drawn = rng.sample(every, 60)
        best = max(drawn, key=lambda spec: len(pairs(spec) & missing))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
    return chosen


Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor for a compiler: nothing but shape, strides and dtype."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _prompts(spec: Specialisation, make: Make) -> Prompts:
    if spec.form == "none":
        return Prompts(None, None, None, None, None)
    lead = {"shared": (), "sample": (BATCH,), "bank": (3,)}[spec.form]
    k, v = (make((*lead, spec.rows, HEADS // spec.group, spec.head_dim), spec.dtype) for _ in "kv")
    gate = make((*(lead if spec.form == "bank" else ()), HEADS), torch.float32)
    index = lengths = None
    if spec.form == "bank":
        index, lengths = make((BATCH,), torch.int32), make((3,), torch.int32)
    return Prompts(k, v, gate, index, lengths)


def _layout(spec: Specialisation, make: Make) -> Layout:
    bounds = cu = None
    if spec.layout == "padded":
        bounds = make((BATCH,), torch.int32)
    if spec.layout == "packed":
        cu = make((BATCH + 1,), torch.int32)
    length = TOKENS if cu is not None else 0
    return Layout(bounds, bounds, cu, cu, None, length, length, spec.layout != "bidirectional")


def launch_of(
    spec: Specialisation, config: TileConfig | None = None, make: Make = on_meta
) -> Launch:
    """The launch of a specialisation.

    Args:
        spec: what is compiled.
        config: its tile; the shipped one unless given.
        make: a tensor of a shape and a dtype; called in one order for every tile.
    """
    config = config or tile(spec.capability, spec.direction, spec.head_dim, spec.dtype)
    packed = spec.layout == "packed"
    lead = (BATCH * TOKENS,) if packed else (BATCH, TOKENS)
    scale, groups = spec.head_dim**-0.5, HEADS // spec.group

    def rows(heads: int) -> Tensor:
        return make((*lead, heads, spec.head_dim), spec.dtype)

    def statistic() -> Tensor:
        return make((HEADS, *lead) if packed else (BATCH, HEADS, TOKENS), torch.float32)

    q, k, v, lse = rows(HEADS), rows(groups), rows(groups), statistic()
    prompts, layout = _prompts(spec, make), _layout(spec, make)
    if spec.direction == "forward":
        return forward_launch(q, k, v, prompts, layout, scale, rows(HEADS), lse, config)
    if spec.direction == "prompt_forward":
        base = rows(HEADS) if spec.only == "all" else None
        cu = layout.cu_seqlens_q
        return prompt_forward_launch(q, prompts, cu, TOKENS, base, scale, rows(HEADS), config)
    statistics = (statistic(), statistic()) if has_many_tiles(q, prompts) else None
    dlse = statistic() if spec.only == "all" else None
    if spec.direction == "backward_dq":
        return query_launch(
            q, k, v, prompts, layout, scale, rows(HEADS), rows(HEADS), lse, dlse, statistic(),
            rows(HEADS), statistics, config,
        )  # fmt: skip
    sums = dv_sums = gates = None
    if prompts.k is not None:
        parts = (BATCH, chunks_of(TOKENS))
        shape = (*parts, spec.rows, groups, spec.head_dim)
        sums = make(shape, torch.float32)
        dv_sums = make(shape, torch.float32) if spec.only == "all" else None
        gates = make((*parts, HEADS), torch.float32)
    dk = rows(groups) if spec.only == "all" else None
    return key_launch(
        q, k, v, prompts, layout, scale, rows(HEADS), lse, statistic(), dk, rows(groups),
        (sums, dv_sums, gates), statistics, config,
    )  # fmt: skip


def forms(
    capability: int, direction: str, head_dim: int, dtype: torch.dtype
) -> list[Specialisation]:
    """Three forms of a kernel: the papers' prompt, a wide one, a long one."""
    group = 4 if direction == "backward_dkv_grouped" else 1
    wide = "packed" if direction == "prompt_forward" else "padded"
    return [
        Specialisation(capability, direction, head_dim, dtype, form, rows, layout, group, "all")
        for form, rows, layout in (
            ("shared", 10, "causal"),
            ("bank", 64, wide),
            ("bank", 300, "packed"),
        )
    ]


def table() -> list[Specialisation]:
    """Every tile of every architecture in its three forms."""
    tiles = [*product(HEAD_DIMS, (torch.bfloat16, torch.float32)), (96, torch.bfloat16)]
    return [
        spec
        for capability, direction, (head_dim, dtype) in product(CAPABILITIES, DIRECTIONS, tiles)
        for spec in forms(capability, direction, head_dim, dtype)
    ]
