"""Does an adapter survive its file bit by bit, and is every other file refused in one line?"""

import hashlib
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import (
    adapter_from_tensors,
    decode,
    encode,
    load_adapter,
    read_adapter,
    read_header,
    save_adapter,
)
from llama_adapter.checkpoints.adapter_header import AdapterHeader
from llama_adapter.checkpoints.fingerprint import Fingerprint, fingerprint, sample_count
from llama_adapter.config import PRESETS, AdapterConfig, LlamaConfig, shape_of
from llama_adapter.model import Llama


@pytest.fixture
def saved(tiny_adapter: Adapter, tiny_model: Llama, tmp_path: Path) -> Path:
    """The tiny adapter's file."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tiny_adapter, fingerprint(tiny_model, "tiny"))
    return path


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda header: None,
    change_tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> None:
    """Change a file and give it a valid hash, as a writer that knows more would."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["llama_adapter"])
    tensors = load_file(path)
    change(header)
    change_tensors(tensors)
    plain = save(tensors)
    split = 8 + int.from_bytes(plain[:8], "little")
    metadata = {"sha256": "0" * 64, "llama_adapter": json.dumps(header)}
    entries = {"__metadata__": metadata, **json.loads(plain[8:split])}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unsigned = len(text).to_bytes(8, "little") + text + plain[split:]
    digest = hashlib.sha256(unsigned).hexdigest().encode()
    path.write_bytes(unsigned.replace(b"0" * 64, digest, 1))


def header_of(settings: AdapterConfig, layers: tuple[int, ...]) -> AdapterHeader:
    """A header of prompts and gates, of a base that does not matter."""
    return AdapterHeader(("prompts", "gates"), layers, settings, Fingerprint("any", {}, ()))


def error_of(path: Path) -> str:
    """The one line that reading a file ends in."""
    with pytest.raises(ValueError, match=str(path)) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def assert_same(adapter: Adapter, expected: Adapter) -> None:
    assert adapter.layers == expected.layers
    assert adapter.config == expected.config
    for name, value in expected.state_dict().items():
        assert adapter.state_dict()[name].dtype == torch.float32
        assert torch.equal(adapter.state_dict()[name], value)


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("layers", [None, (0, 3), (1,)])
@torch.no_grad()
def test_an_adapter_comes_back_bitwise(
    layers: tuple[int, ...] | None,
    activation: str,
    scope: str,
    tiny_model: Llama,
    tmp_path: Path,
) -> None:
    settings = AdapterConfig(
        prompt_length=7, prompt_std=0.3, gate_activation=activation, gate_scope=scope
    )
    adapter = Adapter(settings, tiny_model.config, layers=layers)
    adapter.gates.normal_(std=1.5)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, fingerprint(tiny_model, "tiny"))
    loaded = load_adapter(path, tiny_model, "again")
    assert_same(loaded, adapter)
    tokens = torch.arange(23)[None]
    expected = tiny_model(tokens, tiny_model.project(adapter))
    assert torch.equal(tiny_model(tokens, tiny_model.project(loaded)), expected)


def test_a_loaded_adapter_is_trainable(saved: Path, tiny_model: Llama) -> None:
    before = torch.get_rng_state()
    adapter = load_adapter(saved, tiny_model, "tiny")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    tiny_model(torch.arange(9)[None], tiny_model.project(adapter)).sum().backward()
    assert adapter.prompts.grad is not None
    assert adapter.prompts.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_another_dtype_is_the_same_base(
    dtype: torch.dtype, saved: Path, tiny_adapter: Adapter, tiny_model: Llama
) -> None:
    assert_same(load_adapter(saved, tiny_model.to(dtype), "half"), tiny_adapter)


def test_the_header_says_what_the_file_holds(saved: Path, tiny_model: Llama) -> None:
    header = read_header(saved)
    assert header.groups == ("prompts", "gates")
    assert header.layers == (2, 3)
    assert header.prompt_kind == "hidden"
    assert header.scale_side is None
    assert header.config == AdapterConfig(prompt_length=5)
    assert header.base == fingerprint(tiny_model, "tiny")


