"""What do the kernels take of a chip that is not here? `python -m benchmarks.ahead_of_time`.

Compiles the launches that a GPU would run, their tensors on the meta device, and reads shared
memory, registers, spills and instructions from the machine code, for which triton brings the tools:
its compiler checks none of them. The program compiles every tile of every architecture into one
table, some 20 minutes on two cores, and the small operations into another, two minutes. A row holds
the digest of what was compiled: rows of today's kernels are kept, and a test finds the others.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapter_kernels.arch import ARCHS
from adapter_kernels.launch import Launch
from adapter_kernels.zero_init_attention.configs import HEAD_DIMS, UNMEASURED, tile
from benchmarks.small_forms import SmallForm, small_launch, small_table
from benchmarks.specialisations import Specialisation, launch_of, row_of, table
from benchmarks.workers import WorkerLost, positive, side_by_side
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.options import Parser

# bytes; a loop over heads or sequences keeps pointers there between its inner loops
MOST_STACK, MOST_STACK_GROUPED = 64, 240
RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        shared: bytes of shared memory per program.
        registers: per thread.
        stack: bytes per thread, of which spills are a part.
        spills: stores and loads of local memory in the machine code.
        loop_spills: those of them inside innermost loops.
        tensor_core: instructions that multiply matrices.
        wide_loads: 128-bit loads from global memory, to registers or to shared memory.
    """

    shared: int
    registers: int
    stack: int
    spills: int
    loop_spills: int
    tensor_core: int
    wide_loads: int


def specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, compile-time values and alignments, as triton's own specialisation has them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = ALIGNED
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = ALIGNED
    return signature, constants, attributes


def compile_for(launch: Launch, capability: int) -> Resources:
    """Compile a launch for a compute capability and read its resources.

    Args:
        launch: from a launcher, its tensors anywhere.
        capability: major * 10 + minor.

    Returns:
        The resources of its machine code.
    """
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    return read_resources(compiled.asm["cubin"], compiled.metadata.shared)


def _tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_resources(cubin: bytes, shared: int) -> Resources:
    """Registers, stack and instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    spills, loop_spills = count_spills(code)
    return Resources(
        shared=shared,
        registers=int(numbers["REG"]),
        stack=int(numbers["STACK"]),
        spills=spills,
        loop_spills=loop_spills,
        tensor_core=len(re.findall(r"\b(?:[HIQ]?G?MMA\.|UTC\w*MMA\b)", code)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:[A-Z]+\.)*(?:LTC\w+\.)?128", code)),
    )


def count_spills(code: str) -> tuple[int, int]:
    """Accesses of local memory in disassembled code: all, and those inside innermost loops."""
    lines = code.splitlines()
    labels = {
        match[1]: number
        for number, line in enumerate(lines)
        if (match := re.match(r"\s*(\.L\w+):", line))
    }
    accesses = [number for number, line in enumerate(lines) if re.search(r"\b(STL|LDL)\b", line)]
    loops = [
        (labels[match[1]], number)
        for number, line in enumerate(lines)
        if (match := re.search(r"\bBRA(?:\.\w+)*\b.*?`\((\.L\w+)\)", line))
        and labels.get(match[1], number) < number
    ]
    # what a loop over heads keeps in memory between its inner loops costs nothing
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    inside = [at for at in accesses if any(start < at < end for start, end in inner)]
    return len(accesses), len(inside)


def measured(spec: Specialisation) -> bool:
    """Whether the row that a kernel has in configs.py was chosen by its speed on a GPU."""
    if spec.direction != row_of(spec):
        # it borrows the row, which was chosen for another
        return False
    row = tile(spec.capability, row_of(spec), spec.head_dim, spec.dtype)
    return row.speed != UNMEASURED and spec.head_dim in HEAD_DIMS


def complaints(found: Resources, spec: Specialisation, may_spill: bool) -> list[str]:
    """What is wrong with a kernel on its chip.

    In float32, which is there for parity, registers are held to their bounds up to a width of 128.

    Args:
        found: what it takes.
        spec: what it is.
        may_spill: whether the GPU is the judge of its registers: a tile that spills can be faster
            than all that do not.
    """
    arch, half = ARCHS[spec.capability], spec.dtype != torch.float32
    strict = (half or spec.head_dim <= 128) and not may_spill
    grouped = spec.direction in ("backward_dkv_grouped", "prefix")
    stack = MOST_STACK_GROUPED if grouped else MOST_STACK
    wrong = []
    if found.shared > arch.shared_memory:
        wrong.append(f"shared memory {found.shared} exceeds {arch.name}'s {arch.shared_memory}")
    if strict and found.loop_spills:
        wrong.append(f"{found.loop_spills} spills inside loops")
    if strict and found.stack > stack:
        wrong.append(f"a stack of {found.stack} bytes")
    # what combines splits multiplies nothing but the prompt
    if half and not found.tensor_core and (spec.direction, spec.form) != ("combine", "none"):
        wrong.append("no tensor-core instruction")
    # some 16 rows of 16 elements are less than 16 bytes for each thread
    few = spec.head_dim <= 16 and spec.direction in ("decode", "combine")
    if not found.wide_loads and not few:
        wrong.append("no 128-bit load")
    return wrong


def small_complaints(found: Resources, form: SmallForm) -> list[str]:
    """What is wrong with a small operation's kernel on its chip."""
    arch, wrong = ARCHS[form.capability], []
    if found.shared > arch.shared_memory:
        wrong.append(f"shared memory {found.shared} exceeds {arch.name}'s {arch.shared_memory}")
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.stack:
        wrong.append(f"a stack of {found.stack} bytes")
    # not from rows that begin anywhere; of a half of few numbers a thread holds less than 16 bytes
    few = form.form.startswith("halves") and form.width * form.dtype.itemsize < 256
    if not found.wide_loads and not (form.odd or few):
        wrong.append("no 128-bit load")
    return wrong


