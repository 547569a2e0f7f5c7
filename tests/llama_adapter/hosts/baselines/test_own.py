"""Are the host's own parameters exchanged for trained ones, and given back?"""

import pytest
import torch
import transformers

from llama_adapter.hosts.baselines.own import head_of, need_float32, own_names, train_own
from llama_adapter.hosts.baselines.parts import Undo, parts_of
from llama_adapter.hosts.methods import attach
from tests.llama_adapter.encoder_models import bert, clip, pixels, roberta, vit


def test_biases_are_all_that_are_called_so() -> None:
    model = vit()
    names = own_names(model, [], True)
    every = [name for name, _ in model.named_parameters() if not name.startswith("classifier")]
    assert names == [name for name in every if name.endswith(".bias")]
    assert own_names(model, [], False) == every
    assert {"vit.layers.0.layernorm_before.bias", "vit.embeddings.patch_embeddings.projection.bias",
            "vit.layers.2.attention.k_proj.bias"} <= set(names)  # fmt: skip
    both = clip()
    some = own_names(both, [parts_of(both)["text"]], True)
    assert some
    assert all(name.startswith("text_model.") for name in some)


def test_heads_are_found_by_what_they_are() -> None:
    found = [head_of(x) for x in (vit(), bert("QuestionAnswering", 2), roberta())]
    assert [x[0] for x in found if x] == ["classifier", "qa_outputs", "classifier"]
    assert head_of(clip()) is None
    assert head_of(transformers.ViTModel(vit().config)) is None


def test_tied_parameters_stay_tied() -> None:
    model = vit()
    first, second = model.vit.layers[0].mlp, model.vit.layers[1].mlp
    second.fc1.weight = own = first.fc1.weight
    undo: list[Undo] = []
    trained = train_own(model, [name for name, _ in model.named_parameters()], undo)
    assert first.fc1.weight is second.fc1.weight is trained["vit.layers.0.mlp.fc1.weight"]
    assert first.fc1.weight is not own
    for step in undo:
        step()
    assert first.fc1.weight is second.fc1.weight is own


def test_a_head_in_float32_takes_half_precision() -> None:
    model = vit().to(torch.bfloat16)
    own = dict(model.named_parameters())
    made = attach(model, "linear")
    out = model(pixel_values=pixels().bfloat16()).logits
    assert out.dtype == torch.float32
    out.sum().backward()
    assert made.parameters()["classifier.weight"].grad is not None
    made.detach()
    assert all(x is own[name] for name, x in model.named_parameters())
    assert model(pixel_values=pixels().bfloat16()).logits.dtype == torch.bfloat16


def test_what_cannot_be_trained_is_refused() -> None:
    model = vit()
    need_float32(model, "bias")
    with pytest.raises(ValueError, match=r"bias needs a model in float32, .*bfloat16 in .*float"):
        need_float32(model.bfloat16(), "bias")
    model.classifier.weight = torch.nn.Parameter(torch.ones(5, 48).to(torch.int8), False)
    with pytest.raises(ValueError, match=r"classifier\.weight must be of floating point"):
        attach(model, "adapter")
    assert not [name for name in model._modules if name.startswith("llama_adapter")]
