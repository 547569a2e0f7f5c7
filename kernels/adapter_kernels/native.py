"""Decoding's operations on a CPU in C++ (native.cpp), compiled once per machine when asked for.

The public functions ask these first. Each returns what its public function would, or None for
whatever native.cpp does not take, as everything before `load`: then they go their general way.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from .backend import INTERPRETED

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = ("native_arguments.h", "native_arithmetic.h")
NAME = "adapter_kernels_native"
# by the instructions that torch found, and not the machine's own: homes are shared by machines
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
# a product and a sum are rounded twice, whatever the compiler would make of them
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off"]
# torch's threads are OpenMP's, which Apple's compiler lacks
PARALLEL = ["-fopenmp"] if sys.platform == "linux" else []
# one attempt of a process at a time, and none after one that failed
_lock = threading.Lock()
_failed = False


def takes_nothing(*_: object) -> None:
    """What stands for every operation until it is compiled."""


rms_norm: Callable[..., Any] = takes_nothing
linear: Callable[..., Any] = takes_nothing
swiglu: Callable[..., Any] = takes_nothing
write_cache: Callable[..., Any] = takes_nothing
decode: Callable[..., Any] = takes_nothing


def ready() -> bool:
    """Whether the operations are loaded."""
    return decode is not takes_nothing


def library() -> Path:
    """Where the compiled file of this source, torch, Python and processor is or would be."""
    capability = torch.backends.cpu.get_cpu_capability()
    made_of = (torch.__version__, sys.version, platform.machine(), capability, *_flags())
    code = [path.read_bytes() for path in (SOURCE, *map(SOURCE.with_name, HEADERS))]
    key = hashlib.sha256(b"".join(code) + repr(made_of).encode()).hexdigest()[:16]
    # as torch keeps its extensions
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions"
    return Path(root) / NAME / f"{key}.so"


def load() -> bool:
    """Use the operations from now on; compile them first, some 20 seconds, once per machine.

    Returns:
        Whether they are loaded. Where compiling fails a warning says why, once, and every function
        keeps its other backends.
    """
    global linear, rms_norm, swiglu, write_cache, decode, _failed
    with _lock:
        if ready() or INTERPRETED or _failed:
            return ready()
        try:
            module = _cached(library()) or _compile(library())
        except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            _failed = True
            warnings.warn(
                "decoding on this CPU takes torch's operations, about half as fast as native.cpp, "
                f"which cannot be compiled: {_reason(error)}",
                stacklevel=2,
            )
            return False
        linear, rms_norm, swiglu = module.linear, module.rms_norm, module.swiglu
        write_cache, decode = module.write_cache, module.decode
        return True


def _reason(error: Exception) -> str:
    """One line: the compiler's first complaint, or the error's first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if re.search(r"\berror: ", line)), lines[0])


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*FLAGS, *PARALLEL]
    if capability in INSTRUCTIONS:
        # torch's vector classes go by these
        flags += [*INSTRUCTIONS[capability], f"-DCPU_CAPABILITY={capability}"]
        flags.append(f"-DCPU_CAPABILITY_{capability}")
    return flags


def _compile(path: Path) -> ModuleType:
    """Compile and import; `path` is there whole or not at all, whatever is killed or beside."""
    from torch.utils import cpp_extension

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"there is no C++ compiler {' '.join(compiler)!r}: install g++, or set CXX"
        )
    print("compiling operations for this CPU, once: about 20 seconds", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch's own runtime of threads, and not a second one
    threads = sorted(Path(torch.__path__[0], "lib").glob("libgomp*")) if PARALLEL else []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _ninja_on_path():
        module = cpp_extension.load(
            NAME,
            [str(SOURCE)],
            extra_cflags=_flags(),
            extra_ldflags=[str(one) for one in threads[:1]] or PARALLEL,
            build_directory=folder,
        )
        os.replace(Path(folder) / f"{NAME}.so", path)
    return cast(ModuleType, module)


def _cached(path: Path) -> ModuleType | None:
    """The module compiled before, if it is there and whole."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    if not path.is_file() or spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """A virtual environment that is not activated has ninja, and no shell that finds it."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
