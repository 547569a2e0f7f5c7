"""What only a GPU shows of the kernels: real sizes, races, memory, devices, streams, graphs.

FlashAttention's rule (2 times the same-dtype error, gradients 3 times) is in `kernel_runs`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from adapter_kernels import zero_init_attention
from adapter_kernels.zero_init_attention import library
from adapter_kernels.zero_init_attention.backward_prompt import chunks_of
from tests.adapter_kernels.tolerances import check_bitwise, check_identity
from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import Case, make_case, sized
from tests.adapter_kernels.zero_init_attention.checkers import random_like
from tests.adapter_kernels.zero_init_attention.kernel_runs import check_against_reference

pytestmark = pytest.mark.gpu
BACKENDS = ("triton", "hybrid")
HALF = (torch.bfloat16, torch.float16)
NAMES = ("out", "lse", "dq", "dk", "dv", "dprompt_k", "dprompt_v", "dgate")
MIB = 2**20


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DEVICE", "cuda")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The libraries' backward passes promise equal bits only on request."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(case: Case, backend: str) -> list[Tensor]:
    """Everything of NAMES, for the same gradients of out and lse at every call."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.leaves.items()}
    out, lse = zero_init_attention(
        *leaves.values(), causal=case.causal, return_lse=True, backend=backend
    )
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [case.q * 0.5, lse.detach()])
    return [out.detach(), lse.detach(), *grads]


def equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(NAMES, got, expected, strict=True):
        check_bitwise(name, one, other)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "rows", "form"),
    [
        (113, 203, 64, 10, "shared"),
        (1023, 1024, 128, 10, "shared"),
        (1024, 1023, 96, 17, "sample"),
        (2048, 2048, 128, 64, "bank_lengths"),
        (257, 1999, 80, 128, "bank_lengths"),
        (799, 799, 256, 300, "shared"),
        (1999, 1999, 40, 5, "none"),
    ],
)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_sizes(
    backend: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    head_dim: int,
    rows: int,
    form: str,
    causal: bool,
) -> None:
    case = sized(form, queries=queries, keys=keys, head_dim=head_dim, rows=rows, causal=causal)
    check_against_reference(case.cast(dtype), backend)


@pytest.mark.parametrize("dtype", HALF)
def test_one_query_of_many_keys(dtype: torch.dtype) -> None:
    case = sized("shared", queries=1, keys=2049, head_dim=128, rows=10)
    check_against_reference(case.cast(dtype), "triton")


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_packed_sequences_of_real_sizes(dtype: torch.dtype, prefixed: bool) -> None:
    lengths = [0, 1, 127, 1024, 3, 511]
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    g = torch.Generator().manual_seed(3)
    q = cases.normal(g, ends[-1], 8, 128)
    k, v = (cases.normal(g, ends[-1], 2, 128) for _ in "kv")
    case = make_case("none", "packed")
    cu = cases.int32(*ends)
    case = replace(case, q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=128**-0.5)
    if prefixed:
        bank = [cases.normal(g, 3, 139, 2, 128) for _ in "kv"]
        index, lengths = cases.int32(1, 0, 1, 2, -1, 1), cases.int32(139, 39, 128)
        case = replace(case, prefix_k=bank[0], prefix_v=bank[1], prefix_index=index,
                       prefix_lengths=lengths)  # fmt: skip
    check_against_reference(case.cast(dtype), "triton")


def test_equal_bits_250_times() -> None:
    case = sized("shared", queries=1023, keys=1025, head_dim=128, rows=10).cast(torch.bfloat16)
    first = results(case, "triton")
    for _ in range(250):
        equal(results(case, "triton"), first)


@pytest.mark.usefixtures("deterministic")
def test_the_hybrid_gives_equal_bits_where_asked() -> None:
    case = sized("shared", queries=1023, keys=1023, head_dim=128, rows=10).cast(torch.bfloat16)
    first = results(case, "hybrid")
    for _ in range(50):
        equal(results(case, "hybrid"), first)


@pytest.mark.parametrize("dtype", HALF)
def test_the_hybrid_reads_rows_that_lie_at_odd_places(dtype: torch.dtype) -> None:
    """No library of a GPU may get rows that do not begin at multiples of 16 bytes."""
    case = sized("shared", queries=130, keys=130, head_dim=64, rows=10).cast(dtype)
    shifted = {}
    for name in "qkv":
        x = getattr(case, name).detach()
        room = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)
        room[..., 1:-2] = x
        shifted[name] = room[..., 1:-2].requires_grad_()
    check_against_reference(replace(case, **shifted), "hybrid")
    out = zero_init_attention(*case.leaves.values(), backend="hybrid")
    assert isinstance(out, Tensor)
    # the gradient of a sum has stride 0 everywhere
    repeated = torch.autograd.grad(out.sum(), list(case.leaves.values()), retain_graph=True)
    full = torch.autograd.grad(out, list(case.leaves.values()), torch.ones_like(out))
    for name, one, other in zip(case.leaves, repeated, full, strict=True):
        check_identity(f"d{name}", one, other)


