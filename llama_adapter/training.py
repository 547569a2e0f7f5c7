"""Fine-tuning an adapter on instruction data, and how a run that was stopped continues exactly.

The options and their defaults, the papers', are in recipe.py, one step of a run in trainer.py.
"""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from llama_adapter.adapter import VISUAL, Adapter
from llama_adapter.assets import BASE
from llama_adapter.checkpoints import Base, default_device, load_base
from llama_adapter.checkpoints.adapter_file import save_adapter
from llama_adapter.checkpoints.fingerprint import Fingerprint, fingerprint
from llama_adapter.checkpoints.train_state import TrainState, load_latest, save_train_state
from llama_adapter.data.dataset import Dataset
from llama_adapter.data.examples import Batch
from llama_adapter.data.feed import EpochBatches, JointBatches, ahead
from llama_adapter.data.packed import template_prefixes
from llama_adapter.data.run_data import load_run_data
from llama_adapter.recipe import FinetuneConfig, learning_rate
from llama_adapter.run_folder import OWN_FIELDS, Row, RunFolder, describe_environment
from llama_adapter.seeded import seeded
from llama_adapter.step_profile import outside, phase, profiled
from llama_adapter.trainer import Prepared, Trainer
from llama_adapter.tuned_modules import copy_norms
from llama_adapter.utilisation import Speed, linear_flops, speed_of
from llama_adapter.world import World, join

