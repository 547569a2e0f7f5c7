"""What is installed: every folder of code, the bundled files, and a command that works."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def folders_with_code(root: Path) -> set[str]:
    return {
        ".".join(path.parent.relative_to(root).parts)
        for path in root.rglob("__init__.py")
        if ".venv" not in path.parts and "build" not in path.parts
    }


def setup_arguments() -> dict[str, object]:
    code = (
        "import json, runpy, sys, setuptools; got = {}\n"
        "setuptools.setup = lambda **given: got.update(given)\n"
        "runpy.run_path('setup.py')\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(got))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_package_list_is_the_folders() -> None:
    # a package missing from the list is silently absent from the wheel
    packages = setup_arguments()["packages"]
    assert isinstance(packages, list)
    kernels = folders_with_code(ROOT / "kernels")
    library = {f"llama_adapter.{name}" for name in folders_with_code(ROOT / "llama_adapter")}
    library = {name.rstrip(".") for name in library}
    assert set(packages) == kernels | library


def test_every_module_folder_is_a_package() -> None:
    for root in (ROOT / "kernels" / "adapter_kernels", ROOT / "llama_adapter"):
        for path in root.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.slow
def test_wheel_holds_code_and_assets_and_runs_outside_the_tree(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("native.cpp", "native_arguments.h", "native_arithmetic.h"):
        assert f"adapter_kernels/{name}" in names
    for folder in ("kernels/adapter_kernels", "llama_adapter"):
        for path in (ROOT / folder).rglob("*.py"):
            wanted = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT)
            assert str(wanted) in names
    for asset in (ROOT / "llama_adapter" / "assets").rglob("*"):
        if asset.is_file() and "__pycache__" not in asset.parts:
            assert str(asset.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]

    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    code = "import sys; from llama_adapter.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "Hello", "--max-new-tokens", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
