"""Does our own file hold biases, scales and norms, and the base of an adapter from elsewhere?"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import (
    decode,
    load_adapter,
    read_adapter,
    read_header,
    save_adapter,
)
from llama_adapter.checkpoints.adapter_header import from_json, to_json
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import AdapterConfig, VisualConfig
from llama_adapter.model import Llama
from llama_adapter.tuning import Lora, Tuning
from llama_adapter.vision import Scales
from tests.llama_adapter.checkpoints.test_adapter_file import rewrite

TUNING = Tuning(("bias", "scale", "norm"), ("wq", "w2", "output"), "input")
LORA = Lora(2, ("wq", "wo", "output"), True)


@pytest.fixture
def tuned(tiny_model: Llama, tmp_path: Path) -> Path:
    """A file of an adapter with every group."""
    generator = torch.Generator().manual_seed(3)
    adapter = Adapter(AdapterConfig(prompt_length=3), tiny_model.config, tuning=TUNING)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, fingerprint(tiny_model, "tiny"))
    return path


@pytest.mark.parametrize("lora", [None, LORA], ids=["vectors", "lora too"])
@pytest.mark.parametrize("layers", [(), (1, 3)])
def test_every_group_comes_back_bitwise(
    layers: tuple[int, ...], lora: Lora | None, tiny_model: Llama, tmp_path: Path
) -> None:
    tuning = TUNING if lora is None else replace(TUNING, groups=(*TUNING.groups, "lora"), lora=lora)
    adapter = Adapter(AdapterConfig(), tiny_model.config, layers=layers, tuning=tuning)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter, fingerprint(tiny_model, "tiny"))
    loaded = load_adapter(path, tiny_model, "tiny")
    assert (loaded.tuning, loaded.layers) == (tuning, layers)
    assert to_json(read_header(path))["format_version"] == (2 if lora is None else 3)
    assert all(
        torch.equal(value, adapter.state_dict()[name])
        for name, value in loaded.state_dict().items()
    )
    tokens = torch.arange(19)[None]
    with torch.no_grad():
        expected = tiny_model(tokens, tiny_model.project(adapter))
        assert torch.equal(tiny_model(tokens, tiny_model.project(loaded)), expected)


def test_older_versions_read_what_they_know(tuned: Path, tiny_model: Llama) -> None:
    header = read_header(tuned)
    assert to_json(header)["format_version"] == 2
    plain = Adapter(AdapterConfig(), tiny_model.config)
    save_adapter(tuned, plain, fingerprint(tiny_model, "tiny"))
    content = to_json(read_header(tuned))
    assert content["format_version"] == 1
    assert not {"linears", "origin"} & content.keys()
    with pytest.raises(ValueError, match="header has unknown fields: linears"):
        from_json(content | {"linears": ["wq"]}, "file")


VISUAL = VisualConfig(11, (7, 5), "gelu", "random numbers", scales=Scales((3, 5), "mean"))


def test_an_adapter_of_images_keeps_its_projector(tiny_model: Llama, tmp_path: Path) -> None:
    g, path = torch.Generator().manual_seed(3), tmp_path / "adapter.safetensors"
    adapter = Adapter(AdapterConfig(), tiny_model.config, generator=g, visual=VISUAL)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=1.5, generator=g)
    save_adapter(path, adapter, fingerprint(tiny_model, "tiny"))
    header = read_header(path)
    assert header.visual == VISUAL
    assert header.groups == ("prompts", "gates", "projector")
    assert to_json(header)["format_version"] == 3
    loaded = load_adapter(path, tiny_model, "tiny")
    features = torch.randn(2, 11, generator=g)
    assert torch.equal(loaded.visual_tokens(features), adapter.visual_tokens(features))
    assert list(loaded.groups()) == list(adapter.groups())


EARLY = replace(VISUAL, fusion="early", tokens=3, layers=2)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_images_fused_early_keep_their_gates(scope: str, tiny_model: Llama, tmp_path: Path) -> None:
    g, path = torch.Generator().manual_seed(3), tmp_path / "adapter.safetensors"
    settings = AdapterConfig(gate_scope=scope, prompt_length=4)
    adapter = Adapter(settings, tiny_model.config, generator=g, visual=EARLY)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=1.5, generator=g)
    save_adapter(path, adapter, fingerprint(tiny_model, "tiny"))
    header, tensors = read_adapter(path)
    assert header.visual == EARLY
    assert header.groups == ("prompts", "gates", "projector", "visual_gates")
    assert tensors["visual_gates"].shape == (2, 6 if scope == "head" else 1)
    assert header.layers == (2, 3)
    loaded = load_adapter(path, tiny_model, "tiny")
    tokens, ids = adapter.visual_tokens(torch.randn(2, 11, generator=g)), torch.arange(38)
    with torch.no_grad():
        expected, got = (
            tiny_model(ids.view(2, 19), tiny_model.project(one, tokens))
            for one in (adapter, loaded)
        )
    assert torch.equal(got, expected)
    content = to_json(header)
    for change, message in (
        ({"groups": ["prompts", "gates", "projector"]}, "do not go with visual VisualConfig"),
        ({"visual": content["visual"] | {"layers": 5}}, "visual layers must be at most 4, got 5"),
        ({"visual": content["visual"] | {"layers": 0}}, "layers must be at least 1 for early"),
        (
            {"visual": content["visual"] | {"fusion": "late"}},
            "1 for early fusion and 0 for late",
        ),
        ({"visual": content["visual"] | {"fusion": "deep"}}, "fusion must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json(json.loads(json.dumps(content | change)), "file")


SEEN: dict[str, Any] = json.loads(json.dumps(asdict(VISUAL)))
SCALES: dict[str, Any] = SEEN["scales"]
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"visual": None}, r"groups \('prompts', 'gates', 'projector'\) do not go with visual None"),
    ({"groups": ["prompts", "gates"]}, "do not go with visual VisualConfig"),
    ({"visual": {"features": 11}}, "visual has missing fields: activation, encoder, fusion, hid"),
    ({"visual": SEEN | {"scales": {"pool": "cls"}}}, "scales has missing fields: layers"),
    ({"visual": SEEN | {"scales": SCALES | {"layers": [0]}}}, "scales: layers must be numbers"),
    ({"visual": SEEN | {"scales": SCALES | {"layers": 4}}}, "scales: layers must be .*, got 4"),
    ({"visual": "clip"}, "visual must be .*VisualConfig.*, got 'clip'"),
    ({"format_version": 2}, "header has unknown fields: lora, visual"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_what_does_not_go_with_images_is_named(
    change: dict[str, Any], message: str, tiny_model: Llama, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    adapter = Adapter(AdapterConfig(), tiny_model.config, visual=VISUAL)
    save_adapter(path, adapter, fingerprint(tiny_model, "tiny"))
    content = json.loads(json.dumps(to_json(read_header(path))))
    from_json(content, "file")
    with pytest.raises(ValueError, match=message):
        from_json(content | change, "file")


def test_every_flipped_bit_of_every_group_is_found(tuned: Path) -> None:
    data = bytearray(tuned.read_bytes())
    rng = random.Random(5)
    for bit in rng.sample(range(len(data) * 8), 1500):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="damaged"):
            decode(bytes(data), "file")
        data[bit // 8] ^= 1 << bit % 8


def changed_json(value: Any, rng: random.Random) -> Any:
    """The same JSON with one thing in it replaced, removed or added."""
    odd = [None, True, -1, 0, 10**30, 1.5, float("nan"), "", "x" * 300, [], [[]], {}, {"a": 1}, [7]]
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        kind = rng.random()
        if kind < 0.7:
            value[key] = changed_json(value[key], rng)
        elif kind < 0.85:
            del value[key]
        elif isinstance(value, dict):
            value[f"{key}_more"] = rng.choice(odd)
        else:
            value.append(rng.choice([*odd, value[key]]))
        return value
    return rng.choice(odd)


def fuzz_header(path: Path, count: int) -> None:
    """A header with a valid hash is read as it is, or refused in one line."""
    rng, data, refused = random.Random(4), path.read_bytes(), 0
    for _ in range(count):
        path.write_bytes(data)
        rewrite(path, lambda header: changed_json(header, rng))
        try:
            header, tensors = read_adapter(path)
        except ValueError as error:
            message = str(error)
            assert str(path) in message
            assert "\n" not in message
            refused += 1
        else:
            assert header.tuning == TUNING
            assert tensors["bias_w2"].shape == (4, 48)
    assert refused > count / 2


def test_changed_headers_are_read_or_refused(tuned: Path) -> None:
    fuzz_header(tuned, 200)


@pytest.mark.slow
def test_a_thousand_changed_headers_are_read_or_refused(tuned: Path) -> None:
    fuzz_header(tuned, 1000)


ERRORS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda header: header["groups"].reverse(), "groups must be some of"),
    (lambda header: header.update(groups=[]), "groups .* do not go with 2 adapted layers"),
    (lambda header: header.update(layers=[]), "groups .* do not go with 0 adapted layers"),
    (lambda header: header["groups"].remove("scale"), r"scale_side must be one of \(None,\)"),
    (lambda header: header["groups"].remove("norm"), "has surplus tensors: attention_norm"),
    (lambda header: header["linears"].append("wk"), "linears must be some of"),
    (lambda header: header.update(linears=["wq"]), "has surplus tensors: bias_output"),
    (lambda header: header.update(scale_side="output"), r"scale_w2 must have shape \(4, 48\)"),
    (lambda header: header.update(scale_side=None), "scale_side must be one of"),
    (lambda header: header["base"]["samples"].clear(), "base must have 240 sampled weights"),
    (lambda header: header["base"]["shape"].pop("dim"), "base shape must have dim, n_layers"),
    (
        lambda header: (
            header.update(origin="chat65b"),
            header["base"]["samples"].clear(),
            header["base"]["shape"].pop("n_layers"),
        ),
        "base shape must have n_layers",
    ),
    (
        lambda header: (
            header.update(origin="chat65b"),
            header["base"]["samples"].clear(),
            header["base"]["shape"].pop("hidden_dim"),
        ),
        "base shape must have hidden_dim",
    ),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=range(len(ERRORS)))
def test_what_a_header_must_not_say_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tuned: Path
) -> None:
    rewrite(tuned, change)
    with pytest.raises(ValueError, match=message):
        read_adapter(tuned)


def test_an_adapter_from_elsewhere_is_checked_by_shape(tuned: Path, tiny_model: Llama) -> None:
    rewrite(tuned, lambda header: (header.update(origin="peft"), header["base"]["samples"].clear()))
    with pytest.warns(UserWarning, match="comes from peft, which does not tell its base"):
        load_adapter(tuned, tiny_model, "any")
    rewrite(tuned, lambda header: header["base"]["shape"].update(kv_heads=3))
    with pytest.raises(ValueError, match="kv_heads 3 and 2"):
        load_adapter(tuned, tiny_model, "any")
