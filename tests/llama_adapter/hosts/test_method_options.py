"""Are the methods' options refused where they say nothing, and options of a command as they are?"""

import argparse
from typing import Any

import pytest

from llama_adapter.hosts.method_options import MethodOptions
from llama_adapter.options import add_options, build


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"prompt_length": 0}, "prompt_length must be at least 1, got 0"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"side_layers": 0}, "side_layers must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"prefix_dropout": 1.0}, r"prefix_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"template_length": -1}, "template_length must be at least 0, got -1"),
        ({"encoders": ("vision",)}, "encoders must be of visual, text, got 'vision'"),
    ],
)
def test_nonsense_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MethodOptions(**given)


def test_a_command_can_have_them() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, MethodOptions)
    words = ["--encoders", "visual", "text", "--rank", "4", "--shift-positions", "--layers", "2"]
    made = build(MethodOptions, vars(parser.parse_args(words)))
    assert made == MethodOptions(
        encoders=("visual", "text"), rank=4, shift_positions=True, layers=2
    )
