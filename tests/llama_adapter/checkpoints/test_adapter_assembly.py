"""Is the base's shape taken from the tensors, the caller or the published models, and said?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_adapter.checkpoints.adapter_assembly import ReadOptions, fitting_presets
from llama_adapter.checkpoints.adapter_formats import read_any_adapter
from llama_adapter.config import PRESETS
from tests.llama_adapter.checkpoints.adapter_samples import (
    CONFIG,
    accessory_tensors,
    chat_tensors,
    save,
)


def test_published_bases_are_told_by_shape() -> None:
    assert fitting_presets({"dim": 5120, "n_layers": 40}) == ["llama-13b", "llama-2-13b"]
    assert fitting_presets({"dim": 4096, "kv_heads": 8, "vocab_size": 128256}) == [
        "llama-3-8b",
        "llama-3.1-8b",
    ]
    assert fitting_presets({"dim": 48}) == []


def test_what_all_published_bases_agree_on_is_assumed_and_said(tmp_path: Path) -> None:
    tensors = {
        "llma.prefix": torch.randn(30, 1, 10, 4096),
        "llma.prefix_gate": torch.randn(30, 32),
    }
    stored = read_any_adapter(save({"model": tensors}, tmp_path / "a.pth"))
    assert stored.header.layers == tuple(range(2, 32))
    assert "base: n_layers 32 assumed, as in every published LLaMA of this shape" in stored.notes
    assert "llama-3-8b" in fitting_presets(stored.header.base.shape)
    stored.adapter(PRESETS["llama-2-7b"])


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save({"model": accessory_tensors()}, tmp_path / "a.pth")
    for change, message in (
        ({"n_heads": 8, "attention_head_dim": 8}, "n_heads 4, but the base given has 8"),
        ({"n_layers": 5}, "n_layers 4, but the base given has 5"),
        ({"multiple_of": 64}, "hidden_dim 88, but the base given has 128"),
    ):
        with pytest.raises(ValueError, match=message):
            read_any_adapter(path, ReadOptions(base=replace(CONFIG, **change)))


def test_widths_of_heads_must_be_the_bases(tmp_path: Path) -> None:
    path = save({"model": chat_tensors(prompts=False)}, tmp_path / "a.pth")
    grouped = replace(CONFIG, n_kv_heads=2)
    with pytest.raises(ValueError, match=r"bias_wk must have shape \(4, 16\), got \(4, 32\)"):
        read_any_adapter(path, ReadOptions(base=grouped))
    stored = read_any_adapter(path, ReadOptions(base=CONFIG))
    assert stored.header.base.samples == ()
    assert stored.header.groups == ("bias", "scale", "norm")
