"""An image's name has one place for its number; what it is read as otherwise is told at once."""

from pathlib import Path

import pytest

from llama_adapter.evaluation.data_options import DataOptions, SourceOptions


@pytest.mark.parametrize("name", ["image.jpg", "{}_{}.jpg", "{x}.jpg", "{:q}.jpg", "{.a}.jpg", "{"])
def test_a_name_without_one_place_for_a_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"--image-name must have one place for a number"):
        SourceOptions(Path("data"), image_name=name)


def test_names_by_number() -> None:
    options = DataOptions(Path("data"), image_name="{:03d}.png", output=Path("run"))
    assert options.image_name.format(7) == "007.png"
    assert SourceOptions(Path("data")).image_name.format(42) == "COCO_val2014_000000000042.jpg"
