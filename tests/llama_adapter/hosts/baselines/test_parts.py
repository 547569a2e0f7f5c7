"""Do baselines find a host's encoders, and do their hooks change what they should?"""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from llama_adapter.hosts.baselines import parts
from tests.llama_adapter.encoder_models import bert, clip, roberta, vit
from tests.llama_adapter.hf_models import host


def test_encoders_are_found_in_models_and_alone() -> None:
    config = clip().config
    whole = {
        "vit": (vit(), {"visual": "vit."}),
        "roberta": (roberta(), {"text": "roberta."}),
        "bert": (bert().bert, {"text": ""}),
        "clip": (clip(), {"visual": "vision_model.", "text": "text_model."}),
        "pictures": (transformers.CLIPVisionModel(config.vision_config), {"visual": ""}),
        "texts": (
            transformers.CLIPTextModelWithProjection(config.text_config),
            {"text": "text_model."},
        ),
    }
    for model, wanted in whole.values():
        found = parts.parts_of(model)
        assert {encoder: part.tower.prefix for encoder, part in found.items()} == wanted
        for part in found.values():
            names = dict(part.body.named_modules())
            sites = part.sites
            assert {"embeddings", sites.runner, sites.norm} <= {*names, ""}
            for layer in part.layers():
                inner = dict(layer.named_modules())
                attention = inner[part.tower.host.attention]
                assert sites.feed_forward in inner
                assert sites.query in dict(attention.named_modules())
            assert part.topmost(None) == range(3)
            assert part.topmost(2) == range(1, 3)
            for bad in (0, 4):
                with pytest.raises(ValueError, match=f"layers must be 1 to 3 .*, got {bad}"):
                    part.topmost(bad)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), host()])
def test_other_models_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="model must be a"):
        parts.parts_of(model)


class _Two(nn.Module):
    def forward(self, hidden_states: Any, scale: float = 1.0, **more: Any) -> Any:
        return hidden_states * scale + more.get("extra", 0.0)


def test_hooks_see_arguments_however_they_come() -> None:
    module, x = _Two(), torch.ones(1, 2, 3)
    undo = [
        parts.before(module, lambda given: given | {"scale": given.get("scale", 1.0) * 3}),
        parts.before_layer(module, lambda hidden: hidden + 1),
        parts.after(module, lambda out: -out),
    ]
    assert torch.equal(module(x), -6 * x)
    assert torch.equal(module(x, 2.0), -12 * x)
    assert torch.equal(module(hidden_states=x, scale=2.0, extra=1.0), -13 * x)
    for step in undo:
        step()
    assert torch.equal(module(x, 2.0), 2 * x)
    assert torch.equal(parts.before_layer(module, lambda hidden: hidden * 5)() or module(x), x)


def test_numbers_are_drawn_from_the_generator() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        parts.initialise(layer, torch.Generator().manual_seed(seed))
        found.append({name: x.clone() for name, x in layer.state_dict().items()})
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    assert not torch.equal(found[0]["linear1.weight"], found[2]["linear1.weight"])
    assert found[0]["linear2.weight"].abs().max() <= 16**-0.5
    assert found[0]["norm1.weight"].eq(1).all()
    assert found[0]["linear1.bias"].eq(0).all()


def test_rows_leave_where_they_came_in() -> None:
    x = torch.randn(2, 7, 3)
    got = parts.without_rows(1, 4, x)
    assert torch.equal(got, x[:, [0, 5, 6]])
