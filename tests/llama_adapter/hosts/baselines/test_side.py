"""Is side-tuning a blend of two networks that see the same?"""

import pytest
import torch
from torch import Tensor, nn

from llama_adapter.hosts.baselines.side import hidden_keys
from llama_adapter.hosts.methods import attach
from tests.llama_adapter.encoder_models import clip, pixels, vit, words
from tests.llama_adapter.method_hosts import CASES, attached


def side_of(model: nn.Module, encoder: str, x: Tensor, seen: Tensor) -> Tensor:
    """The network run row by row, on the tokens that a row's last one sees."""
    network = model.get_submodule(f"llama_adapter_{encoder}")
    rows = [network(row[mask][None], None)[0] for row, mask in zip(x, seen, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_a_vits_features_are_the_blend() -> None:
    model, shown = vit(), pixels()
    made = attached(model, "side")
    with torch.no_grad():
        got = model.vit(pixel_values=shown).last_hidden_state
        x = model.vit.embeddings(shown)
        model.get_submodule("llama_adapter_visual")._carried.clear()
        side = side_of(model, "visual", x, torch.ones(x.shape[:2], dtype=torch.bool))
        alpha = made.parameters()["llama_adapter_visual.alpha"].clone()
        made.detach()
        for layer in model.vit.layers:
            x = layer(x)
        wanted = model.vit.layernorm(alpha * x + (1 - alpha) * side)
    assert side.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_words_features_are_the_blend(kind: str, implementation: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    model.set_attn_implementation(implementation)
    body, shown = getattr(model, kind), case.inputs["attention_mask"].bool()
    with torch.no_grad():
        frozen = body(**case.inputs).last_hidden_state
        made = attached(model, "side")
        got = body(**case.inputs).last_hidden_state
        side = side_of(model, "text", body.embeddings(input_ids=case.inputs["input_ids"]), shown)
        alpha = made.parameters()["llama_adapter_text.alpha"]
        wanted = alpha * frozen + (1 - alpha) * side
    torch.testing.assert_close(got[shown], wanted[shown], rtol=1e-5, atol=1e-5)


def test_clips_side_is_causal_as_the_host_is() -> None:
    model, ids = clip(), words()
    attached(model, "side", encoders=("text",))
    with torch.no_grad():
        whole = model.text_model(input_ids=ids).last_hidden_state
        other = ids.clone()
        other[:, 7:-1] = 5
        changed = model.text_model(input_ids=other).last_hidden_state
    torch.testing.assert_close(whole[:, :7], changed[:, :7], rtol=1e-5, atol=1e-5)
    assert (whole[:, 7:] - changed[:, 7:]).abs().max() > 0.1


def test_masks_of_all_forms_hide_the_same_keys() -> None:
    x, flat = torch.zeros(2, 4, 8), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    seen = flat.bool()[:, None, None, :].expand(2, 1, 4, 4)
    added = torch.zeros(2, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    wanted = (~seen).expand(2, 3, 4, 4).flatten(0, 1)
    for mask in (flat, seen, added):
        got = hidden_keys(mask, False, x, 3)
        assert got is not None
        assert torch.equal(got, wanted)
    assert hidden_keys(None, False, x, 3) is None
    causal = hidden_keys(None, True, x, 3)
    assert causal is not None
    assert torch.equal(causal[5], torch.ones(4, 4, dtype=torch.bool).triu(1))


def test_the_blend_begins_in_the_middle() -> None:
    assert attach(vit(), "side").state_dict()["llama_adapter_visual.alpha"] == 0.5
