"""Importing is free of side effects, and the name `kernels` stays Hugging Face's."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n{code}"
    # torch's compiler leaves one in the environment of whoever has imported it
    environment = {k: x for k, x in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_source_root_is_no_package() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_prints_nothing_and_touches_no_gpu() -> None:
    done = run(
        "import os; before = dict(os.environ)\n"
        "import adapter_kernels, llama_adapter.model, llama_adapter.cli, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert dict(os.environ) == before\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_without_triton() -> None:
    done = run(
        "sys.modules['triton'] = None\n"
        "import torch, adapter_kernels as a\n"
        "q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)\n"
        "print(tuple(a.zero_init_attention(q, k, k).shape))"
    )
    assert (done.returncode, done.stdout) == (0, "(1, 3, 2, 8)\n"), done.stderr


def test_command_line_does_not_import_heavy_optional_packages() -> None:
    heavy = (
        "{'transformers', 'peft', 'matplotlib', 'tensorboard', 'accelerate', 'torchao', "
        "'tokenizers', 'tiktoken', 'yaml'}"
    )
    done = run(f"import llama_adapter.cli; print(sorted({heavy} & set(sys.modules)))")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_transformers_imports_from_the_repository_root() -> None:
    done = run("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)")
    assert (done.returncode, done.stdout) == (0, "LlamaForCausalLM\n"), done.stderr
