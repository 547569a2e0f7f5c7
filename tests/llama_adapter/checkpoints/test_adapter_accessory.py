"""Are Accessory's folders read as its formula says, in one piece and from several ranks?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions
from llama_adapter.checkpoints.adapter_formats import read_any_adapter, write_adapter_as
from llama_adapter.tuning import Lora
from tests.llama_adapter.checkpoints.adapter_samples import (
    CONFIG,
    accessory_tensors,
    assert_logits,
    lora_tensors,
    norm_tensors,
    random_model,
    random_tokens,
    save,
    transcribe,
)

SHAPED = ReadOptions(base=CONFIG)


def write_ranks(folder: Path, tensors: dict[str, Tensor], count: int) -> Path:
    """Split as their tensor parallelism does: heads and rows of wq, w1 and w3, and LoRA beside."""
    folder.mkdir()
    for rank in range(count):
        held = {}
        for name, value in tensors.items():
            inner = ("wo.lora_a.weight", "w2.lora_a.weight")
            dim = 1 if name.endswith(("prefix_gate", *inner)) else 0
            outer = tuple(f"{n}.lora_b.weight" for n in ("wq", "wk", "wv", "w1", "w3"))
            biases = ("wq.bias", "w1.bias", "w3.bias")
            split = name.endswith(("prefix_gate", *biases, *inner, *outer))
            held[name] = value.tensor_split(count, dim)[rank].clone() if split else value
        save({"model": held}, folder / f"consolidated.{rank:02d}-of-{count:02d}.model.pth")
    return folder


def lora_names(place: str, linear: str) -> tuple[str, str]:
    return f"llma.{place}.lora_a.weight", f"llma.{place}.lora_b.weight"


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("count", [1, 2])
def test_logits_equal_the_formula(count: int, lora: bool, tmp_path: Path) -> None:
    tensors = accessory_tensors() | (lora_tensors(lora_names) if lora else {})
    stored = read_any_adapter(write_ranks(tmp_path / "ac", tensors, count), SHAPED)
    assert stored.format == "accessory"
    assert stored.notes[0] == "gates: tanh (accessory's convention), one per head"

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        bias = tensors.get(f"llma.{name}.bias")
        if lora and name != "output":
            # a layer of theirs has its LoRA inside: prompts pass through it as well
            first, second = (tensors[one].double() for one in lora_names(name, ""))
            weight = weight + second @ first
        return x @ weight.T if bias is None else x @ weight.T + bias.double()

    assert stored.header.lora == (Lora(3, prompts=True) if lora else None)
    prompts = {
        2 + i: (tensors["llma.prefix"][i, 0], tensors["llma.prefix_gate"][i].tanh())
        for i in range(2)
    }
    norms = {name: tensors[f"llma.{name}"] for name in norm_tensors()}
    model, tokens = random_model(), random_tokens()
    assert_logits(stored, model, tokens, transcribe(model, tokens, linear, norms, prompts))


def test_a_whole_checkpoint_of_two_ranks_leaves_the_base_out(tmp_path: Path) -> None:
    tensors = accessory_tensors()
    expected = read_any_adapter(write_ranks(tmp_path / "alone", tensors, 1), SHAPED)
    folder = write_ranks(tmp_path / "ac", tensors, 2)
    for rank, path in enumerate(sorted(folder.iterdir())):
        held = torch.load(path, weights_only=True)
        for name in ("layers.0.attention.wq", "layers.3.feed_forward.w2", "tok_embeddings"):
            held["model"][f"llma.{name}.weight"] = torch.randn(8, 8 + rank)
        torch.save(held, path)
    stored = read_any_adapter(folder, SHAPED)
    assert "left out: the base's own weights" in stored.notes
    assert stored.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(stored.tensors[name], x) for name, x in expected.tensors.items())


def test_a_round_trip_is_bitwise(tmp_path: Path) -> None:
    tensors = accessory_tensors()
    stored = read_any_adapter(write_ranks(tmp_path / "ac", tensors, 1), SHAPED)
    write_adapter_as(tmp_path / "again", stored, "accessory")
    path = tmp_path / "again" / "consolidated.00-of-01.model.pth"
    written = torch.load(path, weights_only=True)["model"]
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_prompts_alone_belong_to_the_last_layers_of_a_known_base(tmp_path: Path) -> None:
    tensors = {n: v for n, v in accessory_tensors().items() if n.startswith("llma.prefix")}
    folder = write_ranks(tmp_path / "ac", tensors, 1)
    with pytest.raises(ValueError, match="does not tell its base's n_layers: name the base"):
        read_any_adapter(folder)
    assert read_any_adapter(folder, SHAPED).header.layers == (2, 3)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "ac", accessory_tensors(), 2)
    (folder / "consolidated.01-of-02.model.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold 2 consolidated files, got .* \[0\]"):
        read_any_adapter(folder)


def test_second_gates_are_not_dropped_unsaid(tmp_path: Path) -> None:
    changed = accessory_tensors()
    changed["llma.prefix_new_gate"][1] = 0.7
    folder = write_ranks(tmp_path / "ac", changed, 1)
    with pytest.raises(ValueError, match="has new_gate tensors"):
        read_any_adapter(folder, SHAPED)
    asked = ReadOptions(base=CONFIG, leave_out=["new_gate"])
    assert len(read_any_adapter(folder, asked).notes) >= 2


def test_files_of_several_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    for name in ("00-of-02", "01-of-02", "00-of-01"):
        torch.save({"model": accessory_tensors()}, tmp_path / f"consolidated.{name}.model.pth")
    with pytest.raises(ValueError, match=r"files of one number of ranks, got those of \[1, 2\]"):
        read_any_adapter(tmp_path)
