"""A run that is killed, at whatever moment, and resumed is bitwise the run that was not.

The kills are real: this file is also a program, which forks runs of a small model and ends them by
SIGKILL, at random times and inside the writing of files. Forking saves importing torch each time.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.checkpoints import Base, train_state
from llama_adapter.checkpoints.train_state import list_checkpoints, load_latest
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.run_folder import RunFolder
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.training import finetune

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 61
N_KILLS = 20
STEPS = 15
# of a line of the metrics
VARYING = ("time", "tokens_per_second", "tflops")


class WordTokenizer(Tokenizer):
    """A token per word, by its checksum; keeps the sequences short."""

    def __init__(self) -> None:
        self.bos_id, self.eos_id, self.vocab_size = 1, 2, VOCABULARY
        self.digest = "words"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids between the marks that are asked for."""
        ids = [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in text.split()]
        return [1] * bos + ids + [2] * eos


def make_base(seed: int = 23) -> Base:
    config = LlamaConfig(dim=16, n_layers=2, n_heads=2, vocab_size=VOCABULARY, multiple_of=8)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = Llama(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5)
    return Base(model.requires_grad_(False).eval(), WordTokenizer(), "words")


def make_config(folder: Path, name: str) -> FinetuneConfig:
    """15 steps in three epochs over 20 records, with a checkpoint after every second."""
    data = folder / "data.json"
    if not data.exists():
        items = [
            {"instruction": f"do {i}", "input": "", "output": "so " * (i % 3 + 1) + str(i % 7)}
            for i in range(20)
        ]
        data.write_text(json.dumps(items))
    return FinetuneConfig(
        data=data,
        output=folder / name,
        epochs=3,
        warmup_epochs=1.0,
        batch_size=4,
        micro_batch_tokens=100,
        lr=0.05,
        val_size=2,
        save_every=2,
        threads=1,
        adapter=AdapterConfig(prompt_length=2, n_layers=2),
    )


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on kills: every number but the speed, and the adapters' bytes."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if k not in VARYING})
    adapters = {
        name: zlib.crc32((folder / name).read_bytes())
        for name in ("adapter.safetensors", "best.safetensors")
    }
    return {"rows": rows, "adapters": adapters}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curve takes longer to draw than these runs take."""
    monkeypatch.setattr(RunFolder, "draw_curve", lambda self: None)


def test_a_resumed_run_counts_every_step_once(tmp_path: Path) -> None:
    base = make_base()
    finetune(make_config(tmp_path, "whole"), base=base)
    run = make_config(tmp_path, "run")
    for stop in (1, 2, 7, 8, 14):
        finetune(replace(run, max_steps=stop), base=base, resume=True)
    finetune(run, base=base, resume=True)
    expected = results(tmp_path / "whole")
    got = results(run.output)
    steps = [row["step"] for row in got["rows"] if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert [r for r in got["rows"] if "loss" in r] == [r for r in expected["rows"] if "loss" in r]
    assert got["adapters"]["adapter.safetensors"] == expected["adapters"]["adapter.safetensors"]


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    run = make_config(tmp_path, "run")
    finetune(run, base=make_base())
    before = results(run.output)
    (run.output / "adapter.safetensors").unlink()
    seen: list[dict[str, Any]] = []
    result = finetune(run, base=make_base(), resume=True, on_step=seen.append)
    assert seen == []
    assert results(run.output) == before
    assert len(result.losses) == STEPS


def test_a_truncated_checkpoint_is_refused_by_name_and_the_previous_one_used(
    tmp_path: Path,
) -> None:
    base = make_base()
    finetune(make_config(tmp_path, "whole"), base=base)
    run = make_config(tmp_path, "run")

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(run, base=base, on_step=interrupt)
    checkpoints = list_checkpoints(run.output / "checkpoints")
    assert list(checkpoints) == [6, 8]
    checkpoints[8].write_bytes(checkpoints[8].read_bytes()[:-100])
    seen: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match="using step-00000006.safetensors instead") as caught:
        finetune(run, base=base, resume=True, on_step=seen.append)
    assert f"checkpoint {checkpoints[8]} is truncated or damaged" in str(caught[0].message)
    assert seen[0]["step"] == 7
    assert results(run.output) == results(tmp_path / "whole")


def test_the_checkpoint_holds_plain_data_and_both_groups(tmp_path: Path) -> None:
    run = make_config(tmp_path, "run")
    finetune(replace(run, max_steps=5), base=make_base())
    state = load_latest(run.output / "checkpoints")
    assert state is not None
    assert state.step == 5
    assert sorted(state.tensors) == sorted(
        [
            "adapter.gates",
            "adapter.prompts",
            *(
                f"optimiser.{group}.0.{key}"
                for group in ("gates", "prompts")
                for key in ("exp_avg", "exp_avg_sq", "step")
            ),
            "random.cpu",
        ]
    )
    assert sorted(state.values) == ["base", "best", "digests", "options"]


def test_resume_refuses_other_options_data_and_base(tmp_path: Path) -> None:
    run = make_config(tmp_path, "run")
    finetune(replace(run, max_steps=5), base=make_base())
    with pytest.raises(ValueError, match="not empty: give another one, or resume the run in it"):
        finetune(run, base=make_base())
    with pytest.raises(ValueError, match=r"cannot resume .*run: weight_decay was 0.02, is now 0.1"):
        finetune(replace(run, weight_decay=0.1), base=make_base(), resume=True)
    with pytest.raises(ValueError, match=r"it began with another base model \(one shape, but"):
        finetune(run, base=make_base(seed=24), resume=True)
    run.data.write_text(run.data.read_text().replace("do 7", "do 77"))
    with pytest.raises(ValueError, match=r"the content of .*data.json has changed since the run"):
        finetune(run, base=make_base(), resume=True)


def test_killed_runs_resume_bitwise(tmp_path: Path) -> None:
    """20 kills by SIGKILL: at random times, in any file's write, inside the checkpoint's write."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    expected = results(tmp_path / "whole")
    steps = [row["step"] for row in expected["rows"] if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert len(kills) == N_KILLS
    for kill in kills:
        assert kill["signal"] == signal.SIGKILL, kill
        assert kill["resumed"] == 0, kill
        assert results(tmp_path / kill["run"]) == expected, kill
    # the kills were where they should be: spread over the run, and torn files among them
    assert len({kill["logged"] for kill in kills}) >= 6
    assert sum(kill["torn"] for kill in kills) >= 4
    assert sum("checkpoint" in kill["moment"] for kill in kills) >= 8


# from here on: the program that kills


def kill_in_write(folder: Path, number: int, where: str, only_checkpoints: bool) -> None:
    """Let this process end itself inside its `number`-th write of a file.

    Args:
        folder: the run's.
        number: from 1.
        where: "half", when half the bytes are in the temporary file; "synced", before it is
            renamed; "renamed", before the folder is synced.
        only_checkpoints: count the writes of checkpoints only.
    """
    rename, sync, write = os.replace, os.fsync, train_state.write_atomically
    count, inside = 0, not only_checkpoints

    def marked_write(path: Path, data: bytes) -> None:
        nonlocal inside
        inside = True
        write(path, data)
        inside = not only_checkpoints

    def counting_sync(descriptor: int) -> None:
        if where == "half" and inside and count == number - 1:
            # none while the metrics or a folder are synced, which tears nothing
            for temporary in folder.rglob("*.tmp"):
                os.truncate(temporary, temporary.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    def counting_rename(source: Path, target: Path) -> None:
        nonlocal count
        count += inside
        if where == "synced" and inside and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if where == "renamed" and inside and count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    train_state.write_atomically = marked_write
    os.fsync, os.replace = counting_sync, counting_rename


def start(carry_out: Callable[[], Any], prepare: Callable[[], None] | None = None) -> int:
    """Fork a process that carries out something; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        if prepare is not None:
            prepare()
        carry_out()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        raise
    finally:
        os._exit(1)


def wait(process: int) -> tuple[int, int]:
    """Exit code and signal of a process."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return 0, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), 0


def kill_once(
    moment: str, rng: random.Random, run: FinetuneConfig, base: Base, seconds: float
) -> dict[str, Any]:
    """Start a run, kill it at `moment`, look at what is left, and resume it to its end."""

    def resumed() -> object:
        return finetune(run, base=base, resume=True)

    if moment == "time":
        process = start(resumed)
        time.sleep(rng.uniform(0.02, 0.9) * seconds)
        os.kill(process, signal.SIGKILL)
    else:
        place, where = moment.split()
        checkpoints = place == "checkpoint"
        # a run writes 8 checkpoints, 4 files of its own, the final adapter and at least one best
        number = rng.randint(1, 8 if checkpoints else 14)
        process = start(resumed, lambda: kill_in_write(run.output, number, where, checkpoints))
    _, ended_by = wait(process)
    metrics = run.output / "metrics.jsonl"
    logged = len(metrics.read_bytes().split(b"\n")) if metrics.exists() else 0
    torn = bool(list(run.output.rglob("*.tmp"))) if run.output.exists() else False
    code, _ = wait(start(resumed))
    return {
        "run": run.output.name,
        "moment": moment,
        "signal": ended_by,
        "logged": logged,
        "torn": torn,
        "resumed": code,
    }


def main(folder: Path) -> None:
    """Carry out the whole run and the killed ones in `folder`; prints what happened as JSON."""
    torch.set_num_threads(1)
    # the picture is not what is tested here, and takes longer than the rest
    RunFolder.draw_curve = lambda self: None
    base = make_base()
    rng = random.Random(20)
    # what torch imports on first use must not count as running time, nor be imported 40 times
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.utils.tensorboard")
    moments = ["time"] * 8 + [
        f"{place} {where}"
        for place in ("checkpoint", "checkpoint", "file")
        for where in ("half", "synced", "renamed", "half")
    ]
    begun = time.monotonic()
    wait(start(lambda: finetune(make_config(folder, "whole"), base=base, resume=True)))
    seconds = time.monotonic() - begun
    kills = []
    for number, moment in enumerate(moments):
        found = {"signal": 0}
        attempt = 0
        # a run can outpace its killer; that is no kill, and another one is tried
        while found["signal"] == 0 and attempt < 5:
            run = make_config(folder, f"run-{number}-{attempt}")
            found = kill_once(moment, rng, run, base, seconds)
            attempt += 1
        kills.append(found)
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
