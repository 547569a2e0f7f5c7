"""What is installed here, which backend runs where, and what is wrong with it."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

import adapter_kernels

PACKAGE = "llama-adapter-kernels"
# extras whose packages are used where they are installed
OPTIONAL = ("hf", "quant", "eval")
# the oldest GPUs with kernels
CAPABILITY = (8, 0)
KERNELS = (
    "triton and hybrid for attention, triton for rms_norm, apply_rotary, write_cache, swiglu and "
    "linear_cross_entropy"
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(problems: list[str]) -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    seen = set()
    for line in importlib.metadata.requires(PACKAGE) or []:
        need = Requirement(line)
        wanted = not need.marker or need.marker.evaluate({"extra": ""})
        offered = need.marker is not None and any(
            need.marker.evaluate({"extra": extra}) for extra in OPTIONAL
        )
        if need.name in seen or not (wanted or offered):
            continue
        seen.add(need.name)
        found = _version(need.name)
        absent = "not installed" if wanted else "not installed (optional)"
        yield need.name, found or absent
        remedy = f"pip install '{need.name}{need.specifier}'"
        if found is None and wanted:
            problems.append(f"{need.name} is missing: {remedy}")
        elif found is not None and not need.specifier.contains(found, prereleases=True):
            problems.append(f"{need.name} {found} does not fit {need.specifier}: {remedy}")


def _devices(problems: list[str]) -> Iterator[tuple[str, str]]:
    backends = "hybrid for attention, reference for the rest"
    if _cxx() is not None:
        backends = f"native for decoding in float32, {backends}"
    yield "cpu", f"{torch.get_num_threads()} threads, backends: {backends}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, no usable GPU" if built else "torch is a CPU build"
        yield "cuda", f"none ({why})"
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        backends = KERNELS if _runs_kernels(index) else "reference"
        yield f"cuda:{index}", f"{name}, sm_{major}{minor}, {memory}, backends: {backends}"
        if (major, minor) < CAPABILITY:
            problems.append(f"cuda:{index} is sm_{major}{minor}: bfloat16 needs sm_80 or newer")


def _cxx() -> str | None:
    """The C++ compiler that torch takes for a CPU's operations, CXX first."""
    named = shlex.split(os.environ.get("CXX", "c++"))
    return shutil.which(named[0]) if named else None


def _runs_kernels(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    return capability >= CAPABILITY and _version("triton") is not None


def _compiler(problems: list[str]) -> str:
    """The C compiler with which Triton makes what launches its kernels, looked for as Triton does.

    Source: triton/runtime/build.py of 3.6 and 3.7. It takes CC as the name of one program.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = any(_runs_kernels(index) for index in range(gpus))
    named = os.environ.get("CC")
    if needed:
        # these schemes differ on Debian, and the headers are in the second one's folder
        scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
        header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
        if not header.is_file():
            problems.append(f"triton needs {header}: apt install python3-dev")
    if named is not None:
        found, absent = shutil.which(named), f"none: CC={named} is no program on the PATH"
        problem = f"triton needs a C compiler, and CC={named} is no program: unset or correct CC"
    else:
        found, absent = shutil.which("gcc") or shutil.which("clang"), "none"
        problem = "triton needs a C compiler: apt install gcc, or set CC"
    if found is not None:
        return found
    if needed:
        problems.append(problem)
        return absent
    return f"{absent} (needed with a GPU)"


def _imports(problems: list[str]) -> None:
    """Known ways in which an environment breaks the imports of this package and its neighbours."""
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            problems.append(
                f"torchvision does not fit torch {torch.__version__} ({reason}), which breaks "
                "transformers: pip uninstall torchvision"
            )
    kernels = importlib.util.find_spec("kernels")
    if kernels is not None and kernels.origin is not None:
        here = Path(adapter_kernels.__file__).parents[1]
        if Path(kernels.origin).parent == here:
            problems.append(f"{kernels.origin} must not exist: it hides Hugging Face's `kernels`")


def report() -> tuple[list[tuple[str, str]], list[str]]:
    """Look at the environment.

    Returns:
        Facts as (name, value) pairs, and problems with their remedies, one line each.
    """
    problems: list[str] = []
    version = _version(PACKAGE)
    facts = [("llama-adapter", version or "not installed")]
    if version is None:
        problems.append(f"{PACKAGE} is not installed here: pip install .")
        return [*facts, *_devices(problems)], problems
    facts += [*_packages(problems), *_devices(problems)]
    facts.append(("C compiler", _compiler(problems)))
    facts.append(("C++ compiler", _cxx() or "none (a CPU decodes half as fast without)"))
    _imports(problems)
    return facts, problems


def main() -> int:
    """Print the report; returns 0 when nothing is wrong, 1 otherwise."""
    facts, problems = report()
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
    for problem in problems:
        print(f"problem: {problem}")
    print("everything needed is here" if not problems else f"{len(problems)} problem(s) found")
    return 1 if problems else 0
