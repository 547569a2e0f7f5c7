"""Is a Meta folder read whole, whatever its shards, and is every fault in it named in one line?"""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.meta import is_meta, read_meta, shard_paths
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

Write = Callable[..., Path]
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
WQ = "layers.0.attention.wq.weight"


def assert_same(model: Llama, expected: Llama) -> None:
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name


def resave(folder: Path, shard: int, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the content of one shard."""
    path = folder / f"consolidated.{shard:02d}.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def error_of(folder: Path, kind: type[Exception] = ValueError) -> str:
    """The one line that reading a folder ends in."""
    with pytest.raises(kind) as caught:
        read_meta(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(str(folder), "FOLDER")


# LLaMA 1 and 2 split the embedding by column, LLaMA 3 by row; 2 key/value heads are split unevenly
@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["llama 3", "llama 1"])
@pytest.mark.parametrize("shards", [1, 2, 3])
@torch.no_grad()
def test_shards_join_to_the_whole_model(
    shards: int, embedding_dim: int, write_meta: Write, tiny_model: Llama
) -> None:
    folder = write_meta(tiny_model, shards=shards, embedding_dim=embedding_dim)
    model, tokenizer = read_meta(folder)
    assert model.config == tiny_model.config or model.config.max_seq_len == 2048
    assert_same(model, tiny_model)
    tokens = torch.tensor([tokenizer.encode("seven birds follow the river", bos=True)])
    assert torch.equal(model(tokens), tiny_model(tokens))


def test_model_is_frozen_and_evaluating(write_meta: Write, tiny_model: Llama) -> None:
    before = torch.get_rng_state()
    model, _ = read_meta(write_meta(tiny_model))
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_the_files_or_the_wanted_one(
    stored: torch.dtype, wanted: torch.dtype | None, write_meta: Write, tiny_model: Llama
) -> None:
    folder = write_meta(tiny_model.to(stored), shards=2)
    model, _ = read_meta(folder, dtype=wanted)
    assert_same(model, tiny_model.to(wanted or stored))


def test_a_mixture_of_dtypes_has_to_be_decided(write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model.half())
    resave(folder, 0, lambda state: state.update({WQ: state[WQ].float()}))
    assert error_of(folder) == (
        f"FOLDER/consolidated.00.pth: {WQ} is torch.float32, but {EMBEDDING} is torch.float16: "
        "give the dtype to load them in"
    )
    model, _ = read_meta(folder, dtype=torch.float16)
    assert_same(model, tiny_model)


def test_old_files_that_are_no_archives_are_read(write_meta: Write, tiny_model: Llama) -> None:
    model, _ = read_meta(write_meta(tiny_model, shards=2, archive=False))
    assert_same(model, tiny_model)


def test_buffers_of_rotary_frequencies_are_ignored(write_meta: Write, tiny_model: Llama) -> None:
    buffers = {
        "rope.freqs": torch.ones(4),
        "layers.0.attention.inner_attention.rope.freqs": torch.ones(4),
    }
    model, _ = read_meta(write_meta(tiny_model, extra=buffers))
    assert_same(model, tiny_model)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("saved", ["absent", "a second time"])
def test_tied_embeddings_are_recognised(
    saved: str, shards: int, write_meta: Write, tiny_model: Llama
) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state[OUTPUT]
        if saved == "a second time":
            state[OUTPUT] = state[EMBEDDING].clone()

    folder = write_meta(tiny_model, shards=shards, embedding_dim=0)
    for shard in range(shards):
        resave(folder, shard, change)
    model, _ = read_meta(folder)
    assert model.config.tied_embeddings
    assert OUTPUT not in model.state_dict()
    assert torch.equal(model.output_weight, tiny_model.tok_embeddings.weight)


def test_an_output_that_differs_in_one_number_is_its_own(
    write_meta: Write, tiny_model: Llama
) -> None:
    changed = tiny_model.tok_embeddings.weight.clone()
    changed[352, 47] += 1
    folder = write_meta(tiny_model)
    resave(folder, 0, lambda state: state.update({OUTPUT: changed}))
    model, _ = read_meta(folder)
    assert not model.config.tied_embeddings
    assert torch.equal(model.output_weight, changed)


def test_weights_do_not_follow_the_file(write_meta: Write, tiny_model: Llama) -> None:
    """A mapped file that is overwritten in place must not reach into a loaded model."""
    folder = write_meta(tiny_model)
    model, _ = read_meta(folder)
    path = folder / "consolidated.00.pth"
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(model, tiny_model)


WATCH = """
import re, sys, threading
from pathlib import Path
import torch
from llama_adapter.checkpoints.meta import read_meta

def anonymous() -> int:
    found = re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024

def copies(dtype: torch.dtype) -> float:
    done, start = threading.Event(), anonymous()
    peak = start

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = read_meta(Path(sys.argv[1]), dtype=dtype)
    done.set()
    watcher.join()
    peak = max(peak, anonymous())
    return (peak - start) / sum(parameter.nbytes for parameter in model.parameters())

print(copies(torch.float32), copies(torch.bfloat16))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_is_held_while_loading(write_meta: Write) -> None:
    config = LlamaConfig(dim=512, n_layers=6, n_heads=8, vocab_size=353)
    folder = write_meta(Llama(config), shards=2)
    # a fixed threshold makes the C library return what is freed at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", WATCH, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # anonymous memory, the mapped files apart, in copies of the loaded model of 83 and 42 MB
    float32, bfloat16 = map(float, done.stdout.split())
    assert 0.95 < float32 < 1.2
    assert 0.95 < bfloat16 < 1.2


def test_shards_are_ordered_by_number(tmp_path: Path) -> None:
    names = [f"consolidated.{number}.pth" for number in range(12)]
    for name in random.Random(1).sample(names, 12):
        (tmp_path / name).touch()
    (tmp_path / "consolidated.backup.pth").touch()
    assert [path.name for path in shard_paths(tmp_path)] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params.json", "FOLDER/params.json does not exist: copy it from where the weights came"),
        (
            "tokenizer.model",
            "FOLDER/tokenizer.model does not exist: copy it into the folder; LLaMA 1 and 2 keep "
            "it one folder up",
        ),
        (
            "consolidated.00.pth",
            "FOLDER lacks consolidated.00.pth: copy the missing shards into it",
        ),
        (
            "consolidated.01.pth",
            "FOLDER lacks consolidated.01.pth: copy the missing shards into it",
        ),
        (
            "consolidated.02.pth",
            "FOLDER holds 2 of 3 shards, or params.json is another model's: "
            f"{WQ} has 32 of 48 rows",
        ),
    ],
)
def test_a_missing_file_is_named(
    name: str, message: str, write_meta: Write, tiny_model: Llama
) -> None:
    folder = write_meta(tiny_model, shards=3)
    (folder / name).unlink()
    kind = ValueError if name.endswith("02.pth") else FileNotFoundError
    assert error_of(folder, kind) == message


