"""Is a folder that transformers writes the model it wrote, and is every fault named in one line?"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from llama_adapter.checkpoints.hugging_face import is_hugging_face, read_config, read_hugging_face
from llama_adapter.config import RopeScaling
from llama_adapter.model import Llama
from llama_adapter.tokenizer import find_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 357,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# each generation in small; grouped-query, heads that do not add up to the width, narrow layers
FAMILIES: dict[str, dict[str, Any]] = {
    "1": {"rms_norm_eps": 1e-6},
    "2": {"num_key_value_heads": 2, "intermediate_size": 304},
    "3": {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e5}},
    "3.1": {
        "num_key_value_heads": 3,
        "rope_parameters": {
            "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16, **LLAMA3
        },
    },
    "3.2": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "head_dim": 24,
        "rope_parameters": {
            "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 16, **LLAMA3
        },
    },
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "sliding": {"num_key_value_heads": 1, "head_dim": 40, "sliding_window": 50},
}  # fmt: skip
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
WQ = "model.layers.0.self_attn.q_proj.weight"
Theirs = transformers.LlamaForCausalLM | transformers.MistralForCausalLM
Save = Callable[..., tuple[Path, Theirs]]


@pytest.fixture
def save(tiny_tokenizer_path: Path, tmp_path: Path) -> Save:
    """A function that lets transformers write a random model of a family into a new folder."""

    def write(
        family: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 3
    ) -> tuple[Path, Theirs]:
        is_mistral = family in ("mistral", "sliding")
        kind = transformers.MistralForCausalLM if is_mistral else transformers.LlamaForCausalLM
        values = SMALL | FAMILIES[family]
        config = kind.config_class(**values, attn_implementation="eager")
        model = kind(config).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        folder = tmp_path / f"hf-{len(list(tmp_path.iterdir()))}"
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        shutil.copy(tiny_tokenizer_path, folder / "tokenizer.model")
        return folder, model

    return write


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json; ... takes one out."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


def resave(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the content of a single file."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


def error_of(folder: Path, kind: type[Exception] = ValueError) -> str:
    """The one line that reading a folder ends in."""
    with pytest.raises(kind) as caught:
        read_hugging_face(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(str(folder), "FOLDER")


@pytest.mark.parametrize("shard", ["5GB", "60KB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_transformers(family: str, shard: str, save: Save) -> None:
    folder, theirs = save(family, shard=shard)
    count = len(list(folder.glob("*.safetensors")))
    assert count == 1 if shard == "5GB" else count > 1
    model, tokenizer = read_hugging_face(folder)
    assert tokenizer.vocab_size == 353
    tokens = torch.randint(357, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)
    assert model.config.max_seq_len == (50 if family == "sliding" else 128)
    assert model.config.tied_embeddings == (family == "3.2")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_dtype_is_the_files_or_the_wanted_one(
    stored: torch.dtype, wanted: torch.dtype | None, save: Save
) -> None:
    folder, theirs = save("3", dtype=stored)
    model, _ = read_hugging_face(folder, dtype=wanted)
    for name, value in model.state_dict().items():
        assert value.dtype == (wanted or stored), name
    assert torch.equal(model.output_weight, theirs.lm_head.weight.to(wanted or stored))
    values = model.layers[1].attention.wv.weight
    assert torch.equal(values, theirs.model.layers[1].self_attn.v_proj.weight.to(values.dtype))


def test_configurations_as_transformers_4_writes_them(save: Save) -> None:
    folder, _ = save("3.1")
    new = read_config(folder / "config.json")
    scaling = {"factor": 8.0, "original_max_position_embeddings": 16, **LLAMA3}
    change_config(folder, rope_parameters=..., rope_theta=5e5, rope_scaling=scaling)
    assert read_config(folder / "config.json") == new
    scaling["type"] = scaling.pop("rope_type")
    change_config(folder, rope_scaling=scaling)
    assert read_config(folder / "config.json") == new
    assert new.rope_scaling == RopeScaling(8.0, original_context=16)
    change_config(folder, rope_scaling=None)
    assert read_config(folder / "config.json") == replace(new, rope_scaling=None)


def test_absent_keys_mean_what_transformers_takes(save: Save) -> None:
    """Configurations of LLaMA 1's time lack what later models need."""
    for family, kind in (("1", transformers.LlamaConfig), ("mistral", transformers.MistralConfig)):
        folder, _ = save(family)
        absent = ("num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings")
        rest = ("attention_bias", "mlp_bias", "sliding_window", "hidden_act")
        change_config(
            folder, **dict.fromkeys([*absent, *rest, "max_position_embeddings"], ...),
            num_attention_heads=8,
        )  # fmt: skip
        theirs = kind.from_pretrained(folder)
        ours = read_config(folder / "config.json")
        assert ours.kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == 48 // 8
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10000
        assert not ours.tied_embeddings
        assert not theirs.tie_word_embeddings
        window = getattr(theirs, "sliding_window", None) or theirs.max_position_embeddings
        assert ours.max_seq_len == window


