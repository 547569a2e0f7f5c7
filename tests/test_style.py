"""House style that a machine can check: lengths, docstrings, mirrored tests, no suppressions."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "llama_adapter", "benchmarks", "tests", "examples")
LIBRARY = ("kernels", "llama_adapter", "benchmarks")
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_MODEL = 400, 120, 160, 350


def sources(folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_kernel(node: ast.AST) -> bool:
    return any("jit" in ast.dump(decorator) for decorator in getattr(node, "decorator_list", []))


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", sources(FOLDERS), ids=name)
def test_lengths(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = MAX_MODEL if name(path) == "llama_adapter/model.py" else MAX_FILE
    # test files hold many cases side by side and may be longer
    assert len(text.splitlines()) <= (2 * limit if "tests" in path.parts else limit)
    for function in functions(ast.parse(text)):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= (MAX_KERNEL if is_kernel(function) else MAX_FUNCTION), function.name


@pytest.mark.parametrize("path", sources(LIBRARY), ids=name)
def test_docstrings_and_annotations(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not tree.body:
        return
    module = ast.get_docstring(tree) or ""
    assert 1 <= len(module.splitlines()) <= 8, "module docstring of 1 to 8 lines"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for function in functions(tree):
        if is_kernel(function):
            continue
        assert function.returns is not None, f"{function.name} has no return annotation"
        arguments = [*function.args.args, *function.args.kwonlyargs]
        for argument in arguments:
            if argument.arg not in ("self", "cls"):
                assert argument.annotation is not None, f"{function.name}: {argument.arg}"


@pytest.mark.parametrize("path", sources(FOLDERS), ids=name)
def test_no_suppressions_and_no_leftovers(path: Path) -> None:
    if path.name == "test_style.py":
        return
    text = path.read_text(encoding="utf-8")
    for bad in (
        r"# noqa",
        r"# type: ignore",
        r"\bTODO\b",
        r"\bFIXME\b",
        r"except Exception",
        r"except:",
    ):
        assert not re.search(bad, text), bad
    for found in re.findall(r"# pyright: ignore.*", text):
        assert re.fullmatch(r"# pyright: ignore\[report\w+\]", found), f"{found}: name the rule"
    assert path.name != "utils.py"


def test_tests_mirror_the_packages() -> None:
    here = {name(path) for path in sources(("tests",))}
    tests = " ".join(here)
    for package, root in (("adapter_kernels", "kernels/adapter_kernels"), ("llama_adapter",) * 2):
        for path in sorted((ROOT / root).rglob("*.py")):
            inner = path.relative_to(ROOT / root)
            if path.name == "__init__.py" or not path.read_text(encoding="utf-8").strip():
                continue
            wanted = f"tests/{package}/{inner.parent / ('test_' + inner.stem)}".replace("/./", "/")
            assert wanted in tests, f"{name(path)} has no {wanted}*.py"


def test_lint_excludes_nothing() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert not {"exclude", "extend-exclude", "per-file-ignores"} & {*ruff, *ruff["lint"]}
    assert len(ruff["lint"].get("ignore", [])) <= 6


def test_every_extra_dependency_has_a_reason() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    reasons = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = set(re.findall(r"\"([a-z][a-z-]*)(?:\[[a-z]+\])?>=", setup.replace("'", '"')))
    assert {"torch", "triton", "numpy", "safetensors", "sentencepiece", "tqdm"} <= packages
    for package in packages:
        assert f"`{package}`" in reasons, f"{package} has no reason in CONTRIBUTING.md"
