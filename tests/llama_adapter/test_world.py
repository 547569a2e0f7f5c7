"""Processes that train together take one process's steps; a killed one ends the run clearly.

They are started by torchrun itself, over gloo, and killed for real.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from llama_adapter import assets
from llama_adapter.world import World, join
from tests.llama_adapter import world_worker

ROOT = Path(__file__).parents[2]
# odd numbers of records in a batch, and a last one with a single record for two processes
RECORDS, BATCH = 25, 8


@dataclass(frozen=True)
class Item:
    """Anything with tokens."""

    tokens: tuple[int, ...]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = json.loads(assets.FOLLOW_TRAIN.read_text(encoding="utf-8"))[: RECORDS + 2]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(records))
    return path


def command(
    data: Path, output: Path, *more: str, processes: int = 2
) -> tuple[list[str], dict[str, str]]:
    """What starts a run, and its environment."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    words = ["llama_adapter", "finetune", "--output", str(output), "--quiet", *more]
    if "--resume" not in more:
        words += ["--data", str(data), "--epochs", "3", "--batch-size", str(BATCH)]
        words += ["--val-size", "2", "--save-every", "2", "--lr", "0.05", "--threads", "1"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [*start, *words], environment


def run(data: Path, output: Path, *more: str, processes: int = 2) -> str:
    words, environment = command(data, output, *more, processes=processes)
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=240, cwd=output.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(output) if "loss" in row}


def held_out(output: Path) -> list[float]:
    return [row["val_loss"] for row in rows(output) if "val_loss" in row]


def close(one: Sequence[float], other: Sequence[float]) -> bool:
    return bool(
        torch.allclose(torch.tensor(one).double(), torch.tensor(other).double(), rtol=2e-4, atol=0)
    )


def test_a_batch_is_shared_whole_and_evenly() -> None:
    items = [Item((1,) * n) for n in (3, 90, 7, 41, 41, 2, 60)]
    for size in (1, 2, 3, 9):
        shares = [World(rank, size).share(items) for rank in range(size)]
        assert sorted(len(i.tokens) for share in shares for i in share) == sorted(
            len(item.tokens) for item in items
        )
        for share in shares:
            assert [item for item in items if any(item is own for own in share)] == share
    loads = [sum(len(i.tokens) for i in World(rank, 2).share(items)) for rank in range(2)]
    # what the largest first to the least loaded promises
    assert max(loads) <= 4 / 3 * sum(loads) / 2


def test_a_gpu_is_each_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "each process needs a GPU of its own, got 2 for process 3"
    with pytest.raises(ValueError, match=message), join():
        pass
    message = "device must be cuda or cpu where processes are several, got cuda:0"
    with pytest.raises(ValueError, match=message), join("cuda:0"):
        pass


def test_another_that_is_gone_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(
            "[/pytorch/third_party/gloo/pair.cc:553] Connection closed by peer [127.0.1.1]:33501. "
            "This means the remote process has died.\nException raised from ..."
        )

    monkeypatch.setattr(distributed, "all_gather_object", fail)
    message = r"if the run had begun \(Connection closed by peer \[127\.0\.1\.1\]:33501\)$"
    with pytest.raises(ConnectionError, match=message):
        World(0, 2).agree({})


def test_one_process_alone_sends_nothing() -> None:
    alone, x = World(), torch.ones(3)
    alone.add([x])
    assert x.tolist() == [1, 1, 1]
    assert alone.same("value") == "value"
    assert alone.most(3) == 3
    assert alone.gather("value") == ["value"]
    alone.agree({"lr": 1})


LEAVES_AT_ONCE = """
import sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from llama_adapter.world import join

with join() as world:
    # what torch's caches do: keep the group beyond its end
    sys.modules["kept"] = init_device_mesh("cpu", (world.size,))
    for count in range(1001, 1021):
        sent = torch.ones(count)
        distributed.all_reduce(sent)
    del sent
"""