def test_a_folder_without_weights_is_named(write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model)
    (folder / "consolidated.00.pth").unlink()
    assert error_of(folder, FileNotFoundError) == (
        "FOLDER holds no consolidated.00.pth: the weights are missing"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop(WQ),
            f"FOLDER/consolidated.01.pth lacks tensors: {WQ}; is params.json another model's?",
        ),
        (
            lambda state: state.update({"layers.0.attention.wq.bias": torch.zeros(48)}),
            "FOLDER/consolidated.01.pth has surplus tensors: layers.0.attention.wq.bias; "
            "is params.json another model's?",
        ),
        (
            lambda state: state.update({WQ: state[WQ][:, :40].clone()}),
            f"FOLDER: {WQ} must join to shape (48, 48), got shards of [(24, 48), (24, 40)]",
        ),
        (
            lambda state: state.update({"norm.weight": torch.ones(47)}),
            "FOLDER: norm.weight must join to shape (48,), got shards of [(48,), (47,)]",
        ),
        (
            lambda state: state.update({EMBEDDING: torch.zeros(352, 24)}),
            f"FOLDER: {EMBEDDING} must join to shape (353, 48), got shards of "
            "[(353, 24), (352, 24)]",
        ),
        (
            lambda state: state.update({EMBEDDING: torch.zeros(353 * 24)}),
            f"FOLDER: {EMBEDDING} must join to shape (353, 48), got shards of [(353, 24), (8472,)]",
        ),
        (
            lambda state: state.update({WQ: torch.zeros(24, 48, dtype=torch.int8)}),
            f"FOLDER/consolidated.01.pth: {WQ} must be float32, float16 or bfloat16, "
            "got torch.int8",
        ),
        (
            lambda state: state.update({"epoch": 3}),
            "FOLDER/consolidated.01.pth: epoch must be a tensor, got int",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    change: Callable[[dict[str, object]], object],
    message: str,
    write_meta: Write,
    tiny_model: Llama,
) -> None:
    folder = write_meta(tiny_model, shards=2)
    resave(folder, 1, change)
    assert error_of(folder) == message


