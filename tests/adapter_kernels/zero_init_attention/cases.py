"""Which inputs do the tests of zero-initialized attention share? Random ones, in every form.

A Case holds the arguments of one call, dense or packed, in one dtype. Sizes are odd or prime and
unequal, sequences of length 0 and rows that see nothing occur, gates exceed 1 in magnitude.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from adapter_kernels import zero_init_attention, zero_init_attention_varlen
from adapter_kernels.zero_init_attention.library import attention_op

FORMS = ("none", "shared", "sample", "sample_gates", "bank", "bank_lengths")
LAYOUTS = (
    "causal", "bidirectional", "padded", "blind", "packed", "packed_bidirectional", "packed_prefix",
)  # fmt: skip
NAMES = ("q", "k", "v", "prompt_k", "prompt_v", "gate", "prefix_k", "prefix_v")
# which backend `Case.public` asks for; None is what users get here. Tests of one backend set it.
BACKEND: str | None = None
# where every case lies; tests of the kernels set the GPU
DEVICE = "cpu"


@dataclass
class Case:
    """The arguments of zero_init_attention, or of zero_init_attention_varlen where packed."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_k: Tensor | None
    prompt_v: Tensor | None
    gate: Tensor | None
    adapter_index: Tensor | None
    prompt_lengths: Tensor | None
    key_starts: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    causal: bool
    scale: float
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None
    prefix_index: Tensor | None = None
    prefix_lengths: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether the sequences are packed."""
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def prompts(self) -> tuple[Tensor | None, ...]:
        """The five prompt arguments in order."""
        return self.prompt_k, self.prompt_v, self.gate, self.adapter_index, self.prompt_lengths

    @property
    def prefix(self) -> tuple[Tensor | None, ...]:
        """The four prefix arguments in order."""
        return self.prefix_k, self.prefix_v, self.prefix_index, self.prefix_lengths

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments that are there."""
        values = {name: getattr(self, name) for name in NAMES}
        return {name: x for name, x in values.items() if x is not None}

    def cast(self, dtype: torch.dtype, gate: torch.dtype = torch.float32) -> "Case":
        """A detached copy with leaves of this dtype that require gradients."""
        new = {
            name: x.detach().to(gate if name == "gate" else dtype).requires_grad_()
            for name, x in self.leaves.items()
        }
        return replace(self, **new)

    def double(self) -> "Case":
        """A detached float64 copy, gate included."""
        return self.cast(torch.float64, torch.float64)

    def longest(self) -> tuple[int, int]:
        """max_seqlen_q and max_seqlen_k."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return 0, 0
        return int(self.cu_seqlens_q.diff().max()), int(self.cu_seqlens_k.diff().max())

    def operation(self) -> tuple[Tensor, Tensor]:
        """The reference's torch operation, which takes float64 as well: out and lse."""
        index = (self.key_starts, self.key_lengths, self.cu_seqlens_q, self.cu_seqlens_k, None)
        leaves = (self.q, self.k, self.v, *self.prompts, *self.prefix)
        plain = (*self.longest(), self.causal, self.scale, "reference")
        return attention_op(*leaves, *index, *plain)[:2]

    def public(self) -> tuple[Tensor, Tensor]:
        """The public function: out and lse."""
        names = [f.name for f in fields(self)]
        arguments = {name: getattr(self, name) for name in names} | {"backend": BACKEND}
        packing = ("cu_seqlens_q", "cu_seqlens_k")
        if self.packed:
            for name in ("key_starts", "key_lengths"):
                arguments.pop(name)
            arguments["max_seqlen_q"], arguments["max_seqlen_k"] = self.longest()
            result = zero_init_attention_varlen(**arguments, return_lse=True)
        else:
            for name in (*packing, *(name for name in arguments if name.startswith("prefix"))):
                arguments.pop(name)
            result = zero_init_attention(**arguments, return_lse=True)
        assert isinstance(result, tuple)
        return result


def int32(*values: int) -> Tensor:
    """An index tensor."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def make_case(form: str, layout: str, *, seed: int = 0, head_dim: int = 8) -> Case:
    """A float64 case: B = 3, H = 6, G = 2 and P = 3 in a form of FORMS and a layout of LAYOUTS."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, groups, rows, adapters = 3, 6, 2, 3, 4
    queries, keys = (7, 5) if layout == "blind" else (5, 7)
    packed = layout.startswith("packed")
    cu_q = cu_k = starts = ends = None
    if packed:
        # causal rows without keys (4 queries, 2 keys), no queries, and no keys all occur
        cu_q, cu_k = int32(0, 4, 4, 9), int32(0, 2, 5, 12)
        if form == "sample_gates":
            cu_q, cu_k = int32(0, 3, 5, 9), int32(0, 3, 3, 12)
        q, k, v = normal(g, 9, heads, head_dim), *(normal(g, 12, groups, head_dim) for _ in "kv")
    else:
        q = normal(g, batch, queries, heads, head_dim)
        k, v = (normal(g, batch, keys, groups, head_dim) for _ in "kv")
    if layout == "padded":
        # left and right padding; the last sequence has no key at all
        starts, ends = int32(0, 2, 3), int32(7, 5, 3)
    prompt_k = prompt_v = gate = index = lengths = None
    if form != "none":
        lead = {"shared": (), "sample": (batch,), "sample_gates": (batch,)}.get(form, (adapters,))
        prompt_k, prompt_v = (normal(g, *lead, rows, groups, head_dim) for _ in "kv")
        gate = 1.5 * normal(g, *(() if form in ("shared", "sample") else lead), heads)
    if form.startswith("bank"):
        index = int32(2, -1, 2) if form == "bank" else int32(3, 1, 0)
        lengths = int32(1, 3, 3, 2) if form == "bank_lengths" else None
    prefix: tuple[Tensor, ...] = ()
    if layout == "packed_prefix":
        # two sequences share one, the other has none, or one and no key of its own; one is not used
        bank = [normal(g, 3, 5, groups, head_dim) for _ in "kv"]
        of = int32(1, 0, 1) if form == "sample_gates" else int32(1, -1, 1)
        prefix = (bank[0], bank[1], of, int32(5, 3, 4))
    causal = "bidirectional" not in layout
    case = Case(
        q, k, v, prompt_k, prompt_v, gate, index, lengths, starts, ends, cu_q, cu_k, causal, 0.37,
        *prefix,
    )  # fmt: skip
    return case.double()


def sized(
    form: str, *, queries: int, keys: int, head_dim: int, rows: int, causal: bool = True
) -> Case:
    """A dense case of these sizes, B = 2, H = 6 and G = 2."""
    g = torch.Generator().manual_seed(queries + keys)
    case = make_case(form, "causal")
    lead = {"shared": (), "sample": (2,), "bank_lengths": (4,)}.get(form)
    case = replace(
        case,
        q=normal(g, 2, queries, 6, head_dim),
        k=normal(g, 2, keys, 2, head_dim),
        v=normal(g, 2, keys, 2, head_dim),
        causal=causal,
        scale=head_dim**-0.5,
    )
    if lead is None:
        return case
    prompt = [normal(g, *lead, rows, 2, head_dim) for _ in "kv"]
    gate = 1.5 * normal(g, *(lead if form == "bank_lengths" else ()), 6)
    case = replace(case, prompt_k=prompt[0], prompt_v=prompt[1], gate=gate)
    if form == "bank_lengths":
        index, lengths = int32(2, -1), int32(1, rows, max(1, rows - 3), rows)
        case = replace(case, adapter_index=index, prompt_lengths=lengths)
    return case
