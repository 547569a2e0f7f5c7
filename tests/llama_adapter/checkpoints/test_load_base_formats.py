"""Is one model the same base in every format, in bounded memory, and never silently another one?

Of every format 1,000 folders are damaged: each is refused in one line, or is the model it was.
"""

import base64
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import load_adapter, save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from tests.llama_adapter.hf_models import on_transformers, state_of

Write = Callable[..., Path]
FORMATS = ("meta", "hugging face", "litgpt")
LITGPT = Path(__file__).parent / "fixtures" / "litgpt_base"


def write_hugging_face(model: Llama, folder: Path, shard: str = "5GB") -> None:
    """The model as transformers writes it."""
    theirs = on_transformers(model)
    theirs.to(model.output_weight.dtype).save_pretrained(folder, max_shard_size=shard)


def write_litgpt(model: Llama, folder: Path) -> None:
    """The model by litgpt's documented names, with the keys of the configuration it wrote."""
    config, theirs = model.config, state_of(model)
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"}
    parts = {
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
    }
    state = {"lm_head.weight": theirs["lm_head.weight"]}
    state |= {f"{new}.weight": theirs[f"{old}.weight"] for old, new in names.items()}
    for layer in range(config.n_layers):
        old, new = f"model.layers.{layer}", f"transformer.h.{layer}"
        fused = [theirs[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"]
        state[f"{new}.attn.qkv.weight"] = torch.cat(fused)
        state |= {f"{new}.{b}.weight": theirs[f"{old}.{a}.weight"] for a, b in parts.items()}
    torch.save(state, folder / "lit_model.pth")
    content = yaml.safe_load((LITGPT / "model_config.yaml").read_text(encoding="utf-8"))
    content |= {
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_query_groups": config.kv_heads,
        "head_size": config.head_dim,
        "padded_vocab_size": config.vocab_size,
        "intermediate_size": config.hidden_dim,
        "block_size": config.max_seq_len,
        "norm_eps": config.norm_eps,
        "rope_base": int(config.rope_theta),
        "rope_adjustments": None,
    }
    (folder / "model_config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def write_as(write_meta: Write, tiny_tokenizer_path: Path, tmp_path: Path) -> Write:
    """A function that writes a model in a format, whole or in shards where there are some."""

    def write(model: Llama, form: str, *, shards: int = 1) -> Path:
        if form == "meta":
            return write_meta(
                model, shards=shards, params={"max_seq_len": model.config.max_seq_len}
            )
        folder = tmp_path / f"{form}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copy(tiny_tokenizer_path, folder / "tokenizer.model")
        if form == "litgpt":
            write_litgpt(model, folder)
        else:
            write_hugging_face(model, folder, "5GB" if shards == 1 else "60KB")
        return folder

    return write


@torch.no_grad()
def test_one_model_is_one_base_in_every_format(
    write_as: Write, tiny_model: Llama, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    """Weights bitwise, fingerprints equal, and an adapter of one fits the others."""
    bases = [load_base(write_as(tiny_model, form)) for form in FORMATS]
    prints = [fingerprint(base.model, "any") for base in bases]
    assert prints[0] == prints[1] == prints[2]
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tiny_adapter, prints[0])
    tokens = torch.tensor([bases[0].tokenizer.encode("the first answer", bos=True)])
    expected = tiny_model(tokens, tiny_model.project(tiny_adapter))
    for base in bases:
        for name, value in tiny_model.state_dict().items():
            assert torch.equal(base.model.get_parameter(name), value), name
        adapter = load_adapter(path, base.model, base.name)
        assert torch.equal(base.model(tokens, base.model.project(adapter)), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_the_format_is_told_by_what_is_in_the_folder(
    form: str, write_as: Write, tiny_model: Llama
) -> None:
    """litgpt keeps Hugging Face's config.json, Mistral puts a params.json beside it."""
    folder = write_as(tiny_model, form)
    if form == "litgpt":
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    if form == "hugging face":
        (folder / "params.json").write_text('{"dim": 4096}', encoding="utf-8")
        (folder / "consolidated.safetensors").touch()
    assert torch.equal(load_base(folder).model.output_weight, tiny_model.output_weight)


@torch.no_grad()
def test_a_llama_3_folder_of_meta_is_read_with_its_own_tokenizer(
    write_meta: Write, tiny_config: LlamaConfig
) -> None:
    pytest.importorskip("tiktoken")
    model = Llama(replace(tiny_config, vocab_size=512)).requires_grad_(False)
    folder = write_meta(model, shards=2, embedding_dim=0, params={"vocab_size": 512})
    lines = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    base = load_base(folder)
    assert (base.tokenizer.bos_id, base.tokenizer.eos_id) == (256, 257)
    tokens = torch.tensor([base.tokenizer.encode("the river", bos=True)])
    assert torch.equal(base.model(tokens), model(tokens))


WATCH = """
import re, sys, threading
from pathlib import Path
import torch
from llama_adapter.checkpoints import load_base

def anonymous() -> int:
    found = re.search(r"Anonymous:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) * 1024

done, start = threading.Event(), anonymous()
peak = start

def watch() -> None:
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_base(sys.argv[1]).model
done.set()
watcher.join()
print(max(peak, anonymous()) - start - sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", FORMATS)
def test_layers_of_7b_need_little_memory_beyond_themselves(form: str, write_as: Write) -> None:
    """Two layers of LLaMA 7B's width, 0.8 GB: far less than a second copy is held."""
    config = LlamaConfig(4096, 2, 32, 353)
    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device="cpu").bfloat16().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-1, 1)
    folder = write_as(model, form, shards=1 if form == "litgpt" else 2)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 250e6


# values that a damaged or edited configuration may hold
ODD: tuple[Any, ...] = (None, -1, 0, 3, 10**9, 10**400, 2.5, "x", True, [], {}, [[1]], "\x00", -0.5)


def structure(path: Path, data: bytes) -> list[int]:
    """Where a file holds no numbers of a tensor: a header, or what an archive adds to its data."""
    if path.suffix == ".safetensors":
        return list(range(8 + struct.unpack("<Q", data[:8])[0]))
    if path.suffix != ".pth":
        return list(range(len(data)))
    places, end = [], 0
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if re.search(r"/data/\d+$", record.filename):
                sizes = struct.unpack_from("<2H", data, record.header_offset + 26)
                start = record.header_offset + 30 + sum(sizes)
                places += range(end, start)
                end = start + record.file_size
    return [*places, *range(end, len(data))]


def damage_bytes(path: Path, rng: random.Random) -> None:
    """Cut the file, or change, drop or insert bytes of its structure."""
    data = bytearray(path.read_bytes())
    places = structure(path, data)
    at, kind = rng.choice(places), rng.randrange(5)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + rng.randint(1, 9)]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randint(1, 9))
    else:
        size = rng.choice((4, 8))
        value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**64 - 1)) % 2 ** (8 * size)
        known = set(places)
        for offset, byte in enumerate(value.to_bytes(size, "little"), at):
            if offset in known:
                data[offset] = byte
    path.write_bytes(data)


