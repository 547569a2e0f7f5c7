"""What must hold of any implementation of zero-initialized attention? Each check is one function.

The tests run them on the package as it is, where they pass, and on copies with a planted mutation,
where they must fail. They call the public functions, or the operations in float64.
"""

from dataclasses import replace

import torch
from torch import Tensor

from adapter_kernels import (
    gated_prompt_attention,
    zero_init_attention,
    zero_init_attention_decode,
)
from tests.adapter_kernels.tolerances import (
    check_bitwise,
    check_float64,
    check_identity,
    largest,
)
from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import Case, int32, make_case
from tests.adapter_kernels.zero_init_attention.literal import literal

FLOAT32 = torch.float32


def random_like(x: Tensor, seed: int = 99) -> Tensor:
    """Random numbers in the shape and dtype of x."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)


def gradients(case: Case, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """Gradients of every leaf, given random gradients of out and of lse."""
    # no gradient may pass a row without keys, so what it is given there is large
    dlse = random_like(lse, 98).masked_fill(lse == -torch.inf, 1e6)
    leaves = case.leaves
    given = [(y, dy) for y, dy in ((out, random_like(out)), (lse, dlse)) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in given], list(leaves.values()), [dy for _, dy in given], allow_unused=True
    )
    return {
        f"d{name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }


def check_equations(form: str, layout: str) -> None:
    """out, lse and all gradients against the literal transcription, in float64."""
    case = make_case(form, layout, head_dim=3)
    out, lse = case.operation()
    expected_out, expected_lse = literal(case)
    check_float64("out", out, expected_out)
    blind = expected_lse == -torch.inf
    check_bitwise("rows without keys", lse == -torch.inf, blind)
    check_float64("lse", lse.masked_fill(blind, 0.0), expected_lse.masked_fill(blind, 0.0))
    expected = gradients(case, expected_out, expected_lse)
    for name, grad in gradients(case, out, lse).items():
        check_float64(name, grad, expected[name])


def check_gate_zero_is_plain_attention(form: str, layout: str) -> None:
    """Bitwise the attention without a prompt: out, lse, dq, dk, dv."""
    case = make_case(form, layout).cast(FLOAT32)
    assert case.gate is not None
    zero = replace(case, gate=torch.zeros_like(case.gate).requires_grad_())
    plain = replace(zero, prompt_k=None, prompt_v=None, gate=None)
    plain = replace(plain, adapter_index=None, prompt_lengths=None)
    results = [(x, *x.public()) for x in (zero, plain)]
    check_bitwise("out", results[0][1], results[1][1])
    check_bitwise("lse", results[0][2], results[1][2])
    got, expected = (gradients(*result) for result in results)
    for name in ("dq", "dk", "dv"):
        check_bitwise(name, got[name], expected[name])


def check_linear_in_the_gate(form: str, layout: str) -> None:
    """out(g) = out(0) + (out(-2 g) - out(0)) / -2."""
    case = make_case(form, layout).cast(FLOAT32)
    gate = case.gate
    assert gate is not None
    at = [replace(case, gate=factor * gate).public()[0] for factor in (0.0, 1.0, -2.0)]
    assert largest(at[2] - at[0]) > 0.1, "the gate changes nothing"
    check_identity("out", at[1], at[0] + (at[2] - at[0]) / -2.0, scale=largest(at[2]))


def check_prompt_rows_may_be_permuted(form: str, layout: str) -> None:
    """A prompt has no order: permuting its rows permutes its gradients and changes nothing else."""
    case = make_case(form, layout).cast(FLOAT32)
    assert case.prompt_k is not None
    assert case.prompt_v is not None
    order = torch.tensor([2, 0, 1], device=case.prompt_k.device)
    permuted = replace(
        case,
        prompt_k=case.prompt_k.index_select(-3, order).detach().requires_grad_(),
        prompt_v=case.prompt_v.index_select(-3, order).detach().requires_grad_(),
    )
    out, lse = case.public()
    other_out, other_lse = permuted.public()
    check_identity("out", other_out, out)
    expected, got = gradients(case, out, lse), gradients(permuted, other_out, other_lse)
    for name, grad in got.items():
        wanted = expected[name]
        if name in ("dprompt_k", "dprompt_v"):
            wanted = wanted.index_select(-3, order)
        check_identity(name, grad, wanted)


def check_decode_is_a_row_of_prefill(form: str, tokens: int) -> None:
    """The newest `tokens` decoded over a longer cache equal the last rows of the whole sequence."""
    case = make_case(form, "causal").cast(FLOAT32)
    lengths = [7, 4, 5]
    with torch.no_grad():
        got = zero_init_attention_decode(
            case.q[:, -tokens:].contiguous(),
            case.k,
            case.v,
            *case.prompts[:3],
            cache_lengths=int32(*lengths),
            scale=case.scale,
            adapter_index=case.adapter_index,
            prompt_lengths=case.prompt_lengths,
            backend=cases.BACKEND,
        )
        for b, length in enumerate(lengths):
            own = replace(case, k=case.k[:, :length], v=case.v[:, :length])
            rows = own.public()[0][b, -tokens:]
            check_identity(f"sequence {b}", got[b], rows)


def check_dgate_is_dout_times_prompt_out(form: str, layout: str) -> None:
    """dgate is the inner product of dout with the prompt's output before the gate."""
    case = make_case(form, layout).cast(FLOAT32)
    q, gate = case.q, case.gate
    assert gate is not None
    out, _ = case.public()
    dout = random_like(out)
    dgate = torch.autograd.grad(out, gate, dout)[0]
    index, lengths = case.adapter_index, case.prompt_lengths
    ungated = gated_prompt_attention(
        q,
        case.prompt_k,
        case.prompt_v,
        torch.ones_like(gate),
        scale=case.scale,
        adapter_index=index,
        prompt_lengths=lengths,
        cu_seqlens_q=case.cu_seqlens_q,
    )
    terms = (dout * ungated).detach().sum(-1)
    if case.cu_seqlens_q is not None:
        terms = torch.stack([x.sum(0) for x in terms.split(case.cu_seqlens_q.diff().tolist())])
    else:
        terms = terms.sum(1)
    expected = torch.zeros_like(gate)
    for b, row in enumerate(terms):
        if index is not None:
            if index[b] >= 0:
                expected[index[b]] += row
        elif gate.dim() == 2:
            expected[b] += row
        else:
            expected += row
    check_identity("dgate", dgate, expected, scale=largest(dout) * largest(ungated) * len(dout))


