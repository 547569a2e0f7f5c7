"""What a training run leaves behind, and in what order, so that a kill at any moment loses nothing.

    config.json environment.json skipped.jsonl metrics.jsonl events.out.tfevents.* loss.png
    checkpoints/step-*.safetensors adapter.safetensors best.safetensors

metrics.jsonl is the record of truth: one line per optimiser step and one per validation. When a run
continues from a checkpoint, the lines beyond it are cut off and written anew.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from llama_adapter.checkpoints.atomic import TEMPORARY_SUFFIX, write_atomically
from llama_adapter.loss_curve import draw_curves
from llama_adapter.recipe import FinetuneConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("llama-adapter-kernels", "torch", "triton", "numpy", "safetensors", "sentencepiece")
LOCK = ".lock"
# fields that may differ between the processes of a run: what lies where on a machine of several
OWN_FIELDS = (
    "data", "val_data", "base", "output", "token_cache", "threads", "device", "profile",
    "vision.vision_model", "vision.images", "vision.feature_cache",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class RunKind:
    """What the runs of one command have in common.

    Attributes:
        defaults: an instance of the options, as plain data: a run may be older than an option.
        free: options that may differ between a run and its continuation: they change a step by
            rounding at most. Nested ones by dotted names.
        curves: from a run's options and its steps' rows, those of each curve.
        score: the field of rows that holds what is found on the held-out data.
        result: file of what was trained.
        loss_axis: what the axis of losses says.
        score_axis: that of the scores; None: they are losses too.
    """

    defaults: Mapping[str, Any]
    free: tuple[str, ...]
    curves: Callable[[Mapping[str, Any], Sequence[Row]], Mapping[str, Sequence[Row]]]
    score: str = "val_loss"
    result: str = "adapter.safetensors"
    loss_axis: str = "loss, nats per token"
    score_axis: str | None = None


def _curves(options: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Batches of one kind each are two curves."""
    if options.get("joint", "off") == "off":
        return {"training": list(rows)}
    of: dict[str, list[Row]] = {"training, text": [], "training, images": []}
    for row in rows:
        of["training, images" if row.get("images") else "training, text"].append(row)
    return of


_FREE = (
    "output", "max_steps", "save_every", "keep_checkpoints", "profile", "recompute", "token_cache",
    "shard", "micro_batch_tokens", "vision.feature_cache",
)  # fmt: skip
FINETUNE = RunKind(asdict(FinetuneConfig(Path(), Path())), _FREE, _curves)


