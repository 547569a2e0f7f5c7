"""Does the table find what prompts need in each host, and one identity for one base?"""

import pytest
import torch
import transformers

from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.hosts.facts import tower_of
from llama_adapter.model import Llama
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
