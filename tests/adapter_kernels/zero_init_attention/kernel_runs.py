"""How do the tests run the Triton kernels? On a GPU, or in the interpreter on the CPU.

The interpreter is another process: TRITON_INTERPRET=1 must be set before the kernels are imported.
It computes nonsense in bfloat16, hides NaN in maxima, and knows neither tf32 nor races.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor

from adapter_kernels import launch
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention.library import attention_backward_op, attention_op
from tests.adapter_kernels.tolerances import (
    GRADIENT_FACTOR,
    OUT_FACTOR,
    check_as_accurate_as_eager,
    check_bitwise,
    check_lse,
    largest,
)
from tests.adapter_kernels.zero_init_attention.cases import NAMES, Case
from tests.adapter_kernels.zero_init_attention.checkers import random_like

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1 as in the second half of make test",
)


def launched(before: Counter[str]) -> Counter[str]:
    """Kernels launched since `before` was copied from launch.counts, without their underscores."""
    now = Counter(launch.counts)
    now.subtract(before)
    return Counter({name.strip("_"): n for name, n in now.items() if n})


def on_device(case: Case, dtype: torch.dtype) -> Case:
    """The case in this dtype, on the device of the kernels."""
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in vars(case).items()}
    return Case(**moved).cast(dtype)


def floors(
    case: Case, dout: Tensor, out: Tensor, lse: Tensor, grads: dict[str, Tensor]
) -> dict[str, float]:
    """What each gradient may be off by, whatever eager's luck.

    All: a few roundings of the largest, and of P, which is rebuilt from the stored lse and so off
    by float32's eps |lse|. dgate: eps times the sum of its terms. dq, dk: delta comes from the
    rounded `out`, so a row of scores is off by the norm of eps dO o out, roundings being random,
    which matters where the prompt's part of it dwarfs the tokens'.
    """
    eps, single = torch.finfo(case.q.dtype).eps, torch.finfo(torch.float32).eps
    products = (dout.double() * out).abs()
    rows, keys = float(products.norm(dim=-1).max()), max(largest(case.k), largest(case.q))
    found = {}
    for name, grad in grads.items():
        found[name] = 4 * (eps + single * largest(lse)) * largest(grad)
        if name in ("q", "k"):
            found[name] = max(found[name], 2 * eps * rows * keys * abs(case.scale))
        if name == "gate":
            found[name] = max(found[name], eps * float(products.sum()))
    return found


def check_against_reference(case: Case, backend: str, lse_gradient: bool = True) -> None:
    """out, lse and every gradient of a backend against the reference in float64, by the policy.

    The baseline is the reference in the case's own dtype, which rounds its inputs and results and
    nothing in between: stricter than the eager formula.
    """
    truth, eager = case.double(), case
    index = (case.key_starts, case.key_lengths, case.cu_seqlens_q, case.cu_seqlens_k, None)
    plain = (*case.longest(), case.causal, case.scale)

    def run(one: Case, name: str) -> tuple[Tensor, Tensor, Tensor]:
        leaves = tuple(None if x is None else x.detach() for x in (one.q, one.k, one.v))
        others = (None if x is None else x.detach() for x in (*one.prompts, *one.prefix))
        return attention_op(*leaves, *others, *index, *plain, name)

    results = {name: run(one, name) for name, one in ((backend, case), ("reference", eager))}
    true_out, true_lse, _ = run(truth, "reference")
    out, lse, own = results[backend]
    blind = true_lse == -torch.inf
    check_bitwise("rows without keys", lse == -torch.inf, blind)
    check_as_accurate_as_eager("out", out, results["reference"][0], true_out, OUT_FACTOR)
    seen = [x.masked_fill(blind, 0.0) for x in (lse, results["reference"][1], true_lse)]
    check_lse(*seen, case.q.dtype)

    dout = random_like(case.q)
    # no gradient may pass a row without keys, so what it is given there is large
    dlse = random_like(lse, 98).masked_fill(blind, 1e6) if lse_gradient else None
    names = list(case.leaves)
    needs = [name in names for name in NAMES]
    gradients = []
    for one, name, saved, saved_lse in (
        (case, backend, own if own.numel() else out, lse),
        (eager, "reference", *results["reference"][:2]),
        (truth, "reference", true_out, true_lse),
    ):
        given = dout.to(one.q.dtype), None if dlse is None else dlse.to(saved_lse.dtype)
        inputs = (one.q, one.k, one.v, *one.prompts, *one.prefix)
        tensors = (None if x is None else x.detach() for x in inputs)
        arguments = (*given, saved, saved_lse, *tensors, *index, *plain, name, needs)
        found = attention_backward_op(*arguments)
        gradients.append([g for g, need in zip(found, needs, strict=True) if need])
    truths = dict(zip(names, gradients[2], strict=True))
    floor = floors(case, dout, true_out, seen[2], truths)
    for name, *grads in zip(names, *gradients, strict=True):
        assert grads[0].dtype == case.leaves[name].dtype
        if name == "gate":
            grads[1] = grads[1].to(case.q.dtype)
        check_as_accurate_as_eager(f"d{name}", *grads, factor=GRADIENT_FACTOR, floor=floor[name])