def bytes_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def peak(function: Callable[[], object]) -> int:
    """The most memory beyond what was there, after a call that compiles and warms up."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = function()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    del kept
    return most


def test_memory_at_16k_is_that_of_results_and_row_statistics() -> None:
    """A score matrix of these sizes would take 4 GiB in bfloat16."""
    length, heads, rows, width = 16384, 8, 10, 128
    g = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, length, heads, width)] * 3 + [(rows, heads, width)] * 2 + [(heads,)]
    leaves = [torch.randn(shape, generator=g, device="cuda") for shape in shapes]
    leaves = [x.to(torch.bfloat16) for x in leaves[:-1]] + leaves[-1:]

    def call() -> Tensor:
        out = zero_init_attention(*leaves, backend="triton")
        assert isinstance(out, Tensor)
        return out

    out = call()
    statistic = 4 * heads * length
    with torch.no_grad():
        assert peak(call) <= bytes_of(out) + statistic + MIB
    for x in leaves:
        x.requires_grad_()
    out, dout = call(), torch.randn_like(out)
    partial = 4 * chunks_of(length) * (2 * rows * heads * width + heads)
    # the gradients, delta, and partial sums over chunks of query rows
    bound = bytes_of(*leaves) + statistic + partial + MIB
    assert peak(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)) <= bound


@pytest.mark.usefixtures("deterministic")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_on_a_device_that_is_not_the_current_one(backend: str) -> None:
    case = sized("shared", queries=65, keys=65, head_dim=64, rows=10).cast(torch.bfloat16)
    moved = {name: x.to("cuda:1") for name, x in case.leaves.items()}
    got = results(replace(case, **moved), backend)
    assert torch.cuda.current_device() == 0
    assert {x.device.index for x in got} == {1}
    equal([x.to("cuda:0") for x in got], results(case, backend))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_side_streams_compute_the_same(backend: str) -> None:
    """Inputs made on the same side stream: a kernel on another one would read them too early."""
    case = sized("shared", queries=1025, keys=1025, head_dim=128, rows=10).cast(torch.bfloat16)
    expected = results(case, backend)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = {name: x.detach().clone() for name, x in case.leaves.items()}
            found.append(results(replace(case, **late), backend))
    torch.cuda.synchronize()
    for got in found:
        equal(got, expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_follows_its_inputs(backend: str) -> None:
    """Forward and backward in one graph with a memory pool of its own, replayed on other inputs."""
    case = sized("sample", queries=257, keys=257, head_dim=64, rows=10).cast(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(case, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
        captured = results(case, backend)
    for seed in (1, 2, 3):
        for name, x in case.leaves.items():
            x.data.copy_(random_like(x, seed + len(name)))
        graph.replay()
        torch.cuda.synchronize()
        equal([x.clone() for x in captured], results(case, backend))


@pytest.mark.parametrize(
    ("backend", "form", "layout"),
    [
        ("triton", "shared", "causal"),
        ("triton", "bank_lengths", "padded"),
        ("triton", "sample", "packed"),
        ("triton", "shared", "packed_prefix"),
        # no library of a GPU takes padding or packed sequences
        ("hybrid", "shared", "bidirectional"),
    ],
)
def test_opcheck(backend: str, form: str, layout: str) -> None:
    case = make_case(form, layout).cast(torch.bfloat16)
    index = (case.key_starts, case.key_lengths, case.cu_seqlens_q, case.cu_seqlens_k, None)
    rest = (*case.prefix, *index, *case.longest(), case.causal, case.scale, backend)
    opcheck(library.attention_op, (case.q, case.k, case.v, *case.prompts, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    case = sized("shared", queries=65, keys=65, head_dim=64, rows=10).cast(torch.bfloat16)
    leaves = list(case.leaves.values())

    def function(*inputs: Tensor) -> Tensor:
        out = zero_init_attention(*inputs, backend=backend)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(function, fullgraph=True)
    for got, expected in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(function(*leaves).sum(), leaves),
        strict=True,
    ):
        check_identity("compiled", got, expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_checkpointing(backend: str) -> None:
    case = sized("shared", queries=65, keys=65, head_dim=64, rows=10).cast(torch.float32)
    leaves = list(case.leaves.values())

    def function(*inputs: Tensor) -> Tensor:
        out = zero_init_attention(*inputs, backend=backend)
        assert isinstance(out, Tensor)
        return out

    with torch.autocast("cuda", torch.bfloat16):
        out = function(*leaves)
        again = checkpoint(function, *leaves, use_reentrant=False)
    assert out.dtype == torch.bfloat16
    assert isinstance(again, Tensor)
    check_bitwise("out", again, out)
    halves = [x.detach().to(torch.bfloat16) for x in leaves[:-1]] + [leaves[-1].detach()]
    check_bitwise("out", out, function(*halves))
    for name, one, other in zip(
        case.leaves,
        torch.autograd.grad(again.float().sum(), leaves),
        torch.autograd.grad(out.float().sum(), leaves),
        strict=True,
    ):
        check_bitwise(f"d{name}", one, other)
