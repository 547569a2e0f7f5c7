"""Options of images become what the encoder is told, and nonsense is refused."""

import argparse

import pytest

from llama_adapter.options import UsageError, add_options, build
from llama_adapter.vision import ScaleOptions, Scales


def test_options_are_the_scales() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ScaleOptions)
    assert build(ScaleOptions, vars(parser.parse_args([]))).scales == Scales()
    words = ["--vision-layers", "1", "3", "--vision-pool", "mean", "--vision-post-norm"]
    words += ["--vision-project", "--vision-normalise"]
    given = vars(parser.parse_args(words))
    wanted = Scales((1, 3), "mean", post_norm=True, project=True, normalise=True)
    assert build(ScaleOptions, given).scales == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vision_layers": []}, "layers must be numbers from 1, at least one"),
        ({"vision_layers": [0]}, "layers must be numbers from 1"),
        ({"vision_pool": "max"}, "pool must be one of"),
        ({"vision_project": True}, "project needs post_norm"),
    ],
)
def test_scales_that_mean_nothing_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(ScaleOptions, given)