def test_a_wrong_shape_in_a_single_file(write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model)
    resave(folder, 0, lambda state: state.update({EMBEDDING: torch.zeros(352, 48)}))
    assert error_of(folder) == (
        f"FOLDER/consolidated.00.pth: {EMBEDDING} must have shape (353, 48), got (352, 48)"
    )


def test_another_models_params_are_found_out(write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model, params={"n_layers": 3})
    assert error_of(folder) == (
        "FOLDER/consolidated.00.pth has surplus tensors: layers.3.attention.wk.weight, "
        "layers.3.attention.wo.weight, layers.3.attention.wq.weight and 6 more; "
        "is params.json another model's?"
    )


class RunsCode:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_needs_code_is_refused(
    archive: bool, write_meta: Write, tiny_model: Llama, tmp_path: Path
) -> None:
    folder, trap = write_meta(tiny_model), tmp_path / "trap"
    torch.save(
        {WQ: RunsCode(trap)},
        folder / "consolidated.00.pth",
        _use_new_zipfile_serialization=archive,
    )
    message = error_of(folder)
    assert re.fullmatch(
        r"FOLDER/consolidated\.00\.pth can only be read by running code \(\w+\.open\), which is "
        r"refused: save its tensors alone, with torch\.save\(state_dict, path\)",
        message,
    )
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold tensors by name, got list"),
        (torch.ones(3), "must hold tensors by name, got Tensor"),
        ({"model": {}}, "model must be a tensor, got dict"),
        ({}, "lacks tensors: tok_embeddings.weight, layers.0.attention.wq.weight"),
    ],
)
def test_a_torch_file_of_another_kind_is_refused(
    content: object, message: str, write_meta: Write, tiny_model: Llama
) -> None:
    folder = write_meta(tiny_model)
    torch.save(content, folder / "consolidated.00.pth")
    assert message in error_of(folder)


@pytest.mark.parametrize(
    "data", [b"", b"hello world", b"\x80", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_is_not_torchs_is_refused(
    data: bytes, write_meta: Write, tiny_model: Llama
) -> None:
    folder = write_meta(tiny_model)
    (folder / "consolidated.00.pth").write_bytes(data)
    assert error_of(folder) == (
        "FOLDER/consolidated.00.pth is damaged or not a torch file: copy it again"
    )


@pytest.mark.parametrize("archive", [True, False])
def test_a_truncated_file_is_refused(archive: bool, write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model, archive=archive)
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()
    rng = random.Random(3)
    for length in [*rng.sample(range(len(data)), 40), len(data) - 1, 1]:
        path.write_bytes(data[:length])
        message = error_of(folder)
        assert re.search(
            r"consolidated\.00\.pth is (cut off \(\d+ bytes\)|damaged or not a)", message
        )


def test_a_damaged_beginning_is_refused_or_harmless(write_meta: Write, tiny_model: Llama) -> None:
    """Bits flipped in the pickle raise many kinds of errors; every one ends in one line."""
    folder = write_meta(tiny_model)
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()
    rng = random.Random(4)
    messages = []
    for _ in range(80):
        damaged = bytearray(data)
        damaged[rng.randrange(3000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read_meta(folder)
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(str(folder) in message and "\n" not in message for message in messages)


def test_folders_are_recognised_by_their_files(tmp_path: Path) -> None:
    assert not is_meta(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert not is_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").touch()
    assert is_meta(tmp_path)


def test_params_errors_reach_the_caller(write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model)
    params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    (folder / "params.json").write_text(json.dumps(params | {"moe": 8}), encoding="utf-8")
    assert error_of(folder) == (
        "FOLDER/params.json: moe is not supported: the model is a mixture of experts"
    )


def test_a_shard_of_a_huge_number_is_refused_at_once(tmp_path: Path) -> None:
    for number in ("00", "99999999"):
        (tmp_path / f"consolidated.{number}.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks consolidated\.01\.pth: copy"):
        shard_paths(tmp_path)
