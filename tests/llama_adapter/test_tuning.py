"""Which groups go with what, how many numbers they are, and what the command line says of them."""

import re
from typing import Any

import pytest
import torch

from llama_adapter.adapter import Adapter
from llama_adapter.config import PRESETS, AdapterConfig, shape_of
from llama_adapter.tuning import (
    GROUPS,
    LAYER_LINEARS,
    LINEARS,
    Lora,
    Tuning,
    TuningOptions,
    tuned_group,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("scale", "bias"), ("wq",), "input"), "groups must be some of"),
        ((("bias",), ("wk", "wq")), "linears must be some of"),
        ((("bias",), ()), "linears must be named for a bias or a scale"),
        ((("norm",), ("wq",)), "linears must be named for a bias or a scale"),
        ((("scale",), ("wq",)), r"scale_side must be one of \('input', 'output'\)"),
        ((("bias",), ("wq",), "input"), r"scale_side must be one of \(None,\)"),
        ((("lora",),), "lora must go with the group lora, got None"),
        ((("norm",), (), None, Lora(2)), "lora must go with the group lora, got Lora"),
    ],
)
def test_a_tuning_that_makes_no_sense_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tuning(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "lora rank must be from 1 to 65536, got 0"),
        ((2, ()), "lora linears must be some of"),
        ((2, ("wk", "wq")), "lora linears must be some of"),
        ((2, ("wx",)), "lora linears must be some of"),
    ],
)
def test_lora_of_nothing_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(*arguments)


@pytest.mark.parametrize(
    ("preset", "tuning", "count"),
    [
        ("llama-7b", Tuning(("lora",), (), None, Lora(16)), 39_976_960),
        ("llama-7b", Tuning(("bias", "scale", "norm"), LAYER_LINEARS, "output"), 2_985_984),
        ("llama-65b", Tuning(("bias", "scale", "norm"), LAYER_LINEARS, "output"), 14_917_632),
        ("llama-65b", Tuning(("bias", "scale", "norm"), LAYER_LINEARS, "input"), 13_811_712),
    ],
    ids=["lora", "7b", "65b output", "65b input, the 14 M"],
)
def test_their_numbers_are_the_papers(preset: str, tuning: Tuning, count: int) -> None:
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(), PRESETS[preset], layers=(), tuning=tuning)
    assert sum(p.numel() for p in adapter.tuned_parameters().values()) == count
    shapes = tuning.shapes(shape_of(PRESETS[preset]))
    assert {n: tuple(p.shape) for n, p in adapter.tuned_parameters().items()} == shapes
    assert {tuned_group(name) for name in shapes} == set(tuning.groups)


def test_lora_begins_as_nothing_with_a_random_half() -> None:
    tuning = Tuning(("lora",), (), None, Lora(3, LINEARS))
    config = PRESETS["llama-7b"]
    small = type(config)(dim=48, n_layers=2, n_heads=6, vocab_size=40, multiple_of=8)
    first, second = (
        Adapter(
            AdapterConfig(), small, layers=(), tuning=tuning,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1)
    )  # fmt: skip
    for name, value in first.tuned_parameters().items():
        assert torch.equal(value, second.tuned_parameters()[name])
        bound = value.shape[-1] ** -0.5
        if name.startswith("lora_a_"):
            assert 0.8 * bound < float(value.detach().abs().max()) <= bound, name
        else:
            assert not value.any()


def test_options_are_the_papers_unless_told() -> None:
    assert TuningOptions().tuning == Tuning()
    everything = TuningOptions(("norm", "lora", "scale", "bias")).tuning
    assert everything == Tuning(GROUPS, LAYER_LINEARS, "output", Lora(16))
    told = TuningOptions(("scale", "lora"), scale_side="input", lora_rank=4).tuning
    assert told == Tuning(("scale", "lora"), LAYER_LINEARS, "input", Lora(4))
    assert TuningOptions(("lora",)).tuning == Tuning(("lora",), (), None, Lora(16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("gates",),), "tune must be some of ('bias', 'scale', 'norm', 'lora'), each once"),
        ((("bias", "bias"),), "each once, got ('bias', 'bias')"),
        ((("bias",), "output"), "scale_side must be left out without tune scale, got 'output'"),
        ((("bias",), None, 4), "lora_rank must be left out without tune lora, got 4"),
        ((("scale",), "left"), "scale_side must be one of ('input', 'output'), got 'left'"),
        ((("lora",), None, 0), "lora rank must be from 1 to 65536, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TuningOptions(*arguments)
