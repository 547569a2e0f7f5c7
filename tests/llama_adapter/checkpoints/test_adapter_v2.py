"""Do the official version 2 adapters compute their formulas, and is nothing dropped unsaid?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions, fitting_presets
from llama_adapter.checkpoints.adapter_formats import WRITERS, read_any_adapter, write_adapter_as
from llama_adapter.tuning import Lora
from tests.llama_adapter.checkpoints.adapter_samples import (
    CONFIG,
    assert_logits,
    chat_tensors,
    lora_tensors,
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


def lora_names(place: str, linear: str) -> tuple[str, str]:
    """Multimodal 7B's, in the place of the map's own."""
    at = place.removesuffix(linear)
    return f"llama.{at}lora_{linear}_l1.weight", f"llama.{at}lora_{linear}_l2.weight"


def test_lora_is_of_tokens_and_not_of_prompts(tmp_path: Path) -> None:
    tensors = multimodal_tensors() | lora_tensors(lora_names)
    content = {"model": tensors, "config": {"w_bias": True, "w_lora": True, "lora_rank": 3}}
    stored = read_any_adapter(save(content, tmp_path / "7b.pth"), SHAPED)
    assert stored.header.groups == ("prompts", "gates", "bias", "norm", "lora")
    assert stored.header.linears == ("wq", "wo", "w1", "w2", "w3")
    assert stored.header.lora == Lora(3)
    bare = {name.removeprefix("llama."): value for name, value in tensors.items()}

    def frozen(name: str, x: Tensor, weight: Tensor) -> Tensor:
        bias = bare.get(f"{name}.bias")
        return x @ weight.T if bias is None else x @ weight.T + bias.double()

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        if name == "output":
            return frozen(name, x, weight)
        first, second = (tensors[one].double() for one in lora_names(name, name.rpartition(".")[2]))
        return frozen(name, x, weight) + x @ first.T @ second.T

    model, tokens = random_model(), random_tokens()
    norms = {name: bare[name] for name in norm_tensors()}
    rows = prompts_of(bare, tanh=True)
    assert_logits(stored, model, tokens, transcribe(model, tokens, linear, norms, rows, frozen))
    write_adapter_as(tmp_path / "own.safetensors", stored, "llama-adapter")
    again = read_any_adapter(tmp_path / "own.safetensors")
    assert again.header.lora == Lora(3)
    assert all(torch.equal(again.tensors[name], x) for name, x in stored.tensors.items())
    for name in WRITERS:
        if name != "llama-adapter":
            with pytest.raises(ValueError, match=f"{name} is written without LoRA, and the"):
                write_adapter_as(tmp_path / "other", stored, name)


def test_half_of_a_lora_is_named(tmp_path: Path) -> None:
    tensors = multimodal_tensors() | lora_tensors(lora_names)
    del tensors["llama.layers.2.attention.lora_wo_l2.weight"]
    path = save({"model": tensors}, tmp_path / "7b.pth")
    with pytest.raises(ValueError, match=r"lacks tensor layers\.2\.attention\.lora_wo_l2\.weight"):
        read_any_adapter(path, SHAPED)
    tensors["llama.layers.2.attention.lora_wo_l2.weight"] = torch.randn(32, 4)
    path = save({"model": tensors}, tmp_path / "7b.pth")
    with pytest.raises(ValueError, match=r"must have shape \(32, 3\), got \(32, 4\)"):
        read_any_adapter(path, SHAPED)


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
