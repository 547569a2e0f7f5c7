"""Do the official version 2 adapters compute their formulas, and is nothing dropped unsaid?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions, fitting_presets
from llama_adapter.checkpoints.adapter_formats import read_any_adapter, write_adapter_as
from tests.llama_adapter.checkpoints.adapter_samples import (
    CONFIG,
    assert_logits,
    chat_tensors,
    multimodal_tensors,
    norm_tensors,
    prompt_tensors,
    random_model,
    random_tokens,
    save,
    transcribe,
)
from tests.llama_adapter.checkpoints.test_adapter_official import prompts_of

SHAPED = ReadOptions(base=CONFIG)


@pytest.mark.parametrize("prompts", [False, True])
def test_chat65b_scales_the_input(prompts: bool, tmp_path: Path) -> None:
    tensors = chat_tensors(prompts=prompts)
    stored = read_any_adapter(save({"model": tensors}, tmp_path / "chat.pth"), SHAPED)
    assert stored.format == "chat65b"
    assert stored.header.groups[-3:] == ("bias", "scale", "norm")
    assert stored.header.scale_side == "input"
    assert bool(stored.header.layers) == prompts

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        if name == "output":
            return x @ weight.T
        scale, bias = tensors[f"{name}_scale"].double(), tensors[f"{name}_bias"].double()
        return (x * scale) @ weight.T + bias

    model, tokens = random_model(), random_tokens()
    rows = prompts_of(tensors, tanh=True) if prompts else {}
    norms = {name: tensors[name] for name in norm_tensors()}
    assert_logits(stored, model, tokens, transcribe(model, tokens, linear, norms, rows))


def test_a_chat65b_round_trip_is_bitwise(tmp_path: Path) -> None:
    for prompts in (False, True):
        tensors = chat_tensors(prompts=prompts)
        stored = read_any_adapter(save({"model": tensors}, tmp_path / "chat.pth"), SHAPED)
        write_adapter_as(tmp_path / "own.safetensors", stored, "llama-adapter")
        again = read_any_adapter(tmp_path / "own.safetensors")
        write_adapter_as(tmp_path / "again.pth", again, "chat65b")
        written = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("prefix", ["llama.", "llma."])
def test_multimodal_has_biases_without_key_and_value(prefix: str, tmp_path: Path) -> None:
    tensors = multimodal_tensors(prefix)
    content = {"model": tensors, "config": {"w_bias": True, "w_lora": False, "lora_rank": 16}}
    stored = read_any_adapter(save(content, tmp_path / "7b.pth"), SHAPED)
    assert stored.format == "multimodal"
    assert stored.header.linears == ("wq", "wo", "w1", "w2", "w3")
    bare = {name.removeprefix(prefix): value for name, value in tensors.items()}

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        bias = bare.get(f"{name}.bias")
        return x @ weight.T if bias is None else x @ weight.T + bias.double()

    model, tokens = random_model(), random_tokens()
    norms = {name: bare[name] for name in norm_tensors()}
    expected = transcribe(model, tokens, linear, norms, prompts_of(bare, tanh=True))
    assert_logits(stored, model, tokens, expected)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("visual", {"visual_query.weight": torch.randn(10, 8), "clip_proj.bias": torch.randn(8)}),
        ("lora", {"llama.layers.0.attention.lora_wq_l1.weight": torch.randn(2, 32)}),
        ("new_gate", {"llama.layers.3.attention.new_gate": torch.full((1, 1, 1, 1), 0.5)}),
    ],
)
def test_what_changes_answers_is_left_out_when_asked_for_only(
    kind: str, extra: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save({"model": multimodal_tensors() | extra}, tmp_path / "7b.pth")
    with pytest.raises(ValueError, match=f"has {kind} tensors.*--leave-out {kind}"):
        read_any_adapter(path, SHAPED)
    stored = read_any_adapter(path, ReadOptions(base=CONFIG, leave_out=[kind]))
    assert any(kind in note and "left out" in note for note in stored.notes)


def test_second_gates_of_one_change_nothing(tmp_path: Path) -> None:
    extra = {f"llama.layers.{i}.attention.new_gate": torch.ones(1, 1, 1, 1) for i in range(4)}
    path = save({"model": multimodal_tensors() | extra}, tmp_path / "7b.pth")
    assert "left out: 4 new_gate tensors, all 1" in read_any_adapter(path, SHAPED).notes


def test_an_output_side_scale_is_no_input_side_scale(tmp_path: Path) -> None:
    stored = read_any_adapter(
        save({"model": chat_tensors(prompts=True)}, tmp_path / "chat.pth"), SHAPED
    )
    with pytest.raises(ValueError, match="scales on the output side, got input: not convertible"):
        write_adapter_as(tmp_path / "lit", stored, "litgpt-v2")
    for name in ("official", "peft", "litgpt"):
        with pytest.raises(ValueError, match="holds prompts and gates alone, got"):
            write_adapter_as(tmp_path / "other", stored, name)
    with pytest.raises(ValueError, match="accessory has no scales"):
        write_adapter_as(tmp_path / "other", stored, "accessory")
    assert not (tmp_path / "other").exists()


def test_an_unknown_base_is_asked_for(tmp_path: Path) -> None:
    path = save({"model": chat_tensors(prompts=False)}, tmp_path / "chat.pth")
    with pytest.raises(ValueError, match="does not tell its base's n_heads: name the base"):
        read_any_adapter(path)


def test_the_released_65b_file_is_known_by_its_shape(tmp_path: Path) -> None:
    """No prompts, no gates: 13,811,712 numbers, the abstract's 14M."""
    dim, hidden = 8192, 22016
    tensors = {"norm.weight": torch.ones(dim)}
    for i in range(80):
        at = f"layers.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            tensors[f"{at}.attention.{name}_scale"] = torch.ones(dim)
            tensors[f"{at}.attention.{name}_bias"] = torch.ones(dim)
        for name, n_in, n_out in (("w1", dim, hidden), ("w2", hidden, dim), ("w3", dim, hidden)):
            tensors[f"{at}.feed_forward.{name}_scale"] = torch.ones(n_in)
            tensors[f"{at}.feed_forward.{name}_bias"] = torch.ones(n_out)
        tensors |= {
            f"{at}.{name}.weight": torch.ones(dim) for name in ("attention_norm", "ffn_norm")
        }
    stored = read_any_adapter(save({"model": tensors}, tmp_path / "chat.pth"))
    assert sum(value.numel() for value in stored.tensors.values()) == 13_811_712
    assert fitting_presets(stored.header.base.shape) == ["llama-65b"]
    assert any("n_heads 64" in note and "assumed" in note for note in stored.notes)


def test_a_chat65b_file_that_its_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    stored = read_any_adapter(save(prompt_tensors(), tmp_path / "v1.pth"), SHAPED)
    with pytest.raises(ValueError, match=r"of all maps, got no .*: prompts alone"):
        write_adapter_as(tmp_path / "chat.pth", stored, "chat65b")
    assert not (tmp_path / "chat.pth").exists()
