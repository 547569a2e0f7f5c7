"""Does choose_backend take the best, obey a name, refuse what is missing, and warn once on CUDA?"""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import adapter_kernels
from adapter_kernels import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_warned", set())


def test_none_takes_the_first_and_a_name_is_obeyed() -> None:
    both = ("triton", "reference")
    assert backend.choose_backend("f", None, CUDA, both) == "triton"
    assert backend.choose_backend("f", "triton", CUDA, both) == "triton"
    assert backend.choose_backend("f", "reference", CPU, both) == "reference"


def test_unknown_and_missing_backends_are_refused() -> None:
    with pytest.raises(
        ValueError, match=re.escape("one of ('triton', 'native', 'hybrid', 'reference'), got")
    ):
        backend.choose_backend("f", "cuda", CPU, ("reference",))
    message = "backend 'triton' is not available for f on cpu; available: reference"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        backend.choose_backend("f", "triton", CPU, ("reference",))


def test_reference_on_cuda_warns_once_per_operation_and_says_why() -> None:
    with pytest.warns(UserWarning, match="f runs its reference.*slow: no kernel is implemented"):
        backend.choose_backend("f", None, CUDA, ("reference",))
    with pytest.warns(UserWarning, match="g runs its reference.*slow: it was asked for"):
        backend.choose_backend("g", "reference", CUDA, ("triton", "reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose_backend("f", None, CUDA, ("reference",)) == "reference"
        assert backend.choose_backend("h", None, CPU, ("reference",)) == "reference"


def test_choice_is_traced_without_a_graph_break() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + len(backend.choose_backend("f", None, CUDA, ("reference",)))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [9.0, 9.0]


def test_warning_points_at_the_caller_of_the_public_function() -> None:
    def public_function() -> str:
        return backend.choose_backend("f", None, CUDA, ("reference",))

    with pytest.warns(UserWarning, match="correct but slow") as caught:
        public_function()
    (warning,) = caught
    assert warning.filename == __file__
    assert "public_function()" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


def cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each differentiable public function with its differentiable inputs."""
    q, k, v = (torch.randn(1, 5, heads, 8) for heads in (4, 2, 2))
    prompt_k, prompt_v, gate = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(4)
    angles = torch.randn(2, 5, 4)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3, "max_seqlen_k": 3}
    segment = [prompt_k, prompt_v, gate]
    return {
        "zero_init_attention": (adapter_kernels.zero_init_attention, [q, k, v, *segment]),
        "zero_init_attention_varlen": (
            partial(adapter_kernels.zero_init_attention_varlen, **packed),
            [q[0], k[0], v[0], *segment],
        ),
        "gated_prompt_attention": (
            lambda q, k, v, gate, out: adapter_kernels.gated_prompt_attention(
                q, k, v, gate, out=out
            ),
            [q, *segment, q.clone()],
        ),
        "rms_norm": (
            lambda x, w, r: adapter_kernels.rms_norm(x, w, eps=1e-5, residual=r)[0],
            [q, torch.randn(8), q.clone()],
        ),
        "apply_rotary": (
            lambda q, k: adapter_kernels.apply_rotary(q, k, *angles, interleaved=True)[0],
            [q, k],
        ),
        "swiglu": (adapter_kernels.swiglu, [q, q.clone()]),
        "linear_cross_entropy": (
            lambda x, w: adapter_kernels.linear_cross_entropy(x, w, torch.tensor([1, 2])),
            [torch.randn(2, 8), torch.randn(5, 8)],
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_a_forward_mode_tangent_is_refused_and_never_dropped(name: str) -> None:
    """torch.func.jvp through these operations used to give a tangent of zero."""
    function, inputs = cases()[name]
    function(*inputs)
    for index, x in enumerate(inputs):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match=f"^{name} has no forward-mode derivative"):
                function(*inputs[:index], dual, *inputs[index + 1 :])
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, tuple(inputs), tuple(map(torch.ones_like, inputs)))


@pytest.mark.parametrize("name", cases())
def test_vmap_is_refused_and_says_what_to_do(name: str) -> None:
    function, inputs = cases()[name]
    message = f"torch.vmap over {name.removesuffix('_varlen')} is not supported"
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(function)(*(torch.stack([x, x]) for x in inputs))


def test_import_needs_neither_triton_nor_a_gpu_and_prints_nothing() -> None:
    """In a process where triton cannot be imported and no GPU is visible."""
    code = (
        "import sys; sys.modules['triton'] = None; import adapter_kernels, torch; "
        "assert not torch.cuda.is_initialized(); "
        "x = torch.ones(1, 2, 2, 8); y = adapter_kernels.zero_init_attention(x, x, x); "
        "assert torch.equal(x, y)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(backend.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
