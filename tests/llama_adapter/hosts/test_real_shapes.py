"""Do hosts of the papers' sizes, with random numbers, stay what transformers computes?

`make test-all` runs this with the oldest and the newest transformers, too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llama_adapter.hosts import adapt, unadapt
from llama_adapter.hosts.facts import tower_of
from tests.llama_adapter.encoder_models import roberta

REAL = {
    "ViT-B/16": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**{"num_labels": 10}),
    ),
    "RoBERTa-large": (
        transformers.RobertaForTokenClassification,
        transformers.RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1,
        ),
    ),
}  # fmt: skip


def clip_b16() -> Any:
    vision = {"patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision))


def test_the_papers_counts_at_real_shapes() -> None:
    with torch.device("meta"):
        large = REAL["RoBERTa-large"][0](REAL["RoBERTa-large"][1])
    shape = tower_of(large).shape()
    assert (shape.dim, shape.n_layers, shape.n_heads, shape.head_dim) == (1024, 24, 16, 64)
    small = roberta(num_hidden_layers=2)
    adapter = adapt(small, prompt_length=16, prompt_kind="kv")
    # P-tuning v2's Embedding(16, 24 * 2 * 1024), and a gate per head and layer
    per_layer = adapter.prompts[0].numel() // 48 * 1024
    assert per_layer * 24 == 16 * 49152 == 786432
    assert adapter.gates.shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REAL, "CLIP ViT-B/16"])
def test_real_shapes_with_random_weights_give_transformers_own_outputs(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = (clip_b16() if "CLIP" in name else REAL[name][0](REAL[name][1])).eval()
    images = torch.randn(2, 3, 224, 224)
    ids = torch.randint(5, 49000, (2, 77))
    ids[:, -1] = 49407
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0

    def outputs() -> Tensor:
        with torch.no_grad():
            if name == "RoBERTa-large":
                return model(input_ids=ids, attention_mask=mask).logits * mask[..., None]
            if name == "ViT-B/16":
                return model(pixel_values=images).logits
            out = model(pixel_values=images, input_ids=ids)
            return torch.cat([out.image_embeds, out.text_embeds])

    theirs = outputs()
    encoders = (None, "text") if "CLIP" in name else (None,)
    adapters = [adapt(model, encoder=encoder) for encoder in encoders]
    torch.testing.assert_close(outputs(), theirs, rtol=0, atol=1e-5)
    for adapter in adapters:
        nn.init.normal_(adapter.gates, std=1.5)
    changed = outputs()
    assert not torch.allclose(changed, theirs, atol=1e-3)
    model.save_pretrained(tmp_path)
    for encoder in encoders:
        unadapt(model, encoder)
    assert torch.equal(outputs(), theirs)
    for encoder in encoders:
        adapt(model, encoder=encoder, adapter=tmp_path)
    assert torch.equal(outputs(), changed)
