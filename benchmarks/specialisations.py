"""Which forms do the shipped kernels take, and which of them are compiled in the tests?

A specialisation is everything that makes triton compile a kernel anew. The tests compile a choice
in which every two values of any two properties occur together; `make aot-all` the table's rows.
"""

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from itertools import combinations, product

import torch
from torch import Tensor

from adapter_kernels.launch import Launch
from adapter_kernels.zero_init_attention.backward_dkv import key_launch
from adapter_kernels.zero_init_attention.backward_dq import query_launch
from adapter_kernels.zero_init_attention.backward_prefix import prefix_launch, sequence_chunks
from adapter_kernels.zero_init_attention.backward_prompt import chunks_of, prompt_backward_launch
from adapter_kernels.zero_init_attention.configs import (
    CAPABILITIES,
    DIRECTIONS,
    HEAD_DIMS,
    TileConfig,
    tile,
)
from adapter_kernels.zero_init_attention.decode import decode_launches, splits_of
from adapter_kernels.zero_init_attention.forward import forward_launch, prompt_forward_launch
from adapter_kernels.zero_init_attention.kernel_arguments import has_many_tiles
from adapter_kernels.zero_init_attention.layouts import Layout, Prefix, Prompts

BATCH, TOKENS, HEADS = 4, 2048, 32
# of decoding: new tokens of a sequence, keys of a page
NEW_TOKENS, PAGE = 4, 64
# prefixes that packed sequences share, and their keys
PREFIXES, SHARED = 2, 40
# rows of configs.py, the kernel that finishes what decoding splits, and that of shared prefixes,
# which share rows
KERNELS = (*DIRECTIONS, "combine", "prefix")
CHOICES: dict[str, tuple] = {
    "capability": (80, 90),
    "direction": KERNELS,
    "head_dim": (8, 16, 32, 40, 64, 80, 96, 128, 256),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "form": ("none", "shared", "sample", "bank"),
    "rows": (1, 10, 16, 17, 64, 65, 300),
    "layout": ("causal", "bidirectional", "padded", "packed", "prefix", "paged", "eight_bits"),
    "group": (1, 4, 32),
    "only": ("all", "some"),
}


