"""Images are found below their root, are features of the adapter's own encoder, or are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

pytest.importorskip("transformers")

from transformers.utils import logging

from llama_adapter.config import VisualConfig
from llama_adapter.multimodal.clip import ClipFeatures
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.vision import Scales, VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip

SCALES = Scales((2, 4))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two pictures, one of them in a folder, and a text."""
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    picture(folder / "a.png")
    picture(folder / "train" / "b.png", size=(25, 33))
    (folder / "text.png").write_text("no image")
    picture(tmp_path / "outside.png")
    return folder


def options(clip: Path, root: Path | None) -> VisionOptions:
    cache = clip.parent / "features"
    return VisionOptions(vision_model=clip, images=root, feature_cache=cache)


def test_features_of_paths_some_of_which_are_absent(clip: Path, root: Path) -> None:
    pictures = Pictures.load(options(clip, root), SCALES)
    features, present = pictures(["train/b.png", None, "a.png", root / "a.png"])
    assert present.tolist() == [True, False, True, True]
    encoder = ClipFeatures.load(clip, SCALES)
    expected = encoder(encoder.pixels([root / "train" / "b.png", root / "a.png"]))
    torch.testing.assert_close(features[[0, 2]], expected, rtol=0, atol=1e-5)
    assert torch.equal(features[2], features[3])
    assert not features[1].any()
    features, present = pictures([None, None])
    assert features.shape == (2, 48)
    assert not features.any()
    assert present.tolist() == [False, False]
    # without a root a path is what it says
    assert torch.equal(
        Pictures.load(options(clip, None), SCALES)([root / "a.png"])[0][0],
        pictures(["a.png"])[0][0],
    )


def test_what_cannot_be_used_is_named(clip: Path, root: Path) -> None:
    pictures = Pictures.load(options(clip, root), SCALES)
    asked = ["a.png", "../outside.png", "text.png", "train", "absent.png", "a.png", "x\0.png"]
    found = pictures.unusable(asked)
    assert list(found) == ["../outside.png", "text.png", "train", "absent.png", "x\0.png"]
    assert f"image '../outside.png' must lie in {root}, got " in found["../outside.png"]
    assert f"{root}/text.png: no image that can be read" in found["text.png"]
    assert found["absent.png"] == f"image {root}/absent.png: no such file"
    for image in asked[1:5]:
        with pytest.raises((ValueError, FileNotFoundError), match=Path(image).name):
            pictures([None, image])
    assert pictures.path("train/../a.png") == root / "a.png"
    with pytest.raises(ValueError, match=r"must lie in"):
        pictures.path(root.parent / "outside.png")
    with pytest.raises(NotADirectoryError, match="absent: no such folder, of images"):
        Pictures.load(options(clip, root / "absent"), SCALES)
    with pytest.raises(ValueError, match="images need --vision-model"):
        Pictures.load(VisionOptions(images=root))


def test_an_adapter_takes_its_own_encoder_alone(clip: Path, root: Path, tmp_path: Path) -> None:
    pictures = Pictures.load(options(clip, root), SCALES)
    visual = pictures.visual_config(hidden=(7,), activation="gelu")
    digest = pictures.encoder.digest
    assert visual == VisualConfig(48, (7,), "gelu", digest, scales=SCALES)
    # the scales come from the adapter
    again = Pictures.load(options(clip, root), visual=visual)
    assert torch.equal(again(["a.png"])[0], pictures(["a.png"])[0])
    other = save_clip(tmp_path / "other", seed=4)
    with pytest.raises(ValueError, match=f"{other} must be the encoder .* digest {digest}, got"):
        Pictures.load(options(other, root), visual=visual)
    with pytest.raises(ValueError, match="must take features of a CLIP, got one that takes 48"):
        Pictures.load(options(clip, root), visual=VisualConfig(48))
    pictures.check(VisualConfig(48))
    with pytest.raises(ValueError, match="must give 47 features, as the adapter takes, got 48"):
        pictures.check(VisualConfig(47))


def test_a_bar_is_shown_where_it_is_asked_for(
    clip: Path, root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(**options: Any) -> Any:
        return tqdm(**options | {"delay": 0})

    assert logging.is_progress_bar_enabled()
    for shown in (True, False):
        pictures = Pictures.load(options(clip, root), SCALES, progress=shown)
        # the encoder's own is none of ours
        assert capfd.readouterr().err == ""
        # nor is one of what takes no second
        pictures.unusable(["a.png"])
        assert capfd.readouterr().err == ""
        with monkeypatch.context() as patched:
            patched.setattr("llama_adapter.multimodal.pictures.tqdm", at_once)
            pictures.unusable(["a.png", "train/b.png"])
        said = capfd.readouterr().err.strip()
        assert said.startswith("images: ") if shown else not said
    assert logging.is_progress_bar_enabled()
