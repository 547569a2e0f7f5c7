"""The kernel of linear_cross_entropy: as accurate as the formula, where tiles and chunks end."""

import importlib
import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels import launch, linear_cross_entropy
from adapter_kernels.linear_cross_entropy import (
    linear_cross_entropy_dweight_reference,
    linear_cross_entropy_reference,
)
from tests.adapter_kernels.tolerances import GRADIENT_FACTOR, check_as_accurate_as_eager
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    DEVICE,
    DTYPES,
    launched,
    needs_kernels,
)

pytest.importorskip("triton")

from adapter_kernels import linear_cross_entropy_kernel as kernel  # with triton alone

linear_cross_entropy_module = importlib.import_module("adapter_kernels.linear_cross_entropy")

IGNORE = -100
OPS = torch.ops.adapter_kernels
# a tile that ends in the row, one that the row does not fill, and one row of one number
SIZES = [(13, 7, 4099), (5, 19, 53), (1, 3, 4096), (3, 5, 8209), (2, 4, 1)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 rows, so that small inputs have several and a ragged last one."""
    monkeypatch.setattr(kernel, "chunk_rows", lambda *_: 3)


def drawn(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, ignored: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and labels, of several rows some ignored; logits of a few units."""
    g = torch.Generator().manual_seed(rows * vocabulary)
    x = torch.randn(rows, width, generator=g).to(DEVICE, dtype)
    weight = torch.randn(vocabulary, width, generator=g).to(DEVICE, dtype)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    if ignored:
        labels[1::3] = IGNORE
    return x, weight, labels.to(DEVICE)


def formula(x: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """torch's loss of the logits, which it gets in at least float32."""
    logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction=reduction)


def check(
    results: tuple[Tensor, ...], eager: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> None:
    """Loss, dx and dweight by the policy."""
    for name, got, plain, right in zip(
        ("loss", "dx", "dweight"), results, eager, truth, strict=True
    ):
        assert (got.shape, got.dtype) == (plain.shape, plain.dtype), name
        if eager[2].dtype != torch.float32 and plain.dtype == torch.float32:
            # of logits in half precision it is a float32 with their roundings
            plain = plain.double()
        if name == "loss":
            check_as_accurate_as_eager(name, got, plain, right)
        else:
            check_as_accurate_as_eager(name, got, plain, right, GRADIENT_FACTOR)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_accuracy(
    dtype: torch.dtype, size: tuple[int, int, int], ignored: bool, small_chunks: None
) -> None:
    """Loss, dx and dweight against torch's cross entropy in float64, a random gradient per row."""
    x, weight, labels = drawn(*size, dtype, ignored)
    dloss = torch.randn(size[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    before, results = Counter(launch.counts), []
    for function, precise in ((linear_cross_entropy, False), (formula, False), (formula, True)):
        leaves = [(t.double() if precise else t).detach().requires_grad_() for t in (x, weight)]
        if function is formula:
            loss = formula(*leaves, labels, "none")
        else:
            index = IGNORE if ignored else None
            loss = linear_cross_entropy(*leaves, labels, ignore_index=index, reduction="none")
        results.append((loss, *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))))
    chunks = -(-int((labels != IGNORE).sum()) // 3)
    assert launched(before) == {"cross_entropy_kernel": 2 * chunks}
    check(*results)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_ops_are_their_references(dtype: torch.dtype, small_chunks: None) -> None:
    """Ignored rows, labels out of range, and a NaN in each such row, which nobody may see."""
    x, weight, labels = drawn(11, 7, 101, dtype, ignored=True)
    labels[3], labels[6] = 101, -3
    dloss = torch.rand(11, device=DEVICE)
    loss, dx = OPS.linear_cross_entropy(x, weight, labels, IGNORE, True)
    dweight = OPS.linear_cross_entropy_dweight(dloss, x, weight, labels, IGNORE)
    wanted = (
        *linear_cross_entropy_reference(x, weight, labels, IGNORE, True),
        linear_cross_entropy_dweight_reference(dloss, x, weight, labels, IGNORE),
    )
    precise = x.double(), weight.double(), labels, IGNORE
    truth = (
        *linear_cross_entropy_reference(*precise, True),
        linear_cross_entropy_dweight_reference(dloss.double(), *precise),
    )
    check((loss, dx, dweight), wanted, truth)
    out = torch.zeros_like(labels, dtype=torch.bool)
    out[1::3] = out[3] = out[6] = True
    assert not loss[out].any()
    assert not dx[out].any()
    x[out] = float("nan")
    dloss[out] = float("nan")
    again = (
        *OPS.linear_cross_entropy(x, weight, labels, IGNORE, True),
        OPS.linear_cross_entropy_dweight(dloss, x, weight, labels, IGNORE),
    )
    for one, other in zip(again, (loss, dx, dweight), strict=True):
        assert torch.equal(one, other)


def confident(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sure of their label, of a head whose rows share a mean: the others are below 6e-8."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(500, 24, generator=g) + 2 * torch.randn(24, generator=g)
    labels = torch.randint(500, (6,), generator=g)
    x = weight[labels] - weight.mean(0)
    logits = x @ weight.t()
    lead = logits[range(6), labels] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return *(t.to(DEVICE, dtype) for t in (x * (22 / lead)[:, None], weight)), labels.to(DEVICE)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_scaled_loss_of_half_precision_keeps_small_probabilities(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were 0 in float16 before the scale of the loss could arrive: dx was off by its size."""
    if backend == "reference":
        monkeypatch.setattr(linear_cross_entropy_module, "runs_kernels", lambda _: False)
    x, weight, labels = confident(torch.float16)
    found = {}
    for name, leaves in (
        ("ours", (x, weight)), ("eager", (x, weight)), ("truth", (x.double(), weight.double()))
    ):  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in leaves]
        function = linear_cross_entropy if name == "ours" else formula
        loss = function(*leaves, labels, reduction="sum") * 2.0**16
        found[name] = torch.autograd.grad(loss, leaves)
    for got, eager, right in zip(*found.values(), strict=True):
        assert float(right.abs().max()) > 0
        check_as_accurate_as_eager("gradient", got, eager, right, GRADIENT_FACTOR)


@pytest.mark.kernel
@needs_kernels
def test_autocast_changes_nothing() -> None:
    x, weight, labels = (t.requires_grad_(t.is_floating_point()) for t in
                         drawn(11, 7, 101, torch.float32, ignored=True))  # fmt: skip
    found = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(x, weight, labels)
            found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.kernel
@needs_kernels
def test_a_label_out_of_range_is_ignored_where_every_row_counts(small_chunks: None) -> None:
    x, weight, labels = drawn(7, 5, 31, torch.float32, ignored=False)
    wrong, dloss = labels.clone(), torch.rand(7, device=DEVICE)
    wrong[0], wrong[4], wrong[5] = 31, -1, 2**40
    ignored = labels.clone()
    ignored[0] = ignored[4] = ignored[5] = IGNORE
    results = [
        (
            *OPS.linear_cross_entropy(x, weight, given, index, True),
            OPS.linear_cross_entropy_dweight(dloss, x, weight, given, index),
        )
        for given, index in ((wrong, None), (ignored, IGNORE))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert results[0][0][[0, 4, 5]].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_large_logits(dtype: torch.dtype) -> None:
    """Ten thousand apart over two tiles: all the probability on one, or shared by two."""
    weight = torch.zeros(5000, 2, device=DEVICE, dtype=dtype)
    weight[17, 0], weight[4501, 0], weight[4999, 1], weight[23, 1] = 1e4, -1e4, 1e4, 1e4
    x = torch.eye(2, device=DEVICE, dtype=dtype).repeat(2, 1).requires_grad_()
    labels = torch.tensor([17, 4999, 4501, 0], device=DEVICE)
    loss = linear_cross_entropy(x, weight, labels, reduction="none")
    top, two = float(weight[17, 0]), math.log(2)
    wanted = torch.tensor([0.0, two, 2 * top, top + two], device=DEVICE)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.isfinite().all()
    assert dx.tolist() == [[0.0, 0.0], [0.0, 0.0], [2 * top, 0.0], [0.0, top]]


@pytest.mark.kernel
@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("column", [0, 40, 4100])
def test_a_nan_among_the_logits_is_one_of_the_loss(column: int) -> None:
    """Of its own row alone, whether the label's, in the first tile or in the last."""
    logits, labels = torch.randn(3, 4101, device=DEVICE), torch.tensor([40, 7, 9], device=DEVICE)
    logits[0, column] = logits[2, column] = float("nan")
    loss, given = torch.zeros(3, device=DEVICE), logits.clone()
    kernel.cross_entropy_launch(given, labels, None, None, loss, True).run()
    assert loss.isnan().tolist() == [True, False, True]
    assert given.isnan().all(1).tolist() == [True, False, True]
    torch.testing.assert_close(loss[1], functional.cross_entropy(logits[1], labels[1]))
    # the others' own are 0, whatever their rows hold
    labels[0], labels[2] = IGNORE, 4101
    kernel.cross_entropy_launch(logits, labels, None, None, loss, True).run()
    assert loss[[0, 2]].tolist() == [0.0, 0.0]
    assert not logits[[0, 2]].any()


@pytest.mark.gpu
def test_rows_beyond_31_bits_of_elements() -> None:
    """The last of so many rows that their offsets do not fit."""
    rows, vocabulary = 70_001, 32_000
    logits = torch.empty(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    logits[-1] = torch.randn(vocabulary)
    labels, loss = torch.arange(rows, device="cuda") % vocabulary, torch.empty(rows, device="cuda")
    last = logits[-1].float().requires_grad_()
    wanted = functional.cross_entropy(last, labels[-1])
    (dlast,) = torch.autograd.grad(wanted, last)
    kernel.cross_entropy_launch(logits, labels, None, None, loss, True).run()
    torch.testing.assert_close(loss[-1], wanted.detach())
    torch.testing.assert_close(logits[-1].float(), dlast, rtol=2**-8, atol=0)


@pytest.mark.gpu
def test_the_papers_batch_takes_300_mb_and_waits_for_nothing() -> None:
    """8,300 labelled rows of LLaMA's head in bfloat16, all logits of which would be 531 MB."""
    x = torch.randn(8300, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(32_000, 4096, device="cuda", dtype=torch.bfloat16) / 64
    labels = torch.randint(32_000, (8300,), device="cuda")

    def step(rows: int) -> Tensor:
        loss = linear_cross_entropy(x[:rows], weight, labels[:rows], ignore_index=None)
        return torch.autograd.grad(loss, x)[0]

    # compiles, and makes what the library of products keeps
    step(3000)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dx = step(8300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 300e6
    assert dx.isfinite().all()


@pytest.mark.kernel
@needs_kernels
def test_many_small_gradients_of_the_loss_are_not_lost() -> None:
    """Each row's share is below all that float16 holds, their sum is not."""
    rows, vocabulary, share = 128, 4001, 2.0**-14
    x = torch.full((rows, 3), 8.0, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(vocabulary, 3, dtype=torch.float16, device=DEVICE)
    labels, dloss = torch.zeros(rows, device=DEVICE).long(), torch.full((rows,), share).to(DEVICE)
    got = OPS.linear_cross_entropy_dweight(dloss, x, weight, labels, None).float()
    assert torch.tensor(share / vocabulary).half() == 0
    total = torch.tensor(8.0 * rows * share, device=DEVICE)
    error = (got[1:] - total / vocabulary).abs().max()
    assert error <= 2**-24 + 2**-10 * total / vocabulary
    torch.testing.assert_close(got[0], (total / vocabulary - total).expand(3), rtol=2**-10, atol=0)
    # no gradient at all is none
    nothing = OPS.linear_cross_entropy_dweight(0 * dloss, x, weight, labels, None)
    assert not nothing.any()


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)]
)
def test_empty_inputs(rows: int, width: int, vocabulary: int) -> None:
    x, weight = (torch.zeros(n, width, device=DEVICE).requires_grad_() for n in (rows, vocabulary))
    labels = torch.zeros(rows, device=DEVICE).long()
    for index in (0 if not vocabulary else IGNORE, None if vocabulary else 0):
        loss = linear_cross_entropy(x, weight, labels, ignore_index=index)
        some = rows and vocabulary and index != 0
        expected = torch.tensor(float(vocabulary)).log() if some else torch.tensor(0.0)
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-6, atol=0)
        for leaf, grad in zip((x, weight), torch.autograd.grad(loss, (x, weight)), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.kernel
@needs_kernels
def test_the_ops_are_what_their_fakes_say() -> None:
    """Of strided inputs too; torch.compile takes it whole, forward and backward."""
    x, weight, labels = drawn(10, 6, 31, torch.float32, ignored=True)
    x, labels = x[::2, ::2].requires_grad_(), labels[::2]
    weight = weight.t()[::2].t().requires_grad_()
    for index in (IGNORE, None):
        torch.library.opcheck(OPS.linear_cross_entropy.default, (x, weight, labels, index, True))
        plain = (torch.rand(5, device=DEVICE), x.detach(), weight.detach(), labels, index)
        torch.library.opcheck(OPS.linear_cross_entropy_dweight.default, plain)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for function in (compiled, linear_cross_entropy):
        before = Counter(launch.counts)
        got = torch.autograd.grad(function(x, weight, labels), (x, weight))
        assert launched(before) == {"cross_entropy_kernel": 2}
        expected = torch.autograd.grad(formula(x, weight, labels, "mean"), (x, weight))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.kernel
@needs_kernels
def test_a_frozen_weight_takes_one_launch_a_chunk(small_chunks: None) -> None:
    x, weight, labels = drawn(7, 5, 31, torch.float32, ignored=False)
    for need in (True, False):
        before = Counter(launch.counts)
        loss = linear_cross_entropy(x.detach().requires_grad_(need), weight, labels)
        if need:
            loss.backward()
        assert launched(before) == {"cross_entropy_kernel": 3}


def test_chunks_fill_a_gpu_and_no_more() -> None:
    # LLaMA's vocabulary in half precision, and in float32; LLaMA 3's; a small one
    sizes = ((32_000, 2), (32_000, 4), (128_256, 2), (512, 4))
    assert [kernel.chunk_rows(*size) for size in sizes] == [2048, 1024, 1024, 2**16]
