"""Features are what transformers' encoder computes, layer by layer, of whatever is an image."""

from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from transformers import CLIPImageProcessor

from llama_adapter.multimodal.clip import ClipFeatures
from llama_adapter.multimodal.features import FeatureCache
from llama_adapter.vision import Scales
from tests.llama_adapter.clip_models import SHAPE, picture, random_clip, save_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    "scales",
    [
        Scales((2, 4)),
        Scales((1, 3, 4), pool="mean", normalise=True),
        Scales((2, 4), post_norm=True, project=True),
        Scales((4, 2), pool="tokens", post_norm=True, project=True),
        Scales((3,), pool="tokens", normalise=True),
    ],
)
@torch.no_grad()
def test_features_are_the_encoders_layer_by_layer(folder: Path, scales: Scales) -> None:
    features = ClipFeatures.load(folder, scales)
    pixels = torch.randn(3, 3, 24, 24)
    got = features(pixels)
    assert got.shape == (3, features.width)
    model = random_clip()
    vision = model.vision_model
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    found = []
    for number, layer in enumerate(vision.encoder.layers, 1):
        out = layer(x, attention_mask=None)
        x = out[0] if isinstance(out, tuple) else out
        if number not in scales.layers:
            continue
        one = {"cls": x[:, 0], "mean": x[:, 1:].mean(1), "tokens": x}[scales.pool]
        if scales.project:
            one = model.visual_projection(vision.post_layernorm(one))
        one = one / one.norm(dim=-1, keepdim=True) if scales.normalise else one
        # the class token's first, then the patches', each side by side
        found.append((number, one.flatten(1)))
    order = [dict(found)[number] for number in scales.layers]
    torch.testing.assert_close(got, torch.cat(order, -1), rtol=0, atol=1e-5)
    # the last scale of what CLIP itself calls an image's embedding
    if scales.project and scales.pool == "cls":
        width = SHAPE["projection_dim"]
        torch.testing.assert_close(got[:, -width:], model(pixels).image_embeds, rtol=0, atol=1e-5)


def test_a_cache_holds_them(folder: Path, tmp_path: Path) -> None:
    features = ClipFeatures.load(folder, Scales((2, 4)))
    paths = [picture(tmp_path / f"{size}.png", size=(size, 33)) for size in (25, 40, 31)]
    cache = FeatureCache(tmp_path / "cache", features, batch_size=2)
    expected = features(features.pixels(paths))
    torch.testing.assert_close(cache(paths), expected, rtol=0, atol=1e-5)
    assert torch.equal(cache(paths[::-1]), cache(paths).flip(0))
    digests = {features.digest}
    digests.add(ClipFeatures.load(folder, Scales((2, 4))).digest)
    assert len(digests) == 1
    digests.add(ClipFeatures.load(folder, Scales((1, 4))).digest)
    changed = random_clip()
    with torch.no_grad():
        changed.visual_projection.weight[3, 2] += 1
    processor = CLIPImageProcessor.from_pretrained(folder)
    digests.add(ClipFeatures(changed, processor, Scales((2, 4))).digest)
    digests.add(ClipFeatures(random_clip(), CLIPImageProcessor(), Scales((2, 4))).digest)
    assert len(digests) == 4


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_any_image_is_read_as_rgb(mode: str, folder: Path, tmp_path: Path) -> None:
    features = ClipFeatures.load(folder, Scales((4,)))
    path = picture(tmp_path / "a.png", mode)
    pixels = features.pixels([path, Image.open(path)])
    assert pixels.shape == (2, 3, 24, 24)
    assert torch.equal(pixels[0], pixels[1])
    # red first: a picture of red alone is bright in the first channel
    red = features.pixels([Image.new("RGB", (30, 30), (255, 0, 0))])[0].mean((1, 2))
    assert red[0] > red[1]
    assert features(pixels).shape == (2, 24)


def test_what_is_no_image_or_no_encoder_is_named(folder: Path, tmp_path: Path) -> None:
    features = ClipFeatures.load(folder, Scales((4,)))
    text = tmp_path / "a.png"
    text.write_text("not an image")
    with pytest.raises(ValueError, match=f"{text}: no image that can be read"):
        features.pixels([text])
    torn = picture(tmp_path / "b.png")
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{torn}: no image that can be read"):
        features.pixels([torn])
    with pytest.raises(FileNotFoundError, match=r"c\.png: no such file"):
        features.pixels([tmp_path / "c.png"])
    with pytest.raises(FileNotFoundError, match="no such folder, of a CLIP"):
        ClipFeatures.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="layers must be at most the encoder's 4, got"):
        ClipFeatures.load(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": ()}, "layers must be numbers from 1"),
        ({"layers": (0, 2)}, "layers must be numbers from 1"),
        ({"pool": "max"}, "pool must be one of"),
        ({"project": True}, "project needs post_norm"),
    ],
)
def test_what_is_no_choice_of_scales_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scales(**given)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["B/16", "L/14"])
def test_the_published_shapes_run(size: str) -> None:
    """Random weights; ViT-B/16 gives the papers' 6 x 768, L/14 the same through its projection."""
    large = size == "L/14"
    model = random_clip(
        hidden_size=1024 if large else 768,
        intermediate_size=4096 if large else 3072,
        num_hidden_layers=24 if large else 12,
        num_attention_heads=16 if large else 12,
        image_size=224,
        patch_size=14 if large else 16,
        projection_dim=768 if large else 512,
    )
    scales = Scales((4, 8, 12, 16, 20, 24), post_norm=True, project=True) if large else Scales()
    features = ClipFeatures(model, CLIPImageProcessor(), scales)
    pixels = features.pixels([Image.new("RGB", (300, 200), (9, 90, 200))])
    assert pixels.shape == (1, 3, 224, 224)
    assert features(pixels).shape == (1, 6 * 768) == (1, features.width)
