"""A base that no process holds whole trains as a whole one does; real processes, over gloo.

What the processes compare among themselves is in sharded_worker.py.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llama_adapter import assets
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.config import AdapterConfig, LlamaConfig, VisualConfig, width_of
from llama_adapter.model import Llama
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.sharding import own_rows, project_in_place
from llama_adapter.training import finetune
from llama_adapter.world import World
from tests.llama_adapter import sharded_worker
from tests.llama_adapter.hf_models import on_transformers
from tests.llama_adapter.test_world import ROOT, close, command, losses, rows, run, workers

# odd numbers of rows; halves and thirds of the queries and keys end within a head
ODD = LlamaConfig(
    dim=55,
    n_layers=4,
    n_heads=5,
    n_kv_heads=1,
    attention_head_dim=8,
    vocab_size=355,
    max_seq_len=64,
    **width_of(55, 89),
)


def random_model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """A model whose logits are wide."""
    model, generator = Llama(config), torch.Generator().manual_seed(17)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model.to(dtype)


def written(model: Llama, folder: Path, tokenizer: Path) -> Path:
    """A folder in which transformers has saved the model, in several files."""
    size = sum(x.nbytes for x in model.parameters())
    dtype = model.output_weight.dtype
    theirs = on_transformers(model).to(dtype)
    theirs.save_pretrained(folder, max_shard_size=size // 2)
    assert len(list(folder.glob("*.safetensors"))) > 1
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def launch(what: str, folder: Path, results: Path, processes: int = 2) -> list[dict[str, Any]]:
    """What each process found."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += ["-m", sharded_worker.__name__, what, str(folder), str(results)]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # glibc gives freed weights back to the system at once: else it keeps what it thinks it may need
    variables["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[:60])
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(processes)]


def check_collectives(found: dict[str, Any], n_layers: int, tied: bool) -> None:
    """Weights are gathered once per layer and direction, and nothing but gradients is summed."""
    for count in found["collectives"].values():
        gathered = sum(n for name, n in count.items() if "gather" in name)
        forward = n_layers + (1 if tied else 2)
        # none below the first adapted layer has a backward pass; torch gathers one layer ahead
        assert gathered == forward + n_layers - found["first"] + 1, count
        # prompts and gates together, the loss, the number of passes
        assert sum(n for name, n in count.items() if "reduce" in name) == 3, count
        assert not any("scatter" in name for name in count), count
    assert len(found["collectives"]) == 3


