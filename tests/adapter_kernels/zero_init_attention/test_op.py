"""Do the public functions keep the rest of their contract? Strides, empties, lse, pages, poison."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapter_kernels import (
    gated_prompt_attention,
    zero_init_attention,
    zero_init_attention_decode,
    zero_init_attention_varlen,
)
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention.library import attention_op, decode_op
from tests.adapter_kernels.tolerances import (
    check_bitwise,
    check_finite,
    check_identity,
    largest,
)
from tests.adapter_kernels.zero_init_attention.cases import (
    FORMS,
    LAYOUTS,
    Case,
    int32,
    make_case,
)
from tests.adapter_kernels.zero_init_attention.checkers import gradients, random_like

# again on the kernels, where the interpreter makes them the default
pytestmark = pytest.mark.kernel
FLOAT32 = torch.float32
NAN = float("nan")
# what reads pages here
KERNELS = "triton" if INTERPRETED else "reference"


def float_case(form: str, layout: str) -> Case:
    return make_case(form, layout).cast(FLOAT32)


def plain_call(case: Case) -> Tensor:
    """zero_init_attention of a dense case."""
    arguments = {"scale": case.scale, "causal": case.causal, "adapter_index": case.adapter_index}
    out = zero_init_attention(
        case.q, case.k, case.v, *case.prompts[:3], **arguments, prompt_lengths=case.prompt_lengths
    )
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bitwise(layout: str) -> None:
    runs = []
    for _ in range(2):
        case = float_case("bank", layout)
        out, lse = case.public()
        runs.append({"out": out, "lse": lse} | gradients(case, out, lse))
    for name, first in runs[0].items():
        check_bitwise(name, runs[1][name], first)


def test_scale_defaults_to_the_root_of_the_head_dimension() -> None:
    case = float_case("shared", "causal")
    got = zero_init_attention(case.q, case.k, case.v, *case.prompts[:3])
    assert isinstance(got, Tensor)
    check_bitwise("out", got, plain_call(replace(case, scale=8**-0.5)))


@pytest.mark.parametrize("form", FORMS)
def test_fused_is_tokens_plus_prompt_segment(form: str) -> None:
    """The prompt segment added to plain attention is the whole: one rounding more in float32."""
    case = float_case(form, "causal")
    fused = plain_call(case)
    tokens = zero_init_attention(case.q, case.k, case.v, scale=case.scale)
    assert isinstance(tokens, Tensor)
    if case.prompt_k is None:
        check_bitwise("out", fused, tokens)
        return
    added = gated_prompt_attention(
        case.q,
        *case.prompts[:3],
        scale=case.scale,
        adapter_index=case.adapter_index,
        prompt_lengths=case.prompt_lengths,
        out=tokens,
    )
    check_identity("out", added, fused)
    dout = random_like(fused)
    leaves = case.leaves
    expected = torch.autograd.grad(fused, list(leaves.values()), dout)
    got = torch.autograd.grad(added, list(leaves.values()), dout)
    for name, one, other in zip(leaves, got, expected, strict=True):
        check_identity(f"d{name}", one, other)


def test_prompt_segment_leaves_out_alone() -> None:
    case = float_case("shared", "causal")
    base = torch.randn_like(case.q)
    before = base.clone()
    result = gated_prompt_attention(case.q, *case.prompts[:3], out=base)
    check_bitwise("out", base, before)
    assert result.data_ptr() != base.data_ptr()
    zero = torch.zeros_like(case.leaves["gate"])
    same = gated_prompt_attention(case.q, *case.prompts[:2], zero, out=base)
    check_bitwise("gate 0", same, base)
    assert same.data_ptr() != base.data_ptr()


def test_two_gated_segments_in_one_layer() -> None:
    """Static prompts and a second, per-sample segment, each with its gate: the sums add up."""
    case, second = float_case("shared", "causal"), float_case("sample", "causal")
    both = gated_prompt_attention(case.q, *second.prompts[:3], out=plain_call(case))
    alone = gated_prompt_attention(case.q, *second.prompts[:3])
    check_identity("out", both, plain_call(case) + alone)


@pytest.mark.parametrize("form", ["none", "shared", "bank"])
def test_rows_without_keys_get_their_prompt_alone(form: str) -> None:
    case = float_case(form, "blind")
    out, lse = case.public()
    # 7 queries on 5 keys, bottom-right: the first two see nothing
    assert bool((lse[..., :2] == -torch.inf).all())
    check_finite("lse", lse[..., 2:])
    if form == "none":
        assert not out[:, :2].any()
    else:
        alone = gated_prompt_attention(
            case.q, *case.prompts[:3], scale=case.scale, adapter_index=case.adapter_index
        )
        check_bitwise("out", out[:, :2], alone[:, :2])
    for fill in (NAN, torch.inf):
        dlse = random_like(lse).masked_fill(lse == -torch.inf, fill)
        grads = torch.autograd.grad(
            [out, lse], [case.q, case.k, case.v], [random_like(out), dlse], retain_graph=True
        )
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            check_finite(name, grad)


def test_lse_merges_attention_over_two_halves_of_the_keys() -> None:
    """Natural logarithm, and differentiable: merged halves have the gradients of the whole."""
    case = float_case("none", "bidirectional")
    whole, lse = case.public()
    parts = [
        replace(case, k=case.k[:, keys], v=case.v[:, keys]).public()
        for keys in (slice(0, 3), slice(3, 7))
    ]
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [torch.exp(own - merged_lse).transpose(1, 2)[..., None] for _, own in parts]
    merged = sum(weight * own for weight, (own, _) in zip(weights, parts, strict=True))
    assert isinstance(merged, Tensor)
    check_identity("lse", merged_lse, lse)
    check_identity("out", merged, whole)
    dout = random_like(whole)
    expected = torch.autograd.grad(whole, [case.q, case.k, case.v], dout)
    got = torch.autograd.grad(merged, [case.q, case.k, case.v], dout)
    for name, one, other in zip(("dq", "dk", "dv"), got, expected, strict=True):
        check_identity(name, one, other)


@pytest.mark.parametrize("form", FORMS)
def test_packed_equals_one_by_one(form: str) -> None:
    case = float_case(form, "packed")
    out, lse = case.public()
    assert case.cu_seqlens_q is not None
    assert case.cu_seqlens_k is not None
    for b in range(case.batch):
        rows = slice(*case.cu_seqlens_q[b : b + 2].tolist())
        keys = slice(*case.cu_seqlens_k[b : b + 2].tolist())
        prompts = list(case.prompts)
        if form.startswith("sample"):
            prompts[:2] = [x[b : b + 1] for x in prompts[:2] if x is not None]
        if form == "sample_gates":
            prompts[2] = case.leaves["gate"][b : b + 1]
        if case.adapter_index is not None:
            prompts[3] = case.adapter_index[b : b + 1]
        own_out, own_lse = zero_init_attention(
            case.q[None, rows],
            case.k[None, keys],
            case.v[None, keys],
            *prompts[:3],
            adapter_index=prompts[3],
            prompt_lengths=prompts[4],
            scale=case.scale,
            return_lse=True,
        )
        check_identity("out", out[rows], own_out[0], scale=largest(out))
        seen = own_lse[0] > -torch.inf
        check_bitwise("rows without keys", lse[:, rows] > -torch.inf, seen)
        check_identity("lse", lse[:, rows][seen], own_lse[0][seen], scale=largest(own_lse[0][seen]))


def test_packed_sequence_does_not_depend_on_the_others() -> None:
    """Bitwise, given the same max_seqlen: other lengths around a sequence leave it as it is."""
    case = float_case("shared", "packed")
    others = float_case("shared", "packed_bidirectional")
    q, k, v = case.q[4:9], case.k[5:12], case.v[5:12]
    results = []
    for extra in (0, 3, 8):
        lead = (
            torch.cat([x[:extra], own]) for x, own in ((others.q, q), (others.k, k), (others.v, v))
        )
        out, lse = zero_init_attention_varlen(
            *lead,
            *case.prompts[:3],
            cu_seqlens_q=int32(0, extra, extra + 5),
            cu_seqlens_k=int32(0, extra, extra + 7),
            max_seqlen_q=8,
            max_seqlen_k=8,
            return_lse=True,
        )
        results.append((out[extra:], lse[:, extra:]))
    for out, lse in results[1:]:
        check_bitwise("out", out, results[0][0])
        check_bitwise("lse", lse, results[0][1])


def paged(keys: Tensor, page: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Keys (B,S,G,D) as shuffled pages with their table; pages nobody owns hold NaN."""
    b, s = keys.shape[:2]
    pages = s // page
    order = torch.randperm(b * pages + 3, generator=torch.Generator().manual_seed(seed))
    table = order[: b * pages].view(b, pages)
    pool = torch.full((len(order), page, *keys.shape[2:]), NAN)
    pool[table.flatten()] = keys.detach().reshape(b * pages, page, *keys.shape[2:])
    return pool, table.int()


