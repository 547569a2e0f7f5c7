"""Do files that litgpt wrote give litgpt's logits?

The committed ones are make_litgpt.py's; where litgpt is installed, others are written and read.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions
from llama_adapter.checkpoints.adapter_formats import read_any_adapter, write_adapter_as
from llama_adapter.checkpoints.adapter_litgpt import to_halves, to_pairs
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from tests.llama_adapter.checkpoints.adapter_samples import (
    assert_logits,
    litgpt_tensors,
    random_model,
    random_tokens,
    save,
    transcribe,
)

MQA = LlamaConfig(
    dim=32, n_layers=4, n_heads=4, n_kv_heads=1, vocab_size=40, multiple_of=1,
    ffn_dim_multiplier=24.5 / 85,
)  # fmt: skip
GQA = LlamaConfig(dim=48, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=40, multiple_of=8)


def pairs(rows: Tensor, heads: int) -> Tensor:
    """Channel j of the first half and of the second side by side, head by head."""
    width = len(rows) // heads
    order = [
        h * width + half * width // 2 + j
        for h in range(heads)
        for j in range(width // 2)
        for half in (0, 1)
    ]
    return rows[order]


def litgpt_base(files: Path) -> tuple[Llama, dict[str, Tensor]]:
    """Our model with litgpt's base weights, and what else its file holds."""
    held = load_file(files / "litgpt_base_and_logits.safetensors")
    state = {
        "tok_embeddings.weight": held["transformer.wte.weight"],
        "output.weight": held["lm_head.weight"],
        "norm.weight": held["transformer.ln_f.weight"],
    }
    for i in range(4):
        at = f"transformer.h.{i}"
        q, k, v = held[f"{at}.attn.qkv.weight"].split([32, 8, 8])
        names = {
            "attention.wq": pairs(q, 4),
            "attention.wk": pairs(k, 1),
            "attention.wv": v,
            "attention.wo": held[f"{at}.attn.proj.weight"],
            "feed_forward.w1": held[f"{at}.mlp.fc_1.weight"],
            "feed_forward.w3": held[f"{at}.mlp.fc_2.weight"],
            "feed_forward.w2": held[f"{at}.mlp.proj.weight"],
            "attention_norm": held[f"{at}.norm_1.weight"],
            "ffn_norm": held[f"{at}.norm_2.weight"],
        }
        state |= {f"layers.{i}.{name}.weight": value for name, value in names.items()}
    model = Llama(MQA)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval(), held


@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_logits_equal_litgpts(kind: str, litgpt_files: Path) -> None:
    model, held = litgpt_base(litgpt_files)
    stored = read_any_adapter(litgpt_files / f"lit_model.pth.{kind}")
    assert stored.format == {"adapter": "litgpt", "adapter_v2": "litgpt-v2"}[kind]
    assert stored.notes[0] == f"gates: identity ({stored.format}'s convention), one per head"
    assert stored.header.layers == (2, 3)
    assert stored.tensors["gates"].abs().max() > 1
    assert stored.header.scale_side == (None if kind == "adapter" else "output")
    assert_logits(stored, model, held["tokens"], held[f"logits.{kind}"])


@pytest.mark.parametrize("kind", ["litgpt", "litgpt-v2"])
def test_a_round_trip_is_bitwise(kind: str, litgpt_files: Path, tmp_path: Path) -> None:
    name = "lit_model.pth.adapter" + ("_v2" if kind == "litgpt-v2" else "")
    stored = read_any_adapter(litgpt_files / name)
    write_adapter_as(tmp_path / "own.safetensors", stored, "llama-adapter")
    again = read_any_adapter(tmp_path / "own.safetensors")
    write_adapter_as(tmp_path / name, again, kind)
    written, original = (
        torch.load(folder / name, weights_only=True)["model"] for folder in (tmp_path, litgpt_files)
    )
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], value) for key, value in original.items())


def test_grouped_heads_equal_the_intended_formula(tmp_path: Path) -> None:
    """litgpt's own prompts are wrong here; its bias and scale of the fused rows are not."""
    tensors = litgpt_tensors(GQA, version=2)
    path = save({"model": tensors}, tmp_path / "lit_model.pth.adapter_v2")
    stored = read_any_adapter(path)
    assert "heads: of width 8 assumed, dim / n_heads (model_config.yaml is not there)" in (
        stored.notes
    )
    assert stored.header.base.shape["kv_heads"] == 2
    theirs = {"wo": "attn.proj", "w1": "mlp.fc_1", "w3": "mlp.fc_2", "w2": "mlp.proj"}

    def rows(name: str, kind: str) -> Tensor:
        _, *place, linear = ("", *name.split("."))
        if linear == "output":
            return tensors[f"lm_head.adapter_{kind}"].double()
        at = f"transformer.h.{place[1]}"
        if linear in theirs:
            return tensors[f"{at}.{theirs[linear]}.adapter_{kind}"].double()
        fused = tensors[f"{at}.attn.qkv.adapter_{kind}"].double()
        q, k, v = fused.split([48, 16, 16])
        return {"wq": pairs(q, 6), "wk": pairs(k, 2), "wv": v}[linear]

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        return rows(name, "scale") * (x @ weight.T + rows(name, "bias"))

    norms = {"norm.weight": tensors["transformer.ln_f.weight"]}
    for i in range(4):
        norms[f"layers.{i}.attention_norm.weight"] = tensors[f"transformer.h.{i}.norm_1.weight"]
        norms[f"layers.{i}.ffn_norm.weight"] = tensors[f"transformer.h.{i}.norm_2.weight"]
    prompts = {
        i: (
            tensors[f"transformer.h.{i}.attn.adapter_wte.weight"],
            tensors[f"transformer.h.{i}.attn.gating_factor"].view(-1),
        )
        for i in (2, 3)
    }
    model, tokens = random_model(GQA), random_tokens(GQA)
    assert_logits(stored, model, tokens, transcribe(model, tokens, linear, norms, prompts))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1,)])
def test_older_gates_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = litgpt_tensors()
    for name in [name for name in tensors if "gating" in name]:
        tensors[name] = tensors[name].view(-1)[: 4 if len(shape) == 4 else 1].view(shape)
    path = save({"model": tensors}, tmp_path / "lit_model.pth.adapter")
    stored = read_any_adapter(path)
    expected = torch.stack([tensors[f"transformer.h.{i}.attn.gating_factor"] for i in (2, 3)])
    assert torch.equal(stored.tensors["gates"], expected.view(2, -1))


def test_rows_change_places_within_a_head() -> None:
    rows = torch.randn(12)
    assert torch.equal(to_pairs(rows, 3), pairs(rows, 3))
    assert torch.equal(to_halves(to_pairs(rows, 3), 3), rows)


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    tensors = litgpt_tensors(GQA, version=2)
    tensors["transformer.h.1.attn.qkv.adapter_scale"] = torch.ones(81)
    path = save({"model": tensors}, tmp_path / "lit_model.pth.adapter_v2")
    message = r"h\.1\.attn\.qkv\.adapter_scale must have shape \(80\), got \(81,\)"
    with pytest.raises(ValueError, match=message):
        read_any_adapter(path, ReadOptions(base=GQA))
