"""Does a folder that litgpt wrote compute what litgpt computes, and is every fault named?

fixtures/litgpt_base was written by litgpt 0.5.13, by fixtures/make_litgpt_base.py; where litgpt is
installed, another folder is written and read.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.litgpt import is_litgpt, read_config, read_litgpt

QKV = "transformer.h.0.attn.qkv.weight"
EMBEDDING, OUTPUT = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture
def folder(litgpt_files: Path, tiny_tokenizer_path: Path, tmp_path: Path) -> Path:
    """A copy of what litgpt wrote, with a tokenizer."""
    for name in ("lit_model.pth", "model_config.yaml", "logits.pth"):
        shutil.copy(litgpt_files / "litgpt_base" / name, tmp_path / name)
    shutil.copy(tiny_tokenizer_path, tmp_path / "tokenizer.model")
    return tmp_path


def expected(folder: Path) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that litgpt computed for them in float32."""
    content = torch.load(folder / "logits.pth", weights_only=True)
    return content["tokens"], content["logits"]


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of model_config.yaml; ... takes one out."""
    path = folder / "model_config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(yaml.safe_dump(kept), encoding="utf-8")


def resave(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of the weights' file; what `change` returns is it, if not None."""
    path = folder / "lit_model.pth"
    state = torch.load(path, weights_only=True)
    torch.save(change(state) or state, path)


def error_of(folder: Path, kind: type[Exception] = ValueError) -> str:
    """The one line that reading a folder ends in."""
    with pytest.raises(kind) as caught:
        read_litgpt(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(str(folder), "FOLDER")


@torch.no_grad()
def test_logits_are_litgpts(folder: Path) -> None:
    tokens, logits = expected(folder)
    assert logits.std() > 0.5
    model, tokenizer = read_litgpt(folder, dtype=torch.float32)
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)
    assert tokenizer.vocab_size == 353
    assert model.config.vocab_size == 360
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert read_litgpt(folder)[0].output_weight.dtype == torch.float16
    assert load_base(folder).model.config == model.config


@torch.no_grad()
def test_weights_saved_by_litgpts_training_lie_under_model(folder: Path) -> None:
    tokens, logits = expected(folder)
    resave(folder, lambda state: {"model": state})
    model, _ = read_litgpt(folder, dtype=torch.float32)
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5)


def test_the_older_lit_config_is_read(folder: Path) -> None:
    content = yaml.safe_load((folder / "model_config.yaml").read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if value is not None}
    for new in ("norm_class_name", "mlp_class_name"):
        content["_" + new.removesuffix("_name")] = content.pop(new)
    (folder / "lit_config.json").write_text(json.dumps(content | {"org": "meta"}))
    new = read_config(folder / "model_config.yaml")
    assert read_config(folder / "lit_config.json") == new
    (folder / "model_config.yaml").unlink()
    assert read_litgpt(folder)[0].config == new