@pytest.mark.parametrize("page", [1, 2, 8])
@pytest.mark.parametrize("form", ["none", "shared", "bank_lengths"])
def test_paged_equals_contiguous(form: str, page: int) -> None:
    case = float_case(form, "causal")
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(3, 8, 2, 8, generator=g) for _ in "kv")
    lengths = int32(8, 6, 5)
    (k_pages, table), (v_pages, _) = paged(k, page), paged(v, page)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = NAN, NAN
        # a page number past the length is never followed
        table[b, -(-length // page) :] = 10**6
    prompts = {"adapter_index": case.adapter_index, "prompt_lengths": case.prompt_lengths}
    with torch.no_grad():
        expected = zero_init_attention_decode(
            case.q, k, v, *case.prompts[:3], cache_lengths=lengths, **prompts, backend=KERNELS
        )
        check_finite("decode", expected)
        got = zero_init_attention_decode(
            case.q,
            k_pages,
            v_pages,
            *case.prompts[:3],
            cache_lengths=lengths,
            page_table=table,
            **prompts,
            backend=KERNELS,
        )
        check_bitwise("decode", got, expected)
        sizes = {"cu_seqlens_q": int32(0, 5, 10, 15), "max_seqlen_q": 5, "max_seqlen_k": 8}
        chunk = zero_init_attention_varlen(
            case.q.flatten(0, 1),
            k_pages,
            v_pages,
            *case.prompts[:3],
            cu_seqlens_k=int32(0, 8, 14, 19),
            page_table=table,
            **sizes,
            **prompts,
            backend=KERNELS,
        )
        packed = [torch.cat([x[b, :n] for b, n in enumerate(lengths.tolist())]) for x in (k, v)]
        expected = zero_init_attention_varlen(
            case.q.flatten(0, 1),
            *packed,
            *case.prompts[:3],
            cu_seqlens_k=int32(0, 8, 14, 19),
            **sizes,
            **prompts,
            # pages are not for the hybrid
            backend=KERNELS,
        )
    assert isinstance(chunk, Tensor)
    assert isinstance(expected, Tensor)
    check_bitwise("varlen", chunk, expected)
    check_bitwise("decode against varlen", got.flatten(0, 1), expected)


def test_empty_slots_of_a_decode_batch_are_zero() -> None:
    """cache_lengths 0 marks a slot that holds no sequence: neither tokens nor prompt contribute."""
    case = float_case("shared", "causal")
    k, v = case.k.detach().clone(), case.v.detach().clone()
    k[1], v[1] = NAN, NAN
    with torch.no_grad():
        out = zero_init_attention_decode(
            case.q[:, :1], k, v, *case.prompts[:3], cache_lengths=int32(7, 0, 1), scale=case.scale
        )
    assert not out[1].any()
    own = replace(case, q=case.q[2:, :1], k=case.k[2:, :1], v=case.v[2:, :1])
    check_identity("one token", out[2:], plain_call(own).detach())


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_padding_may_hold_anything(layout: str) -> None:
    case = float_case("bank_lengths", layout)
    clean = {"out": case.public()[0]} | gradients(case, *case.public())
    poisoned = {name: x.detach().clone() for name, x in case.leaves.items()}
    if layout == "padded":
        for b, (start, end) in enumerate(((0, 7), (2, 5), (3, 3))):
            for x in (poisoned["k"], poisoned["v"]):
                x[b, :start], x[b, end:] = NAN, NAN
    # adapter 2 is not used, adapters 0 and 3 are shorter than the bank's rows
    for x in (poisoned["prompt_k"], poisoned["prompt_v"]):
        x[2], x[0, 1:], x[3, 2:] = NAN, NAN, NAN
    poisoned["gate"][2] = NAN
    dirty = replace(case, **{name: x.requires_grad_() for name, x in poisoned.items()})
    results = {"out": dirty.public()[0]} | gradients(dirty, *dirty.public())
    for name, expected in clean.items():
        check_bitwise(name, results[name], expected)


def test_no_adapter_is_no_prompt() -> None:
    """Bitwise, and its bank row gets no gradient from it, whatever the row holds."""
    case = float_case("bank", "causal")
    bank = {name: x.detach().clone() for name, x in case.leaves.items() if "prompt" in name}
    for x in bank.values():
        x[0] = NAN
    bank = {name: x.requires_grad_() for name, x in bank.items()}
    case = replace(case, adapter_index=int32(-1, 1, -1), **bank)
    out = plain_call(case)
    plain = zero_init_attention(case.q, case.k, case.v, scale=case.scale)
    assert isinstance(plain, Tensor)
    check_bitwise("out", out[0], plain[0])
    check_bitwise("out", out[2], plain[2])
    assert largest(out[1] - plain[1]) > 0.1
    grads = torch.autograd.grad(out.square().sum(), [*bank.values(), case.leaves["gate"]])
    for name, grad in zip((*bank, "gate"), grads, strict=True):
        assert largest(grad[1]) > 0.0, f"d{name} of the adapter in use"
        assert not grad[[0, 2, 3]].any(), f"d{name} of the others"


def test_index_out_of_range_acts_as_none_without_a_check() -> None:
    """What a GPU does, where values are not checked; the operation itself never checks them."""
    case = float_case("bank_lengths", "causal")
    nothing = (None, None, None, 0, 0, True, 0.3, KERNELS)
    tensors = (case.q, case.k, case.v, case.prompt_k, case.prompt_v, case.gate)
    outs = []
    for index, lengths, ends in (
        (int32(-1, 2, -1), int32(3, 3, 3, 3), int32(7, 7, 7)),
        (int32(4, 2, -9), int32(3, 3, 9, 3), int32(7, 99, 7)),
    ):
        outs.append(attention_op(*tensors, index, lengths, *case.prefix, None, ends, *nothing)[0])
    check_bitwise("out", outs[1], outs[0])
    pages, table = case.k.detach().view(3, 7, 2, 8), int32(0, 1, 2).view(3, 1)
    rest = (None, None, None, None, None)
    outs, name = [], KERNELS
    for lengths in (int32(7, 7, 0), int32(7, 99, -4)):
        outs.append(
            decode_op(case.q.detach(), pages, pages, *rest, lengths, table, None, None, 0.3, name)
        )
    check_bitwise("decode", outs[1], outs[0])
    q, cu_q = case.q.detach().flatten(0, 1), int32(0, 5, 10, 15)
    outs = []
    for third, pages_of in ((14, (0, 1, 2)), (99, (-5, 1, 99))):
        index = (None, None, cu_q, int32(0, 7, 7, third), int32(*pages_of).view(3, 1), 5, 7)
        out, _, _ = attention_op(q, pages, pages, *rest, *case.prefix, *index, True, 0.3, name)
        outs.append(out)
    check_bitwise("varlen", outs[1], outs[0])


def test_sequences_without_keys_read_no_page() -> None:
    case = float_case("shared", "causal")
    pages = torch.full((2, 7, 2, 8), NAN)
    pages[1] = case.k[0].detach()
    out, lse = zero_init_attention_varlen(
        case.q.detach().flatten(0, 1),
        pages,
        pages,
        *case.prompts[:3],
        cu_seqlens_q=int32(0, 5, 10, 15),
        cu_seqlens_k=int32(0, 0, 7, 7),
        max_seqlen_q=5,
        max_seqlen_k=7,
        page_table=int32(0, 1, 10**6).view(3, 1),
        scale=case.scale,
        return_lse=True,
        backend=KERNELS,
    )
    prompt = {"scale": case.scale, "backend": KERNELS}
    alone = gated_prompt_attention(case.q, *case.prompts[:3], **prompt).flatten(0, 1)
    for rows in (slice(0, 5), slice(10, 15)):
        check_bitwise("out", out[rows], alone[rows])
        assert bool((lse[:, rows] == -torch.inf).all())
    check_finite("out", out)


@pytest.mark.parametrize(
    ("b", "t", "s"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (2, 0, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("form", ["none", "shared", "sample", "bank"])
@pytest.mark.parametrize("causal", [True, False])
def test_empty_dense_inputs(form: str, causal: bool, b: int, t: int, s: int) -> None:
    case = float_case(form, "causal")
    prompts = list(case.prompts)
    if form == "sample":
        prompts[:2] = [x[:b] for x in prompts[:2] if x is not None]
    if case.adapter_index is not None:
        prompts[3] = case.adapter_index[:b]
    q, k, v = case.q[:b, :t], case.k[:b, :s], case.v[:b, :s]
    for bound in (None, torch.zeros(b, dtype=torch.int32)):
        out, lse = zero_init_attention(
            q,
            k,
            v,
            *prompts[:3],
            causal=causal,
            key_starts=bound,
            adapter_index=prompts[3],
            return_lse=True,
        )
        assert (out.shape, lse.shape) == ((b, t, 6, 8), (b, 6, t))
        check_finite("out", out)
        if s == 0:
            assert bool((lse == -torch.inf).all())
        out.sum().backward()
    for name, leaf in case.leaves.items():
        assert leaf.grad is not None
        check_finite(f"d{name}", leaf.grad)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), [((), ()), ((0, 0), (3, 0)), ((2, 1), (0, 0))])
@pytest.mark.parametrize("form", ["none", "shared", "bank"])
def test_empty_packed_inputs(
    form: str, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]
) -> None:
    case = float_case(form, "packed")
    q, k, v = case.q[: sum(q_lengths)], case.k[: sum(k_lengths)], case.v[: sum(k_lengths)]
    index = None if case.adapter_index is None else case.adapter_index[: len(q_lengths)]
    cu_q, cu_k = (
        int32(0, *torch.tensor(n).cumsum(0).tolist()) if n else int32(0)
        for n in (q_lengths, k_lengths)
    )
    # a bound may be larger than every sequence
    out, lse = zero_init_attention_varlen(
        q,
        k,
        v,
        *case.prompts[:3],
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=4,
        max_seqlen_k=5,
        adapter_index=index,
        return_lse=True,
    )
    assert (out.shape, lse.shape) == ((sum(q_lengths), 6, 8), (6, sum(q_lengths)))
    assert bool((lse == -torch.inf).all())
    check_finite("out", out)
    if case.prompt_k is not None:
        alone = gated_prompt_attention(q, *case.prompts[:3], adapter_index=index, cu_seqlens_q=cu_q)
        check_bitwise("prompt alone", out, alone)
    out.sum().backward()
    for name, leaf in case.leaves.items():
        assert leaf.grad is not None
        check_finite(f"d{name}", leaf.grad)


@pytest.mark.parametrize(("b", "t", "s"), [(0, 1, 7), (2, 0, 7), (2, 1, 0)])
def test_empty_decode_inputs(b: int, t: int, s: int) -> None:
    case = float_case("shared", "causal")
    with torch.no_grad():
        out = zero_init_attention_decode(
            case.q[:b, :t],
            case.k[:b, :s],
            case.v[:b, :s],
            *case.prompts[:3],
            cache_lengths=torch.full((b,), s, dtype=torch.int32),
        )
    assert out.shape == (b, t, 6, 8)
    check_finite("out", out)
    if s == 0:
        assert not out.any()


def test_strides_of_inputs_and_gradients_are_free() -> None:
    """Slices of one fused projection, heads-first storage, an expanded dout: bitwise the same."""
    case = float_case("shared", "causal")
    k, v = case.k[:, :5], case.v[:, :5]
    reference = replace(case, k=k.detach().requires_grad_(), v=v.detach().requires_grad_())
    expected = plain_call(reference)
    fused = torch.cat([case.q, k, v], 2).detach()
    heads_first = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, k, v)]
    for q, k, v in (fused.split([6, 2, 2], 2), heads_first):
        assert not q.is_contiguous()
        strided = replace(case, q=q.requires_grad_(), k=k.requires_grad_(), v=v.requires_grad_())
        out = plain_call(strided)
        check_bitwise("out", out, expected)
        assert out.is_contiguous()
        transposed = random_like(expected).transpose(1, 2).contiguous().transpose(1, 2)
        for dout in (transposed, torch.ones(()).expand_as(out)):
            got = torch.autograd.grad(out, list(strided.leaves.values()), dout, retain_graph=True)
            wanted = torch.autograd.grad(
                expected, list(reference.leaves.values()), dout.contiguous(), retain_graph=True
            )
            for name, one, other in zip(case.leaves, got, wanted, strict=True):
                check_bitwise(f"d{name}", one, other)


