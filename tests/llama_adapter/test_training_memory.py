"""A file of a million records trains in the memory of a short one.

This file is also the program that trains, in a process of its own, whose anonymous memory is
watched: what is mapped from files is the system's, which takes it back where it is short.
"""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FEW, MANY = 100_000, 1_000_000
# as objects of Python a record takes 2,400; as a place in arrays, some tens
MOST_BYTES_PER_RECORD = 90


@pytest.mark.slow
def test_ten_times_the_records_take_little_more_memory(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    few, many = (json.loads(line) for line in done.stdout.splitlines()[1:])
    print(few, many)
    for run, count in ((few, FEW), (many, MANY)):
        assert run["records"] == count
        assert run["steps"] == 8
        assert run["loss"] < 8
    # tens of tokens each, on disk
    assert many["cache"] > 150e6
    assert many["peak"] - few["peak"] < MOST_BYTES_PER_RECORD * (MANY - FEW)


# from here on: the program that trains


class Watch(threading.Thread):
    """The most anonymous memory that the process has had since `peak` was set to 0."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Look often: what numpy takes for a moment counts."""
        while True:
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.003)


def main(folder: Path) -> None:
    """Train on a short file, for all that is allocated once, then on FEW and on MANY records."""
    from llama_adapter import assets
    from llama_adapter.checkpoints import load_base
    from llama_adapter.config import AdapterConfig
    from llama_adapter.recipe import FinetuneConfig
    from llama_adapter.training import finetune

    warnings.simplefilter("ignore")
    base, watch = load_base(assets.BASE), Watch()
    watch.start()
    for count in (2_000, FEW, MANY):
        data = folder / f"{count}.jsonl"
        with data.open("w") as file:
            for i in range(count):
                record = {"instruction": f"Write the plural of bus {i}.", "output": "buses"}
                file.write(json.dumps(record) + "\n")
        config = FinetuneConfig(
            data=data, output=folder / f"run-{count}", token_cache=folder / "cache", max_steps=8,
            val_size=500, threads=1, adapter=AdapterConfig(n_layers=2),
        )  # fmt: skip
        watch.peak = 0
        result = finetune(config, base=base, progress=False)
        found: dict[str, Any] = {
            "peak": watch.peak,
            "records": len(result.dataset.train) + len(result.dataset.held_out),
            "steps": len(result.losses),
            "loss": result.losses[-1],
            "cache": sum(path.stat().st_size for path in (folder / "cache").iterdir()),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