def check_batch_of_one(form: str, layout: str) -> None:
    """Bitwise: a sequence's out, lse, dq, dk and dv do not depend on the rest of its batch."""
    case = make_case(form, layout).cast(FLOAT32)
    out, lse = case.public()
    together = gradients(case, out, lse)
    for b in range(case.batch):
        one = slice(b, b + 1)
        picked = {
            name: None if x is None else x[one]
            for name in ("q", "k", "v", "adapter_index", "key_starts", "key_lengths")
            for x in (getattr(case, name),)
        }
        if form.startswith("sample"):
            picked |= {"prompt_k": case.leaves["prompt_k"][one]}
            picked |= {"prompt_v": case.leaves["prompt_v"][one]}
        if form == "sample_gates":
            picked |= {"gate": case.leaves["gate"][one]}
        alone = replace(case, **picked)
        own_out, own_lse = alone.public()
        check_bitwise("out", own_out, out[one])
        check_bitwise("lse", own_lse, lse[one])
        dout, dlse = random_like(out)[one], random_like(lse, 98).masked_fill(lse == -torch.inf, 1e6)
        got = torch.autograd.grad(
            [own_out, own_lse], [alone.q, alone.k, alone.v], [dout, dlse[one]]
        )
        for name, grad in zip(("dq", "dk", "dv"), got, strict=True):
            check_bitwise(name, grad, together[name][one])


def check_index_is_read_at_every_call() -> None:
    """Bank rows are those of this call's index, not of an earlier one; -1 is no prompt at all."""
    case = make_case("bank", "causal").cast(FLOAT32)
    k, v, gate = case.leaves["prompt_k"], case.leaves["prompt_v"], case.leaves["gate"]
    for index in ((0, 1, 2), (3, 3, 0), (-1, 0, -1)):
        out = replace(case, adapter_index=int32(*index)).public()[0]
        for b, a in enumerate(index):
            prompt = (k[a], v[a], gate[a]) if a >= 0 else (None, None, None)
            plain = {"scale": case.scale, "backend": cases.BACKEND}
            expected = zero_init_attention(case.q, case.k, case.v, *prompt, **plain)
            assert isinstance(expected, Tensor)
            check_bitwise(f"sequence {b} with adapter {a}", out[b], expected[b])
