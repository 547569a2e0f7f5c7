"""Run the tests that lean on a neighbour's version against its oldest and newest supported ones.

Each row's packages are installed into a folder of their own, which comes first on the path of a
fresh pytest process; packages that bring many of their own get an environment of their own.
`make test-all` runs this.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"


@dataclass(frozen=True)
class Row:
    """Packages in place of the pinned ones, the tests that must pass with them, and their world."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    # packages that nothing else here needs come with all that they need
    dependencies: bool = False
    # which of the tests, as pytest's -m takes it
    marks: str = "not slow"


KERNEL_TESTS = (
    "tests/adapter_kernels/zero_init_attention/test_tiles.py",
    "tests/adapter_kernels/zero_init_attention/test_forward.py",
    "tests/adapter_kernels/zero_init_attention/test_backward_dq.py",
    "tests/adapter_kernels/zero_init_attention/test_backward_prompt.py",
)
MODEL_TESTS = (
    "tests/llama_adapter/test_model.py",
    "tests/llama_adapter/test_tokenizer.py",
    "tests/llama_adapter/checkpoints/test_hugging_face.py",
    "tests/llama_adapter/checkpoints/test_load_base_formats.py",
    "tests/test_imports.py",
)
LM_EVAL_TESTS = (
    "tests/llama_adapter/integrations/test_lm_eval.py",
    "tests/llama_adapter/evaluation/test_open_llm_tasks.py",
    "tests/test_readme_table.py",
)
LITGPT_TESTS = (
    "tests/llama_adapter/checkpoints/test_litgpt.py",
    "tests/llama_adapter/checkpoints/test_adapter_litgpt.py",
    "tests/benchmarks/test_train_step.py",
    "tests/benchmarks/test_train_step_litgpt.py",
)
HF_TESTS = (
    *MODEL_TESTS,
    "tests/llama_adapter/checkpoints/test_adapter_peft.py",
    "tests/llama_adapter/hosts",
    "tests/llama_adapter/tasks",
    "tests/llama_adapter/multimodal",
    "tests/llama_adapter/host_training",
    "tests/llama_adapter/evaluation/test_host_command.py",
    "tests/llama_adapter/integrations",
)
# transformers wants a newer safetensors than we do, so these do without it
FILE_TESTS = (
    "tests/llama_adapter/checkpoints/test_adapter_file.py",
    "tests/llama_adapter/checkpoints/test_train_state.py",
    "tests/benchmarks/test_loading.py",
)
OLDEST = ("transformers==5.10.1", "tokenizers==0.22.2", "peft==0.18.0")
NEWEST = ("transformers==5.23.0", "peft==0.21.2")
REAL_SHAPES = ("tests/llama_adapter/hosts/test_real_shapes.py",)
ROWS = (
    Row(OLDEST, HF_TESTS),
    Row(OLDEST, REAL_SHAPES, marks="slow"),
    Row(NEWEST, HF_TESTS),
    Row(NEWEST, REAL_SHAPES, marks="slow"),
    Row(("lm-eval[hf]==0.4.13",), LM_EVAL_TESTS, dependencies=True),
    # with what it imports: all that it asks for would bring a hub too old for our transformers
    Row(
        (
            "litgpt==0.5.13",
            "lightning==2.6.6",
            "pytorch-lightning==2.6.6",
            "lightning-utilities==0.15.3",
            "torchmetrics==1.9.0",
            "jsonargparse==4.41.0",
        ),
        LITGPT_TESTS,
    ),
    Row(("safetensors==0.5.3",), FILE_TESTS),
    Row(("torchao==0.17.0",), ("tests/llama_adapter/checkpoints/test_quantize.py",)),
    Row(("sentencepiece==0.2.1",), ("tests/llama_adapter/test_tokenizer.py",)),
    Row(("numpy==1.26.4",), ("tests/adapter_kernels", "tests/llama_adapter/test_model.py")),
    Row(("triton==3.6.0",), ("tests/benchmarks/test_ahead_of_time.py",)),
    # this version's interpreter fails with numpy 2.4
    Row(("triton==3.6.0", "numpy==1.26.4"), KERNEL_TESTS, {"TRITON_INTERPRET": "1"}),
)


def run(row: Row) -> int:
    """Install one row and run its tests; returns pytest's exit code."""
    target = FOLDER / "+".join(row.packages).replace("==", "-")
    python, inherited = sys.executable, os.environ.get("PYTHONPATH")
    path = [inherited] if inherited else []
    if row.dependencies:
        python = own_environment(target, row.packages)
    else:
        path = [str(target), *path]
        if not target.exists():
            install = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*install, "--target", str(target), *row.packages], check=True)
    print(f"== {', '.join(row.packages)}", flush=True)
    command = [python, "-m", "pytest", "-m", row.marks, *row.tests]
    environment = {**os.environ, **row.environment, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def own_environment(target: Path, packages: tuple[str, ...]) -> str:
    """The Python of an environment that sees this one's packages and has others of its own."""
    python = target / "bin" / "python"
    ready = target / "ready"
    if not ready.exists():
        venv.create(target, with_pip=True, clear=True)
        own = sysconfig.get_path("purelib", "venv", {"base": str(target)})
        # pip leaves alone what lies outside of its environment
        (Path(own) / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet"]
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*install, *constraints, *packages], check=True)
        ready.touch()
    return str(python)


def main() -> int:
    """Run every row; returns 1 if any failed."""
    failed = [row.packages for row in ROWS if run(row) != 0]
    for packages in failed:
        print(f"failed with {', '.join(packages)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