@pytest.mark.parametrize("hidden", [40, 88, 127, 128, 129, 304])
def test_every_feed_forward_width_is_met(hidden: int, save: Save) -> None:
    folder, _ = save("1")
    change_config(folder, intermediate_size=hidden)
    assert read_config(folder / "config.json").hidden_dim == hidden


def test_buffers_of_rotary_frequencies_are_ignored(save: Save) -> None:
    folder, theirs = save("1")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    resave(folder, lambda state: state.update({name: torch.ones(4)}))
    model, _ = read_hugging_face(folder)
    assert torch.equal(model.output_weight, theirs.lm_head.weight)


def test_a_tied_output_may_be_saved_a_second_time(save: Save) -> None:
    folder, theirs = save("3.2")
    resave(folder, lambda state: state.update({OUTPUT: state[EMBEDDING].clone()}))
    model, _ = read_hugging_face(folder)
    assert "output.weight" not in model.state_dict()
    assert torch.equal(model.output_weight, theirs.lm_head.weight)
    resave(folder, lambda state: state.update({OUTPUT: state[EMBEDDING] + 1}))
    assert error_of(folder) == (
        f"FOLDER/model.safetensors: {OUTPUT} must be the embedding, because config.json has "
        "tie_word_embeddings, but it differs"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "qwen2"}, "model_type must be llama or mistral, got 'qwen2'"),
        ({"model_type": ...}, "model_type must be llama or mistral, got None"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures must be ['LlamaForCausalLM'], got ['LlamaForSequenceClassification']",
        ),
        ({"attention_bias": True}, "attention_bias must be false, got True"),
        ({"mlp_bias": True}, "mlp_bias must be false, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\", got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported, got {'bi"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is not supported, got {'AutoModel'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling's rope_type must be default or llama3, got 'linear'",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": {"rope_type": "default", "type": "linear"}},
            "rope_scaling must have one rope_type, got 'default' and 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters's rope_type must be default or llama3, got 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "rope_parameters must have a factor, got []",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters must say its rope_type, got only ['factor']",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters's partial_rotary_factor must be 1",
        ),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a positive number, got -1"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing"),
        ({"hidden_size": 48.0}, "hidden_size must be an integer from 1 to 2147483647, got 48.0"),
        ({"hidden_size": 50, "head_dim": None}, "dim must be a multiple of n_heads = 6, got 50"),
        ({"num_hidden_layers": 10**9}, "n_layers must be at most 1000, got 1000000000"),
        ({"vocab_size": 10**40}, "vocab_size must be an integer from 1 to 2147483647, got 1000"),
        ({"intermediate_size": 10**400}, "intermediate_size must be an integer from 1 to 21474"),
        (
            {"num_attention_heads": 0},
            "num_attention_heads must be an integer from 1 to 2147483647, got 0",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"vocab_size": 352}, "vocab_size is 352, but tokenizer.model has 353 tokens; they belong"),
    ],
)
def test_what_the_model_cannot_compute_is_named(
    values: dict[str, Any], message: str, save: Save
) -> None:
    folder, _ = save("1")
    change_config(folder, **values)
    assert error_of(folder).startswith(f"FOLDER/config.json: {message}")


