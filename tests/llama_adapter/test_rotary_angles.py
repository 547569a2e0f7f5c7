"""Angles are transformers', for every generation and up to the last position."""

import math
from dataclasses import replace

import pytest
import torch

from llama_adapter.model import Llama
from llama_adapter.rotary_angles import rotary_angles
from tests.llama_adapter.hf_models import on_transformers
from tests.llama_adapter.test_model import small


@pytest.mark.parametrize("preset", ["llama-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b"])
def test_rotary_angles_equal_transformers_up_to_the_last_position(preset: str) -> None:
    config = small(preset, dim=128, n_layers=1, n_heads=1, n_kv_heads=1)
    theirs = on_transformers(Llama(config)).model.rotary_emb
    positions = torch.tensor([0, 1, 2047, 8191, 8192, 65537, 131071])
    cos, sin = rotary_angles(config, positions)
    expected_cos, expected_sin = theirs(torch.zeros(1), positions[None])
    # the last bit of an interpolated frequency may differ, which is 1e-5 after twenty turns
    tolerance = 0 if config.rope_scaling is None else 1e-5
    torch.testing.assert_close(cos, expected_cos[0, :, :64], rtol=0, atol=tolerance)
    torch.testing.assert_close(sin, expected_sin[0, :, :64], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("preset", "factor"), [("llama-3.1-8b", 8), ("llama-3.2-1b", 32)])
def test_rotary_scaling_slows_the_slow_turns_only(preset: str, factor: int) -> None:
    scaled = small(preset, dim=128, n_heads=1, n_kv_heads=1)
    plain = replace(scaled, rope_scaling=None)
    position = torch.tensor([1.0])
    with_scaling, without = (
        torch.atan2(*reversed(rotary_angles(config, position)))[0] for config in (scaled, plain)
    )
    wavelength = 2 * math.pi / without
    ratio = without / with_scaling
    assert torch.equal(ratio[wavelength < 8192 / 4], torch.ones(29))
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full((29,), float(factor)))
    between = ratio[(wavelength >= 8192 / 4) & (wavelength <= 8192)]
    assert len(between) == 6
    assert torch.all((between > 1) & (between < factor) & (between.diff(prepend=between[:1]) >= 0))
