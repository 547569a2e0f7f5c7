"""Are arguments of `adapt` and `unadapt` that do not fit named in one line, the host untouched?"""

import re
from typing import Any

import pytest
import torch

from llama_adapter.hosts import adapt, unadapt
from tests.llama_adapter.encoder_models import bert, clip


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("layers", "top", "int or Sequence or None of int"),
        ("layers", 2.0, "int or Sequence or None of int"),
        ("layers", [1.5], "int or Sequence or None of int"),
        ("layers", True, "int or Sequence or None of int"),
        ("prompt_length", "3", "int"),
        ("prompt_length", 2.5, "int"),
        ("prompt_std", "wide", "int or float"),
        ("encoder", 1, "str or None"),
        ("shift_positions", "yes", "bool"),
        ("head", 1, "bool"),
        ("generator", 3, "Generator or None"),
        ("adapter", 5, "Adapter or str or Path or None"),
    ],
)
def test_an_argument_of_another_type_is_named(name: str, value: Any, wanted: str) -> None:
    model = bert()
    message = re.escape(f"{name} must be {wanted}, got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        adapt(model, **{name: value})
    assert all(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_a_count_of_layers_outside_the_model_is_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers must be from 1 to 3, got {layers}"):
        adapt(bert(), layers=layers)


def test_a_host_in_float64_is_refused_before_it_is_changed() -> None:
    model = bert().double()
    with pytest.raises(ValueError, match=r"model must be float32, .*, got torch.float64"):
        adapt(model)
    assert all(x.requires_grad for x in model.parameters())


def test_an_adapter_that_exists_is_brought_to_float32() -> None:
    model = bert()
    adapt(model)
    half = unadapt(model).half()
    assert {x.dtype for x in adapt(model, adapter=half).parameters()} == {torch.float32}


def test_unadapt_names_the_encoder_that_has_the_adapter() -> None:
    model = clip()
    adapt(model, encoder="text")
    with pytest.raises(ValueError, match="encoder must be 'text', got None"):
        unadapt(model)
    unadapt(model, "text")
