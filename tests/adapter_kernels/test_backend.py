"""Does choose_backend take the best, obey a name, refuse what is missing, and warn once on CUDA?"""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

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
        ValueError, match=re.escape("one of ('triton', 'hybrid', 'reference'), got")
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
