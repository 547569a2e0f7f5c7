"""Do `llama-adapter convert` and `info` bring adapters over and say what was assumed?"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from llama_adapter import assets
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import load_adapter, save_adapter
from llama_adapter.checkpoints.adapter_formats import WRITERS
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.cli import main
from llama_adapter.config import AdapterConfig, VisualConfig
from tests.llama_adapter.checkpoints.adapter_samples import chat_tensors, prompt_tensors, save


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of one command."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_an_official_adapter_becomes_ours_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(assets.BASE)
    config = base.model.config
    tensors = {"adapter_query.weight": torch.randn(10, config.dim)}
    for layer in range(config.n_layers):
        gate = torch.randn(1, config.n_heads, 1, 1) * (layer == config.n_layers - 1)
        tensors[f"layers.{layer}.attention.gate"] = gate
    source, target = save(tensors, tmp_path / "v1.pth"), tmp_path / "ours.safetensors"
    code, out, _ = run(capsys, "convert", source, target, "--to", "llama-adapter")
    assert code == 0
    assert "official" in out
    assert "gates: tanh (official's convention), one per head" in out
    with pytest.warns(UserWarning, match="its shape fits 'any', its weights are not known"):
        adapter = load_adapter(target, base.model, "any")
    assert torch.equal(adapter.prompts[0], tensors["adapter_query.weight"])
    options = ["--to", "llama-adapter", "--base", assets.BASE, "--gate-activation", "identity"]
    code, out, _ = run(capsys, "convert", source, target, *options)
    assert code == 0
    assert "identity (as told)" in out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(target, base.model, "any")
    code, out, _ = run(capsys, "generate", "Hello", "--adapter", target, "--max-new-tokens", 3)
    assert code == 0


@pytest.mark.parametrize("output", ["| true", ">&-"])
def test_a_written_file_is_a_success_whoever_reads_the_report(output: str, tmp_path: Path) -> None:
    source, target = save(prompt_tensors(), tmp_path / "v1.pth"), tmp_path / "ours.safetensors"
    command = [sys.executable, "-m", "llama_adapter", "convert", source, target, "--to"]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {output}; exit ${{PIPESTATUS[0]}}', "_", *command, "llama-adapter"],
        capture_output=True,
        text=True,
        # as users run it: buffered, so that the reader's absence shows at a flush
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert target.is_file()


def test_info_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = prompt_tensors()
    path = save(tensors, tmp_path / "v1.pth")
    code, out, _ = run(capsys, "info", path)
    gates = torch.stack([tensors[f"layers.{i}.attention.gate"] for i in (2, 3)]).tanh()
    assert code == 0
    assert "format      official" in out
    assert "layers      2: 2, 3" in out
    assert "prompts     10 per layer, hidden" in out
    assert f"multipliers from {gates.min():.3f} to {gates.max():.3f}" in out
    assert f"(648 parameters, {path.stat().st_size:,} bytes)" in out
    assert "fits        no published LLaMA (by shape)" in out
    assert "note        gates: tanh (official's convention), one per head" in out


@pytest.mark.parametrize("fusion", [(), ("early", 3, 2)], ids=["late", "early"])
def test_an_adapter_of_images_is_told_and_its_projector_not_lost(
    fusion: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = load_base(assets.BASE).model, tmp_path / "a.safetensors"
    config = AdapterConfig(gate_activation="identity", gate_scope="layer")
    visual = VisualConfig(11, (7, 5), "silu", "random numbers", *fusion)
    adapter = Adapter(config, model.config, visual=visual)
    if adapter.visual_gates is not None:
        torch.nn.init.constant_(adapter.visual_gates, -1.25)
    save_adapter(path, adapter, fingerprint(model, "tiny"))
    assert main(["info", str(path)]) == 0
    said = "images      11 features of random numbers; projector's hidden widths 7, 5"
    out = capsys.readouterr().out
    assert said in out
    early = "fusion      early: 3 tokens in the first 2 layers, multipliers from -1.250 to -1.250"
    assert (early in out) == ("early" in fusion)
    for name in WRITERS:
        out = tmp_path / f"as_{name}"
        code = main(["convert", str(path), str(out), "--to", name])
        if name == "llama-adapter":
            assert code == 0
            again = load_adapter(out, model, "tiny")
            for key, value in adapter.state_dict().items():
                assert torch.equal(again.state_dict()[key], value), key
        else:
            assert code == 2
            said = f"{name} holds no projector of images, and the adapter has one"
            assert said in capsys.readouterr().err
            assert not out.exists()


def test_info_of_a_7b_adapter_names_its_bases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"adapter_query.weight": torch.randn(300, 4096)}
    for layer in range(32):
        tensors[f"layers.{layer}.attention.gate"] = torch.randn(1, 32, 1, 1) * (layer > 1)
    code, out, _ = run(capsys, "info", save(tensors, tmp_path / "v1.pth"))
    assert code == 0
    assert "fits        llama-7b, llama-2-7b, llama-3-8b, llama-3.1-8b (by shape)" in out


def test_what_cannot_be_told_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = save(prompt_tensors(), tmp_path / "v1.pth")
    chat = save({"model": chat_tensors(prompts=False)}, tmp_path / "chat.pth")
    for words, message in (
        ((heads, "--to", "peft"), "peft holds one gate per layer"),
        ((chat, "--to", "official"), "name the base, with --base"),
        ((heads, "--to", "official", "--prompt-length", 7), "must hold 7 rows"),
        ((heads, "--to", "official", "--prompt-length", 0), "--prompt-length must be at least 1"),
        ((heads, "--to", "official", "--base", tmp_path / "absent"), "does not exist"),
        ((heads, "--to", "official", "--base", "llama-7b"), "base given has"),
        ((tmp_path / "absent", "--to", "official"), "absent does not exist"),
    ):
        source, *rest = words
        code, _, err = run(capsys, "convert", source, tmp_path / "out", *rest)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_writer_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in WRITERS)
