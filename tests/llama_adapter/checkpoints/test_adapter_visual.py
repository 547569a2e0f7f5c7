"""Does an image change the answers as the official code's and Accessory's formula says?"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import ReadOptions, StoredAdapter
from llama_adapter.checkpoints.adapter_formats import WRITERS, read_any_adapter, write_adapter_as
from llama_adapter.cli import main
from llama_adapter.config import Resampler, VisualConfig
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.vision import Scales, VisionOptions
from tests.llama_adapter.checkpoints.adapter_samples import (
    CLIP_TOKENS,
    CLIP_WIDTH,
    CONFIG,
    accessory_tensors,
    multimodal_tensors,
    norm_tensors,
    random_model,
    random_tokens,
    save,
    see,
    transcribe,
    visual_tensors,
)
from tests.llama_adapter.clip_models import picture, random_clip, save_clip

SHAPED = ReadOptions(base=CONFIG)
SEEN = VisualConfig(
    CLIP_TOKENS * CLIP_WIDTH,
    (),
    "gelu",
    tokens=10,
    scales=Scales((24,), "tokens", True, True),
    resampler=Resampler(CLIP_WIDTH, 32, 2, 16),
)


def official(folder: Path) -> tuple[Path, dict[str, Tensor], str]:
    """A file, its tensors by bare names, and the name of the queries."""
    tensors = multimodal_tensors() | visual_tensors()
    clip = {"clip.visual.proj": torch.randn(4, 4), "clip.logit_scale": torch.ones(())}
    path = save({"model": tensors | clip}, folder / "7b.pth")
    return path, {n.removeprefix("llama."): x for n, x in tensors.items()}, "visual_query.weight"


def accessory(folder: Path) -> tuple[Path, dict[str, Tensor], str]:
    tensors = accessory_tensors() | visual_tensors("llma.", "visual_query")
    (folder / "ac").mkdir()
    save({"model": tensors}, folder / "ac" / "consolidated.00-of-01.model.pth")
    bare = {name.removeprefix("llma."): value for name, value in tensors.items()}
    bare["adapter_query.weight"] = bare["prefix"].flatten(0, 2)
    for row, layer in enumerate((2, 3)):
        bare[f"layers.{layer}.attention.gate"] = bare["prefix_gate"][row].view(1, 4, 1, 1)
    return folder / "ac", bare, "visual_query"


def expected_logits(bare: dict[str, Tensor], seen: list[Tensor | None], tokens: Tensor) -> Tensor:
    """Of sequences with what was seen (P, C) beside each, added row by row in layers 2 and 3."""
    model = random_model()

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        bias = bare.get(f"{name}.bias")
        return x @ weight.T if bias is None else x @ weight.T + bias.double()

    rows = bare["adapter_query.weight"].double().unflatten(0, (2, 10))
    gates = [bare[f"layers.{layer}.attention.gate"].flatten().tanh() for layer in (2, 3)]
    norms, found = {name: bare[name] for name in norm_tensors()}, []
    for row, image in zip(tokens, seen, strict=True):
        added = 0.0 if image is None else image
        prompts = {2 + i: (rows[i] + added, gates[i]) for i in range(2)}
        found.append(transcribe(model, row[None], linear, norms, prompts))
    return torch.cat(found)


@pytest.mark.parametrize("make", [official, accessory])
@torch.no_grad()
def test_logits_equal_the_formula(make, tmp_path: Path) -> None:
    path, bare, queries = make(tmp_path)
    stored = read_any_adapter(path, SHAPED)
    assert stored.header.visual == SEEN
    assert stored.header.groups == ("prompts", "gates", "projector", "bias", "norm")
    assert any("the 257 tokens of a CLIP ViT-L/14" in note for note in stored.notes)
    model, tokens = random_model(), random_tokens()
    images = torch.randn(2, CLIP_TOKENS, CLIP_WIDTH, generator=torch.Generator().manual_seed(4))
    adapter = stored.adapter(CONFIG)
    present = torch.tensor([True, False])
    for shown in (torch.tensor([True, True]), present):
        visual = adapter.visual_tokens(images.flatten(1), shown)
        got = model(tokens, model.project(adapter, visual))
        seen = [see(bare, queries, images[i]) if shown[i] else None for i in range(2)]
        expected = expected_logits(bare, seen, tokens)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    text = expected_logits(bare, [None, None], tokens)
    assert (expected[0] - text[0]).abs().max() > 0.1
    torch.testing.assert_close(model(tokens, model.project(adapter)), text, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_picture_goes_from_its_file_to_the_logits(tmp_path: Path) -> None:
    """By a CLIP of 24 layers and 257 tokens in transformers' own format, as ViT-L/14 is."""
    path, bare, queries = official(tmp_path)
    stored = read_any_adapter(path, SHAPED)
    shape = {"image_size": 32, "patch_size": 2, "num_hidden_layers": 24, "projection_dim": 12}
    clip = save_clip(tmp_path / "clip", **shape)
    pictures = Pictures.load(
        VisionOptions(vision_model=clip, feature_cache=tmp_path / "kept"), visual=SEEN
    )
    image = picture(tmp_path / "a.png")
    features, present = pictures([image, None])
    theirs, pixels = random_clip(**shape), pictures.encoder.pixels([image])
    states = theirs.vision_model(pixels).last_hidden_state
    tokens = theirs.visual_projection(theirs.vision_model.post_layernorm(states))[0]
    assert tokens.shape == (CLIP_TOKENS, CLIP_WIDTH)
    model, ids, adapter = random_model(), random_tokens(), stored.adapter(CONFIG)
    got = model(ids, model.project(adapter, adapter.visual_tokens(features, present)))
    expected = expected_logits(bare, [see(bare, queries, tokens), None], ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def same(first: StoredAdapter, second: StoredAdapter) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(first.tensors[name], value) for name, value in second.tensors.items()
    )


