"""Are bottleneck adapters added to what the feed-forward part gives?"""

import pytest
import torch
from torch import Tensor

from llama_adapter.hosts.methods import MethodOptions, attach
from tests.llama_adapter.encoder_models import vit
from tests.llama_adapter.method_hosts import CASES, attached


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("vit", "vit.layers.1.mlp"),
        ("clip", "vision_model.encoder.layers.1.mlp"),
        ("roberta", "roberta.encoder.layer.1.output.dense"),
        ("bert", "bert.encoder.layer.1.output.dense"),
    ],
)
def test_an_adapter_is_the_literal_formula(kind: str, place: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    module = model.get_submodule(place)
    own: list[Tensor] = []
    # the first hook sees what the host itself gives
    module.register_forward_hook(lambda _, args, out: own.append(out))
    made = attached(model, "adapter")
    given: list[Tensor] = []
    module.register_forward_hook(lambda _, args, out: given.append(out))
    with torch.no_grad():
        case.run(model)
    encoder = "visual" if kind in ("vit", "clip") else "text"
    state = made.state_dict()
    down, below, up, above = (
        state[f"llama_adapter_{encoder}.layers.1.{name}"]
        for name in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    assert down.shape == (12, 48)
    x = own[0] @ down.T + below
    inner = x * (1 + torch.erf(x / 2**0.5)) / 2
    torch.testing.assert_close(given[0], own[0] + inner @ up.T + above, rtol=1e-5, atol=1e-5)
    assert (given[0] - own[0]).abs().max() > 0.1


def test_the_reduction_is_eight() -> None:
    state = attach(vit(), "adapter", MethodOptions()).state_dict()
    assert state["llama_adapter_visual.layers.0.down.weight"].shape == (6, 48)
    assert state["llama_adapter_visual.layers.0.up.weight"].eq(0).all()