def test_a_sliding_window_must_be_a_number(save: Save) -> None:
    folder, _ = save("mistral")
    change_config(folder, sliding_window="all")
    assert "sliding_window must be an integer from 1 to 2147483647, got 'all'" in error_of(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop(WQ),
            f"FOLDER/model.safetensors lacks tensors: {WQ}; is config.json another model's?",
        ),
        (
            lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
            "FOLDER/model.safetensors has surplus tensors: model.layers.0.self_attn.q_proj.bias; "
            "is config.json another model's?",
        ),
        (
            lambda state: state.update({"a\nb": torch.ones(1)}),
            "FOLDER/model.safetensors has surplus tensors: a\\nb; is config.json another model's?",
        ),
        (
            lambda state: state.update({WQ: torch.ones(48, 40)}),
            f"FOLDER/model.safetensors: {WQ} must have shape (48, 48), got (48, 40)",
        ),
        (
            lambda state: state.update({WQ: state[WQ].half()}),
            f"FOLDER/model.safetensors: {WQ} is torch.float16, but {OUTPUT} is torch.float32: "
            "give the dtype to load them in",
        ),
        (
            lambda state: state.update({WQ: state[WQ].to(torch.int8)}),
            f"FOLDER/model.safetensors: {WQ} must be float32, float16 or bfloat16, got I8",
        ),
        (lambda state: state.clear(), "FOLDER/model.safetensors lacks tensors: lm_head.weight"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    change: Callable[[dict[str, Tensor]], object], message: str, save: Save
) -> None:
    folder, _ = save("1")
    resave(folder, change)
    assert error_of(folder).startswith(message)


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 9]
)
def test_a_file_that_is_no_safetensors_is_refused(data: bytes, save: Save) -> None:
    folder, _ = save("1")
    (folder / "model.safetensors").write_bytes(data)
    assert error_of(folder).startswith(
        "FOLDER/model.safetensors is damaged or not a safetensors file ("
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_missing_file_is_named(name: str, save: Save) -> None:
    folder, _ = save("1")
    (folder / name).unlink()
    assert name in error_of(folder, FileNotFoundError)
    (folder / "pytorch_model.bin").touch()
    if name == "model.safetensors":
        assert error_of(folder, FileNotFoundError) == (
            "FOLDER holds no model.safetensors and no model.safetensors.index.json: load the model "
            "with transformers and save_pretrained(folder)"
        )


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_shards_and_their_index_must_agree(save: Save) -> None:
    folder, _ = save("2", shard="60KB")
    index, path = index_of(folder), folder / "model.safetensors.index.json"

    def error(weight_map: object, kind: type[Exception] = ValueError) -> str:
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return error_of(folder, kind).removeprefix("FOLDER/model.safetensors.index.json")

    other = next(file for file in index.values() if file != index[WQ])
    said = f" says that {WQ} is in {other}, but it is in {index[WQ]}"
    assert error(index | {WQ: other}) == said
    assert "says that" in error({name: file for name, file in index.items() if name != WQ})
    assert error(index | {"x": other}) == f"FOLDER/{other} lacks x"
    assert error(index | {"x": "absent.safetensors"}, FileNotFoundError) == (
        "FOLDER/absent.safetensors does not exist: copy the shard into the folder"
    )
    for wrong in ("../x.safetensors", "/x.safetensors", "model.bin", 3):
        assert ": weight_map must hold names of files, got" in error(index | {WQ: wrong})
    for nothing in (None, {}, [1]):
        assert ": weight_map must be an object of file names" in error(nothing)
    error(index | {WQ: other})
    (folder / "model.safetensors").touch()
    assert "remove the one that is not meant" in error_of(folder)


def test_a_tensor_in_two_shards_is_refused(save: Save) -> None:
    folder, _ = save("2", shard="60KB")
    index = index_of(folder)
    other = folder / next(file for file in index.values() if file != index[WQ])
    state = safetensors.torch.load_file(other)
    safetensors.torch.save_file(state | {WQ: torch.ones(48, 48)}, other)
    assert re.search(rf"{WQ} is in model-\d+-of-\d+\.safetensors too", error_of(folder))


def test_weights_do_not_follow_the_file(save: Save) -> None:
    """A mapped file that is overwritten in place must not reach into a loaded model."""
    folder, _ = save("3")
    model, _ = read_hugging_face(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_folders_are_recognised_by_their_files(save: Save, tmp_path: Path) -> None:
    assert not is_hugging_face(tmp_path)
    assert is_hugging_face(save("1")[0])
    assert isinstance(read_hugging_face(save("1")[0])[0], Llama)


@pytest.mark.parametrize("outside", [None, 16])
@torch.no_grad()
def test_an_original_context_that_is_not_told_is_transformers_guess(
    outside: int | None, save: Save
) -> None:
    folder, _ = save("3.2")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    rope.pop("original_max_position_embeddings")
    change_config(folder, rope_parameters=rope)
    if outside is not None:
        change_config(folder, original_max_position_embeddings=outside)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.randint(357, (2, 50), generator=torch.Generator().manual_seed(1))
    model, _ = read_hugging_face(folder)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    rope.pop("low_freq_factor")
    change_config(folder, rope_parameters=rope)
    assert "must have a low_freq_factor" in error_of(folder)


def test_sizes_that_no_memory_holds_are_one_line(save: Save) -> None:
    folder, _ = save("1")
    for huge in ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2}, {"vocab_size": 2**31 - 1}):
        change_config(folder, **huge)
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
            read_hugging_face(folder)


def test_an_end_mark_behind_the_sentencepiece_model_is_the_jsons(save: Save) -> None:
    folder, _ = save("1")
    change_config(folder, eos_token_id=[2, 354])
    message = "texts end at token 354, which tokenizer.model does not have: copy tokenizer.json"
    with pytest.raises(ValueError, match=message):
        find_tokenizer(folder)
