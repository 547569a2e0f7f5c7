"""Do files that PEFT wrote give PEFT's logits and gradients, and can PEFT read ours?"""

import json
from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions
from llama_adapter.checkpoints.adapter_formats import read_any_adapter, write_adapter_as
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from tests.llama_adapter.checkpoints.adapter_samples import (
    peft_tensors,
    prompt_tensors,
    random_model,
    random_tokens,
    save,
)
from tests.llama_adapter.hf_models import on_transformers

GROUPED = LlamaConfig(dim=48, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=40, multiple_of=8)


def write_with_peft(model: Llama, folder: Path, *, safe: bool) -> tuple[PeftModel, Path]:
    """An adapter with random numbers on two layers, saved by PEFT."""
    config = AdaptionPromptConfig(
        adapter_layers=2, adapter_len=7, target_modules="self_attn", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(on_transformers(model, attn_implementation="eager"), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "adaption_" in name:
                parameter.normal_(generator=generator)
    theirs.save_pretrained(str(folder), safe_serialization=safe)
    return theirs, folder


@pytest.mark.parametrize("safe", [True, False])
def test_logits_and_gradients_equal_pefts(safe: bool, tmp_path: Path) -> None:
    model, tokens = random_model(GROUPED), random_tokens(GROUPED)
    theirs, folder = write_with_peft(model, tmp_path / "peft", safe=safe)
    stored = read_any_adapter(folder)
    assert stored.format == "peft"
    assert stored.header.layers == (2, 3)
    assert stored.notes == ("gates: identity (peft's convention), one per layer",)
    adapter = stored.adapter(GROUPED)
    weight = torch.randn(2, 19, 40, generator=torch.Generator().manual_seed(4))
    ours_logits, their_logits = model(tokens, model.project(adapter)), theirs(tokens).logits
    assert (ours_logits - model(tokens)).abs().max() > 0.1
    torch.testing.assert_close(ours_logits, their_logits, rtol=0, atol=1e-5)
    (ours_logits * weight).sum().backward()
    (their_logits * weight).sum().backward()
    for row, layer in enumerate((2, 3)):
        attention = theirs.base_model.model.model.layers[layer].self_attn
        for mine, wanted in (
            (adapter.prompts, attention.adaption_prompt.grad[0]),
            (adapter.gates, attention.adaption_gate.grad),
        ):
            assert mine.grad is not None
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(mine.grad[row], wanted, rtol=1e-4, atol=1e-4)


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    model, tokens = random_model(GROUPED), random_tokens(GROUPED)
    theirs, folder = write_with_peft(model, tmp_path / "peft", safe=True)
    stored = read_any_adapter(folder)
    assert write_adapter_as(tmp_path / "again", stored, "peft") == ()
    first, second = (path / "adapter_model.safetensors" for path in (folder, tmp_path / "again"))
    again = read_any_adapter(second)
    assert all(torch.equal(again.tensors[n], value) for n, value in stored.tensors.items())
    assert first.stat().st_size > 0
    loaded = PeftModel.from_pretrained(
        on_transformers(model, attn_implementation="eager"), str(tmp_path / "again")
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)


def test_gates_per_head_do_not_fit_a_number(tmp_path: Path) -> None:
    path = save(prompt_tensors(), tmp_path / "official.pth")
    with pytest.raises(ValueError, match="peft holds one gate per layer, and the adapter's differ"):
        write_adapter_as(tmp_path / "peft", read_any_adapter(path), "peft")
    assert not (tmp_path / "peft").exists()
    path = save(prompt_tensors(scalar=True), tmp_path / "scalar.pth")
    stored = read_any_adapter(path)
    notes = write_adapter_as(tmp_path / "peft", stored, "peft")
    assert notes == ("gates: tanh is applied, so that the format's plain product gives the same",)
    again = read_any_adapter(tmp_path / "peft")
    assert torch.equal(again.tensors["gates"], stored.tensors["gates"].tanh())


def test_the_configuration_must_agree(tmp_path: Path) -> None:
    stored = read_any_adapter(save_peft(tmp_path / "a.bin", peft_tensors()))
    assert stored.notes[-1].startswith("no adapter_config.json beside it")
    write_adapter_as(tmp_path / "peft", stored, "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for change, message in (
        ({"adapter_len": 9}, "adapter_len is 9, but .* has 10"),
        ({"adapter_layers": 3}, "adapter_layers is 3, but .* has 2"),
        ({"peft_type": "LORA"}, "must have peft_type ADAPTION_PROMPT, got 'LORA'"),
    ):
        path.write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_any_adapter(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"but neither adapter_model\.safetensors nor"):
        read_any_adapter(tmp_path / "peft")


def test_gpt2_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"base_model.model.transformer.h.0.attn.adaption_prompt": torch.randn(1, 3, 32)}
    with pytest.raises(ValueError, match="is of a GPT-2 model"):
        read_any_adapter(save_peft(tmp_path / "a.bin", tensors), ReadOptions())


def save_peft(path: Path, tensors: dict[str, Tensor]) -> Path:
    return save(tensors, path)


def test_another_prompt_length_than_the_files_is_refused(tmp_path: Path) -> None:
    path = save_peft(tmp_path / "a.bin", peft_tensors())
    assert read_any_adapter(path, ReadOptions(prompt_length=10)).header.config.prompt_length == 10
    with pytest.raises(ValueError, match="holds prompts of 10 rows, got --prompt-length 3"):
        read_any_adapter(path, ReadOptions(prompt_length=3))