@pytest.mark.parametrize("rows", [1, 16, 17, 144, 224])
def test_prompt_lengths_up_to_those_of_prompt_tuning(rows: int) -> None:
    case = float_case("shared", "causal")
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randn(rows, 2, 8, generator=g).requires_grad_() for _ in "kv"]
    case = replace(case, prompt_k=prompts[0], prompt_v=prompts[1])
    out = plain_call(case)
    scores = torch.einsum("bthd,phd->bthp", case.q, prompts[0].repeat_interleave(3, 1)) * case.scale
    added = torch.einsum("bthp,phd->bthd", scores.softmax(-1), prompts[1].repeat_interleave(3, 1))
    tokens = zero_init_attention(case.q, case.k, case.v, scale=case.scale)
    check_identity("out", out, tokens + case.leaves["gate"][:, None] * added)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "layout"), [("bank_lengths", "padded"), ("bank", "packed"), ("shared", "causal")]
)
def test_reference_on_cuda_never_waits_and_equals_the_cpu(form: str, layout: str) -> None:
    """Indices and lengths stay on the device: the mode that forbids synchronisation is on."""
    case = float_case(form, layout)
    out, lse = case.public()
    expected = gradients(case, out, lse)
    moved = {name: x.detach().cuda() for name, x in vars(case).items() if isinstance(x, Tensor)}
    cuda = replace(case, **moved)
    leaves = [x.requires_grad_() for x in cuda.leaves.values()]
    dlse = random_like(lse, 98).masked_fill(lse == -torch.inf, 1e6).cuda()
    dout = random_like(out).cuda()
    bounds = (cuda.key_starts, cuda.key_lengths, cuda.cu_seqlens_q, cuda.cu_seqlens_k, None)
    index = (*cuda.prefix, *bounds)
    rest = (*index, *case.longest(), case.causal, case.scale, "reference")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got_out, got_lse, _ = attention_op(cuda.q, cuda.k, cuda.v, *cuda.prompts, *rest)
        grads = torch.autograd.grad([got_out, got_lse], leaves, [dout, dlse])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_identity("out", got_out.cpu(), out)
    for (name, wanted), grad in zip(expected.items(), grads, strict=True):
        check_identity(name, grad.cpu(), wanted)
