"""Is LoRA W + (alpha / rank) B A, for queries and values, at every rank of the tables?"""

import sys

import pytest
import torch

from llama_adapter.hosts.methods import attach
from tests.llama_adapter.encoder_models import vit
from tests.llama_adapter.method_hosts import CASES, attached

PLACES = {
    "vit": "vit.layers.{}.attention.{}_proj",
    "roberta": "roberta.encoder.layer.{}.attention.self.{}",
    "clip": "vision_model.encoder.layers.{}.self_attn.{}_proj",
}


@pytest.mark.parametrize("rank", [2, 4, 8, 16])
@pytest.mark.parametrize("kind", PLACES)
def test_it_is_the_sum_of_two_matrices(kind: str, rank: int) -> None:
    case, model = CASES[kind], CASES[kind].make()
    made = attached(model, "lora", rank=rank, lora_alpha=12)
    with torch.no_grad():
        got, state = case.run(model), made.state_dict()
        made.detach()
        for layer in range(3):
            for name in ("query", "value") if kind == "roberta" else ("q", "v"):
                place = PLACES[kind].format(layer, name)
                a, b = (state.pop(f"{place}.lora_{x}.default.weight") for x in "AB")
                assert a.shape == (rank, 48)
                model.get_submodule(place).weight += 12 / rank * b @ a
        for name, value in state.items():
            model.get_parameter(name).copy_(value)
        torch.testing.assert_close(got, case.run(model), rtol=1e-5, atol=2e-5)


def test_it_begins_as_torch_draws_a_linear_layer() -> None:
    state = attach(vit(), "lora").state_dict()
    first = torch.cat([x for name, x in state.items() if ".lora_A." in name])
    assert all(x.eq(0).all() for name, x in state.items() if ".lora_B." in name)
    assert 0.95 * 48**-0.5 < first.abs().max() <= 48**-0.5


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'peft>=0\.18'"):
        attach(model, "lora")
    assert all(x.requires_grad for x in model.parameters())