class Table(NamedTuple):
    """What is compiled into one file.

    Attributes:
        path: the file, as JSON.
        specs: what is compiled, a row each.
        launch: that of one.
        facts: what a row says of the resources.
        judge: what is wrong with them.
    """

    path: Path
    specs: Callable[[], list[Any]]
    launch: Callable[[Any], Launch]
    facts: tuple[str, ...]
    judge: Callable[[Resources, Any], list[str]]


@cache
def settle_keys() -> None:
    """Make every kernel's cache_key say the same in every process.

    triton puts the constants of what a kernel calls into its key only if that has been hashed
    before: so hash all of them until nothing changes.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("adapter_kernels")]
    values = {id(x): x for module in modules for x in vars(module).values()}.values()
    kernels = [x for x in values if isinstance(x, triton.JITFunction)]
    before, keys = None, []
    while keys != before:
        before, keys = keys, []
        for kernel in kernels:
            kernel.hash = None
            keys.append(kernel.cache_key)


def digest_of(launch: Launch, capability: int) -> str:
    """Digest of what the compiler is given: kernel, all that it calls, specialisation, compiler."""
    settle_keys()
    given = (specialise(launch), launch.num_warps, launch.num_stages, capability)
    text = f"{triton.__version__} {launch.kernel.cache_key} {given}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named(spec: Specialisation | SmallForm) -> dict[str, Any]:
    """A specialisation as plain data."""
    values = asdict(spec).items()
    return {name: str(x).removeprefix("torch.") if name == "dtype" else x for name, x in values}


def compiled(launch: Callable[[Any], Launch], spec: Any) -> Resources:
    """What the kernel of a row takes."""
    return compile_for(launch(spec), spec.capability)


def line_of(chosen: Table, spec: Any, found: Resources) -> dict[str, Any]:
    """One row of a table: the specialisation, its resources, and what is wrong with them."""
    facts = {name: getattr(found, name) for name in chosen.facts}
    digest = digest_of(chosen.launch(spec), spec.capability)
    return {**named(spec), **facts, "complaints": chosen.judge(found, spec), "digest": digest}


TABLES = {
    "attention": Table(
        RESULTS / "ahead_of_time.json",
        table,
        launch_of,
        tuple(one.name for one in fields(Resources)),
        lambda found, spec: complaints(found, spec, measured(spec)),
    ),
    "small_ops": Table(
        RESULTS / "ahead_of_time_small_ops.json",
        small_table,
        small_launch,
        # of a kernel that only moves data there is no more to say
        ("registers", "spills", "stack", "shared", "wide_loads"),
        small_complaints,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Compile every row of the tables and write them.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0, or 1 if a kernel does not fit its chip.
    """
    parser = Parser(prog="python -m benchmarks.ahead_of_time", description=__doc__)
    parser.add_argument("--processes", type=positive, default=2, help="that compile side by side")
    parser.add_argument("--only", choices=list(TABLES), help="one table of them")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse(arguments)
    try:
        # before the minutes that it takes, not after them
        options.output.mkdir(parents=True, exist_ok=True)
        chosen = [TABLES[options.only]] if options.only else list(TABLES.values())
        wrong = [write_table(one, options.output, options.processes) for one in chosen]
    except KeyboardInterrupt:
        print("\ninterrupted; the compiler keeps what it has compiled", file=sys.stderr)
        return 130
    except (OSError, WorkerLost) as error:
        print(f"ahead_of_time: error: {error}", file=sys.stderr)
        return 2
    return 1 if any(wrong) else 0


def held(path: Path, facts: tuple[str, ...]) -> dict[str, Resources]:
    """What the rows of a table hold, by digest; nothing where there is no such table."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["digest"]: held_by(row) for row in rows if set(facts) <= row.keys()}


def held_by(row: dict[str, Any]) -> Resources:
    """What one row holds; a fact that its table leaves out is 0."""
    return Resources(*(row.get(one.name, 0) for one in fields(Resources)))


def write_table(chosen: Table, folder: Path, processes: int) -> int:
    """Compile what the table lacks and write it; returns how many rows have complaints."""
    output, specs = folder / chosen.path.name, chosen.specs()
    digests = [digest_of(chosen.launch(spec), spec.capability) for spec in specs]
    known = held(output, chosen.facts)
    pairs = zip(digests, specs, strict=True)
    missing = {digest: spec for digest, spec in pairs if digest not in known}
    found = side_by_side(partial(compiled, chosen.launch), list(missing.values()), processes)
    found = tqdm(found, total=len(missing), mininterval=10)
    known |= dict(zip(missing, found, strict=True))
    rows = [
        line_of(chosen, spec, known[digest]) for spec, digest in zip(specs, digests, strict=True)
    ]
    for spec, row in zip(specs, rows, strict=True):
        if row["complaints"]:
            print(f"{spec}: {'; '.join(row['complaints'])}")
    text = json.dumps({"triton": triton.__version__}, indent=1)[:-2] + ',\n "rows": [\n  '
    text += ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"
    write_atomically(output, text.encode())
    wrong = sum(bool(row["complaints"]) for row in rows)
    print(f"{len(rows)} rows, {wrong} with complaints, in {output}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