@dataclass(frozen=True)
class Specialisation:
    """One form of a kernel.

    Attributes:
        capability: of the chip, major * 10 + minor.
        direction: of KERNELS.
        head_dim: D.
        dtype: of q.
        form: of the prompt.
        rows: P.
        layout: of the sequences, packed ones that share a "prefix" among them, or of a cache:
            "causal" is in order, "eight_bits" of that width.
        group: H / G.
        only: "some" leaves out dlse, and of the gradients dk and dprompt_v; decoding then has one
            new token and one split, and a prefix is one alone, as long as it can be, of sequences
            that see all their keys.
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


def row_of(spec: Specialisation) -> str:
    """The direction whose row of configs.py a kernel has."""
    if spec.direction == "prefix":
        return "backward_dkv_grouped" if spec.group > 1 else "backward_dkv"
    return "decode" if spec.direction == "combine" else spec.direction


def layouts_of(spec: Specialisation) -> tuple[str, ...]:
    """The layouts that a kernel takes, on this chip and in this dtype."""
    if spec.direction in ("prompt_forward", "prompt_backward"):
        return ("causal", "packed")
    if spec.direction in ("combine", "prefix"):
        return ("causal",) if spec.direction == "combine" else ("prefix",)
    if spec.direction == "decode":
        narrow = spec.capability >= 89 and spec.dtype != torch.float32 and spec.head_dim % 16 == 0
        return ("causal", "paged", "eight_bits") if narrow else ("causal", "paged")
    every = ("causal", "bidirectional", "padded", "packed")
    more = {"forward": ("prefix", "paged"), "backward_dq": ("prefix",)}
    return (*every, *more.get(spec.direction, ()))


def valid(spec: Specialisation) -> bool:
    """Whether there is such a kernel: one sees keys or prompts, grouped heads are grouped."""
    if spec.direction.startswith("backward_dkv") and (
        (spec.group > 1) != (spec.direction == "backward_dkv_grouped")
    ):
        return False
    if spec.layout not in layouts_of(spec):
        return False
    of_keys = spec.direction.startswith("backward_dkv") or spec.direction == "prefix"
    if of_keys and spec.form != "none":
        return False
    if spec.direction.startswith("prompt") and spec.form == "none":
        return False
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
    table = None
    if spec.layout in ("packed", "prefix", "paged"):
        cu = make((BATCH + 1,), torch.int32)
    if spec.layout == "paged":
        table = make((BATCH, TOKENS // PAGE), torch.int32)
    length = TOKENS if cu is not None else 0
    causal = spec.layout != "bidirectional" and (spec.layout, spec.only) != ("prefix", "some")
    return Layout(bounds, bounds, cu, cu, table, length, length, causal)


def _prefix(spec: Specialisation, make: Make) -> Prefix:
    if spec.layout != "prefix":
        return Prefix()
    count = PREFIXES if spec.only == "all" else 1
    k, v = (make((count, SHARED, HEADS // spec.group, spec.head_dim), spec.dtype) for _ in "kv")
    lengths = make((count,), torch.int32) if spec.only == "all" else None
    return Prefix(k, v, make((BATCH,), torch.int32), lengths)


def _decode_launch(spec: Specialisation, config: TileConfig, make: Make) -> Launch:
    groups, tokens = HEADS // spec.group, NEW_TOKENS if spec.only == "all" else 1
    several = spec.only == "all" or spec.direction == "combine"
    paged, narrow = spec.layout == "paged", spec.layout == "eight_bits"
    lead = (BATCH * TOKENS // PAGE, PAGE) if paged else (BATCH, TOKENS)
    dtype = torch.float8_e4m3fn if narrow else spec.dtype
    q, out = (make((BATCH, tokens, HEADS, spec.head_dim), spec.dtype) for _ in range(2))
    k, v = (make((*lead, groups, spec.head_dim), dtype) for _ in "kv")
    lengths = make((BATCH,), torch.int32)
    table = make((BATCH, TOKENS // PAGE), torch.int32) if paged else None
    k_scale, v_scale = (make((groups,), torch.float32) if narrow else None for _ in "kv")
    partials = None
    if several:
        shape = (BATCH, groups, splits_of(TOKENS), spec.group * tokens)
        partials = make((*shape, spec.head_dim), torch.float32), make(shape, torch.float32)
    launches = decode_launches(
        q, k, v, _prompts(spec, make), lengths, table, k_scale, v_scale, spec.head_dim**-0.5, out,
        partials, config,
    )  # fmt: skip
    return launches[-1 if spec.direction == "combine" else 0]


def launch_of(
    spec: Specialisation, config: TileConfig | None = None, make: Make = on_meta
) -> Launch:
    """The launch of a specialisation.

    Args:
        spec: what is compiled.
        config: its tile; the shipped one unless given.
        make: a tensor of a shape and a dtype; called in one order for every tile.
    """
    row = row_of(spec)
    config = config or tile(spec.capability, row, spec.head_dim, spec.dtype)
    if row == "decode":
        return _decode_launch(spec, config, make)
    packed, paged = spec.layout in ("packed", "prefix", "paged"), spec.layout == "paged"
    lead = (BATCH * TOKENS,) if packed else (BATCH, TOKENS)
    scale, groups = spec.head_dim**-0.5, HEADS // spec.group

    def rows(heads: int) -> Tensor:
        return make((*lead, heads, spec.head_dim), spec.dtype)

    def statistic() -> Tensor:
        return make((HEADS, *lead) if packed else (BATCH, HEADS, TOKENS), torch.float32)

    q, lse = rows(HEADS), statistic()
    k, v = (
        make((BATCH * TOKENS // PAGE, PAGE, groups, spec.head_dim), spec.dtype)
        if paged
        else rows(groups)
        for _ in "kv"
    )
    prompts, layout, prefix = _prompts(spec, make), _layout(spec, make), _prefix(spec, make)
    if spec.direction == "forward":
        return forward_launch(q, k, v, prompts, prefix, layout, scale, rows(HEADS), lse, config)
    if spec.direction == "prompt_forward":
        base = rows(HEADS) if spec.only == "all" else None
        cu = layout.cu_seqlens_q
        return prompt_forward_launch(q, prompts, cu, TOKENS, base, scale, rows(HEADS), config)
    statistics = (statistic(), statistic()) if has_many_tiles(q, prompts) else None
    dlse = statistic() if spec.only == "all" else None
    if spec.direction == "backward_dq":
        return query_launch(
            q, k, v, prompts, prefix, layout, scale, rows(HEADS), rows(HEADS), lse, dlse,
            statistic(), rows(HEADS), statistics, config,
        )  # fmt: skip
    dout, every = rows(HEADS), spec.only == "all"
    if spec.direction == "prompt_backward":
        parts = (BATCH, chunks_of(TOKENS))
        shape = (*parts, spec.rows, groups, spec.head_dim)
        sums, gates = make(shape, torch.float32), make((*parts, HEADS), torch.float32)
        dv_sums = make(shape, torch.float32) if every else None
        return prompt_backward_launch(
            q, prompts, layout.cu_seqlens_q, TOKENS, scale, dout, (sums, dv_sums, gates),
            statistics, config,
        )  # fmt: skip
    if spec.direction == "prefix":
        assert prefix.k is not None
        lead = (sequence_chunks(BATCH, len(prefix.k)), *prefix.k.shape)
        dk, dv = make(lead, torch.float32) if every else None, make(lead, torch.float32)
        return prefix_launch(q, prefix, layout, scale, dout, lse, statistic(), (dk, dv), config)
    dk = rows(groups) if every else None
    return key_launch(q, k, v, layout, scale, dout, lse, statistic(), dk, rows(groups), config)


def forms(
    capability: int, direction: str, head_dim: int, dtype: torch.dtype
) -> list[Specialisation]:
    """Forms of a kernel: the papers' prompt, a wide one, a long one, and those of a cache."""
    group = 4 if direction in ("backward_dkv_grouped", "decode", "combine") else 1
    if direction.startswith("backward_dkv") or direction == "prefix":
        return [
            Specialisation(capability, direction, head_dim, dtype, "none", 1, layout, of, only)
            for layout, of, only in (
                (("prefix", 1, "all"), ("prefix", 4, "all"), ("prefix", 1, "some"))
                if direction == "prefix"
                else (("causal", group, "all"), ("padded", group, "all"), ("packed", group, "some"))
            )
        ]
    wide, long, only = "padded", "packed", "all"
    if direction.startswith("prompt"):
        wide = "packed"
    if direction == "combine":
        wide = long = "causal"
    if direction == "decode":
        narrow = capability >= 89 and dtype != torch.float32
        wide, long, only = "paged", "eight_bits" if narrow else "causal", "some"
    found = [
        Specialisation(capability, direction, head_dim, dtype, form, rows, layout, group, of)
        for form, rows, layout, of in (
            ("shared", 10, "causal", "all"),
            ("bank", 64, wide, only),
            ("bank", 300, long, only),
        )
    ]
    if direction in ("forward", "backward_dq"):
        found.append(replace(found[0], layout="prefix"))
    if direction == "forward":
        found.append(replace(found[0], layout="paged"))
    return found


def table() -> list[Specialisation]:
    """Every tile of every architecture in its three forms."""
    tiles = [*product(HEAD_DIMS, (torch.bfloat16, torch.float32)), (96, torch.bfloat16)]
    return [
        spec
        for capability, direction, (head_dim, dtype) in product(CAPABILITIES, KERNELS, tiles)
        for spec in forms(capability, direction, head_dim, dtype)
    ]
