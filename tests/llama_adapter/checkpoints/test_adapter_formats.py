"""Is every format told from the others, and no damaged file of any of them taken for a whole one?

The mutations are random from fixed seeds: of tensors and names, of bytes, of archives' records.
"""

import io
import json
import os
import random
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llama_adapter.checkpoints.adapter_assembly import ReadOptions, StoredAdapter
from llama_adapter.checkpoints.adapter_formats import (
    IN_FOLDERS,
    WRITERS,
    adapter_path,
    read_any_adapter,
    write_adapter_as,
)
from tests.llama_adapter.checkpoints import adapter_samples as samples

SHAPED = ReadOptions(base=samples.CONFIG)


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def nested(tensors: dict[Any, Any]) -> bytes:
    return torch_bytes({"model": tensors})


# format to its tensors, its file's content, and the file's name
FORMATS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Any], bytes], str]] = {
    "official": (samples.prompt_tensors, torch_bytes, "adapter.pth"),
    "chat65b": (lambda: samples.chat_tensors(prompts=True), nested, "chat.pth"),
    "multimodal": (samples.multimodal_tensors, nested, "7b.pth"),
    "peft": (samples.peft_tensors, torch_bytes, "adapter_model.bin"),
    "peft safetensors": (
        samples.peft_tensors,
        safetensors.torch.save,
        "adapter_model.safetensors",
    ),
    "litgpt": (samples.litgpt_tensors, nested, "lit_model.pth.adapter"),
    "litgpt-v2": (
        lambda: samples.litgpt_tensors(version=2),
        nested,
        "lit_model.pth.adapter_v2",
    ),
    "accessory": (samples.accessory_tensors, nested, "consolidated.00-of-01.model.pth"),
}


TENSOR_CHANGES = (
    "drop",
    "rename",
    "surplus",
    "longer",
    "shorter",
    "more_sizes",
    "integers",
    "doubles",
    "booleans",
    "nan",
    "infinity",
    "list",
    "nothing",
    "number_as_name",
    "expanded",
    "sparse",
    "empty",
    "complex",
)


def written(name: str, folder: Path) -> Path:
    tensors, content, file = FORMATS[name]
    path = folder / file
    path.write_bytes(content(tensors()))
    return path


def same(one: StoredAdapter, other: StoredAdapter) -> bool:
    """Whether two adapters would compute the same."""
    keys = one.tensors.keys() == other.tensors.keys() and one.header == other.header
    return keys and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_told_by_its_names(name: str, tmp_path: Path) -> None:
    stored = read_any_adapter(written(name, tmp_path), SHAPED)
    assert stored.format == name.partition(" ")[0]
    assert stored.header.origin == stored.format
    assert stored.header.layers == (2, 3)
    activation = "identity" if name.startswith(("peft", "litgpt")) else "tanh"
    assert stored.header.config.gate_activation == activation
    assert any(note.startswith(f"gates: {activation} (") for note in stored.notes)


@pytest.mark.parametrize("name", FORMATS)
def test_our_own_file_keeps_every_format_bitwise(name: str, tmp_path: Path) -> None:
    stored = read_any_adapter(written(name, tmp_path), SHAPED)
    write_adapter_as(tmp_path / "own.safetensors", stored, "llama-adapter")
    again = read_any_adapter(tmp_path / "own.safetensors")
    assert again.format == "llama-adapter"
    assert same(again, stored)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.partition(" ")[0] in WRITERS])
def test_a_written_file_is_read_back_bitwise(name: str, tmp_path: Path) -> None:
    stored = read_any_adapter(written(name, tmp_path), SHAPED)
    write_adapter_as(tmp_path / "again", stored, stored.format)
    assert same(read_any_adapter(tmp_path / "again", SHAPED), stored)


def test_a_folder_is_looked_into(tmp_path: Path) -> None:
    assert adapter_path(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="is a folder without an adapter of a known form"):
        read_any_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        read_any_adapter(tmp_path / "absent")
    path = written("litgpt", tmp_path)
    assert adapter_path(tmp_path) == path


def test_unknown_names_and_formats_are_refused(tmp_path: Path) -> None:
    path = samples.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is no adapter of a known format: it has tensors weight"):
        read_any_adapter(path)
    stored = read_any_adapter(written("official", tmp_path), SHAPED)
    with pytest.raises(ValueError, match="format must be one of llama-adapter, official"):
        write_adapter_as(tmp_path / "b", stored, "gguf")
    # a text from the base's black picture would differ: there is no lossless file
    assert "multimodal" not in WRITERS


def test_what_a_file_says_itself_is_not_told(tmp_path: Path) -> None:
    stored = read_any_adapter(written("official", tmp_path), SHAPED)
    write_adapter_as(tmp_path / "own.safetensors", stored, "llama-adapter")
    with pytest.raises(ValueError, match="says itself what --gate-activation would tell"):
        read_any_adapter(tmp_path / "own.safetensors", ReadOptions(gate_activation="tanh"))


