"""What a run's options name is read once: its data, and the pictures that it is about."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("transformers")

from llama_adapter.checkpoints import Base
from llama_adapter.data.run_data import load_run_data
from llama_adapter.model import Llama
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.vision import ScaleOptions, VisionOptions
from tests.llama_adapter.clip_models import save_clip


@pytest.fixture
def base(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> Base:
    return Base(tiny_model, tiny_tokenizer, "tiny")


def config(tmp_path: Path, items: list[Any], **more: Any) -> FinetuneConfig:
    (tmp_path / "data.json").write_text(json.dumps(items))
    return FinetuneConfig(tmp_path / "data.json", tmp_path / "run", val_size=1, **more)


ITEMS = [{"instruction": f"river {n}", "output": "stone"} for n in range(5)]


def test_text_needs_no_encoder(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    # not even the package that reads one
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "llama_adapter.multimodal.clip", raising=False)
    dataset, pictures = load_run_data(config(tmp_path, ITEMS), base)
    assert pictures is None
    assert (len(dataset.train), len(dataset.held_out)) == (4, 1)
    assert list(dataset.digests) == [str(tmp_path / "data.json")]
    assert not dataset.with_image.any()


def test_every_picture_is_encoded_before_a_run(tmp_path: Path, base: Base) -> None:
    clip, images = save_clip(tmp_path / "clip"), tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (24, 24), (number * 90, 0, 0)).save(images / f"{number}.png")
    items = [item | {"image": f"{n % 4}.png"} for n, item in enumerate(ITEMS)]
    cache = tmp_path / "features"
    run = config(
        tmp_path,
        items,
        vision=VisionOptions(clip, images, cache),
        scales=ScaleOptions((1, 4), vision_normalise=True),
    )
    dataset, pictures = load_run_data(run, base)
    assert pictures is not None
    assert len(list(cache.rglob("*.features"))) == 3
    assert dataset.digests[str(clip)] == pictures.encoder.digest
    assert dataset.digests[f"the images in {images}"] == pictures.content
    assert [problem.index for problem in dataset.problems[str(run.data)]] == [3]
    assert "3.png: no such file" in dataset.problems[str(run.data)][0].reason
    assert dataset.with_image.all()
    features, present = pictures([example.image for example in dataset.train])
    assert features.shape == (3, 48)
    assert present.all()
    assert (features.view(3, 2, 24).norm(dim=-1) - 1).abs().max() < 1e-5
