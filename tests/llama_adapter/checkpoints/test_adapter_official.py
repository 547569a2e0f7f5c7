"""Is the official adapter read as its training or its inference code computes with it?"""

import argparse
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions
from llama_adapter.checkpoints.adapter_formats import read_any_adapter, write_adapter_as
from llama_adapter.config import PRESETS
from tests.llama_adapter.checkpoints.adapter_samples import (
    CONFIG,
    assert_logits,
    prompt_tensors,
    random_model,
    random_tokens,
    save,
    transcribe,
)

SHAPED = ReadOptions(base=CONFIG)


def prompts_of(
    tensors: dict[str, Tensor], *, tanh: bool, length: int = 10
) -> dict[int, tuple[Tensor, Tensor]]:
    """Layers 2 and 3, as the official code views its block of rows."""
    rows = tensors["adapter_query.weight"].reshape(-1, length, 32)
    gates = [tensors[f"layers.{i}.attention.gate"].reshape(-1).expand(4) for i in (2, 3)]
    return {i: (rows[i - 2], gates[i - 2].tanh() if tanh else gates[i - 2]) for i in (2, 3)}


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("activation", [None, "tanh", "identity"])
def test_logits_equal_the_formula_in_both_conventions(
    activation: str | None, scalar: bool, tmp_path: Path
) -> None:
    tensors = prompt_tensors(scalar=scalar)
    path = save(tensors, tmp_path / "adapter.pth")
    stored = read_any_adapter(path, ReadOptions(gate_activation=activation))
    wanted = activation or "tanh"
    scope = "layer" if scalar else "head"
    assert (stored.header.config.gate_activation, stored.header.config.gate_scope) == (
        wanted,
        scope,
    )
    how = "as told" if activation else "official's convention"
    assert stored.notes[0] == f"gates: {wanted} ({how}), one per {scope}"
    model, tokens = random_model(), random_tokens()
    expected = transcribe(model, tokens, prompts=prompts_of(tensors, tanh=wanted == "tanh"))
    assert_logits(stored, model, tokens, expected)


def test_half_precision_and_the_base_beside_it(tmp_path: Path) -> None:
    tensors = {name: value.half() for name, value in prompt_tensors().items()}
    whole = {"model": tensors | random_model().state_dict(), "epoch": 4}
    stored = read_any_adapter(save(whole, tmp_path / "checkpoint.pth"), SHAPED)
    assert "left out: the base's own weights" in stored.notes
    expected = tensors["adapter_query.weight"].float().view(2, 10, 32)
    assert torch.equal(stored.tensors["prompts"], expected)


def test_another_prompt_length_is_told(tmp_path: Path) -> None:
    path = save(prompt_tensors(), tmp_path / "adapter.pth")
    stored = read_any_adapter(path, ReadOptions(prompt_length=10))
    assert stored.header.layers == (2, 3)
    for length, problem in ((5, None), (20, None), (7, "must hold 7 rows")):
        told = ReadOptions(prompt_length=length)
        if problem is None and length == 20:
            # one layer of 20 rows: then layer 2 has a gate, but no prompts
            problem = "a layer below the last 1 has a gate other than 0"
        if problem is None:
            assert read_any_adapter(path, told).header.layers == (0, 1, 2, 3)
            continue
        with pytest.raises(ValueError, match=problem):
            read_any_adapter(path, told)


def test_a_training_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    whole = {"model": prompt_tensors(), "args": argparse.Namespace(epochs=5)}
    path = save(whole, tmp_path / "checkpoint-4.pth")
    message = (
        r"can only be read by running code \(argparse\.Namespace\), which is refused: save its"
    )
    with pytest.raises(ValueError, match=message):
        read_any_adapter(path)


def test_a_7b_adapter_fits_7b_bases(tmp_path: Path) -> None:
    tensors = {"adapter_query.weight": torch.randn(300, 4096)}
    for layer in range(32):
        gate = torch.randn(1, 32, 1, 1) if layer > 1 else torch.zeros(1, 32, 1, 1).half()
        tensors[f"layers.{layer}.attention.gate"] = gate
    stored = read_any_adapter(save(tensors, tmp_path / "adapter.pth"))
    assert stored.header.base.shape == {"dim": 4096, "n_layers": 32, "n_heads": 32}
    assert stored.header.layers == tuple(range(2, 32))
    stored.adapter(PRESETS["llama-7b"])
    with pytest.raises(ValueError, match="dim 4096 and 5120, n_layers 32 and 40"):
        stored.adapter(PRESETS["llama-13b"])


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_a_round_trip_is_bitwise(activation: str, tmp_path: Path) -> None:
    tensors = prompt_tensors()
    told = ReadOptions(gate_activation=activation)
    stored = read_any_adapter(save(tensors, tmp_path / "adapter.pth"), told)
    notes = write_adapter_as(tmp_path / "again.pth", stored, "official")
    assert notes[-1].startswith(f"gates: to be read as {activation}, as their")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    scalar = read_any_adapter(save(prompt_tensors(scalar=True), tmp_path / "scalar.pth"))
    with pytest.raises(ValueError, match="a gate per head, and the base's n_heads is not known"):
        write_adapter_as(tmp_path / "b.pth", scalar, "official")
    told = ReadOptions(base=CONFIG, gate_scope="head")
    spread = read_any_adapter(tmp_path / "scalar.pth", told)
    assert torch.equal(spread.tensors["gates"], scalar.tensors["gates"].expand(-1, 4))
    save(prompt_tensors(), tmp_path / "heads.pth")
    with pytest.raises(ValueError, match=re.escape("differ from head to head: gate_scope must be")):
        read_any_adapter(tmp_path / "heads.pth", ReadOptions(gate_scope="layer"))


@pytest.mark.parametrize("length", [1, 5, 20])
def test_a_prompt_length_is_told_by_the_layers_with_gates(length: int, tmp_path: Path) -> None:
    tensors = prompt_tensors()
    rows = torch.randn(2 * length, 32)
    path = save(tensors | {"adapter_query.weight": rows}, tmp_path / "adapter.pth")
    stored = read_any_adapter(path, SHAPED)
    assert stored.header.layers == (2, 3)
    assert torch.equal(stored.tensors["prompts"], rows.view(2, length, 32))
    assert any(note.startswith(f"prompt length: {length},") for note in stored.notes)
