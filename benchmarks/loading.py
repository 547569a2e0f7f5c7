"""How long does a base take to load, in how much memory? `python -m benchmarks.loading`.

Writes a random model of LLaMA 7B's shape in bfloat16 (13.5 GB of disk, and as much memory) in each
format, loads it in a process of its own, and says what that held beyond the weights themselves. The
file was just written, so it comes from the page cache where that has room. `--quick` takes a model
of two narrow layers.
"""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_adapter import assets
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.hugging_face import LAYER_TENSORS, MODEL_TENSORS
from llama_adapter.config import PRESETS, LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.options import Parser

RESULTS = Path(__file__).parent / "results" / "cpu"
QUICK = LlamaConfig(256, 2, 4, 32000, norm_eps=1e-6)
FULL = PRESETS["llama-7b"]
# anonymous memory is the process's own; mapped files are not
LOAD = """
import re, sys, threading, time
from pathlib import Path
from llama_adapter.checkpoints import load_base

def anonymous() -> int:
    found = re.search(r"Anonymous:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) * 1024

done, before = threading.Event(), anonymous()
peak = before

def watch() -> None:
    global peak
    while not done.wait(0.02):
        peak = max(peak, anonymous())

watcher, start = threading.Thread(target=watch), time.perf_counter()
watcher.start()
model = load_base(sys.argv[1]).model
seconds = time.perf_counter() - start
done.set()
watcher.join()
size = sum(parameter.nbytes for parameter in model.parameters())
print(seconds, size, max(peak, anonymous()) - before - size)
"""


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Llama(config).state_dict().items()}


def tokenizer(count: int) -> bytes:
    """The bundled tokenizer with pieces without a use, as many as the model has rows."""
    # a generated module, whose names no checker sees
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString((assets.BASE / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), count):
        model.pieces.add(piece=f"unused{number}", score=-1e6)
    return model.SerializeToString()


def random_tensor(shape: tuple[int, ...]) -> Tensor:
    """bfloat16 numbers, the same few over and over: what they are costs no time to read."""
    out = torch.empty(shape, dtype=torch.bfloat16)
    block = torch.rand(9973, dtype=torch.float32).bfloat16()
    flat = out.view(-1)
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])
    return out


def write_meta(config: LlamaConfig, folder: Path) -> None:
    """One consolidated file, as of 7B."""
    torch.save(
        {name: random_tensor(shape) for name, shape in shapes_of(config).items()},
        folder / "consolidated.00.pth",
    )
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
    }
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


def write_hugging_face(config: LlamaConfig, folder: Path) -> None:
    """One safetensors file per layer, and their index."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes_of(config).items():
        _, layer, rest = name.split(".", 2) if name.startswith("layers.") else ("", "rest", name)
        theirs = (
            MODEL_TENSORS[name]
            if layer == "rest"
            else f"model.layers.{layer}.{LAYER_TENSORS[rest]}"
        )
        groups.setdefault(f"model-{layer}.safetensors", {})[theirs] = shape
    index = {}
    for file, shapes in groups.items():
        save_file({name: random_tensor(shape) for name, shape in shapes.items()}, folder / file)
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    values = {
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


FORMATS: dict[str, Callable[[LlamaConfig, Path], None]] = {
    "Meta, one file": write_meta,
    "Hugging Face, a file per layer": write_hugging_face,
}


def measure(config: LlamaConfig, write: Callable[[LlamaConfig, Path], None]) -> list[float]:
    """Seconds, bytes of the weights, and bytes held beyond them at most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(config, folder)
        (folder / "tokenizer.model").write_bytes(tokenizer(config.vocab_size))
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(folder)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
    return [float(word) for word in done.stdout.split()]


def main(arguments: list[str] | None = None) -> int:
    """Measure every format and write a table; returns 0."""
    parser = Parser(prog="python -m benchmarks.loading", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds")
    parser.add_argument("--output", type=Path, help="folder (default: the committed results)")
    options = parser.parse(sys.argv[1:] if arguments is None else arguments)
    config = QUICK if options.quick else FULL
    lines = [
        "# Loading a base",
        "",
        f"{config.describe()}, bfloat16, from files just written; {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}. Beyond the weights: the process's own "
        "memory at its peak, less the loaded weights. The seconds depend on the disk and on what "
        "else runs, the memory does not.",
        "",
        "| format | weights, GB | seconds | beyond the weights, GB |",
        "|---|---|---|---|",
    ]
    for name, write in FORMATS.items():
        seconds, size, beyond = measure(config, write)
        lines.append(f"| {name} | {size / 1e9:.2f} | {seconds:.1f} | {beyond / 1e9:.2f} |")
        print(lines[-1], flush=True)
    folder = options.output or (Path("runs") if options.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "loading.md", ("\n".join(lines) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
