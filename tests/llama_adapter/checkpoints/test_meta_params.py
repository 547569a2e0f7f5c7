"""Do the published params.json files give the presets, and is everything else refused by name?"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llama_adapter.checkpoints.meta_params import read_params
from llama_adapter.config import PRESETS, LlamaConfig, RopeScaling

# the files as published, by preset; those of LLaMA 1 and 2 leave the vocabulary to the tokenizer
PUBLISHED: dict[str, dict[str, object]] = {
    "llama-7b": {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-06,
        "vocab_size": -1,
    },
    "llama-65b": {
        "dim": 8192,
        "multiple_of": 256,
        "n_heads": 64,
        "n_layers": 80,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama-2-7b": {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama-2-70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama-3-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
    },
    "llama-3.1-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "llama-3.1-405b": {
        "dim": 16384,
        "n_layers": 126,
        "n_heads": 128,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.2,
        "multiple_of": 4096,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "llama-3.2-1b": {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "llama-3.2-3b": {
        "dim": 3072,
        "n_layers": 28,
        "n_heads": 24,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 256,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
}
SMALL = {"dim": 48, "n_layers": 4, "n_heads": 6}


def read(tmp_path: Path, content: object, tokens: int = 353) -> LlamaConfig:
    path = tmp_path / "params.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_params(path, tokens)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_gives_the_preset(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    config = read(tmp_path, PUBLISHED[name], preset.vocab_size)
    # the weights, not this file, tell whether embeddings are tied
    assert config == replace(preset, tied_embeddings=False)


def test_what_is_not_said_has_llama_1s_value(tmp_path: Path) -> None:
    assert read(tmp_path, SMALL) == LlamaConfig(48, 4, 6, 353)


@pytest.mark.parametrize(
    ("extra", "field", "value"),
    [
        ({"n_kv_heads": 2}, "kv_heads", 2),
        ({"n_kv_heads": None}, "kv_heads", 6),
        ({"head_dim": 40}, "head_dim", 40),
        ({"max_seq_len": 99}, "max_seq_len", 99),
        ({"max_batch_size": 32}, "max_seq_len", 2048),
        ({"rope_theta": 1000000}, "rope_theta", 1e6),
        ({"vocab_size": -1}, "vocab_size", 353),
        ({"vocab_size": 353}, "vocab_size", 353),
        ({"vision_chunk_size": -1}, "n_layers", 4),
        ({"quantization_args": None}, "n_layers", 4),
        ({"use_scaled_rope": False}, "rope_scaling", None),
        ({"use_scaled_rope": True}, "rope_scaling", RopeScaling(8.0)),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling", RopeScaling(4.0)),
        (
            {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32}},
            "rope_scaling",
            RopeScaling(4.0, original_context=32),
        ),
        (
            {"use_scaled_rope": True, "rope_scaling": {"factor": 4.0, "low_freq_factor": 2.0}},
            "rope_scaling",
            RopeScaling(4.0, low_freq_factor=2.0),
        ),
    ],
)
def test_known_keys_are_read(
    extra: dict[str, object], field: str, value: object, tmp_path: Path
) -> None:
    assert getattr(read(tmp_path, SMALL | extra), field) == value


def test_content_may_lie_under_model(tmp_path: Path) -> None:
    assert read(tmp_path, {"model": SMALL}) == read(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"params\.json is not JSON"),
        ("", r"params\.json is not JSON"),
        ("[1]", r"params\.json must hold a JSON object, got list"),
        ({"model": 3}, r"params\.json must hold a JSON object, got int"),
        ({"dim": 48, "n_layers": 4}, r"params\.json: key 'n_heads' is missing"),
        (SMALL | {"swin_norm": True}, r"params\.json: unknown key 'swin_norm'; known are dim, n_l"),
        ({"model": SMALL, "vocab": 3}, r"params\.json: unknown key 'model'"),
        (SMALL | {"dim": "48"}, r"params\.json: dim must be int, got '48'"),
        (SMALL | {"dim": 48.0}, r"params\.json: dim must be int, got 48\.0"),
        (SMALL | {"n_layers": True}, r"params\.json: n_layers must be int, got True"),
        (SMALL | {"norm_eps": "1e-5"}, r"norm_eps must be int or float, got '1e-5'"),
        (SMALL | {"use_scaled_rope": 1}, r"use_scaled_rope must be bool, got 1"),
        (SMALL | {"n_kv_heads": 4}, r"params\.json: n_kv_heads must divide n_heads = 6, got 4"),
        (
            SMALL | {"vocab_size": 32000},
            r"vocab_size is 32000, but tokenizer\.model has 353 tokens; they belong to different",
        ),
        (
            SMALL | {"rope_scaling": {"factor": 8.0, "type": "yarn"}},
            r"rope_scaling must have \['factor', .*got \['factor', 'type'\]",
        ),
        (
            SMALL | {"rope_scaling": {"factor": "8"}},
            r"rope_scaling's factor must be a positive number, got '8'",
        ),
        (
            SMALL | {"rope_scaling": {"original_context": 0}},
            r"rope_scaling's original_context must be a positive number, got 0",
        ),
        (
            SMALL | {"rope_scaling": {"low_freq_factor": 4}},
            r"rope_scaling's low_freq_factor must be below high_freq_factor = 4\.0, got 4",
        ),
        (
            SMALL | {"quantization_args": {"group_size": 32}},
            r"quantization_args is not supported: the weights are quantised",
        ),
        (
            SMALL | {"lora_args": {"rank": 16}},
            r"lora_args is not supported: the weights are a LoRA",
        ),
        (
            SMALL | {"vision_chunk_size": 448},
            r"vision_chunk_size is not supported: the model reads",
        ),
        (SMALL | {"moe_args": {"num_experts": 8}}, r"moe_args is not supported: .* experts"),
    ],
)
def test_anything_else_is_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("key", ["norm_eps", "rope_theta", "ffn_dim_multiplier"])
def test_numbers_that_make_no_model_are_refused(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"params\.json: {key} must be positive and finite, got"):
        read(tmp_path, SMALL | {key: value})
