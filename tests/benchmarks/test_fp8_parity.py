"""Is the gate of fp8 shut where it should be, and does it open on the bundled base?"""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import fp8_parity
from benchmarks.fp8_parity import Parity

CPU = torch.device("cpu")
EXACT = (1.30, 1.34, 1.32)


@pytest.mark.parametrize(
    ("fp8", "opens"),
    [
        ((1.31, 1.33, 1.32), True),
        # off by more than seeds differ: higher, lower, and in turns, which cancels in a mean
        ((1.35, 1.39, 1.37), False),
        ((1.25, 1.29, 1.27), False),
        ((1.36, 1.28, 1.32), False),
        ((1.30, math.nan, 1.32), False),
        ((1.30, math.inf, 1.32), False),
    ],
)
def test_the_gate(fp8: tuple[float, ...], opens: bool) -> None:
    parity = Parity(EXACT, fp8)
    assert parity.passes == opens
    text = parity.report(CPU, 24)
    assert f"**{'open' if opens else 'shut'}**" in text
    assert "24 steps" in text
    assert f"| 1 | 1.34000 | {fp8[1]:.5f} |" in text


def test_seeds_that_agree_leave_no_room() -> None:
    assert not Parity((1.3, 1.3, 1.3), (1.3, 1.3, 1.3)).passes


def test_a_shut_gate_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_parity, "compare", lambda *_: Parity(EXACT, (1.4, 1.4, 1.4)))
    command = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert fp8_parity.main(command) == 1
    assert "**shut**" in (tmp_path / "fp8_parity.md").read_text()
    monkeypatch.setattr(fp8_parity, "compare", lambda *_: Parity(EXACT, EXACT))
    assert fp8_parity.main(command) == 0


@pytest.mark.slow
def test_it_opens_on_a_cpu() -> None:
    """The same 8-bit numbers; after fewer steps than these the seeds hardly differ."""
    parity = fp8_parity.compare(CPU, fp8_parity.QUICK_STEPS)
    assert parity.passes
    # rounded indeed
    assert parity.exact != parity.fp8


@pytest.mark.gpu
def test_it_opens_on_a_gpu(tmp_path: Path) -> None:
    command = ["--quick", "--device", "cuda", "--output", str(tmp_path)]
    assert fp8_parity.main(command) == 0
