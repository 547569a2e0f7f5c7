"""Work and peaks are those of the tables; a speed says nothing of a peak that nobody knows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_adapter.adapter import Adapter
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.packing import Packing
from llama_adapter.recompute import RECOMPUTED
from llama_adapter.utilisation import GPUS, Speed, gpu_of, linear_flops, speed_of

CPU = torch.device("cpu")
LLAMA_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200"),
        ("", None),
    ],
)
def test_a_gpu_is_found_by_its_name(name: str, row: str | None) -> None:
    assert gpu_of(name) == row


def test_peaks_are_the_data_sheets() -> None:
    assert [GPUS[name].peak("bfloat16") for name in ("A100", "H100", "H200")] == [312, 989, 989]
    assert [GPUS[name].peak("float32") for name in ("A100", "H100", "H200")] == [19.5, 67, 67]


def test_work_is_that_of_a_frozen_base() -> None:
    # 25.42 GFLOP a token less attention's 0.16, at 7B with half of the rows in the loss
    assert linear_flops(LLAMA_7B, 2, 1, 30) / 2e9 == pytest.approx(25.42 - 0.16, abs=0.05)
    # counted one by one on a small shape with fewer key heads, two of three layers adapted
    config = LlamaConfig(dim=12, n_layers=3, n_heads=3, n_kv_heads=1, vocab_size=50, multiple_of=8)
    queries, keys, back, ffn = 12 * 12, 12 * 4, 12 * 12, 12 * config.hidden_dim
    layer = queries + 2 * keys + back + 3 * ffn
    # one layer back whole, in the lowest adapted one only what is behind its attention
    macs = 3 * layer + layer + (back + 3 * ffn)
    assert linear_flops(config, 7, 2, 2) == 2 * (7 * macs + 2 * 2 * 12 * 50)


def test_what_is_computed_again_counts(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    tokens = torch.arange(3, 14)
    packing = Packing(torch.arange(11), torch.tensor([0, 11], dtype=torch.int32), 11)
    executed = {}
    for recompute in (None, *RECOMPUTED):
        with FlopCounterMode(display=False) as counter:
            prompts = tiny_model.project(tiny_adapter)
            hidden = tiny_model.hidden_packed(tokens, packing, prompts, recompute=recompute)
            hidden.square().sum().backward()
        counts = counter.get_flop_counts()["Global"]
        executed[recompute] = sum(n for op, n in counts.items() if "mm" in str(op))
    layers = len(tiny_adapter.layers)
    for recompute in RECOMPUTED:
        claimed = linear_flops(tiny_model.config, 11, 0, layers, recompute)
        claimed -= linear_flops(tiny_model.config, 11, 0, layers)
        assert claimed > 0
        assert executed[recompute] - executed[None] == claimed


def test_a_speed_is_the_median_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"step": i, "loss": 1.0, "tokens_per_second": 1000.0 * i, "tflops": 100.0 * i}
        for i in (1, 5, 2, 4, 3)
    ]
    speed = speed_of([*rows, {"step": 5, "val_loss": 2.0}], CPU, "bfloat16")
    assert speed == Speed(3000.0, 300.0, None, "bfloat16")
    assert speed is not None
    assert speed.utilisation is None
    assert str(speed) == "3,000 record tokens/s"
    assert speed_of([{"step": 0, "val_loss": 2.0}], CPU, "float32") is None

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for dtype, peak in (("bfloat16", 989), ("float16", 989), ("float32", 67), ("float8", 1979)):
        speed = speed_of(rows, torch.device("cuda:0"), dtype)
        assert speed is not None
        assert speed.utilisation == pytest.approx(300 / peak)
    speed = speed_of(rows, torch.device("cuda:0"), "bfloat16")
    shown = "3,000 record tokens/s, utilisation 30.3% of H200's 989 TFLOP/s in bfloat16"
    assert str(speed) == shown
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    assert str(speed_of(rows, torch.device("cuda:0"), "bfloat16")) == "3,000 record tokens/s"
