"""Are prompts among the tokens what the papers' formulas say, layer by layer?"""

import math

import peft
import pytest
import torch
from torch import Tensor

from llama_adapter.hosts.methods import MethodOptions, attach
from tests.llama_adapter.encoder_models import bert, clip, pixels, roberta, vit, words
from tests.llama_adapter.method_hosts import attached, padded_words


@pytest.mark.parametrize("deep", [False, True])
def test_vpt_on_a_vit_is_the_literal_loop(deep: bool) -> None:
    model, shown = vit(), pixels()
    made = attached(model, "vpt_deep" if deep else "vpt_shallow")
    with torch.no_grad():
        got = model(pixel_values=shown).logits
        prompts = made.parameters()["llama_adapter_visual.prompts"].clone()
        head = made.parameters()["classifier.weight"], made.parameters()["classifier.bias"]
        made.detach()
        body = model.vit
        x = body.embeddings(shown)
        for index, layer in enumerate(body.layers):
            if index == 0:
                x = torch.cat([x[:, :1], prompts[0].expand(3, 4, 48), x[:, 1:]], 1)
            elif deep:
                x[:, 1:5] = prompts[index]
            x = layer(x)
        wanted = body.layernorm(x)[:, 0] @ head[0].T + head[1]
    assert prompts.shape == ((3, 4, 48) if deep else (1, 4, 48))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_vpt_on_a_clip_comes_before_its_first_norm() -> None:
    model, shown = clip(), pixels()
    made = attached(model, "vpt_deep")
    with torch.no_grad():
        got = model.get_image_features(pixel_values=shown).pooler_output
        prompts = made.parameters()["llama_adapter_visual.prompts"].clone()
        made.detach()
        body = model.vision_model
        x = body.embeddings(shown)
        x = body.pre_layrnorm(torch.cat([x[:, :1], prompts[0].expand(3, 4, 48), x[:, 1:]], 1))
        for index, layer in enumerate(body.encoder.layers):
            if index:
                x[:, 1:5] = prompts[index]
            x = layer(x, None)
        wanted = model.visual_projection(body.post_layernorm(x[:, 0]))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_masked_patch_stays_masked() -> None:
    model, shown = vit(), pixels()
    attached(model, "vpt_deep")
    mask = torch.ones(3, 26, dtype=torch.int64)
    mask[:, 1], mask[0, 8] = 0, 0
    other = shown.clone()
    other[:, :, :4, :4] += 1
    with torch.no_grad():
        one, same, moved = (
            model.vit(pixel_values=x, attention_mask=m).last_hidden_state[:, 0]
            for x, m in ((shown, mask), (other, mask), (other, None))
        )
    torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-6)
    assert (one - moved).abs().max() > 0.01


def test_visual_prompts_begin_within_vpts_bound() -> None:
    made = attach(vit(), "vpt_deep", MethodOptions(prompt_length=50))
    drawn = made.parameters()["llama_adapter_visual.prompts"]
    bound = math.sqrt(6 / (3 * 4 * 4 + 48))
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert abs(drawn.std().item() - bound / math.sqrt(3)) < 0.01 * bound


def pefts(model: object, prompts: Tensor) -> peft.PeftModel:
    """PEFT's prompt tuning with given rows."""
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    theirs = peft.get_peft_model(model, config)
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(prompts)
    return theirs.eval()


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_prompt_tuning_is_pefts(kind: str) -> None:
    model = roberta() if kind == "roberta" else bert()
    body = getattr(model, kind)
    given = padded_words(1 if kind == "roberta" else 0)
    made = attached(body, "prompt_tuning")
    with torch.no_grad():
        got = body(**given).last_hidden_state
        prompts = made.parameters()["llama_adapter_text.prompts"].clone()
        made.detach()
        theirs = pefts(body, prompts)(**given)[0]
    shown = given["attention_mask"].bool()
    torch.testing.assert_close(got[shown], theirs[:, 4:][shown], rtol=1e-5, atol=1e-5)


def test_prompt_tuning_takes_what_the_host_takes() -> None:
    model, ids = bert(), words()
    attached(model, "prompt_tuning")
    kinds = torch.zeros_like(ids)
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(model(ids, token_type_ids=kinds).logits, wanted)
        assert not torch.allclose(model(ids, token_type_ids=kinds + 1).logits, wanted, atol=0.01)
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, wanted)
        mask = torch.ones_like(ids)
        torch.testing.assert_close(model(ids, mask).logits, wanted)
    for bad, text in (
        ({"position_ids": kinds}, "position_ids must be left to the host"),
        ({"attention_mask": torch.ones(3, 1, 13, 13)}, r"attention_mask must be \(B, T\)"),
    ):
        with pytest.raises(ValueError, match=text):
            model(ids, **bad)
    with pytest.raises(ValueError, match="tokens must be at most 36 beside 4 prompts, got 37"):
        model(words(2, 37))
