"""What was trained comes back bit by bit, onto its host and with its options, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from llama_adapter.checkpoints.train_state import content_hash
from llama_adapter.cli import main
from llama_adapter.host_training.method_file import (
    host_fingerprint,
    load_trained,
    result_name,
    save_trained,
)
from llama_adapter.hosts.methods import Attached, MethodOptions, attach
from tests.llama_adapter.tasks.image_hosts import random_clip, random_vit
from tests.llama_adapter.tasks.text_hosts import host, roberta_tokenizer

OPTIONS = MethodOptions(prompt_length=3, reduction=4, rank=2)


def make_host(kind: str) -> Any:
    if kind == "roberta":
        return host(roberta_tokenizer(), labels=3)
    return random_vit(classes=3) if kind == "vit" else random_clip()


def trained(model: Any, method: str, options: MethodOptions = OPTIONS) -> Attached:
    """A method with random numbers, gates above 1 among them."""
    attached = attach(model, method, options, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    state = attached.state_dict()
    attached.load_state_dict(
        {name: 1.5 * torch.randn(x.shape, generator=generator) for name, x in state.items()}
    )
    return attached


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("vit", "zero_init", OPTIONS),
        ("vit", "linear", OPTIONS),
        ("roberta", "lora", OPTIONS),
        ("roberta", "bias", OPTIONS),
        ("roberta", "zero_init", MethodOptions(prompt_length=3, prompt_kind="kv")),
        ("clip", "coop", OPTIONS),
        ("clip", "frozen", OPTIONS),
        ("clip", "zero_init", MethodOptions(prompt_length=3, encoders=("text",))),
        ("clip", "zero_init", MethodOptions(prompt_length=3, encoders=("visual", "text"))),
    ],
)
def test_the_weights_come_back_bitwise(
    kind: str, method: str, options: MethodOptions, tmp_path: Path
) -> None:
    model = make_host(kind)
    known = host_fingerprint(model)
    attached = trained(model, method, options)
    save_trained(tmp_path, attached, known)
    assert (tmp_path / result_name(method, options)).is_file()
    other = make_host(kind)
    again = attach(other, method, options, generator=torch.Generator().manual_seed(9))
    load_trained(tmp_path, again, known)
    expected = attached.state_dict()
    assert expected.keys() == again.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_header_names_method_options_and_host(tmp_path: Path) -> None:
    model = make_host("vit")
    known = host_fingerprint(model)
    save_trained(tmp_path, trained(model, "adapter"), known)
    path = tmp_path / "method.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()["llama-adapter"]
    assert '"method": "adapter"' in header
    assert '"reduction": 4' in header
    first = path.read_bytes()
    save_trained(tmp_path, trained(make_host("vit"), "adapter"), known)
    assert path.read_bytes() == first


def test_info_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_host("vit")
    known = host_fingerprint(model)
    attached = trained(model, "adapter")
    save_trained(tmp_path, attached, known)
    count = sum(value.numel() for value in attached.state_dict().values())
    for path in (tmp_path, tmp_path / "method.safetensors"):
        assert main(["info", str(path)]) == 0
        shown = capsys.readouterr().out
        assert f"method      adapter ({count:,} parameters, " in shown
        assert "options     reduction 4, encoders " in shown
        assert "dim 24, n_layers 2" in shown


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    model = make_host("vit")
    known = host_fingerprint(model)
    attached = trained(model, "adapter")
    with pytest.raises(FileNotFoundError, match=r"method.safetensors does not exist: the run has"):
        load_trained(tmp_path, attached, known)
    save_trained(tmp_path, attached, known)
    path = tmp_path / "method.safetensors"
    narrow = attach(make_host("vit"), "adapter", MethodOptions(prompt_length=3, reduction=8))
    with pytest.raises(ValueError, match=r"method.safetensors must be of options .*'reduction': 8"):
        load_trained(tmp_path, narrow, known)
    side = attach(make_host("vit"), "side", OPTIONS)
    with pytest.raises(ValueError, match=r"must be of method side, got adapter"):
        load_trained(tmp_path, side, known)
    other = random_vit(classes=3, seed=8)
    with pytest.raises(ValueError, match=r"was trained on another model \(one shape, but"):
        load_trained(tmp_path, attached, host_fingerprint(other))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is no file of a trained method, or damaged"):
        load_trained(tmp_path, attached, known)


def test_a_flipped_bit_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_host("vit")
    known = host_fingerprint(model)
    attached = trained(model, "bias")
    save_trained(tmp_path, attached, known)
    path = tmp_path / "method.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged \(its content does not match the hash inside\)"):
        load_trained(tmp_path, attached, known)
    assert main(["info", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"method": "none"},
        {"method": []},
        {"options": None},
        {"options": {}},
        {"host": None},
        {"host": []},
        {"host": {"name": "x", "shape": 3, "samples": []}},
        {"host": {"name": "x", "shape": {"dim": "a"}, "samples": []}},
        {"host": {"name": "x", "shape": {}, "samples": None}},
        {"host": {"name": "x", "shape": {}, "samples": ["a"]}},
    ],
)
def test_a_header_that_says_what_it_must_not_is_one_line(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_host("vit")
    known = host_fingerprint(model)
    attached = trained(model, "bias")
    save_trained(tmp_path, attached, known)
    path = tmp_path / "method.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["llama-adapter"])
    state = load(path.read_bytes())
    del header["sha256"]
    header |= change
    header["sha256"] = content_hash(json.dumps(header), state)
    path.write_bytes(save(state, {"llama-adapter": json.dumps(header)}))
    with pytest.raises(ValueError, match=r"method.safetensors is no file of a trained method"):
        load_trained(tmp_path, attached, known)
    assert main(["info", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_numbers_of_another_type_and_endless_headers_are_refused(tmp_path: Path) -> None:
    model = make_host("vit")
    known = host_fingerprint(model)
    attached = trained(model, "linear")
    save_trained(tmp_path, attached, known)
    path = tmp_path / "method.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["llama-adapter"])
    del header["sha256"]
    state = {name: value.to(torch.int8) for name, value in load(path.read_bytes()).items()}
    header["sha256"] = content_hash(json.dumps(header), state)
    path.write_bytes(save(state, {"llama-adapter": json.dumps(header)}))
    with pytest.raises(ValueError, match=r"must be float32, got torch.int8"):
        load_trained(tmp_path, attached, known)
    path.write_bytes(save(state, {"llama-adapter": "[" * 100_000}))
    with pytest.raises(ValueError, match=r"is no file of a trained method"):
        load_trained(tmp_path, attached, known)