def test_the_same_adapter_is_the_same_file(
    saved: Path, tiny_adapter: Adapter, tiny_model: Llama, tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    save_adapter(again, tiny_adapter, fingerprint(tiny_model, "tiny"))
    assert again.read_bytes() == saved.read_bytes()
    header, tensors = read_adapter(saved)
    assert encode(header, tensors) == saved.read_bytes()


def test_the_file_is_plain_safetensors(saved: Path, tiny_adapter: Adapter) -> None:
    tensors = load_file(saved)
    assert tensors.keys() == {"prompts", "gates"}
    assert torch.equal(tensors["prompts"], tiny_adapter.prompts)
    assert torch.equal(tensors["gates"], tiny_adapter.gates)


def test_an_adapter_of_the_7b_model_takes_4_9_megabytes(tmp_path: Path) -> None:
    config = PRESETS["llama-7b"]
    adapter = Adapter(AdapterConfig(), config)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 1_229_760
    base = Fingerprint("7b", shape_of(config), tuple([0.01234] * sample_count(32)))
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, base)
    assert 4_919_040 < path.stat().st_size < 4_950_000


def test_saving_replaces_the_file_whole(
    saved: Path, tiny_adapter: Adapter, tiny_model: Llama
) -> None:
    with torch.no_grad():
        tiny_adapter.gates.add_(1)
    save_adapter(saved, tiny_adapter, fingerprint(tiny_model, "tiny"))
    assert_same(load_adapter(saved, tiny_model, "tiny"), tiny_adapter)
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_saving_into_a_missing_folder_is_refused(
    tiny_adapter: Adapter, tiny_model: Llama, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*absent does not exist"):
        save_adapter(tmp_path / "absent" / "a", tiny_adapter, fingerprint(tiny_model, "tiny"))


def test_saving_for_a_base_of_another_shape_is_refused(
    tiny_adapter: Adapter, tmp_path: Path
) -> None:
    base = Fingerprint("7b", shape_of(PRESETS["llama-7b"]), tuple([0.5] * sample_count(32)))
    message = r"adapter: prompts must have shape \(2, 5, 4096\), got \(2, 5, 48\)"
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path / "adapter.safetensors", tiny_adapter, base)
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_another_shape_says_which_is_which(saved: Path) -> None:
    config = LlamaConfig(dim=32, n_layers=4, n_heads=4, vocab_size=353, multiple_of=64)
    with pytest.raises(ValueError, match="was trained on base") as caught:
        load_adapter(saved, Llama(config), "other")
    assert str(caught.value) == (
        f"adapter {saved} was trained on base 'tiny' (dim 48, n_layers 4, n_heads 6, kv_heads 2, "
        "head_dim 8, hidden_dim 128, vocab_size 353), but the loaded base is 'other' (dim 32, "
        "n_layers 4, n_heads 4, kv_heads 4, head_dim 8, hidden_dim 128, vocab_size 353): "
        "dim 48 and 32, n_heads 6 and 4, kv_heads 2 and 4"
    )


