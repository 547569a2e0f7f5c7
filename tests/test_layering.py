"""Imports go downwards only, as CONTRIBUTING.md draws them."""

import ast
from pathlib import Path

import pytest

import adapter_kernels

ROOT = Path(__file__).parents[1]

# top-level modules of llama_adapter, lowest first; a module may import from lower rows only
LAYERS = (
    {"vision"},
    {
        "caches",
        "config",
        "assets",
        "float8",
        "options",
        "quiet",
        "recompute",
        "seeded",
        "tuning",
        "world",
    },
    {"layers", "projector", "recipe", "tuned_modules", "utilisation"},
    {"adapter", "cache", "packing", "rotary_angles", "tokenizer", "sampling"},
    {"completion"},
    {"model"},
    {"adapter_bank", "decoder", "sharding"},
    {"checkpoints"},
    {"loss_curve", "multimodal", "step_profile"},
    {"hosts"},
    {"data", "run_folder", "convert"},
    {"tasks"},
    {"trainer", "engine"},
    {"training", "generation", "host_training"},
    {"answering", "integrations"},
    {"evaluation", "generate_command"},
    {"chat_command", "quickstart", "doctor"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# modules of adapter_kernels: what each may import from the package, by file stem
KERNEL_LEAVES = {"checks", "arch", "backend", "reference"}
KERNEL_ORDER = {"configs": {"arch"}, "forward": {"configs"}, "backward": {"configs"}}


def imported(path: Path) -> list[str]:
    """Dotted names that a file imports, relative imports resolved."""
    package = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).parent.parts
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            names.append(module)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("llama_adapter"), ids=lambda p: str(p.relative_to(ROOT)))
def test_llama_adapter_imports_lower_layers_only(path: Path) -> None:
    own = path.relative_to(ROOT / "llama_adapter").with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} has no row in LAYERS"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "llama_adapter" and len(parts) > 1 and parts[1] != own:
            assert LEVEL[parts[1]] < LEVEL[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sources("llama_adapter"), ids=lambda p: str(p.relative_to(ROOT)))
def test_llama_adapter_uses_public_kernel_names_only(path: Path) -> None:
    public = {"adapter_kernels", *(f"adapter_kernels.{name}" for name in adapter_kernels.__all__)}
    used = {name for name in imported(path) if name.split(".")[0] == "adapter_kernels"}
    assert used <= public


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_above_them(path: Path) -> None:
    used = imported(path)
    assert not [name for name in used if name.split(".")[0] in ("llama_adapter", "benchmarks")]
    own = {name.split(".")[-1] for name in used if name.startswith("adapter_kernels.")}
    if path.stem == "reference":
        assert {name.split(".")[0] for name in used} <= {"torch", "math", "typing", "dataclasses"}
    if path.stem in KERNEL_LEAVES:
        assert not own & {"op", "forward", "backward", "decode", "configs"}
    if path.stem in KERNEL_ORDER:
        assert "op" not in own


def test_nobody_imports_the_source_root() -> None:
    for folder in ("kernels", "llama_adapter", "benchmarks", "tests", "examples"):
        for path in sources(folder):
            tops = {name.split(".")[0] for name in imported(path)}
            assert "kernels" not in tops, f"{path} imports kernels, a source root"
