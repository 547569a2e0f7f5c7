"""Fine-tuning a host in a run folder, and how a run that was stopped continues exactly."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.fingerprint import Fingerprint
from llama_adapter.checkpoints.train_state import TrainState, load_latest, save_train_state
from llama_adapter.data.checked_files import FileProblem
from llama_adapter.host_training.fit import Row
from llama_adapter.host_training.host_config import METRICS, HostRunConfig, defaults
from llama_adapter.host_training.loading import (
    digest_of,
    final_task,
    load_host,
    load_task,
    method_options,
)
from llama_adapter.host_training.method_file import host_fingerprint, result_name, save_trained
from llama_adapter.host_training.search import Search
from llama_adapter.hosts.attention import device_of
from llama_adapter.hosts.methods import Attached, attach
from llama_adapter.run_folder import RunFolder, RunKind, describe_environment
from llama_adapter.seeded import seeded
from llama_adapter.tasks.task import Task

# what a host's head was trained to say, for whoever asks it
TASK_FILE = "task.json"
PACKAGES = ("transformers", "peft", "tokenizers", "pillow")
_FREE = ("output", "save_every", "keep_checkpoints", "strict")
_SHOWN = 3


@dataclass(frozen=True)
class HostResult:
    """A finished run.

    Attributes:
        attached: the method on the host, with the weights that remain.
        folder: the run folder.
        task: what was trained on.
        items: of it, in the fit whose weights remain.
        rate: the learning rate that was chosen, or given.
        results: by learning rate that was tried, its validation score; None where it diverged.
    """

    attached: Attached
    folder: RunFolder
    task: Task
    items: int
    rate: float
    results: Mapping[float, float | None]


def train_host(
    config: HostRunConfig,
    *,
    resume: bool = False,
    progress: bool | None = None,
    on_step: Callable[[Row], None] | None = None,
) -> HostResult:
    """Train a method on a host for a task, in a run folder.

    Args:
        config: everything.
        resume: continue what config.output holds; on the CPU, with as many threads, the result is
            bitwise that of an uninterrupted run. An empty or absent folder starts a new run.
        progress: show the progress bar on stderr; None shows it on a terminal.
        on_step: called with every line of metrics.jsonl as it is written.

    Returns:
        The trained method, the run folder and the task.

    Raises:
        FileNotFoundError: the model or a file of the task does not exist.
        ImportError: transformers, or what the method needs, is missing.
        ValueError: the data, the run folder or the model cannot be used; the message says which.
        FloatingPointError: the loss or its gradient became NaN or infinite; names the step.
        KeyboardInterrupt: interrupted; everything written is whole, the message says how to resume.
    """
    config = config.absolute()
    folder = RunFolder(config.output, asdict(config), resume, kind=_kind(config))
    options = config.task_options
    task, problems = load_task(options, config.model, seed=config.fit.seed)
    _report(problems, config.strict)
    model = load_host(config, task)
    made_with = method_options(config, task)
    known, device = host_fingerprint(model), device_of(model)
    final = final_task(task) if config.final == "train+val" else None
    attached: list[Attached] = []

    def make() -> Attached:
        for before in attached:
            before.detach()
        attached.clear()
        generator = torch.Generator().manual_seed(config.fit.seed)
        attached.append(attach(model, config.method, made_with, generator=generator))
        return attached[0]

    search = Search(make, task, config.fit, config.lr_grid, final)
    with seeded(config.fit.seed, device, config.threads):
        run = _Run(config, search, folder, digest_of(options, task, config.model), known)
        state = load_latest(folder.checkpoints) if resume else None
        if state is not None:
            run.restore(state)
        try:
            folder.open(search.step, describe_environment(device, PACKAGES))
            folder.write_skipped([_skipped(one) for one in problems])
            described = {"kind": task.kind, "labels": list(task.labels), "metric": task.metric}
            text = json.dumps(described, ensure_ascii=False, indent=2)
            write_atomically(folder.path / TASK_FILE, f"{text}\n".encode())
            run.train(progress, on_step)
            search.finish()
            save_trained(folder.path, attached[0], known)
            folder.draw_curve()
        finally:
            folder.close()
    assert search.rate is not None
    items = len((final or task).train)
    return HostResult(attached[0], folder, task, items, search.rate, search.results)


def _skipped(problem: FileProblem) -> dict[str, Any]:
    """A problem as skipped.jsonl has it: its line, or where in a JSON file it is."""
    where = {"line": problem.index}
    if problem.unit != "line":
        where = {"place": f"{problem.unit} {problem.index}"}
    return {"file": problem.path, **where, "reason": problem.reason}


def _kind(config: HostRunConfig) -> RunKind:
    def curves(options: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, list[Row]]:
        """A curve for each fit of a grid."""
        found: dict[str, list[Row]] = {}
        last = max((row["fit"] for row in rows), default=0)
        for row in rows:
            name = f"learning rate {row['peak_lr']:g}"
            if config.final == "train+val" and row["fit"] == last:
                name += ", all data"
            found.setdefault(name, []).append(row)
        return found

    return RunKind(
        defaults(HostRunConfig),
        _FREE,
        curves,
        score=f"val_{METRICS[config.task_options.task]}",
        result=result_name(config.method, config.method_options),
        loss_axis="training loss, nats",
        score_axis="validation score, per cent",
    )


def _report(problems: Sequence[FileProblem], strict: bool) -> None:
    """Warn of what cannot be used, or refuse it."""
    if not problems:
        return
    shown = "; ".join(map(str, problems[:_SHOWN]))
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    said = f"{len(problems)} entries of the data cannot be used: {shown}{more}"
    if strict:
        raise ValueError(said)
    warnings.warn(said, stacklevel=4)


class _Run:
    """The loop over steps, and what a checkpoint of it holds."""

    def __init__(
        self,
        config: HostRunConfig,
        search: Search,
        folder: RunFolder,
        digest: str,
        host: Fingerprint,
    ) -> None:
        self.config, self.search, self.folder = config, search, folder
        self.digest, self.host = digest, host
        self.saved = 0

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint, if it belongs to this data and this host."""
        where = f"cannot resume {self.folder.path}"
        # config.json is for people; what the run began with is in its checkpoints
        self.folder.check_same_options(state.values["options"])
        if state.values["digest"] != self.digest:
            raise ValueError(
                f"{where}: the content of the data, or how the host reads it, has "
                "changed since the run began"
            )
        before = state.values["host"]
        before = Fingerprint(before["name"], before["shape"], tuple(before["samples"]))
        difference = before.difference(self.host)
        if difference:
            raise ValueError(f"{where}: it began with another model ({difference})")
        self.search.restore(state.tensors, state.values["search"])
        self.saved = state.step

    def save(self) -> None:
        """Write a checkpoint, after the metrics up to it."""
        values = {
            "options": self.folder.fixed_options,
            "digest": self.digest,
            "host": asdict(self.host),
            "search": self.search.values(),
        }
        self.folder.sync()
        state = TrainState(self.search.step, self.search.tensors(), values)
        save_train_state(self.folder.checkpoints, state, self.config.keep_checkpoints)
        self.saved = self.search.step

    def train(self, progress: bool | None, on_step: Callable[[Row], None] | None) -> None:
        """Take all steps that are left."""
        search = self.search
        if not search.step and not search.takes_steps:
            # at its end from the beginning
            self.save()
        hidden = None if progress is None else not progress
        bar = tqdm(total=search.total, initial=search.step, unit="step", disable=hidden)
        score = self.folder.kind.score
        shown: dict[str, str] = {}
        try:
            for row in search.rows():
                self.folder.log(row)
                shown |= {"lr": f"{row['peak_lr']:g}", "loss": f"{row['loss']:.3f}"}
                if score in row:
                    shown[score] = f"{row[score]:.2f}"
                bar.set_postfix(shown, False)
                bar.update()
                if on_step is not None:
                    on_step(row)
                if search.step % self.config.save_every == 0 or search.at_an_end:
                    self.save()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped at step {search.step} of {search.total}; llama-adapter finetune --output "
                f"{self.folder.path} --resume continues from step {self.saved}"
            ) from None
        finally:
            bar.close()