def damage_object(content: dict[str, Any], rng: random.Random, extra: str) -> None:
    """Drop a key, add one, or give one an odd value."""
    key = rng.choice(list(content))
    kind = rng.randrange(3)
    if kind == 0:
        del content[key]
    elif kind == 1:
        content[extra] = rng.choice(ODD)
    else:
        content[key] = rng.choice(ODD)


def damage_state(state: dict[str, Any], rng: random.Random) -> None:
    """Drop, rename, add, cut, flatten or convert a tensor."""
    name = rng.choice(list(state))
    value, kind = state[name], rng.randrange(7)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state[name + rng.choice((".bias", "x", "\n", "\0"))] = state.pop(name)
    elif kind == 2:
        state[name.replace("0", "9") + rng.choice(("", "2"))] = value.clone()
    elif kind == 3:
        state[name] = value[: rng.randrange(len(value))].clone()
    elif kind == 4:
        state[name] = value.reshape(-1, 1).clone()
    elif kind == 5:
        state[name] = value.to(rng.choice((torch.float64, torch.int8, torch.float16)))
    else:
        state[name] = torch.cat([value, value])


def damage_header(path: Path, rng: random.Random) -> None:
    """Rewrite the header of a safetensors file with an entry that is another."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(5)
    if kind == 0:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-4, 4, 64, 2**40, -(2**40)))
    elif kind == 1:
        entry["shape"] = rng.choice(([], [0], [2**62, 4], [*entry["shape"], 2], [-1]))
    elif kind == 2:
        entry["dtype"] = rng.choice(("F16", "F64", "I8", "BF16", "BOOL", "", 3))
    elif kind == 3:
        damage_object(entry, rng, "extra")
    else:
        damage_object(header, rng, "extra")
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def damage_archive(path: Path, rng: random.Random) -> None:
    """Pack an archive again with a record less, twice, under another name, cut or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    chosen, kind = rng.randrange(len(records)), rng.randrange(5)
    name, data = records[chosen]
    if kind == 0:
        del records[chosen]
    elif kind == 1:
        records.append((name, rng.randbytes(len(data))))
    elif kind == 2:
        records[chosen] = (name + rng.choice(("0", "/x", "é")), data)
    elif kind == 3:
        records[chosen] = (name, data[: rng.randrange(len(data) + 1)])
    method = zipfile.ZIP_DEFLATED if kind == 4 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records:
            archive.writestr(name, data)