def test_it_is_kept_in_our_file_and_left_out_where_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, _ = official(tmp_path)
    stored = read_any_adapter(path, SHAPED)
    own = tmp_path / "own.safetensors"
    write_adapter_as(own, stored, "llama-adapter")
    again = read_any_adapter(own)
    assert again.header.visual == SEEN
    assert same(stored, again)
    assert main(["info", str(own)]) == 0
    out = capsys.readouterr().out
    assert (
        "images      3084 features; 10 queries of 257 tokens, through 2 blocks of width 32" in out
    )
    assert "scales      tokens of layers 24, post_norm, project" in out
    for name in WRITERS:
        if name != "llama-adapter":
            with pytest.raises(ValueError, match=f"{name} holds no projector of images"):
                write_adapter_as(tmp_path / "other", stored, name)
    text = read_any_adapter(path, ReadOptions(base=CONFIG, leave_out=["visual"]))
    plain = read_any_adapter(save({"model": multimodal_tensors()}, tmp_path / "a.pth"), SHAPED)
    assert text.header.visual is None
    assert same(text, plain)
    assert any("left out: 33 visual tensors" in note for note in text.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual_query.weight": None}, "lacks tensor visual_query.weight"),
        ({"visual_query.weight": torch.randn(9, 32)}, r"must have shape \(10, visual_width\)"),
        ({"clip_proj.bias": None}, "lacks tensor clip_proj.bias"),
        ({"visual_blocks.1.mlp.fc2.bias": None}, "lacks tensor visual_blocks.1.mlp.fc2.bias"),
        ({"visual_blocks.1.mlp.fc1.weight": torch.randn(64, 32)}, r"shape \(128, 32\), got \(64"),
        ({"visual_proj.weight": torch.randn(48, 32)}, r"must have shape \(32, 32\), got \(48"),
        ({"visual_blocks.2.norm3.weight": torch.ones(32)}, "visual_blocks.2.attn.qkv.weight"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = multimodal_tensors() | visual_tensors() | change
    content = {"model": {name: value for name, value in tensors.items() if value is not None}}
    path = save(content, tmp_path / "7b.pth")
    with pytest.raises(
        ValueError, match=f"{message}.*--leave-out visual reads the text part alone"
    ):
        read_any_adapter(path, SHAPED)


def test_a_width_that_16_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    tensors = multimodal_tensors() | {"visual_query.weight": torch.randn(10, 24)}
    tensors |= {"clip_proj.weight": torch.randn(24, 12), "clip_proj.bias": torch.randn(24)}
    tensors |= {"clip_proj_norm.weight": torch.ones(24), "clip_proj_norm.bias": torch.ones(24)}
    path = save({"model": tensors}, tmp_path / "7b.pth")
    with pytest.raises(ValueError, match="visual_blocks of 16 heads, got 0 of width 24"):
        read_any_adapter(path, SHAPED)