def changed_tensors(tensors: dict[Any, Any], rng: random.Random) -> str:
    """One thing made wrong in place; returns what."""
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice(TENSOR_CHANGES)
    if kind == "drop":
        # without second gates there are none
        tensors.pop("llma.prefix_gate" if "new_gate" in name else name)
    elif kind == "rename":
        at = rng.randrange(len(name))
        tensors[name[:at] + rng.choice("xé0_.") + name[at + 1 :] + "y"] = tensors.pop(name)
    elif kind == "surplus":
        tensors[rng.choice(["x", name + ".more", "layers.77.attention.gate"])] = value
    elif kind == "longer":
        dim = rng.randrange(value.ndim)
        tensors[name] = torch.cat((value, value.narrow(dim, 0, 1)), dim)
    elif kind == "shorter":
        tensors[name] = value[..., : value.shape[-1] - 1] if value.shape[-1] > 1 else value[:0]
    elif kind == "expanded":
        # a few bytes that say they are a terabyte
        tensors[name] = torch.ones(1).expand(10**6, 10**6)
    elif kind == "number_as_name":
        tensors[7] = tensors.pop(name)
    else:
        tensors[name] = {
            "more_sizes": lambda: value[None, None],
            "integers": value.long,
            "doubles": value.double,
            "booleans": value.bool,
            "nan": lambda: value * float("nan"),
            "infinity": lambda: value.exp() / 0,
            "list": value.tolist,
            "nothing": lambda: None,
            "sparse": value.to_sparse,
            "empty": lambda: value.new_zeros(0),
            "complex": lambda: value.to(torch.complex64),
        }[kind]()
    return f"{kind} of {name}"


def changed_archive(data: bytes, rng: random.Random) -> bytes:
    """An archive with a record missing, renamed, twice, packed or of other content."""
    kind = rng.choice(["missing", "renamed", "twice", "packed", "other", "cut"])
    source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    records = source.infolist()
    # other numbers with their checksum are another adapter
    named = [record for record in records if kind != "other" or "/data/" not in record.filename]
    chosen = rng.choice(named)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for record in records:
            content, name = source.read(record), record.filename
            if record is chosen:
                if kind == "missing":
                    continue
                name = name + "x" if kind == "renamed" else name
                content = rng.randbytes(len(content)) if kind == "other" else content
                content = content[: len(content) // 2] if kind == "cut" else content
                if kind == "twice":
                    target.writestr(name, rng.randbytes(len(content)))
            packing = zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED
            target.writestr(zipfile.ZipInfo(name), content, packing)
    return buffer.getvalue()


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors header with an entry of another place, type or size."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entry = entries[rng.choice(sorted(entries))]
    key = rng.choice(["dtype", "shape", "data_offsets"])
    other = [
        "F16", "I64", [], [1 << 62, 4], [-1], [0, 1 << 40], [8, 4], None, {}, "x" * 999,
    ]  # fmt: skip
    entry[key] = rng.choice(other)
    text = json.dumps(entries).encode()
    size = rng.choice([len(text), len(text), len(text) + 9, 1 << 40, 0, 3])
    return size.to_bytes(8, "little") + text + data[8 + length :]


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut off, grown, or with a bit, a byte or a piece of its beginning or end changed."""
    kind = rng.choice(["cut", "grown", "bit", "byte", "piece"])
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "grown":
        return data + rng.randbytes(rng.randrange(1, 50))
    changed = bytearray(data)
    # names, sizes and types are there; of the numbers between a file without checksums says nothing
    length = 8 + int.from_bytes(data[:8], "little")
    end = length if data[8:9] == b"{" else len(data)
    at = rng.randrange(min(end, 3000)) if rng.random() < 0.8 else rng.randrange(end)
    if kind == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        changed[at] = rng.randrange(256)
    else:
        span = min(rng.randrange(1, 20), end - at)
        changed[at : at + span] = rng.randbytes(span)
    return bytes(changed)


def fuzz(name: str, folder: Path, count: int) -> None:
    """Every mutation is an error of one line that names the file, or changes nothing."""
    rng = random.Random(name)
    tensors, content, file = FORMATS[name]
    path = written(name, folder)
    data, expected = path.read_bytes(), read_any_adapter(path, SHAPED)
    refused, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        what = rng.choice(["tensors", "tensors", "container", "bytes"])
        if what == "tensors":
            changed = tensors()
            what = changed_tensors(changed, rng)
            try:
                path.write_bytes(content(changed))
            except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):
                # safetensors' own writer refuses it
                assert file.endswith(".safetensors")
                continue
        elif what == "container":
            is_archive = data[:2] == b"PK"
            path.write_bytes((changed_archive if is_archive else changed_header)(data, rng))
        else:
            path.write_bytes(changed_bytes(data, rng))
        start = time.monotonic()
        try:
            got = read_any_adapter(path, SHAPED)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message, f"{what}: {message}"
            assert str(path) in message, f"{what}: {message}"
            refused += 1
        else:
            assert same(got, expected), f"{what} was read"
            assert " of " not in what, f"{what} was read"
        assert time.monotonic() - start < 5, what
    assert refused > count / 2
    # kilobytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_refused_or_harmless(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_a_thousand_mutations_are_refused_or_harmless(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, 1000)


def test_what_is_neither_a_file_nor_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="must be a file or a folder, got a device or a pipe"):
            read_any_adapter(path)


def test_a_description_is_answered_with_its_folder(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json", "model_config.yaml"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"{name} describes what lies beside it: give its"):
            read_any_adapter(tmp_path / name)


@pytest.mark.parametrize("format", WRITERS)
def test_a_target_of_the_wrong_kind_is_refused_and_stays(format: str, tmp_path: Path) -> None:
    stored = read_any_adapter(written("official", tmp_path), SHAPED)
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("kept")
    folder.mkdir()
    wrong = file if format in IN_FOLDERS else folder
    with pytest.raises(ValueError, match=rf"{wrong.name} must be a \w+, got a \w+, for {format}"):
        write_adapter_as(wrong, stored, format)
    with pytest.raises(FileNotFoundError, match=r"folder .*absent does not exist: cannot write x"):
        write_adapter_as(tmp_path / "absent" / "x", stored, format)
    assert file.read_text() == "kept"
    assert not list(folder.iterdir())
