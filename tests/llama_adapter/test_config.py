"""Do the presets have the published shapes, and are impossible shapes refused by name?"""

from dataclasses import replace

import pytest
import torch

from llama_adapter.config import PRESETS, AdapterConfig, LlamaConfig
from llama_adapter.model import Llama

# name, parameters, feed-forward width, heads, key/value heads, head width: the published models
PUBLISHED = [
    ("llama-7b", 6_738_415_616, 11008, 32, 32, 128),
    ("llama-13b", 13_015_864_320, 13824, 40, 40, 128),
    ("llama-30b", 32_528_943_616, 17920, 52, 52, 128),
    ("llama-65b", 65_285_660_672, 22016, 64, 64, 128),
    ("llama-2-7b", 6_738_415_616, 11008, 32, 32, 128),
    ("llama-2-13b", 13_015_864_320, 13824, 40, 40, 128),
    ("llama-2-70b", 68_976_648_192, 28672, 64, 8, 128),
    ("llama-3-8b", 8_030_261_248, 14336, 32, 8, 128),
    ("llama-3-70b", 70_553_706_496, 28672, 64, 8, 128),
    ("llama-3.1-8b", 8_030_261_248, 14336, 32, 8, 128),
    ("llama-3.1-70b", 70_553_706_496, 28672, 64, 8, 128),
    ("llama-3.1-405b", 405_853_388_800, 53248, 128, 8, 128),
    ("llama-3.2-1b", 1_235_814_400, 8192, 32, 8, 64),
    ("llama-3.2-3b", 3_212_749_824, 8192, 24, 8, 128),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_preset_has_the_published_size(row: tuple[str, int, int, int, int, int]) -> None:
    name, parameters, hidden, heads, kv_heads, head_dim = row
    config = PRESETS[name]
    with torch.device("meta"):
        model = Llama(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    got = (config.hidden_dim, config.n_heads, config.kv_heads, config.head_dim)
    assert got == (hidden, heads, kv_heads, head_dim)


def test_every_preset_is_in_the_table() -> None:
    assert {row[0] for row in PUBLISHED} == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "theta", "eps", "factor", "context"),
    [
        ("llama-7b", 1e4, 1e-6, None, 2048),
        ("llama-65b", 1e4, 1e-5, None, 2048),
        ("llama-2-70b", 1e4, 1e-5, None, 4096),
        ("llama-3-8b", 5e5, 1e-5, None, 8192),
        ("llama-3.1-405b", 5e5, 1e-5, 8.0, 131072),
        ("llama-3.2-3b", 5e5, 1e-5, 32.0, 131072),
    ],
)
def test_preset_has_the_published_constants(
    name: str, theta: float, eps: float, factor: float | None, context: int
) -> None:
    config = PRESETS[name]
    assert (config.rope_theta, config.norm_eps, config.max_seq_len) == (theta, eps, context)
    scaling = config.rope_scaling
    assert (None if scaling is None else scaling.factor) == factor
    if scaling is not None:
        assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
        assert scaling.original_context == 8192
    assert config.tied_embeddings == name.startswith("llama-3.2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1, got 0"),
        ({"dim": 50}, "dim must be a multiple of n_heads = 4, got 50"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads = 4, got 3"),
        ({"n_kv_heads": 0}, "n_kv_heads must divide n_heads = 4, got 0"),
        ({"dim": 12}, "head_dim must be even for rotary embedding, got 3"),
        ({"attention_head_dim": 0}, "head_dim must be at least 2, got 0"),
        ({"attention_head_dim": -2}, "head_dim must be at least 2, got -2"),
    ],
)
def test_impossible_shape_is_refused(changes: dict[str, int], message: str) -> None:
    config = LlamaConfig(dim=48, n_layers=2, n_heads=4, vocab_size=101)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(config, **changes)


def test_description_tells_two_shapes_apart() -> None:
    line = PRESETS["llama-3-8b"].describe()
    assert line == "dim 4096, 32 layers, 32 heads (8 key/value), vocabulary 128256"
    assert line != PRESETS["llama-7b"].describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_length": 0}, "prompt_length must be from 1 to 65536, got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"prompt_std": 0.0}, "prompt_std must be above 0 and at most 1000000, got 0.0"),
        ({"prompt_std": float("nan")}, "prompt_std must be above 0 and at most 1000000, got nan"),
        ({"gate_activation": "relu"}, "gate_activation must be one of .* got 'relu'"),
        ({"gate_scope": "token"}, "gate_scope must be one of .* got 'token'"),
    ],
)
def test_impossible_adapter_is_refused(changes: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(AdapterConfig(), **changes)


@pytest.mark.parametrize(
    ("adapted", "model", "expected"),
    [
        (None, 32, tuple(range(2, 32))),
        (None, 3, (2,)),
        (None, 2, (1,)),
        (None, 1, (0,)),
        (4, 4, (0, 1, 2, 3)),
        (1, 5, (4,)),
    ],
)
def test_adapted_layers_are_the_topmost(
    adapted: int | None, model: int, expected: tuple[int, ...]
) -> None:
    assert AdapterConfig(n_layers=adapted).layers_of(model) == expected


def test_more_adapted_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match="n_layers must be at most the model's 4, got 5"):
        AdapterConfig(n_layers=5).layers_of(4)