def test_other_weights_of_the_same_shape_say_which_is_which(
    saved: Path, tiny_config: LlamaConfig
) -> None:
    message = (
        r"was trained on base 'tiny' \(dim 48, .*\), but the loaded base is 'other' \(dim 48, .*\)"
        r": one shape, but \d+ of 240 sampled weights differ"
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(saved, Llama(tiny_config), "other")


def test_every_flipped_bit_is_found(saved: Path) -> None:
    """Every bit of the header, its length and the hash, and some hundred of the tensors."""
    data = bytearray(saved.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(5)
    for bit in [*range(end * 8), *rng.sample(range(end * 8, len(data) * 8), 400)]:
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="damaged"):
            decode(bytes(data), "file")
        data[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(data), "file")[0] == read_header(saved)


def test_every_truncation_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    rng = random.Random(6)
    for length in [*range(64), *rng.sample(range(len(data)), 200), len(data) - 1]:
        with pytest.raises(ValueError, match="damaged"):
            decode(data[:length], "file")
    with pytest.raises(ValueError, match="damaged"):
        decode(data + b"\0", "file")


def test_a_truncated_file_says_what_to_do(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    size = saved.stat().st_size
    assert error_of(saved) == (
        f"adapter file FILE is damaged or cut off ({size} bytes): its content does not match the "
        "hash inside; copy it again from where it came"
    )


def test_a_missing_file_is_named(tiny_model: Llama, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter file .*absent does not exist"):
        load_adapter(tmp_path / "absent", tiny_model, "tiny")


class RunsCode:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


def test_files_of_another_kind_are_refused_unread(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "adapter.pth"
    torch.save({"prompts": RunsCode(trap)}, path)
    archive = path.read_bytes()
    others = [b"", b"hello", pickle.dumps(RunsCode(trap)), archive, save({"x": torch.ones(3)})]
    for data in others:
        path.write_bytes(data)
        assert error_of(path) == (
            "adapter file FILE is not an adapter file of this package, or its beginning is "
            "damaged; llama-adapter convert brings those of other programs into this format"
        )
    assert not trap.exists()


HEADER_ERRORS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (
        lambda header: header.update(format_version=5),
        " has format version 5, this package reads versions 1, 2, 3, 4",
    ),
    (
        lambda header: header.clear(),
        " has format version None, this package reads versions 1, 2, 3, 4",
    ),
    (
        lambda header: header["groups"].append("ladder"),
        " has group 'ladder', this version knows ('prompts', 'gates', 'projector', "
        "'visual_gates', 'bias', 'scale', 'norm', 'lora', 'head')",
    ),
    (
        lambda header: header["groups"].append("lora"),
        ": lora must go with the group lora, got None, ('lora',)",
    ),
    (
        lambda header: header.update(visual=None),
        ": header has unknown fields: visual",
    ),
    (
        lambda header: header.update(prompt_kind="rows"),
        " has prompt_kind 'rows', this version knows ('hidden', 'kv')",
    ),
    (
        lambda header: header.update(prompt_kind="kv"),
        ": prompts must have shape (2, 2, 5, 16), got (2, 5, 48)",
    ),
    (
        lambda header: header.update(host={"kind": "vit", "head": None, "shift_positions": False}),
        ": header has unknown fields: host",
    ),
    (
        lambda header: header.update(scale_side="input"),
        ": scale_side must be one of (None,) with groups (), got 'input'",
    ),
    (lambda header: header.update(early_fusion=8), ": header has unknown fields: early_fusion"),
    (lambda header: header.pop("layers"), ": header has missing fields: layers"),
    (
        lambda header: header["config"].update(rank=8, alpha=2),
        ": config has unknown fields: alpha, rank",
    ),
    (
        lambda header: header["config"].pop("gate_activation"),
        ": config has missing fields: gate_activation",
    ),
    (
        lambda header: header["config"].update(gate_activation="relu"),
        ": config: gate_activation must be one of ('tanh', 'identity'), got 'relu'",
    ),
    (
        lambda header: header["config"].update(prompt_length="5"),
        ": config: prompt_length must be int, got '5'",
    ),
    (
        lambda header: header["config"].update(prompt_length=True),
        ": config: prompt_length must be int, got True",
    ),
    (lambda header: header["base"].update(hash=1), ": base has unknown fields: hash"),
    (lambda header: header["base"].update(name=None), ": base: name must be str, got None"),
    (
        lambda header: header["base"]["samples"].pop(),
        ": base must have 240 sampled weights, got 239",
    ),
    (
        lambda header: header["base"]["shape"].pop("dim"),
        ": base shape must have dim, n_layers, n_heads, kv_heads, head_dim, hidden_dim, "
        "vocab_size, got n_layers, n_heads, kv_heads, head_dim, hidden_dim, vocab_size",
    ),
    (
        lambda header: header["base"]["shape"].update(dim=0),
        ": base: dim must be at least 1, got 0",
    ),
    (
        lambda header: header.update(layers=[3, 2]),
        ": layers must be ascending indices below 4, got (3, 2)",
    ),
    (
        lambda header: header.update(layers=[2, 4]),
        ": layers must be ascending indices below 4, got (2, 4)",
    ),
    (
        lambda header: header.update(groups=["prompts"]),
        " has surplus tensors: gates",
    ),
    (
        lambda header: header["config"].update(prompt_length=6),
        ": prompts must have shape (2, 6, 48), got (2, 5, 48)",
    ),
    (
        lambda header: header["config"].update(gate_scope="layer"),
        ": gates must have shape (2, 1), got (2, 6)",
    ),
    (lambda header: header.update(layers="23"), ": header: layers must be tuple[int, ...]"),
    (lambda header: header.update(config=[]), ": header: config must be AdapterConfig, got []"),
]


@pytest.mark.parametrize(("change", "message"), HEADER_ERRORS, ids=range(len(HEADER_ERRORS)))
def test_what_a_header_must_not_say_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], message: str, saved: Path
) -> None:
    rewrite(saved, change)
    assert error_of(saved).startswith(f"adapter file FILE{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("gates"), " does not have tensors: gates"),
        (
            lambda tensors: tensors.update({"bias": torch.ones(3)}),
            " has surplus tensors: bias",
        ),
        (
            lambda tensors: tensors.update(gates=torch.ones(2, 6).half()),
            ": gates must be float32, got torch.float16",
        ),
        (
            lambda tensors: tensors.update(gates=torch.ones(1, 6, 1, 1)),
            ": gates must have shape (2, 6), got (1, 6, 1, 1)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_header_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, saved: Path
) -> None:
    rewrite(saved, change_tensors=change)
    assert error_of(saved) == f"adapter file FILE{message}"


def test_rewriting_without_a_change_is_readable(saved: Path) -> None:
    """The error cases above are refused for what they changed, not for how they were written."""
    expected = read_header(saved)
    rewrite(saved)
    assert read_header(saved) == expected


def test_an_adapter_is_made_of_tensors(tiny_config: LlamaConfig) -> None:
    tensors = {"prompts": torch.randn(2, 3, 48), "gates": torch.randn(2, 1)}
    settings = AdapterConfig(prompt_length=3, gate_scope="layer", gate_activation="identity")
    adapter = adapter_from_tensors(header_of(settings, (0, 2)), tensors, tiny_config)
    assert torch.equal(adapter.prompts, tensors["prompts"])
    assert torch.equal(adapter.multipliers(), tensors["gates"].expand(2, 6))
    with torch.no_grad():
        adapter.prompts.zero_()
    assert tensors["prompts"].count_nonzero() == 288


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompts": torch.ones(2, 3, 48)}, "adapter does not have tensors: gates"),
        (
            {"prompts": torch.ones(2, 3, 48), "gates": torch.ones(2, 5)},
            r"adapter: gates must have shape \(2, 6\), got \(2, 5\)",
        ),
        (
            {"prompts": torch.ones(2, 3, 48), "gates": torch.ones(2, 6).bfloat16()},
            r"adapter: gates must be float32, got torch\.bfloat16",
        ),
    ],
)
def test_tensors_of_another_format_are_checked(
    tensors: dict[str, Tensor], message: str, tiny_config: LlamaConfig
) -> None:
    settings = replace(AdapterConfig(), prompt_length=3)
    with pytest.raises(ValueError, match=message):
        adapter_from_tensors(header_of(settings, (0, 2)), tensors, tiny_config)
