"""Does the table find what prompts need in each host, and one identity for one base?"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.hosts import adapt, unadapt
from llama_adapter.hosts.facts import tower_of
from llama_adapter.model import Llama
from tests.llama_adapter.encoder_models import bert
from tests.llama_adapter.hf_models import KINDS, SIZES, host, on_transformers


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_host_is_found(kind: str) -> None:
    model = host(kind)
    tower = tower_of(model)
    shape = tower.shape()
    assert len(tower.attentions()) == 4
    assert (shape.dim, shape.n_layers, shape.n_heads, shape.kv_heads) == (64, 4, 8, 2)
    assert tower.fingerprint().shape["hidden_dim"] == SIZES["intermediate_size"]
    for attention in tower.attentions():
        assert attention.get_submodule(tower.host.key).out_features == 16


@pytest.mark.parametrize("tied", [False, True])
def test_one_base_has_one_fingerprint_in_both_libraries(tiny_model: Llama, tied: bool) -> None:
    if tied:
        with torch.no_grad():
            tiny_model.output.weight.copy_(tiny_model.tok_embeddings.weight)
    theirs = on_transformers(tiny_model, tie_word_embeddings=tied)
    assert fingerprint(tiny_model, "a").difference(tower_of(theirs).fingerprint()) is None
    with torch.no_grad():
        theirs.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    assert fingerprint(tiny_model, "a").difference(tower_of(theirs).fingerprint()) is not None


def test_other_models_are_refused_by_name() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    known = "bert, clip, .*, roberta, vit"
    with pytest.raises(ValueError, match=f"{known}, got GPT2LMHeadModel of type 'gpt2'"):
        tower_of(transformers.GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match=f"{known}, got Linear"):
        tower_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must have model.layers, .* got LlamaModel"):
        tower_of(host().model)


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT without its look for weights of torchao, of which it may know other versions."""
    module = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    return module


def test_a_part_of_a_model_and_one_in_peft_are_refused_by_name(peft: Any) -> None:
    model = bert("SequenceClassification")
    with pytest.raises(ValueError, match=r"must have encoder.layer, .* got BertEncoder: pass the"):
        tower_of(model.bert.encoder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["key"]))
    with pytest.raises(ValueError, match=r"must have .*encoder.layer, .* got PeftModel: .*get_bas"):
        adapt(wrapped)
    with pytest.raises(ValueError, match="must have an adapter"):
        unadapt(None)


def test_a_host_with_lora_has_the_fingerprint_of_its_base(tmp_path: Path, peft: Any) -> None:
    before = tower_of(bert()).fingerprint()
    model = bert()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "key", "value", "dense"]))
    assert before.difference(tower_of(model).fingerprint()) is None
    adapt(model, prompt_length=3)
    model.save_pretrained(tmp_path)
    unadapt(model)
    adapt(model, adapter=tmp_path)
    unadapt(model)
    model.bert.encoder.layer[0].attention.self.query = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"must have bert\..*query.weight, .* without"):
        tower_of(model).fingerprint()
