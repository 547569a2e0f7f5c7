"""Every line of the README's table "your weights, your code" runs as it is printed there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig as HostConfig
from transformers import LlamaForCausalLM

from llama_adapter import assets
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.cli import main
from llama_adapter.config import AdapterConfig
from tests.llama_adapter.checkpoints import adapter_samples
from tests.llama_adapter.hf_models import host, peft_model

ROOT = Path(__file__).parents[1]
TABLE = re.search(
    r"### Your weights, your code\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), flags=re.DOTALL
)
assert TABLE is not None
ROWS = [line.strip("| ").split(" | ") for line in TABLE[1].splitlines()[2:]]
# the first piece of code of each row is the line to write
LINES = {have: re.findall(r"`([^`]+)`", line) for have, line in ROWS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the table speaks of, as their programs would have left them."""
    found = tmp_path_factory.mktemp("table")
    torch.manual_seed(3)
    config = HostConfig(
        hidden_size=32, intermediate_size=88, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=1200, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(found / "base")
    shutil.copy(assets.BASE / "tokenizer.model", found / "base")
    torch.save(adapter_samples.prompt_tensors(), found / "official.pth")
    torch.save({"model": adapter_samples.litgpt_tensors()}, found / "lit_model.pth.adapter")
    content = {"model": adapter_samples.multimodal_tensors() | adapter_samples.visual_tensors()}
    settings = {"w_bias": True, "w_lora": False, "lora_rank": 16}
    torch.save(content | {"config": settings}, found / "multimodal.pth")
    (found / "peft").mkdir()
    save_file(adapter_samples.peft_tensors(), found / "peft" / "adapter_model.safetensors")
    description = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 10, "adapter_layers": 2}
    description |= {"target_modules": "self_attn", "task_type": "CAUSAL_LM"}
    (found / "peft" / "adapter_config.json").write_text(json.dumps(description))
    base = load_base(found / "base")
    config = AdapterConfig(prompt_length=10, n_layers=2, gate_scope="layer")
    layer = Adapter(config, base.model.config)
    torch.nn.init.normal_(layer.gates)
    save_adapter(found / "layer.safetensors", layer, fingerprint(base.model, base.name))
    return found


COMMANDS = [have for have, code in LINES.items() if code[0].startswith("llama-adapter ")]


@pytest.mark.parametrize("have", COMMANDS)
def test_a_command(
    have: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(LINES[have][0])[1:]
    for extra in ([], *[shlex.split(more) for more in LINES[have][1:] if more.startswith("--")]):
        assert main([*words, *extra]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.strip()
        if words[0] == "convert" and words[-1] != "peft":
            assert main(["info", words[2]]) == 0
            # what was converted answers, on its base
            rest = ["--base", "base", "--adapter", words[2], "--max-new-tokens", "2"]
            assert main(["generate", "Hello", *rest]) == 0, capsys.readouterr().err
            capsys.readouterr()


def test_python_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(LINES["a folder of PEFT"][0])[1:]
    assert main(words) == 0
    codes = [
        code for code in LINES.values() if not code[0].startswith(("llama-adapter ", "python"))
    ]
    for code, *rest in codes:
        scope: dict[str, Any] = {"AdapterConfig": AdapterConfig, "torch": torch}
        if code.startswith("from adapter_kernels"):
            exec(code, scope)
            assert callable(scope["zero_init_attention"])
            continue
        module, *others = rest
        scope["model"] = peft_model(host()) if code.startswith("patch") else host()
        name = re.search(r"(\w+)\(", code)
        assert name is not None
        exec(f"from {module} import {name[1]}\n{code}", scope)
        with torch.no_grad():
            logits = scope["model"](input_ids=torch.tensor([[5, 7, 11]])).logits
        assert bool(logits.isfinite().all())
        assert not [one for one in others if one not in ("AdapterConfig()", "llama_adapter.hosts")]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_of_lm_eval(folder: Path, tmp_path: Path) -> None:
    """The line as printed, but for a task that needs no network."""
    convert = shlex.split(LINES["a folder of PEFT"][0])[1:]
    os.chdir(folder)
    assert main(convert) == 0
    (tmp_path / "data.jsonl").write_text('{"text": "Say hello.", "choices": ["hello", "ash"]}\n')
    (tmp_path / "toy.yaml").write_text(
        "task: arc_easy_here\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {tmp_path / 'data.jsonl'}\ntest_split: train\n"
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: 0\n"
    )
    line = LINES["tasks of lm-evaluation-harness"][0].replace("arc_easy", "arc_easy_here")
    words = [*shlex.split(line)[1:], "--include_path", str(tmp_path)]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arc_easy_here" in done.stdout


def test_every_line_is_one_of_these() -> None:
    python = [have for have in LINES if have not in COMMANDS]
    assert len(COMMANDS) == 7
    assert python == [
        "a PEFT adaption-prompt model in Python",
        "LLaMA, Mistral or Qwen2 of transformers",
        "transformers' Trainer, to resume or to load the best model",
        "a loaded transformers model: LLaMA, Mistral, Qwen2, ViT, BERT, RoBERTa, CLIP",
        "tasks of lm-evaluation-harness",
        "attention of your own",
    ]
