"""Cached features are those of the encoder, whatever changes, breaks or is shared."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_adapter.multimodal.features import FeatureCache, digest_of


class Bytes:
    """Features that are a file's first bytes; it counts what it is asked for."""

    width = 5

    def __init__(self, digest: str = "first") -> None:
        self.digest, self.asked = digest, 0

    def pixels(self, images: Sequence[str | Path]) -> Tensor:
        self.asked += len(images)
        rows = [np.frombuffer(Path(one).read_bytes()[: self.width], np.uint8) for one in images]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels * (2 if self.digest == "first" else 3)).bfloat16()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Seven files, of which two have one content."""
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([min(number, 5), 1, 2, 3, 4, 9]))
    return paths


def expected(images: Sequence[Path], factor: int = 2) -> Tensor:
    return torch.stack([torch.tensor([*one.read_bytes()[:5]]).float() * factor for one in images])


def test_an_image_is_encoded_once(images: list[Path], tmp_path: Path) -> None:
    encoder = Bytes()
    cache = FeatureCache(tmp_path / "cache", encoder, batch_size=4)
    assert torch.equal(cache(images), expected(images))
    assert encoder.asked == 6
    order = [images[index] for index in (3, 0, 3, 6)]
    again = FeatureCache(tmp_path / "cache", encoder)
    got = again(order)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected(order))
    assert encoder.asked == 6
    assert again([]).shape == (0, 5)
    # under another name it is the same image, and with another content another
    images[0].rename(tmp_path / "renamed.png")
    images[1].write_bytes(b"other image")
    assert torch.equal(again([tmp_path / "renamed.png"]), torch.tensor([[0.0, 2, 4, 6, 8]]))
    assert encoder.asked == 6
    assert torch.equal(again([images[1]]), expected([images[1]]).bfloat16().float())
    assert encoder.asked == 7


def test_another_encoder_has_features_of_its_own(images: list[Path], tmp_path: Path) -> None:
    FeatureCache(tmp_path, Bytes())(images)
    got = FeatureCache(tmp_path, Bytes("second"))(images)
    assert torch.equal(got, expected(images, 3))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04junk", b"no features at all"])
def test_what_is_damaged_is_made_anew(damage: bytes, images: list[Path], tmp_path: Path) -> None:
    encoder = Bytes()
    cache = FeatureCache(tmp_path / "cache", encoder)
    cache(images)
    files = sorted(cache.folder.rglob("*.features"))
    assert len(files) == 6
    whole = files[4].read_bytes()
    files[2].write_bytes(damage)
    # a bit of a number, numbers of zero as after a power failure, and one number too many
    files[3].write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    files[4].write_bytes(whole[:-20] + bytes(20))
    files[5].write_bytes(whole + bytes(4))
    assert torch.equal(cache(images), expected(images))
    assert encoder.asked == 10
    assert torch.equal(cache(images), expected(images))
    assert encoder.asked == 10


def test_features_that_are_no_numbers_are_not_kept(images: list[Path], tmp_path: Path) -> None:
    class Odd(Bytes):
        def __call__(self, pixels: Tensor) -> Tensor:
            return super().__call__(pixels).masked_fill(pixels == 3, torch.nan)

    cache = FeatureCache(tmp_path / "cache", Odd())
    with pytest.raises(ValueError, match=r"\.png: its features must be finite numbers"):
        cache(images)
    assert not list(cache.folder.rglob("*.features"))


def test_a_folder_that_cannot_be_made_is_no_fault_of_an_image(
    images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"features cannot be cached in .*--feature-cache") as raised:
        FeatureCache(tmp_path / "file", Bytes())(images)
    assert type(raised.value) is OSError


def test_a_file_that_is_not_there_is_named(images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.png: no such file"):
        FeatureCache(tmp_path, Bytes())([images[0], tmp_path / "absent.png"])


def test_files_that_are_known_are_not_read_again(images: list[Path], tmp_path: Path) -> None:
    encoder = Bytes()
    cache = FeatureCache(tmp_path / "cache", encoder)
    right = cache(images, know=True)
    content = cache.known
    held = images[3].read_bytes()
    images[3].write_bytes(b"other image")
    assert torch.equal(cache(images), right)
    assert cache.known == content
    # its content has other features, which are not kept as those of the first
    for path in cache.folder.rglob("*.features"):
        path.unlink()
    with pytest.raises(ValueError, match=r"3\.png: was changed while it was in use"):
        cache(images)
    again = FeatureCache(tmp_path / "cache", encoder)
    again(images, know=True)
    assert again.known != content
    images[3].write_bytes(held)
    assert torch.equal(cache(images), right)
    # whoever knows nothing reads everything
    other = FeatureCache(tmp_path / "cache", encoder)
    other(images)
    assert other.known == FeatureCache(tmp_path, encoder).known != content


def test_a_digest_is_of_all_that_decides() -> None:
    weights = [torch.randn(3, 4), torch.randn(2).bfloat16()]
    first = digest_of(weights, "scales")
    assert digest_of([x.clone() for x in weights], "scales") == first
    changed = weights[1].clone()
    changed[1] += 1
    others = {digest_of(weights, "others"), digest_of([weights[0], changed], "scales")}
    assert len(others | {first}) == 3
