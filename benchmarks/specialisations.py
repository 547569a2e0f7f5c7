"""Which forms do the shipped kernels take, and which of them are compiled in the tests?

A specialisation is everything that makes triton compile a kernel anew. The tests compile a choice
in which every two values of any two properties occur together; `make aot-all` the table's rows.
"""

import random
from dataclasses import astuple, dataclass, fields
from itertools import combinations, product

import torch
from torch import Tensor

from adapter_kernels.launch import Launch
from adapter_kernels.zero_init_attention.backward_dkv import key_launch
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


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _prompts(spec: Specialisation) -> Prompts:
    if spec.form == "none":
        return Prompts(None, None, None, None, None)
    lead = {"shared": (), "sample": (BATCH,), "bank": (3,)}[spec.form]
    k, v = (
        _meta(*lead, spec.rows, HEADS // spec.group, spec.head_dim, dtype=spec.dtype) for _ in "kv"
    )
    gate = _meta(*(lead if spec.form == "bank" else ()), HEADS, dtype=torch.float32)
    index = lengths = None
    if spec.form == "bank":
        index, lengths = _meta(BATCH, dtype=torch.int32), _meta(3, dtype=torch.int32)
    return Prompts(k, v, gate, index, lengths)


def _layout(spec: Specialisation) -> Layout:
    bounds = cu = None
    if spec.layout == "padded":
        bounds = _meta(BATCH, dtype=torch.int32)
    if spec.layout == "packed":
        cu = _meta(BATCH + 1, dtype=torch.int32)
    length = TOKENS if cu is not None else 0
    return Layout(bounds, bounds, cu, cu, None, length, length, spec.layout != "bidirectional")


def launch_of(spec: Specialisation, config: TileConfig | None = None) -> Launch:
    """The launch of a specialisation, with the shipped tile unless another is given."""
    config = config or tile(spec.capability, spec.direction, spec.head_dim, spec.dtype)
    packed = spec.layout == "packed"
    lead = (BATCH * TOKENS,) if packed else (BATCH, TOKENS)
    scale, groups = spec.head_dim**-0.5, HEADS // spec.group

    def rows(heads: int, dtype: torch.dtype = spec.dtype) -> Tensor:
        return _meta(*lead, heads, spec.head_dim, dtype=dtype)

    statistic = (HEADS, *lead) if packed else (BATCH, HEADS, TOKENS)
    lse = _meta(*statistic, dtype=torch.float32)
    q, k, v = rows(HEADS), rows(groups), rows(groups)
    prompts, layout = _prompts(spec), _layout(spec)
    if spec.direction == "forward":
        return forward_launch(q, k, v, prompts, layout, scale, rows(HEADS), lse, config)
    if spec.direction == "prompt_forward":
        base = rows(HEADS) if spec.only == "all" else None
        cu = layout.cu_seqlens_q
        return prompt_forward_launch(q, prompts, cu, TOKENS, base, scale, rows(HEADS), config)
    statistics = (lse, lse) if has_many_tiles(q, prompts) else None
    dlse = lse if spec.only == "all" else None
    if spec.direction == "backward_dq":
        return query_launch(
            q, k, v, prompts, layout, scale, rows(HEADS), rows(HEADS), lse, dlse, lse,
            rows(HEADS), statistics, config,
        )  # fmt: skip
    sums = dv_sums = gates = None
    if prompts.k is not None:
        shape = (BATCH, 2, spec.rows, groups, spec.head_dim)
        sums = _meta(*shape, dtype=torch.float32)
        dv_sums = sums if spec.only == "all" else None
        gates = _meta(BATCH, 2, HEADS, dtype=torch.float32)
    dk = rows(groups) if spec.only == "all" else None
    return key_launch(
        q, k, v, prompts, layout, scale, rows(HEADS), lse, lse, dk, rows(groups),
        (sums, dv_sums, gates), statistics, config,
    )  # fmt: skip


def table() -> list[Specialisation]:
    """Every tile of every architecture, each in three forms: the papers' prompt, a wide, a long."""
    tiles = [*product(HEAD_DIMS, (torch.bfloat16, torch.float32)), (96, torch.bfloat16)]
    found = []
    for capability in CAPABILITIES:
        for direction, (head_dim, dtype) in product(DIRECTIONS, tiles):
            for form, rows, layout in (
                ("shared", 10, "causal"),
                ("bank", 64, "packed" if direction == "prompt_forward" else "padded"),
                ("bank", 300, "packed"),
            ):
                group = 4 if direction == "backward_dkv_grouped" else 1
                spec = (capability, direction, head_dim, dtype, form, rows, layout, group, "all")
                found.append(Specialisation(*spec))
    return found