@pytest.mark.parametrize("shared", [True, False])
def test_an_output_that_is_the_embedding_is_tied(shared: bool, folder: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[OUTPUT] = state[EMBEDDING] if shared else state[EMBEDDING].clone()

    resave(folder, change)
    model, _ = read_litgpt(folder)
    assert model.config.tied_embeddings
    assert "output.weight" not in model.state_dict()


def test_a_sliding_window_limits_the_context(folder: Path) -> None:
    change_config(folder, sliding_window_size=40, sliding_window_indices=[1, 1])
    assert read_config(folder / "model_config.yaml").max_seq_len == 40


def test_what_is_not_said_has_litgpts_value(folder: Path) -> None:
    change_config(folder, head_size=None, n_query_groups=None, rope_adjustments=None, rope_base=...)
    config = read_config(folder / "model_config.yaml")
    assert (config.head_dim, config.kv_heads, config.rope_theta) == (24 // 6, 6, 10000)
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_class_name": "LayerNorm"}, "norm_class_name must be RMSNorm, got 'LayerNorm'"),
        ({"norm_class_name": ...}, "norm_class_name must be RMSNorm, got None"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name must be LLaMAMLP, got 'GemmaMLP'"),
        ({"parallel_residual": True}, "parallel_residual must be False, got True"),
        ({"bias": True}, "bias must be False, got True"),
        ({"rotary_percentage": 0.25}, "rotary_percentage must be 1.0, got 0.25"),
        ({"attn_bias": True}, "attn_bias is not supported, got True"),
        ({"norm_qk": True}, "norm_qk is not supported, got True"),
        ({"n_expert": 8}, "n_expert is not supported, got 8"),
        ({"scale_embeddings": True}, "scale_embeddings is not supported, got True"),
        ({"attention_scores_scalar": 12}, "attention_scores_scalar is not supported, got 12"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported, got 30.0"),
        ({"rope_condense_ratio": 4}, "rope_condense_ratio is not supported, got 4"),
        ({"rope_interleave": True}, "rope_interleave is not supported, got True"),
        ({"norm_1": False}, "norm_1 is not supported, got False"),
        ({"a_new_trick": 3}, "a_new_trick is not supported, got 3"),
        (
            {"rope_adjustments": {"factor": 4.0}},
            "rope_adjustments must be LLaMA 3.1's, got {'factor': 4.0}",
        ),
        ({"rope_adjustments": {"factor": 1, "a": 1, "b": 2, "c": 3}}, "rope_adjustments must have"),
        ({"n_embd": "24"}, "n_embd must be an integer from 1 to 2147483647, got '24'"),
        ({"n_layer": ...}, "key 'n_layer' is missing"),
        ({"n_layer": 10**8}, "n_layers must be at most 1000, got 100000000"),
        ({"norm_eps": -1.0}, "norm_eps must be a positive number, got -1.0"),
        ({"padded_vocab_size": 352}, "vocab_size is 352, but tokenizer.model has 353 tokens"),
    ],
)
def test_what_the_model_cannot_compute_is_named(
    values: dict[str, Any], message: str, folder: Path
) -> None:
    change_config(folder, **values)
    assert error_of(folder).startswith(f"FOLDER/model_config.yaml: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not YAML: while parsing a flow node"),
        ("- 1", "must hold keys and values, got list"),
        ("1: 2", "must hold keys and values, got dict"),
        ("a: &a [1]\nb: [*a, *a]", "is not YAML: it has aliases"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constr"),
        ("a: \x00", "is not YAML: unacceptable character"),
    ],
)
def test_other_yaml_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "model_config.yaml").write_text(text)
    assert error_of(folder).startswith(f"FOLDER/model_config.yaml {message}")


def test_without_pyyaml_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert error_of(folder) == (
        "FOLDER/model_config.yaml needs PyYAML to be read: pip install 'llama-adapter-kernels[hf]'"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"x": 3}, ": x must be a tensor, got int"),
        (
            lambda state: state.pop(QKV) is None,
            f" lacks tensors: {QKV}; is model_config.yaml another model's?",
        ),
        (
            lambda state: state.update({"transformer.h.2.norm_1.weight": torch.ones(24)}),
            " has surplus tensors: transformer.h.2.norm_1.weight; "
            "is model_config.yaml another model's?",
        ),
        (
            lambda state: state.update({QKV: state[QKV][:-1].clone()}),
            f": {QKV} must have shape (160, 24), got (159, 24)",
        ),
        (
            lambda state: state.update({QKV: state[QKV].float()}),
            f": {QKV} is torch.float32, but {OUTPUT} is torch.float16: give the dtype to load th",
        ),
        (
            lambda state: state.update({"transformer.h.0.attn.attn.weight": state.pop(QKV)}),
            ": transformer.h.0.attn.attn.weight has the rows of queries, keys and values interle",
        ),
        (
            lambda state: state.update({QKV: state[QKV].T}),
            f": {QKV} must have memory of its own, not a part of another tensor's",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    resave(folder, lambda state: change(state) or None)
    assert error_of(folder).startswith("FOLDER/lit_model.pth" + message)


def test_missing_files_are_named(folder: Path) -> None:
    assert is_litgpt(folder)
    (folder / "tokenizer.model").unlink()
    assert error_of(folder, FileNotFoundError).startswith("FOLDER holds no tokenizer.model and no")
    (folder / "model_config.yaml").unlink()
    assert error_of(folder, FileNotFoundError) == (
        "FOLDER holds no model_config.yaml and no lit_config.json"
    )
    assert is_litgpt(folder)
    (folder / "lit_model.pth").unlink()
    assert not is_litgpt(folder)
