"""Features are what transformers' encoder computes, layer by layer, of whatever is an image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers import CLIPImageProcessor, CLIPVisionModel

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
    # a projection that is not applied decides nothing
    digests.add(ClipFeatures(changed, processor, Scales((2, 4))).digest)
    assert len(digests) == 2
    projected = Scales((2, 4), post_norm=True, project=True)
    digests.add(ClipFeatures.load(folder, projected).digest)
    digests.add(ClipFeatures(changed, processor, projected).digest)
    digests.add(ClipFeatures(random_clip(), CLIPImageProcessor(), Scales((2, 4))).digest)
    assert len(digests) == 5


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 2}, {"hidden_act": "gelu"}, {"layer_norm_eps": 0.1}]
)
def test_what_no_weight_tells_is_another_encoder(
    change: dict, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | change))
    a, b = (ClipFeatures.load(one, Scales((2, 4))) for one in (folder, other))
    assert a.digest != b.digest
    pixels = torch.randn(2, 3, 24, 24)
    assert not torch.equal(a(pixels), b(pixels))


def test_the_visual_half_alone_is_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    half = CLIPVisionModel.from_pretrained(folder)
    half.save_pretrained(tmp_path / "half")
    CLIPImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "half")
    whole, alone = (ClipFeatures.load(one, Scales((2, 4))) for one in (folder, tmp_path / "half"))
    assert whole.digest == alone.digest
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(whole(pixels), alone(pixels))
    with pytest.raises(ValueError, match="lacks 1 weights of its CLIP, as visual_projection"):
        ClipFeatures.load(tmp_path / "half", Scales((2,), post_norm=True, project=True))


def test_a_damaged_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "model.safetensors"
    tensors = load_file(file)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            ClipFeatures.load(other, Scales((2,)))

    save_file({n: x for n, x in tensors.items() if n != name}, file, {"format": "pt"})
    refused(r"other lacks 1 weights of its CLIP, as .*layers\.1\.mlp\.fc1\.weight")
    save_file(tensors | {name: tensors[name] * torch.nan}, file, {"format": "pt"})
    refused("other: weights must be finite")
    save_file(tensors, file, {"format": "pt"})
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused("other holds no CLIP that can be read")
    file.write_bytes(whole)
    (other / "config.json").write_text("[]")
    refused("other holds no CLIP that can be read")
    (other / "config.json").unlink()
    refused("other holds no CLIP that can be read")


def test_sixteen_bits_of_grey_are_scaled_and_other_numbers_refused(
    folder: Path, tmp_path: Path
) -> None:
    features = ClipFeatures.load(folder, Scales((2,)))
    grey = np.linspace(0, 65535, 1600).reshape(40, 40)
    deep, plain = tmp_path / "deep.png", tmp_path / "plain.png"
    Image.fromarray(grey.astype(np.uint16)).save(deep)
    Image.fromarray((grey / 257).round().astype(np.uint8)).save(plain)
    # within one step of 255, where both are rounded
    one = features.pixels([deep]) - features.pixels([plain])
    assert float(one.abs().max()) < 1.1 / 255 / min(features._processor.image_std)
    for kind in (np.float32, np.int32):
        Image.fromarray(grey.astype(kind)).save(tmp_path / "odd.tiff")
        with pytest.raises(ValueError, match=r"odd\.tiff: must have 8 or 16 bits a channel"):
            features.pixels([tmp_path / "odd.tiff"])


def test_a_thread_of_an_image_is_refused(folder: Path, tmp_path: Path) -> None:
    features = ClipFeatures.load(folder, Scales((2,)))
    assert features.pixels([picture(tmp_path / "a.png", size=(2, 200))]).shape == (1, 3, 24, 24)
    Image.new("L", (1, 40_000)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: one side must be at most 100 times the other"):
        features.pixels([tmp_path / "b.png"])


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