def damage(folder: Path, form: str, rng: random.Random) -> None:
    """One structural change to a folder."""
    weights = sorted([*folder.glob("*.pth"), *folder.glob("*.safetensors")])
    configs = sorted([*folder.glob("*.json"), *folder.glob("*.yaml")])
    path, kind = rng.choice(weights), rng.randrange(8)
    if kind <= 2:
        damage_bytes(path, rng)
    elif kind == 3:
        load = safetensors.torch.load_file if form == "hugging face" else torch.load
        save = safetensors.torch.save_file if form == "hugging face" else torch.save
        state = load(path)
        damage_state(state, rng)
        save(state, path)
    elif kind == 4:
        (damage_header if form == "hugging face" else damage_archive)(path, rng)
    elif kind == 5:
        path = rng.choice([*weights, *configs, folder / "tokenizer.model"])
        if rng.random() < 0.5:
            path.unlink()
        else:
            path.rename(path.with_name("x" + path.name))
    elif kind == 6:
        damage_bytes(rng.choice(configs), rng)
    else:
        path = rng.choice(configs)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        inner = [value for value in content.values() if isinstance(value, dict) and value]
        damage_object(rng.choice([content, *inner]), rng, "extra")
        dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
        path.write_text(dump(content), encoding="utf-8")


def assert_same_weights(model: Llama, expected: dict[str, Tensor], number: int) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), f"{name} of folder {number}"


# what a folder with a record twice is made with
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "count", [150, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "1000"]
)
def test_damaged_folders_are_refused_or_what_they_were(
    form: str, count: int, write_as: Write, tiny_model: Llama, tmp_path: Path
) -> None:
    whole = write_as(tiny_model, form)
    shards = write_as(tiny_model, form, shards=1 if form == "litgpt" else 2)
    expected, rng = tiny_model.state_dict(), random.Random(count)
    messages, kept, before = [], 0, _resident()
    for number in range(count):
        folder = tmp_path / "damaged"
        shutil.copytree(rng.choice((whole, shards)), folder)
        damage(folder, form, rng)
        try:
            model = load_base(folder).model
        except (ValueError, FileNotFoundError) as error:
            messages.append((number, str(error)))
        else:
            assert_same_weights(model, expected, number)
            kept += 1
        shutil.rmtree(folder)
    for number, message in messages:
        assert "\n" not in message, number
        assert len(message) < 1000, number
        assert "damaged" in message, number
    assert len(messages) > 0.6 * count
    assert kept > 0.02 * count
    assert _resident() - before < 300e6


def _resident() -> int:
    if sys.platform != "linux":
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
