"""Are the operations good citizens of torch? opcheck, compile, export, autograd, refusals."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from adapter_kernels import (
    gated_prompt_attention,
    zero_init_attention,
    zero_init_attention_decode,
    zero_init_attention_varlen,
)
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention import library
from tests.adapter_kernels.tolerances import check_bitwise, check_identity
from tests.adapter_kernels.zero_init_attention.cases import NAMES, Case, int32, make_case, sized

# again on the kernels, where the interpreter makes them the default
pytestmark = pytest.mark.kernel
FLOAT32 = torch.float32
# the default first
HERE = ("triton",) if INTERPRETED else ("hybrid", "reference")
Leaves = tuple[Tensor, ...]


def detached(case: Case) -> Case:
    return replace(case, **{name: x.detach() for name, x in case.leaves.items()})


def index_arguments(case: Case) -> tuple[Any, ...]:
    """What follows the prompts in the operation's schema, up to the backend."""
    index = (case.key_starts, case.key_lengths, case.cu_seqlens_q, case.cu_seqlens_k, None)
    return (*case.prefix, *index, *case.longest(), case.causal, case.scale)


def test_every_operation_declares_itself_safe_to_compile() -> None:
    operations = (
        library.attention_op,
        library.attention_backward_op,
        library.decode_op,
        library.prompt_op,
        library.prompt_backward_op,
    )
    for operation in operations:
        assert torch.Tag.pt2_compliant_tag in operation.tags, str(operation)


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("shared", "causal"), ("bank_lengths", "padded"), ("none", "blind"), ("sample", "packed"),
        ("shared", "packed_prefix"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", HERE)
def test_opcheck_of_attention(backend: str, form: str, layout: str) -> None:
    case = make_case(form, layout).cast(FLOAT32)
    arguments = (case.q, case.k, case.v, *case.prompts, *index_arguments(case), backend)
    opcheck(library.attention_op, arguments)


@pytest.mark.parametrize(
    "needs",
    [(True,) * 6, (False, False, False, True, True, True), (True, False) * 3],
)
@pytest.mark.parametrize("layout", ["causal", "packed", "packed_prefix"])
@pytest.mark.parametrize("backend", HERE)
def test_opcheck_of_attention_backward(backend: str, layout: str, needs: tuple[bool, ...]) -> None:
    case = detached(make_case("bank", layout).cast(torch.float16))
    out, lse = case.operation()
    arguments = (torch.randn_like(out), torch.randn_like(lse), out, lse, case.q, case.k, case.v)
    needs = (*needs, case.prefix_k is not None, needs[0])
    rest = (*index_arguments(case), backend, list(needs))
    opcheck(library.attention_backward_op, (*arguments, *case.prompts, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("shared", "square"),
        ("shared", "causal"),
        ("bank_lengths", "padded"),
        ("sample", "packed"),
        ("bank", "packed_prefix"),
        ("none", "blind"),
    ],
)
@pytest.mark.parametrize("turned", ["", "qkv"])
@pytest.mark.parametrize("backend", HERE)
def test_results_lie_as_compiled_code_is_told(
    backend: str, turned: str, form: str, layout: str, dtype: torch.dtype
) -> None:
    """opcheck compares strides on a GPU only; transformers hands on heads before rows."""
    square = layout == "square"
    case = sized(form, queries=9, keys=9, rows=3, head_dim=8) if square else make_case(form, layout)
    case = detached(case.cast(dtype))
    case = replace(case, **{name: turn(getattr(case, name)) for name in turned})
    inputs = (case.q, case.k, case.v, *case.prompts)
    found = library.attention_op(*inputs, *index_arguments(case), backend)
    out, lse, own = found
    kept, dout = own if len(own) else out, turn(torch.randn_like(out))
    for dlse in (None, torch.randn_like(lse)):
        rest = (*inputs, *index_arguments(case), backend, [True] * 8)
        found += library.attention_backward_op(dout, dlse, kept, lse, *rest)
    if form != "none":
        alone = "reference" if backend == "hybrid" else backend
        rest = (case.cu_seqlens_q, dout, case.scale, alone)
        found += (library.prompt_op(case.q, *case.prompts, *rest),)
        rest = (case.cu_seqlens_q, case.scale, alone, [True] * 4)
        found += library.prompt_backward_op(dout, case.q, *case.prompts, *rest)
    assert not any(x.numel() and not x.is_contiguous() for x in found)


def turn(x: Tensor) -> Tensor:
    """The same numbers, heads before rows in memory."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_of_decode(paged: bool) -> None:
    case = detached(make_case("shared", "causal").cast(torch.float16))
    k, v, table = case.k, case.v, None
    if paged:
        k, v, table = k.view(21, 1, 2, 8), v.view(21, 1, 2, 8), torch.arange(21).view(3, 7).int()
    lengths = int32(7, 0, 5)
    backend = "triton" if INTERPRETED else "reference"
    arguments = (case.q, k, v, *case.prompts, lengths, table, None, None, case.scale, backend)
    opcheck(library.decode_op, arguments)


@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_opcheck_of_the_prompt_segment(layout: str) -> None:
    case = make_case("bank", layout).cast(FLOAT32)
    backend = "triton" if INTERPRETED else "reference"
    rest = (case.cu_seqlens_q, case.q.detach() * 2, case.scale, backend)
    opcheck(library.prompt_op, (case.q, *case.prompts, *rest))
    plain = detached(case)
    rest = (plain.cu_seqlens_q, plain.scale, backend, [True, False, True, True])
    opcheck(library.prompt_backward_op, (plain.q * 3, plain.q, *plain.prompts, *rest))


def dense(q: Tensor, k: Tensor, v: Tensor, *prompt: Tensor) -> Leaves:
    """Attention with both results in use, and a second gated segment on top."""
    out, lse = zero_init_attention(q, k, v, *prompt, return_lse=True)
    return gated_prompt_attention(q, *prompt, out=out), lse


def packed(q: Tensor, k: Tensor, v: Tensor, *prompt: Tensor) -> Leaves:
    """The same sequences packed, of 5 queries and 7 keys each."""
    cu_q, cu_k = int32(0, 5, 10, 15), int32(0, 7, 14, 21)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    sizes = {"max_seqlen_q": 5, "max_seqlen_k": 7}
    out = zero_init_attention_varlen(*flat, *prompt, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **sizes)
    assert isinstance(out, Tensor)
    return (gated_prompt_attention(q.flatten(0, 1), *prompt, cu_seqlens_q=cu_q, out=out),)


def run(function: Callable[..., Leaves], case: Case) -> Leaves:
    """Results and gradients of all leaves."""
    leaves = tuple(x.detach().requires_grad_() for x in case.leaves.values())
    outs = function(*leaves)
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    return *(out.detach() for out in outs), *grads


@pytest.mark.parametrize("function", [dense, packed])
def test_compiles_into_one_graph(function: Callable[..., Leaves]) -> None:
    case = make_case("shared", "causal").cast(FLOAT32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled, case), run(function, case), strict=True):
        check_bitwise("compiled", got, expected)


def test_compiled_sequence_length_may_change() -> None:
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager", dynamic=True)
    case = make_case("shared", "causal").cast(FLOAT32)
    shorter = replace(case, q=case.q[:2, :3], k=case.k[:2, :4], v=case.v[:2, :4])
    for one in (case, shorter):
        for got, expected in zip(run(compiled, one), run(dense, one), strict=True):
            check_bitwise("compiled", got, expected)


def test_decode_compiles_into_one_graph() -> None:
    case = detached(make_case("bank", "causal").cast(FLOAT32))

    def decode(lengths: Tensor) -> Tensor:
        return zero_init_attention_decode(
            case.q,
            case.k,
            case.v,
            *case.prompts[:3],
            cache_lengths=lengths,
            adapter_index=case.adapter_index,
        )

    lengths = int32(7, 5, 6)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    check_bitwise("compiled", compiled(lengths), decode(lengths))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inductor_compiles_forward_and_backward(dtype: torch.dtype) -> None:
    case = make_case("shared", "causal").cast(dtype)
    compiled = torch.compile(dense, fullgraph=True)
    for got, expected in zip(run(compiled, case), run(dense, case), strict=True):
        check_identity("compiled", got, expected)


class Model(torch.nn.Module):
    """A module around one call, for export."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *prompt: Tensor) -> Leaves:
        """The function `dense`."""
        return dense(q, k, v, *prompt)


def test_exports() -> None:
    case = detached(make_case("shared", "causal").cast(FLOAT32))
    leaves = tuple(case.leaves.values())
    program = torch.export.export(Model(), leaves)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "adapter_kernels.zero_init_attention.default" in names
    for got, expected in zip(program.module()(*leaves), dense(*leaves), strict=True):
        check_bitwise("exported", got, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    case = make_case("bank", "causal").cast(FLOAT32)

    def function(*leaves: Tensor) -> Tensor:
        one = replace(case, **dict(zip(case.leaves, leaves, strict=True)))
        return one.public()[0]

    expected = torch.autograd.grad(
        function(*case.leaves.values()).square().sum(), case.leaves.values()
    )
    leaves = [x.detach().requires_grad_() for x in case.leaves.values()]
    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        check_bitwise("gradient", leaf.grad, grad)


class Spy:
    """Records what the backward of a backend was asked for and what it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str, name: str) -> None:
        self.needs: list[tuple[bool, ...]] = []
        self.second: list[Any] = []
        self.sizes: list[tuple[int, ...]] = []
        launcher = library.launchers(backend)
        original = getattr(launcher, name)

        def recording(*args: Any) -> tuple[Tensor, ...]:
            results = original(*args)
            self.needs.append(args[-1])
            self.second.append(args[1])
            self.sizes.append(tuple(result.numel() for result in results))
            return results

        monkeypatch.setattr(launcher, name, recording)


@pytest.mark.parametrize(
    "asked",
    [
        ("q", "k", "v", "prompt_k", "prompt_v", "gate"),
        ("prompt_k", "prompt_v", "gate"),
        ("gate",),
        ("q",),
        ("v",),
        ("k", "prompt_v"),
    ],
)
@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_gradients_nobody_asked_for_are_not_computed(
    layout: str, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch, HERE[0], "attention_backward")
    case = detached(make_case("bank", layout).cast(FLOAT32))
    for name in asked:
        case.leaves[name].requires_grad_()
    case.public()[0].sum().backward()
    wanted = tuple(name in asked for name in NAMES)
    assert spy.needs == [wanted]
    assert spy.second == [None], "lse was not used, so it has no gradient, not one of zeros"
    sizes = tuple(case.leaves[name].numel() if name in asked else 0 for name in NAMES)
    assert spy.sizes == [sizes]
    assert [name for name, x in case.leaves.items() if x.grad is not None] == list(asked)


def test_prompt_segment_computes_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, "triton" if INTERPRETED else "reference", "prompt_backward")
    case = detached(make_case("shared", "causal").cast(FLOAT32))
    prompt_k, prompt_v, gate = case.leaves["prompt_k"], case.leaves["prompt_v"], case.leaves["gate"]
    base = torch.randn_like(case.q).requires_grad_()
    gated_prompt_attention(case.q, prompt_k, prompt_v, gate, out=base).sum().backward()
    assert spy.needs == [], "only out needs a gradient, which passes through"
    assert base.grad is not None
    check_bitwise("dout", base.grad, torch.ones_like(base))
    gate.requires_grad_()
    gated_prompt_attention(case.q, prompt_k, prompt_v, gate).sum().backward()
    assert spy.needs == [(False, False, False, True)]
    assert spy.sizes == [(0, 0, 0, 6)]


def test_gradient_through_lse_alone() -> None:
    case = make_case("shared", "causal").double()
    _, lse = case.operation()
    got = torch.autograd.grad(lse.sum(), [case.q, case.k, case.v, case.gate], allow_unused=True)
    scores = torch.einsum("bthd,bshd->bhts", case.q, case.k.repeat_interleave(3, 2)) * case.scale
    hidden = torch.ones(5, 7, dtype=torch.bool).triu(3)
    expected = torch.autograd.grad(
        scores.masked_fill(hidden, -torch.inf).logsumexp(-1).sum(), [case.q, case.k]
    )
    check_identity("dq", got[0], expected[0])
    check_identity("dk", got[1], expected[1])
    for name, grad in zip(("dv", "dgate"), got[2:], strict=True):
        assert not grad.any(), f"{name} must be 0"


@pytest.mark.parametrize("layout", ["causal", "packed"])
def test_double_backward_is_refused(layout: str) -> None:
    case = make_case("shared", layout).cast(FLOAT32)
    (first,) = torch.autograd.grad(case.public()[0].sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="zero_init_attention cannot be differentiated twice"):
        first.sum().backward()
    out = gated_prompt_attention(case.q, *case.prompts[:3], cu_seqlens_q=case.cu_seqlens_q)
    (first,) = torch.autograd.grad(out.sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_prompt_attention cannot be differentiated twice"):
        first.sum().backward()


def test_vmap_is_refused() -> None:
    case = detached(make_case("shared", "causal").cast(FLOAT32))
    many = torch.stack([case.q, case.q])
    with pytest.raises(RuntimeError, match="vmap over zero_init_attention is not supported: make"):
        torch.vmap(lambda q: zero_init_attention(q, case.k, case.v))(many)
    with pytest.raises(RuntimeError, match="vmap over gated_prompt_attention is not supported"):
        torch.vmap(lambda q: gated_prompt_attention(q, *case.prompts[:3]))(many)
    lengths = int32(7, 7, 7)
    with pytest.raises(RuntimeError, match="vmap over zero_init_attention_decode is not supported"):
        torch.vmap(lambda q: zero_init_attention_decode(q, case.k, case.v, cache_lengths=lengths))(
            many
        )


def test_decode_and_paged_prefill_are_forward_only() -> None:
    case = make_case("shared", "causal").cast(FLOAT32)
    out = zero_init_attention_decode(case.q, case.k, case.v, cache_lengths=int32(7, 7, 7))
    with pytest.raises(RuntimeError, match="zero_init_attention_decode is forward only"):
        out.sum().backward()
    pages = (x.detach().view(3, 7, 2, 8) for x in (case.k, case.v))
    out = zero_init_attention_varlen(
        case.q.flatten(0, 1),
        *pages,
        cu_seqlens_q=int32(0, 5, 10, 15),
        cu_seqlens_k=int32(0, 7, 14, 21),
        max_seqlen_q=5,
        max_seqlen_k=7,
        page_table=int32(0, 1, 2).view(3, 1),
    )
    assert isinstance(out, Tensor)
    with pytest.raises(RuntimeError, match="varlen with page_table is forward only"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_together_and_not_the_gate(dtype: torch.dtype) -> None:
    case = make_case("shared", "causal").cast(FLOAT32)
    # as a model under autocast has them: projections in half precision, rotated queries in float32
    mixed = replace(case, k=case.k.to(dtype), prompt_v=case.leaves["prompt_v"].to(dtype))
    with torch.autocast("cpu", dtype):
        out, lse = mixed.public()
        grads = torch.autograd.grad(out.sum(), [case.q, case.leaves["gate"]], retain_graph=True)
    half = case.cast(dtype)
    expected, expected_lse = half.public()
    # bitwise the half precision call: autocast does not reach into the float32 inside
    check_bitwise("out", out, expected)
    check_bitwise("lse", lse, expected_lse)
    own = torch.autograd.grad(expected.sum(), [half.q, half.leaves["gate"]])
    assert [grad.dtype for grad in grads] == [FLOAT32, FLOAT32]
    check_bitwise("dq", grads[0], own[0].float())
    check_bitwise("dgate", grads[1], own[1])


def test_autocast_of_decode_and_prompt_segment() -> None:
    case = detached(make_case("shared", "causal").cast(FLOAT32))
    half = detached(case.cast(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        decoded = zero_init_attention_decode(
            case.q, case.k, half.v, *case.prompts[:3], cache_lengths=int32(7, 6, 5)
        )
        added = gated_prompt_attention(case.q, *case.prompts[:3], out=half.q)
    check_bitwise(
        "decode",
        decoded,
        zero_init_attention_decode(
            half.q, half.k, half.v, *half.prompts[:3], cache_lengths=int32(7, 6, 5)
        ),
    )
    check_bitwise("prompt", added, gated_prompt_attention(half.q, *half.prompts[:3], out=half.q))


def test_shapes_are_known_without_computing() -> None:
    leaves = [
        x.detach().to("meta") for x in make_case("shared", "causal").cast(FLOAT32).leaves.values()
    ]
    out, lse = dense(*leaves)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (3, 5, 6, 8), FLOAT32)
    assert (lse.device.type, lse.shape, lse.dtype) == ("meta", (3, 6, 5), FLOAT32)