class RunFolder:
    """One run's folder: checked when made, written from `open` to `close`.

    Attributes:
        path: the folder.
        rows: every line of metrics.jsonl so far.
        follows: whether another process writes it, and this one nothing.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        resume: bool,
        follows: bool = False,
        kind: RunKind = FINETUNE,
    ) -> None:
        """Check that the run may use the folder; nothing is written.

        Args:
            path: a folder that is empty or absent, or with `resume` one that holds this run.
            config: the run's fields as plain data, nested ones as mappings.
            resume: whether to continue what the folder holds; an empty one starts a new run.
            follows: another process checks and writes it.
            kind: of the run.

        Raises:
            ValueError: the folder is in use and resume is False, is no run folder, or holds a run
                with another configuration, whose field is named.
        """
        self.path, self.follows, self.kind = Path(path), follows, kind
        self.rows: list[Row] = []
        self._config = _plain(config)
        self._resume = resume
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._events: SummaryWriter | None = None
        if follows:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output must be a folder, got the file {self.path}")
        self._check_use()

    @property
    def checkpoints(self) -> Path:
        """Folder of the training checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """File of the final adapter, or of what else was trained."""
        return self.path / self.kind.result

    @property
    def best_adapter(self) -> Path:
        """File of the adapter with the lowest validation loss."""
        return self.path / "best.safetensors"

    @property
    def curve(self) -> Path:
        """Picture of the loss curve."""
        return self.path / "loss.png"

    @property
    def options(self) -> dict[str, Any]:
        """The run's options, nested ones by dotted names."""
        return _flatten(self._config)

    @property
    def fixed_options(self) -> dict[str, Any]:
        """Those that a continuation may not change."""
        return self._fixed(self.options)

    def _fixed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name not in self.kind.free}

    def check_same_options(self, before: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first, unless `before` fixed the same options.

        One that is not among them is younger than the run, which therefore had the default.
        """
        now = self.fixed_options
        defaults = _flatten(_plain(self.kind.defaults))
        for name in [*now, *(name for name in before if name not in now)]:
            had = before.get(name, defaults.get(name))
            if had != now.get(name):
                raise ValueError(
                    f"cannot resume {self.path}: {name} was {had!r}, is now {now.get(name)!r}"
                )

    def _check_use(self) -> None:
        held = self._held_files()
        if held and not self._resume:
            raise ValueError(
                f"output folder {self.path} is not empty: give another one, or resume the run in "
                "it (--resume)"
            )
        if held:
            self._check_same_run()

    def _held_files(self) -> list[Path]:
        """What the folder holds, but for its lock and what a kill left of a write."""
        if not self.path.is_dir():
            return []
        found = self.path.iterdir()
        return [path for path in found if path.suffix != TEMPORARY_SUFFIX and path.name != LOCK]

    def _lock_folder(self) -> None:
        """Keep other processes out until the folder is closed; the system frees a dead one's."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("a")
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            # Windows has no such call
            return
        except OSError:
            self.close()
            raise ValueError(f"run folder {self.path} is in use by another process") from None
        # what was free when this run began may have been taken since
        self._check_use()

    def _check_same_run(self) -> None:
        file = self.path / "config.json"
        if not file.is_file():
            raise ValueError(f"cannot resume {self.path}: it holds no run (config.json is missing)")
        try:
            before = _flatten(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, AttributeError):
            raise ValueError(f"cannot resume {self.path}: config.json is not readable") from None
        self.check_same_options(self._fixed(before))

    def open(self, step: int, environment: Mapping[str, Any]) -> None:
        """Create or take over the folder, and cut the metrics back to `step`.

        Args:
            step: the step that the run continues from; 0 starts anew.
            environment: for environment.json, see `describe_environment`.

        Raises:
            OSError: the folder cannot be written.
            ValueError: another process uses the folder, or its metrics or checkpoints do not hold
                what the step promises.
        """
        if self.follows:
            return
        self._lock_folder()
        metrics = self.path / "metrics.jsonl"
        rows = _read_rows(metrics)
        kept = [row for row in rows if row["step"] <= step] if step else []
        if [row["step"] for row in kept if "loss" in row] != list(range(1, step + 1)):
            raise ValueError(
                f"cannot resume {self.path}: metrics.jsonl is damaged, it lacks steps before the "
                f"checkpoint's step {step}"
            )
        if not step and self.adapter.is_file() and not any(self.checkpoints.glob("step-*")):
            raise ValueError(
                f"cannot resume {self.path}: it holds an adapter, but no usable checkpoint"
            )
        if not step and rows:
            warnings.warn(
                f"{self.path} holds no checkpoint yet: starting again from step 0", stacklevel=2
            )
        # half a second to import, and no business of whoever only reads the configuration
        from torch.utils.tensorboard import SummaryWriter

        # the configuration comes first: what it marks as a run can be continued
        self._write_json("config.json", self._config)
        self.checkpoints.mkdir(exist_ok=True)
        for folder in (self.path, self.checkpoints):
            for remains in folder.glob(f".*{TEMPORARY_SUFFIX}"):
                remains.unlink()
        self._write_json("environment.json", environment)
        self.rows = kept
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(metrics, text.encode())
        self._metrics = metrics.open("a", encoding="utf-8")
        # tells TensorBoard to drop what an interrupted run logged beyond this step
        self._events = SummaryWriter(self.path, purge_step=step + 1 if step else 0)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_skipped(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """List the records that are not used, one JSON object a line, in skipped.jsonl."""
        if self.follows:
            return
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path / "skipped.jsonl", text.encode())

    def log(self, row: Row) -> None:
        """Append one line to metrics.jsonl, at once, and its numbers to the TensorBoard events.

        Args:
            row: "step", and any other numbers by name.

        Raises:
            RuntimeError: the folder is not open.
        """
        row = {**row, "time": round(time.time(), 3)}
        if self.follows:
            self.rows.append(row)
            return
        if self._metrics is None or self._events is None:
            raise RuntimeError("the run folder must be open before anything is logged")
        self.rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            if name not in ("step", "time"):
                self._events.add_scalar(name, value, row["step"], walltime=row["time"])

    def sync(self) -> None:
        """Bring the metrics to the disk; before a checkpoint, which counts on its lines."""
        if self._metrics is not None and self._events is not None:
            os.fsync(self._metrics.fileno())
            self._events.flush()

    def close(self) -> None:
        """Close the metrics and the events; harmless when they are not open."""
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            self._events.close()
        if self._lock is not None:
            self._lock.close()
        self._metrics = self._events = self._lock = None

    def training_losses(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and their losses, by what they are curves of."""
        curves = self.kind.curves(self.options, [row for row in self.rows if "loss" in row])
        return {label: [(x["step"], x["loss"]) for x in rows] for label, rows in curves.items()}

    def draw_curve(self) -> None:
        """Draw the training losses and what was found on held-out data over the steps."""
        if self.follows:
            return
        kind, name = self.kind, self.kind.score
        scores = [(row["step"], row[name]) for row in self.rows if name in row]
        axes = kind.loss_axis, kind.score_axis
        draw_curves(self.curve, self.training_losses(), scores, axes)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(config, default=str))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as `adapter.prompt_length`, so that an error can name them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _read_rows(path: Path) -> list[Row]:
    """Lines of a metrics file up to the first that a kill left torn."""
    rows: list[Row] = []
    if not path.is_file():
        return rows
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


def describe_environment(device: torch.device, more: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, device, threads and the source's git commit; no paths, no host names.

    Args:
        device: where the run computes.
        more: packages beside PACKAGES.

    Returns:
        Plain data for environment.json.
    """
    packages = {}
    for name in (*PACKAGES, *more):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    # with the build that the package's metadata may leave out: +cpu, +cu130
    packages["torch"] = torch.__version__
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "commit": _git_commit(Path(__file__).resolve().parents[1]),
    }


def _git_commit(root: Path) -> str | None:
    """Commit of the checkout the package runs from, or None outside of one."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