# the papers' recipe takes thousands of steps; with fewer than this the gates hardly leave zero
FEW_STEPS = 50


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        adapter: the final adapter, as in the folder's adapter.safetensors.
        folder: the run folder.
        dataset: what was trained on, held out and set aside.
        speed: of the steps that this call took; None where it took none.
    """

    adapter: Adapter
    folder: RunFolder
    dataset: Dataset
    speed: Speed | None

    @property
    def adapter_path(self) -> Path:
        """File of the final adapter."""
        return self.folder.adapter

    @property
    def curve_path(self) -> Path:
        """Picture of the loss curve."""
        return self.folder.curve

    @property
    def losses(self) -> list[float]:
        """Training loss of every step, of resumed runs from the first one on."""
        return [row["loss"] for row in self.folder.rows if "loss" in row]

    @property
    def val_losses(self) -> dict[int, float]:
        """Loss on the held-out records by step: at the start, after each epoch, at the end."""
        return {row["step"]: row["val_loss"] for row in self.folder.rows if "val_loss" in row}


def finetune(
    config: FinetuneConfig,
    *,
    base: Base | None = None,
    resume: bool = False,
    progress: bool | None = None,
    on_step: Callable[[Row], None] | None = None,
) -> FinetuneResult:
    """Train an adapter for a frozen base on instruction data.

    Prompts and gates are float32 whatever the base's dtype. Records that cannot be used are listed
    in the run folder and warned of. Where config.vision names images, all are encoded before the
    first step, and a projector is trained with the rest. Where torchrun has started several
    processes, each computes a share of every batch, and rank 0 alone writes the run folder; a run
    may be continued by another number of them.

    Args:
        config: the recipe, the data and the run folder.
        base: a loaded base, frozen, in place of config.base, dtype, device, quantize and shard.
        resume: continue what config.output holds; on the CPU, with as many threads, the losses are
            bitwise those of an uninterrupted run. An empty or absent folder starts a new run.
        progress: show the progress bar on stderr; None shows it on a terminal.
        on_step: called with every line of metrics.jsonl as it is written.

    Returns:
        The adapter, the run folder and the data.

    Raises:
        FileNotFoundError: a data file, the base, the images or their encoder do not exist.
        ValueError: the data, the run folder or the base cannot be used, or processes of the run
            were given different options or content; the message says which.
        FloatingPointError: the loss or its gradient became NaN or infinite; names step and records.
        ConnectionError: another process of the run is gone.
        KeyboardInterrupt: interrupted; everything written is whole, the message says how to resume.
    """
    with join(config.device) as world:
        return _finetune(config, base, resume, progress, on_step, world)


def _finetune(
    config: FinetuneConfig,
    base: Base | None,
    resume: bool,
    progress: bool | None,
    on_step: Callable[[Row], None] | None,
    world: World,
) -> FinetuneResult:
    # a run can be continued from anywhere
    config = config.absolute()
    folder = RunFolder(config.output, asdict(config), resume, follows=world.rank > 0)
    world.agree({name: x for name, x in folder.options.items() if name not in OWN_FIELDS})
    if base is None:
        device = world.device or config.device or default_device()
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        where = config.base or BASE
        base = load_base(
            where,
            dtype=dtype,
            device=device,
            quantize=config.quantize,
            shard=world if config.shard else None,
        )
    dataset, pictures = load_run_data(config, base, False if folder.follows else progress)
    for line in dataset.warnings if not folder.follows else ():
        warnings.warn(line, stacklevel=3)
    device = base.model.output_weight.device
    with seeded(config.seed, device, config.threads):
        generator = torch.Generator().manual_seed(config.seed)
        adapter = Adapter(
            config.adapter,
            base.model.config,
            generator=generator,
            tuning=config.tuning.tuning,
            visual=None if pictures is None else pictures.visual_config(**config.projector.shape),
        ).to(device)
        copy_norms(base.model, adapter.tuned_parameters())
        trainer = Trainer(
            base.model,
            adapter,
            micro_batch_tokens=config.micro_batch_tokens,
            prefixes=template_prefixes(base.tokenizer),
            features=pictures,
            weight_decay=config.weight_decay,
            betas=config.betas,
            clip=config.clip,
            recompute=config.recompute,
            world=world,
        )
        known = base.fingerprint or fingerprint(base.model, base.name)
        world.agree({"content of the data": [digest[:12] for digest in dataset.digests.values()]})
        for rank, other in enumerate(world.gather(known)):
            if difference := known.difference(other):
                raise ValueError(
                    f"the base must be the same in every process, got another in {rank} "
                    f"({difference})"
                )
        run = _Run(config, trainer, dataset, folder, known)
        held = load_latest(folder.checkpoints) if resume and not folder.follows else None
        state = world.same(held)
        if state is not None:
            run.restore(state)
        steps = config.epochs * run.per_epoch
        few = steps < FEW_STEPS and config.max_steps is None and not run.step
        if few and not folder.follows:
            warnings.warn(
                f"few optimiser steps to learn much, {steps} (training records: "
                f"{len(dataset.train)}, epochs: {config.epochs}, batch_size: {config.batch_size}): "
                "give more epochs, a smaller batch_size, or both",
                stacklevel=3,
            )
        try:
            folder.open(run.step, describe_environment(device))
            folder.write_skipped(dataset.skipped_lines())
            speed = run.train(False if folder.follows else progress, on_step)
        finally:
            folder.close()
    return FinetuneResult(adapter.requires_grad_(True), folder, dataset, speed)


class _Run:
    """The loop over steps, and what a checkpoint of it holds."""

    def __init__(
        self,
        config: FinetuneConfig,
        trainer: Trainer,
        dataset: Dataset,
        folder: RunFolder,
        base: Fingerprint,
    ) -> None:
        self.config, self.trainer, self.dataset = config, trainer, dataset
        self.folder, self.base = folder, base
        self.per_epoch = len(self._epoch(0))
        self.step = 0
        self.saved = 0
        self.best: float | None = None

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint, if it belongs to this data and this base."""
        where = f"cannot resume {self.folder.path}"
        # config.json is for people; what the run began with is in its checkpoints
        self.folder.check_same_options(state.values["options"])
        for file, digest in self.dataset.digests.items():
            if state.values["digests"].get(file) != digest:
                raise ValueError(f"{where}: the content of {file} has changed since the run began")
        before = state.values["base"]
        before = Fingerprint(before["name"], before["shape"], tuple(before["samples"]))
        difference = before.difference(self.base)
        if difference:
            raise ValueError(f"{where}: it began with another base model ({difference})")
        limit = self.config.max_steps
        if limit is not None and state.step > limit:
            raise ValueError(f"{where}: it is at step {state.step}, beyond max_steps = {limit}")
        self.trainer.load_tensors(state.tensors)
        self.step = self.saved = state.step
        self.best = state.values["best"]

    def save(self) -> None:
        """Write a checkpoint, after the metrics up to it."""
        if self.folder.follows:
            return
        values = {
            "options": self.folder.fixed_options,
            "digests": self.dataset.digests,
            "base": asdict(self.base),
            "best": self.best,
        }
        self.folder.sync()
        state = TrainState(self.step, self.trainer.tensors(), values)
        save_train_state(self.folder.checkpoints, state, self.config.keep_checkpoints)
        self.saved = self.step

    def train(self, progress: bool | None, on_step: Callable[[Row], None] | None) -> Speed | None:
        """Run all steps that are left, then write the adapter and the loss curve."""
        before = len(self.folder.rows)
        total = self.config.epochs * self.per_epoch
        if self.config.max_steps is not None:
            total = min(total, self.config.max_steps)
        hidden = None if progress is None else not progress
        bar = tqdm(total=total, initial=self.step, unit="step", disable=hidden)
        try:
            writes = self.config.profile and not self.folder.follows
            device = self.trainer.model.output_weight.device
            with (
                profiled(self.folder.path if writes else None, device) as advance,
                closing(self._rows(total)) as rows,
            ):
                for row in rows:
                    self.folder.log(row)
                    if "loss" in row:
                        advance()
                        speed = f"{row['tokens_per_second']:.0f}"
                        bar.set_postfix({"loss": f"{row['loss']:.3f}", "tokens/s": speed}, False)
                        bar.update()
                    if on_step is not None:
                        on_step(row)
        except KeyboardInterrupt:
            command = f"llama-adapter finetune --output {self.folder.path} --resume"
            if self.trainer.world.size > 1:
                command = f"torchrun with -m {command.replace('-', '_', 1)}"
            # only who writes knows how far that has come
            where = "the last checkpoint" if self.folder.follows else f"step {self.saved}"
            raise KeyboardInterrupt(
                f"stopped at step {self.step} of {total}; {command} continues from {where}"
            ) from None
        finally:
            bar.close()
        if not self.folder.follows:
            save_adapter(self.folder.adapter, self.trainer.adapter, self.base)
        self.folder.draw_curve()
        dtype = str(self.trainer.model.tok_embeddings.weight.dtype).removeprefix("torch.")
        if self.config.quantize == "fp8":
            dtype = "float8"
        return speed_of(self.folder.rows[before:], device, dtype)

    def _epoch(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch."""
        config, groups, data = self.config, tuple(self.trainer.groups), self.dataset
        if config.joint == "off":
            return EpochBatches(data.train, config.batch_size, config.seed, epoch, groups)
        text = tuple(name for name in groups if name not in VISUAL)
        own = text, tuple(name for name in groups if name in VISUAL)
        return JointBatches(
            data.train, data.with_image, config.batch_size, config.seed, epoch, own, config.joint
        )

    def _batches(self, first: int, total: int) -> Iterator[Batch]:
        """Those of the steps from `first` on."""
        batches: Sequence[Batch] | None = None
        for step in range(first, total):
            epoch, position = divmod(step, self.per_epoch)
            if batches is None or position == 0:
                batches = self._epoch(epoch)
            yield batches[position]

    def _rows(self, total: int) -> Generator[Row, None, None]:
        """Take the steps; what a row is followed by happens once the row is written."""
        if self.step == 0:
            yield from self._validation()
        with closing(ahead(self._batches(self.step, total), self.trainer.prepare)) as feed:
            yield from self._steps(total, feed)

    def _steps(self, total: int, feed: Iterator[Prepared]) -> Iterator[Row]:
        config, model = self.config, self.trainer.model
        while self.step < total:
            lr = learning_rate(config, self.step / self.per_epoch)
            started = time.perf_counter()
            with phase("pack"):
                work = next(feed)
            try:
                loss, norm = self.trainer.step(work, lr)
            except FloatingPointError as error:
                where = f"step {self.step + 1}, learning rate {lr:g}"
                raise FloatingPointError(f"{where}: {error}") from None
            seconds = time.perf_counter() - started
            tokens = sum(len(example.tokens) for example in work.batch.examples)
            adapted = len(self.trainer.adapter.layers)
            flops = linear_flops(model.config, *work.computed, adapted, config.recompute)
            self.step += 1
            pictured = sum(example.image is not None for example in work.batch.examples)
            yield {
                "step": self.step,
                "epoch": self.step / self.per_epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_second": round(tokens / seconds, 1),
                "tflops": float(f"{flops / seconds / 1e12:.4g}"),
                **({} if self.trainer.features is None else {"images": pictured}),
            }
            if self.step % self.per_epoch == 0 or self.step == total:
                yield from self._validation()
            if self.step % config.save_every == 0 or self.step == total:
                self.save()

    def _validation(self) -> Iterator[Row]:
        if not self.dataset.held_out:
            return
        with outside():
            loss = self.trainer.validate(self.dataset.held_out)
        if self.step and (self.best is None or loss < self.best):
            self.best = loss
            if not self.folder.follows:
                save_adapter(self.folder.best_adapter, self.trainer.adapter, self.base)
        yield {"step": self.step, "epoch": self.step / self.per_epoch, "val_loss": loss}
