"""Does CoOp's context stand where the template's words stood?"""

from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter.hosts.methods import MethodOptions, attach
from tests.llama_adapter.encoder_models import clip
from tests.llama_adapter.method_hosts import attached

TEMPLATE = (11, 12, 13)


def texts(length: int = 9, template: tuple[int, ...] = TEMPLATE) -> Tensor:
    """[99] template, class of one to three words, [100], padding by the end's word."""
    ids = torch.full((3, length), 100)
    for row, name in enumerate(((20,), (21, 22), (23, 24, 25))):
        found = torch.tensor([99, *template, *name])
        ids[row, : len(found)] = found
    return ids


def features(model: Any, ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model.get_text_features(input_ids=ids, **given).pooler_output


def test_from_the_templates_words_it_is_the_host() -> None:
    model = clip()
    theirs = features(model, texts())
    attach(model, "coop", MethodOptions(prompt_length=3, template_length=3, context_ids=TEMPLATE))
    torch.testing.assert_close(features(model, texts()), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_host_with_words_of_its_own(length: int, masked: bool) -> None:
    """Words that no text uses get the learnt vectors, and stand in the template's place."""
    model = clip()
    made = attached(model, "coop", prompt_length=length)
    ids = texts()
    given = {"attention_mask": (torch.arange(9) < 8).long().expand(3, 9)} if masked else {}
    got = features(model, ids, **given)
    context = made.state_dict()["llama_adapter_text.context"]
    made.detach()
    assert context.shape == (length, 32)
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[40 : 40 + length] = context
    longer = texts(9 - 3 + length, tuple(range(40, 40 + length)))
    if masked:
        shown = torch.arange(6 + length) < 5 + length
        given = {"attention_mask": shown.long().expand(3, -1)}
    torch.testing.assert_close(got, features(model, longer, **given), rtol=1e-5, atol=1e-5)


def test_padding_makes_room_and_words_do_not() -> None:
    model = clip()
    attached(model, "coop", prompt_length=20)
    short = features(model, texts(9))
    torch.testing.assert_close(features(model, texts(40)), short, rtol=1e-5, atol=1e-5)
    full = torch.full((1, 40), 50)
    full[0, 0], full[0, -1] = 99, 100
    with pytest.raises(ValueError, match="texts must end within 40 tokens with 20 of context"):
        features(model, full)
    with pytest.raises(ValueError, match="position_ids must be left to the host with coop"):
        features(model, texts(), position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match="a template of 3 tokens behind their first, got 4"):
        features(model, texts()[:, :4])


def test_pictures_are_the_hosts() -> None:
    model, pictures = clip(), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pictures).pooler_output
        attached(model, "coop")
        assert torch.equal(model.get_image_features(pixel_values=pictures).pooler_output, theirs)


def test_it_begins_small() -> None:
    made = attach(clip(), "coop", MethodOptions(prompt_length=64))
    drawn = made.state_dict()["llama_adapter_text.context"]
    assert abs(drawn.std().item() - 0.02) < 0.001
