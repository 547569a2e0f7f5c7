"""Options are refused by name, and learning rates are those of the formulas."""

import math
from typing import Any

import pytest

from llama_adapter.host_training.fit_config import FitConfig, learning_rates


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be from 0 to 1e[+]30, got -1.0"),
        ({"lr": math.nan}, "lr must be from 0 to 1e[+]30, got nan"),
        ({"optimizer": "lion"}, "optimizer must be one of .*, got 'lion'"),
        ({"warmup_epochs": 31.0}, "warmup_epochs must be from 0 to epochs = 30, got 31.0"),
        ({"momentum": 1.0}, "betas and momentum must be from 0 to below 1"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FitConfig(**wrong)


def test_a_cosine_after_a_rising_line() -> None:
    config = FitConfig(epochs=10, lr=0.2, head_lr=0.4, warmup_epochs=2.0)
    assert learning_rates(config, 0.0) == (0.0, 0.0)
    assert learning_rates(config, 0.5) == pytest.approx((0.05, 0.1), rel=1e-12)
    assert learning_rates(config, 2.0) == pytest.approx((0.2, 0.4), rel=1e-12)
    expected = 0.2 * (1 + math.cos(math.pi * 3 / 8)) / 2
    assert learning_rates(config, 5.0) == pytest.approx((expected, 2 * expected), rel=1e-12)
    assert learning_rates(config, 10.0) == pytest.approx((0.0, 0.0), abs=1e-15)


def test_other_schedules_and_a_held_warm_up() -> None:
    linear = FitConfig(epochs=4, lr=0.2, schedule="linear")
    assert learning_rates(linear, 1.0) == pytest.approx((0.15, 0.15), rel=1e-12)
    held = FitConfig(epochs=4, lr=0.2, schedule="constant", warmup_epochs=1.0, warmup_lr=1e-5)
    assert learning_rates(held, 0.9) == (1e-5, 1e-5)
    assert learning_rates(held, 3.9) == (0.2, 0.2)