def test_two_processes_hold_and_compute_what_one_does(
    tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = written(random_model(ODD), tmp_path / "base", tiny_tokenizer_path)
    for found in launch("compare", folder, tmp_path):
        check_collectives(found, ODD.n_layers, tied=False)


@pytest.mark.slow
def test_three_processes_share_a_tied_base_in_bfloat16(
    tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    model = random_model(replace(ODD, tied_embeddings=True), torch.bfloat16)
    folder = written(model, tmp_path / "base", tiny_tokenizer_path)
    for found in launch("compare", folder, tmp_path, 3):
        check_collectives(found, ODD.n_layers, tied=True)


@pytest.mark.slow
def test_a_process_never_holds_much_more_than_its_part(
    tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    sizes = {"dim": 512, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 2053, "n_layers": 24}
    config = LlamaConfig(**sizes, **width_of(512, 1024), max_seq_len=64)
    model = random_model(config)
    whole = sum(x.nbytes for x in model.parameters())
    folder = written(model, tmp_path / "base", tiny_tokenizer_path)
    del model
    for found in launch("measure", folder, tmp_path):
        # what is measured is the weights: all of them, where nobody shares them
        assert whole <= found["whole"] <= 1.05 * whole
        assert 0.5 * whole <= found["load"] <= 0.55 * whole
        # two layers of 24 are gathered at a time, each in what is sent and what is computed with
        assert found["load"] < found["step"] <= 0.75 * whole


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 355])
def test_rows_are_cut_as_torch_cuts_them(rows: int) -> None:
    for size in (1, 2, 3, 5):
        chunks = list(torch.arange(rows).chunk(size))
        chunks += [torch.arange(0)] * (size - len(chunks))
        assert [list(own_rows(rows, rank, size)) for rank in range(size)] == [
            chunk.tolist() for chunk in chunks
        ]


def test_a_prompt_projected_in_its_layer_is_the_same(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    before, inside = tiny_model.project(tiny_adapter), project_in_place(tiny_model, tiny_adapter)
    assert list(inside.layers) == list(before.layers)
    assert len(inside.layers) == len(before.layers)
    assert inside.layers.get(0) is None
    for layer, prompt in before.layers.items():
        again = inside.layers[layer]
        assert torch.equal(again.k, prompt.k)
        assert torch.equal(again.v, prompt.v)
        assert torch.equal(again.gate, prompt.gate)


@pytest.mark.parametrize(
    "visual",
    [VisualConfig(7), VisualConfig(7, fusion="early", tokens=3, layers=2)],
    ids=["late", "early"],
)
@torch.no_grad()
def test_and_so_are_an_images_tokens(visual: VisualConfig, tiny_model: Llama) -> None:
    g = torch.Generator().manual_seed(3)
    settings = AdapterConfig(prompt_length=5, n_layers=3)
    adapter = Adapter(settings, tiny_model.config, generator=g, visual=visual)
    for name, parameter in adapter.named_parameters():
        if "gates" in name:
            parameter.normal_(std=1.5, generator=g)
    present = torch.tensor([True, False])
    tokens = adapter.visual_tokens(torch.randn(2, 7, generator=g), present)
    ids = torch.randint(3, 300, (2, 19), generator=g)
    expected = tiny_model(ids, tiny_model.project(adapter, tokens))
    assert torch.equal(tiny_model(ids, project_in_place(tiny_model, adapter, tokens)), expected)
    plain = tiny_model(ids, tiny_model.project(adapter))
    assert [bool((a - b).abs().max() > 0.01) for a, b in zip(expected, plain, strict=True)] == [
        True,
        False,
    ]


def test_one_process_alone_cannot_shard(tmp_path: Path) -> None:
    config = FinetuneConfig(data=assets.FOLLOW_TRAIN, output=tmp_path / "run", shard=True)
    with pytest.raises(ValueError, match="shard needs processes that torchrun has started"):
        finetune(config)
    assert not (tmp_path / "run").exists()


def test_a_quantised_base_cannot_be_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = "quantize must be left out .* got 'int8': such weights cannot be split"
    with pytest.raises(ValueError, match=refusal):
        FinetuneConfig(Path("data.json"), tmp_path, quantize="int8", shard=True)
    # before anything of it is read
    monkeypatch.setattr("llama_adapter.checkpoints.check_launched", lambda: None)
    monkeypatch.setattr("llama_adapter.checkpoints.READERS", ((lambda _: True, pytest.fail),))
    with pytest.raises(ValueError, match=refusal):
        load_base(tmp_path, quantize="int8", shard=World())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of which the last batch of an epoch has one alone."""
    records = json.loads(assets.FOLLOW_TRAIN.read_text(encoding="utf-8"))[:27]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes, each with the whole base."""
    folder = tmp_path_factory.mktemp("whole") / "two"
    run(data, folder)
    return folder


@pytest.mark.slow
def test_a_run_is_the_same_sharded_and_continues_either_way(
    data: Path, two: Path, tmp_path: Path
) -> None:
    sharded, there, back = (tmp_path / name for name in ("sharded", "there", "back"))
    run(data, sharded, "--shard")
    assert rows_without_time(sharded) == rows_without_time(two)
    files = [folder / "adapter.safetensors" for folder in (two, sharded)]
    for name, x in load_file(files[0]).items():
        assert torch.equal(x, load_file(files[1])[name]), name
    # begun sharded on 2, continued whole on 1; and the other way round
    run(data, there, "--shard", "--max-steps", "4")
    run(data, there, "--resume", "--no-shard", "--max-steps", "12", processes=1)
    run(data, back, "--max-steps", "4", processes=1)
    run(data, back, "--resume", "--shard", "--max-steps", "12")
    one = tmp_path / "one"
    run(data, one, processes=1)
    for mixed in (there, back):
        assert list(losses(mixed)) == list(losses(one))
        assert close(list(losses(mixed).values()), list(losses(one).values()))
    assert first_losses(there, 4) == first_losses(sharded, 4)
    assert first_losses(back, 4) == first_losses(one, 4)


def first_losses(output: Path, count: int) -> list[float]:
    return list(losses(output).values())[:count]


def rows_without_time(output: Path) -> list[dict[str, Any]]:
    """Lines of the metrics, but for what a clock says."""
    clocks = ("time", "tokens_per_second", "tflops")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows(output)]


@pytest.mark.slow
def test_a_killed_process_is_named_and_a_resume_takes_the_same_steps(
    data: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "killed"
    run(data, whole, "--epochs", "6")
    words, environment = command(data, output, "--epochs", "6", "--shard")
    process = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoints").is_dir() or not any((output / "checkpoints").iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # the one that writes
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    # torchrun names who began it; the other one says no more than that it is alone
    _, _, cause = said.partition("Root Cause")
    assert re.search(r"rank\s*: 0 ", cause), said
    assert "SIGKILL" in cause
    assert "another process of this run is gone" in said
    assert "[rank" not in said, "no traceback of ours"
    assert 2 <= len(losses(output)) < 24
    run(data, output, "--resume")
    assert losses(output) == losses(whole)


@pytest.mark.slow
def test_two_machines_meet_at_a_rendezvous(data: Path, two: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words, environment = command(data, apart, "--shard")
    at = words.index("--standalone")
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    words[at : at + 2] = [*meet, "--rdzv-id=test", "--nproc-per-node=1"]
    agents = [
        subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert rows_without_time(apart) == rows_without_time(two)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_trains_on_what_it_has_gathered(data: Path, tmp_path: Path, dtype: str) -> None:
    """One process over NCCL: the weights of a layer are a copy, which comes and goes."""
    found = []
    for name in ("whole", "sharded"):
        words, environment = command(data, tmp_path / name, "--dtype", dtype)
        words[words.index("--nproc-per-node=2")] = "--nproc-per-node=1"
        # all that this process has, the GPU among it
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], *sys.path])
        }
        if name == "sharded":
            words.append("--shard")
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(list(losses(tmp_path / name).values()))
    assert len(found[0]) == 12
    assert found[0] == pytest.approx(found[1], rel=1e-5 if dtype == "float32" else 1e-2)