@pytest.mark.slow
def test_processes_that_were_given_different_things_do_not_train(
    data: Path, tmp_path: Path
) -> None:
    """They used to write an adapter of mixed shares, to abort, or to wait for half an hour."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(data.read_text())[::-1]))
    words, environment = command(data, tmp_path)
    start = [*words[: words.index("-m", 2) + 1], world_worker.__name__]
    done = subprocess.run(
        [*start, str(data), str(other), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["errors"] == second["errors"]
    same = "must be the same in every process, got "
    assert first["errors"] == {
        "lr": f"lr {same}0.05 in 0 and 0.1 in 1",
        "seed": f"seed {same}0 in 0 and 5 in 1",
        "prompt_length": f"adapter.prompt_length {same}10 in 0 and 9 in 1",
        "shard": f"shard {same}True in 0 and False in 1",
        "max_steps": f"max_steps {same}2 in 0 and 3 in 1",
        "data": first["errors"]["data"],
    }
    assert first["errors"]["data"].startswith(f"content of the data {same}[")
    for name in first["errors"]:
        assert not (tmp_path / name).exists(), name
    # a base that was sharded before is trained as one that the run shards, among processes that met
    given, loaded = first["losses"]
    assert given == loaded
    assert len(given) == 2


@pytest.mark.slow
def test_ctrl_c_says_how_all_processes_go_on(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    words, environment = command(data, output, "--epochs", "200", "--shard", "--save-every", "3")
    process = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list((output / "checkpoints").glob("*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    how = f"torchrun with -m llama_adapter finetune --output {output} --resume continues from"
    assert how in said
    assert "[rank" not in said, "no traceback of ours"
    # the one that writes knows the step, another does not; either may be stopped first
    for line in said.splitlines():
        if how in line:
            assert re.search(r"at step \d+ of \d+; .* from (step \d+|the last checkpoint)$", line)
    run(data, output, "--resume", "--max-steps", str(len(losses(output)) + 2))


@pytest.mark.slow
def test_a_process_that_leaves_at_once_ends_well(tmp_path: Path) -> None:
    """Each of them used to abort about every other time."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES_AT_ONCE)
    words, environment = command(script, tmp_path, processes=6)
    done = subprocess.run(
        [*words[: words.index("-m", 2)], str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_either_continues(
    data: Path, tmp_path: Path
) -> None:
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    run(data, one, processes=1)
    printed = run(data, two)
    assert printed.count("adapter     ") == 1, "one process speaks"
    assert list(losses(one)) == list(losses(two)) == list(range(1, 13))
    assert close(list(losses(one).values()), list(losses(two).values()))
    assert close(held_out(one), held_out(two))
    tensors = [load_file(folder / "adapter.safetensors") for folder in (one, two)]
    for name, x in tensors[0].items():
        assert float((x - tensors[1][name]).abs().max()) <= 2e-3 * float(x.abs().max()), name
    # a checkpoint of two is continued by one
    run(data, again, "--max-steps", "4")
    run(data, again, "--resume", "--max-steps", "12", processes=1)
    assert close(list(losses(two).values()), list(losses(again).values()))
    first = dict(list(losses(two).items())[:4])
    assert dict(list(losses(again).items())[:4]) == first


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_a_resume_takes_the_same_steps(
    data: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "killed"
    run(data, whole, "--epochs", "9")
    words, environment = command(data, output, "--epochs", "9")
    process = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoints").is_dir() or not any((output / "checkpoints").iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    follower = workers(process.pid)[1]
    os.kill(follower, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in said or "another process of this run is gone" in said
    done = len(losses(output))
    assert 2 <= done < 36
    run(data, output, "--resume")
    assert losses(output) == losses(whole)


def workers(parent: int) -> list[int]:
    """torchrun's children, by rank."""
    found: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = status.read_text().rpartition(") ")
            if int(rest.split()[1]) == parent:
                pid = int(status.parent.name)
                variables = (status.parent / "environ").read_bytes().split(b"\0")
                rank = next(v for v in variables if v.startswith(b"RANK="))
                found[int(rank[5:])] = pid
        except (OSError, StopIteration):
            continue
    return [found[rank] for rank in sorted(found)]
