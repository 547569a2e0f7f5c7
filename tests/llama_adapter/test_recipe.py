"""The recipe's numbers are the papers', and a value that makes no sense is named."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.config import VisualConfig
from llama_adapter.data.feed import ORDERS
from llama_adapter.recipe import JOINT, FinetuneConfig, FusionOptions, learning_rate
from llama_adapter.vision import VisionOptions

PAPERS = FinetuneConfig(data=Path("a.json"), output=Path("run"))


def test_the_defaults_are_the_papers_recipe() -> None:
    assert (PAPERS.epochs, PAPERS.warmup, PAPERS.batch_size) == (5, 2.0, 64)
    assert (PAPERS.weight_decay, PAPERS.betas, PAPERS.min_lr) == (0.02, (0.9, 0.95), 0.0)
    assert (PAPERS.max_length, PAPERS.clip, PAPERS.adapter.prompt_length) == (512, None, 10)
    assert len(PAPERS.adapter.layers_of(32)) == 30


def test_the_warm_up_keeps_its_share_of_other_numbers_of_epochs() -> None:
    assert (replace(PAPERS, epochs=1).warmup, replace(PAPERS, epochs=10).warmup) == (0.4, 4.0)
    assert math.isclose(learning_rate(replace(PAPERS, epochs=1), 0.2), 2.25e-3 / 2)
    assert replace(PAPERS, epochs=10, warmup_epochs=1.0).warmup == 1.0


def test_the_learning_rate_scales_with_the_effective_batch() -> None:
    assert PAPERS.peak_lr == 9e-3 * 64 / 256 == 2.25e-3
    assert replace(PAPERS, batch_size=32).peak_lr == 1.125e-3
    assert replace(PAPERS, micro_batch_tokens=64).peak_lr == 2.25e-3
    assert replace(PAPERS, lr=0.1).peak_lr == 0.1


def test_joint_orders_are_those_that_there_are() -> None:
    assert ("off", *ORDERS) == JOINT


def test_early_fusion_has_the_papers_numbers() -> None:
    assert VisualConfig(9, **FusionOptions().shape) == VisualConfig(9)
    early = VisualConfig(9, **FusionOptions("early").shape)
    assert (early.fusion, early.tokens, early.layers) == ("early", 20, 1)
    other = FusionOptions("early", 3, 2, (7, 5)).shape
    assert VisualConfig(9, **other) == VisualConfig(9, (7, 5), fusion="early", tokens=3, layers=2)
    for wrong in (("early", 0), ("early", 3, 0), ("late", None, 1), ("deep",)):
        with pytest.raises(ValueError, match="must be"):
            FusionOptions(*wrong)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 1 and"):
        FusionOptions(projector_hidden=(64, 0))


def test_paths_become_those_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vision = VisionOptions(Path("clip"), Path("/pictures"))
    found = replace(PAPERS, base=Path("base"), vision=vision).absolute()
    assert (found.data, found.base) == (tmp_path / "a.json", tmp_path / "base")
    assert (found.val_data, found.token_cache, found.output) == (None, None, Path("run"))
    assert found.vision == VisionOptions(tmp_path / "clip", Path("/pictures"))


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0.0, 0.0),
        (0.5, 2.25e-3 / 4),
        (1.0, 2.25e-3 / 2),
        (1.99, 2.25e-3 * 0.995),
        (2.0, 2.25e-3),
        # a quarter, half and three quarters of the cosine: (1 + cos 45, 90, 135 degrees) / 2
        (2.75, 2.25e-3 * 0.8535533905932737),
        (3.5, 2.25e-3 * 0.5),
        (4.25, 2.25e-3 * 0.14644660940672624),
        (5.0, 0.0),
    ],
)
def test_schedule_of_the_papers(epoch: float, expected: float) -> None:
    assert math.isclose(learning_rate(PAPERS, epoch), expected, rel_tol=1e-12, abs_tol=1e-18)


def test_schedule_with_a_lower_limit_and_without_warmup_or_cosine() -> None:
    limited = replace(PAPERS, lr=0.1, min_lr=0.02)
    assert math.isclose(learning_rate(limited, 1.0), 0.05)
    assert math.isclose(learning_rate(limited, 3.5), 0.06)
    assert math.isclose(learning_rate(limited, 5.0), 0.02)
    assert learning_rate(replace(PAPERS, lr=0.1, warmup_epochs=0.0), 0.0) == 0.1
    assert math.isclose(learning_rate(replace(PAPERS, lr=0.1, warmup_epochs=5.0), 4.5), 0.09)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1, got 0"),
        (
            {"quantize": "int4"},
            "quantize must be one of ('int8', 'nf4', 'fp8') to train, got 'int4'",
        ),
        (
            {"joint": "both"},
            "joint must be one of ('off', 'alternate', 'proportional', 'concat'), got 'both'",
        ),
        ({"joint": "concat"}, "images and vision_model must be given for joint = concat"),
        (
            {"vision": VisionOptions(images=Path("a"))},
            "images and vision_model must be given together, got images = a",
        ),
        (
            {"vision": VisionOptions(vision_model=Path("a"))},
            "images and vision_model must be given together, got vision_model = a",
        ),
        ({"recompute": "all"}, "recompute must be one of ('mlp', 'block'), got 'all'"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"lr": -0.1}, "lr must be from 0 to 1e+30, got -0.1"),
        ({"base_lr": math.nan}, "base_lr must be from 0 to 1e+30, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be from 0 to 1e+30, got inf"),
        ({"val_size": -1}, "val_size must be from 0 to 1e+30, got -1"),
        ({"val_fraction": 1.0}, "val_fraction must be from 0 to below 1, got 1.0"),
        (
            {"epochs": 1, "warmup_epochs": 2.0},
            "warmup_epochs must be from 0 to epochs = 1, got 2.0",
        ),
        ({"betas": (0.9, 1.0)}, "betas must be from 0 to below 1, got (0.9, 1.0)"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"threads": 0}, "threads must be from 1 to 1024, got 0"),
        ({"max_steps": 0}, "max_steps must be positive, got 0"),
        (
            {"val_data": Path("v.json"), "val_size": 3},
            "val_size must be left out where val_data is given",
        ),
        (
            {"dtype": "float64"},
            "dtype must be one of ('float32', 'bfloat16', 'float16'), got 'float64'",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        replace(PAPERS, **changes)
    assert str(caught.value) == message
