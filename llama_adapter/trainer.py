"""One optimiser step: exact gradient accumulation, and one optimiser per named parameter group.

The base is frozen. A batch says which groups it trains; the others are left alone, and the state of
all of them can be taken out by name and put back.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapter_kernels import linear_cross_entropy
from llama_adapter.adapter import VISUAL, Adapter, Prompts
from llama_adapter.checkpoints.quantize import is_quantized, passes_gradients
from llama_adapter.checkpoints.train_state import (
    load_optimisers,
    load_random,
    named_under,
    optimiser_tensors,
    random_tensors,
)
from llama_adapter.data.examples import Batch, Example
from llama_adapter.data.feed import ahead
from llama_adapter.data.packed import (
    Collated,
    Features,
    PackedBatch,
    Prefix,
    collate,
    micro_batches,
)
from llama_adapter.model import Llama
from llama_adapter.recompute import RECOMPUTED
from llama_adapter.sharding import is_sharded, project_in_place
from llama_adapter.step_profile import phase
from llama_adapter.tuning import VECTORS
from llama_adapter.world import World

_NAMED_RECORDS = 8
# on an H200 a step with a number of rows that its process had not seen took 520 to 640 ms, others
# 290 (the matrix library's preparations, it seems); of 64 records there are few multiples of this,
# filled up by half of it on average
GPU_ROWS = 64
# examples of a validation that processes divide among them, which is also how many are in memory
_SHARED_AT_ONCE = 1024


@dataclass(frozen=True)
class Prepared:
    """A batch, ready to be computed.

    Attributes:
        batch: the whole of it.
        parts: one per forward pass of this process.
    """

    batch: Batch
    parts: tuple[Collated, ...]

    @property
    def computed(self) -> tuple[int, int]:
        """Rows that the model computes in this process, and those of them that become logits."""
        sizes = [part.computed for part in self.parts]
        return sum(size[0] for size in sizes), sum(size[1] for size in sizes)


class Trainer:
    """One adapter, and one AdamW per group of its parameters.

    A group that a batch does not name gets no gradient, no step and no decay from it.
    """

    def __init__(
        self,
        model: Llama,
        adapter: Adapter,
        *,
        micro_batch_tokens: int,
        prefixes: Sequence[Prefix] = (),
        features: Features | None = None,
        weight_decay: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        clip: float | None = None,
        recompute: str | None = None,
        world: World | None = None,
    ) -> None:
        """Prepare to train.

        Args:
            model: the base, frozen.
            adapter: float32, on the model's device.
            micro_batch_tokens: tokens per forward pass; changes memory and time, not results.
            prefixes: beginnings that examples may share, computed once per pass: the template's.
            features: of the images that examples name, by any thread; None takes no images.
            weight_decay: of every group; prompts and gates are decayed alike, as in the official
                recipe, and vectors are not: biases, scales, norms, a projector's biases.
            betas: AdamW's.
            clip: largest norm of the gradient of all groups of a batch together, or None.
            recompute: "mlp" or "block", what of each layer the backward computes again instead of
                keeping it; changes memory and time, not results.
            world: the processes that train together, of which each computes a share of every batch
                and takes the same step; None is this one alone.

        Raises:
            ValueError: the base is in int4 or not frozen, a parameter of the adapter is not
                float32, it has biases, scales, norms or LoRA and the base is sharded, there are
                features and no projector, or recompute is unknown.
        """
        if not passes_gradients(model):
            raise ValueError(
                "model must be as it is, in int8, nf4 or fp8 to train on it: give load_base "
                'quantize="int8", "nf4", "fp8" or none'
            )
        unfrozen = [name for name, value in model.named_parameters() if value.requires_grad]
        if unfrozen:
            raise ValueError(f"model must be frozen, {unfrozen[0]} requires a gradient")
        for name, value in adapter.named_parameters():
            if value.dtype != torch.float32:
                raise ValueError(f"adapter must be float32, {name} is {value.dtype}")
        if adapter.tuning.groups and is_sharded(model):
            groups = ", ".join(adapter.tuning.groups)
            raise ValueError(
                f"adapter must have prompts and gates alone on a sharded base, got {groups}: no "
                "process holds the layers that those change"
            )
        if features is not None and adapter.projector is None:
            raise ValueError("features must be left out: this adapter has no projector")
        if recompute not in (None, *RECOMPUTED):
            raise ValueError(f"recompute must be one of {RECOMPUTED} or None, got {recompute!r}")
        self.model, self.adapter, self.world = model, adapter, world or World()
        self.features = features
        self.recompute = recompute
        self.quantized, self.sharded = is_quantized(model), is_sharded(model)
        self.micro_batch_tokens, self.prefixes, self.clip = micro_batch_tokens, prefixes, clip
        self.groups = adapter.groups()
        self.optimisers = {
            name: torch.optim.AdamW(_decayed(name, parameters, weight_decay), lr=0.0, betas=betas)
            for name, parameters in self.groups.items()
        }

    def prepare(self, batch: Batch) -> Prepared:
        """What this process computes of a batch, packed in the host's memory, by any thread."""
        own = self.world.share(batch.examples)
        parts = micro_batches(own, self.micro_batch_tokens, self.prefixes)
        return Prepared(batch, tuple(self.collate(part) for part in parts))

    def collate(self, examples: Sequence[Example]) -> Collated:
        """The examples of one forward pass, packed for the model's device."""
        on_gpu = self.model.output_weight.is_cuda
        rows = GPU_ROWS if on_gpu else 1
        return collate(examples, self.prefixes, on_gpu, rows, self.features)

    def loss_sum(self, part: Collated) -> Tensor:
        """Cross entropy in nats summed over the examples' labels, differentiable in the adapter."""
        with phase("pack"):
            batch = part.to(self.model.output_weight.device)
        with phase("forward"):
            prompts = self.project(batch)
            hidden = self._hidden(batch, prompts)
            # the rows that carry loss alone: logits of the others would be thrown away
            rows, weight = hidden[batch.rows], self.model.output_weight
            tuned = None if prompts is None else prompts.tuned
            if not self.quantized and (tuned is None or tuned.output is None):
                return linear_cross_entropy(
                    rows, weight, batch.targets, ignore_index=None, reduction="sum"
                )
            # torchao multiplies by its weights itself, and a tuned projection is more than a weight
            logits = self.model.logits(rows, prompts).float()
            return torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")

    def project(self, batch: PackedBatch) -> Prompts | None:
        """The adapter's prompts for packed examples; None runs the model as it is."""
        project = project_in_place if self.sharded else Llama.project
        visual = None
        if batch.features is not None:
            visual = self.adapter.visual_tokens(batch.features, batch.present)
        return project(self.model, self.adapter, visual)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Final hidden states (total, C) of packed examples, differentiable in the adapter."""
        return self._hidden(batch, self.project(batch))

    def _hidden(self, batch: PackedBatch, prompts: Prompts | None) -> Tensor:
        return self.model.hidden_packed(
            batch.tokens, batch.packing, prompts, recompute=self.recompute
        )

    def step(self, work: Batch | Prepared, lr: float) -> tuple[float, float]:
        """Take one optimiser step.

        The loss is the mean over all labels of the batch, however it is cut into micro-batches, so
        accumulation is exact. (The official code averages each micro-batch by itself, which weighs
        a label by the company it is in.) A batch without any label has the loss 0. One without any
        image leaves the groups alone that images alone reach.

        Args:
            work: examples, and the groups that they train; or what `prepare` made of them.
            lr: learning rate of those groups.

        Returns:
            The loss in nats per label and the norm of its gradient.

        Raises:
            ValueError: the batch names no group, one that the adapter does not have, or none but
                those of images without having one.
            FloatingPointError: the loss or the gradient is not finite; nothing was changed.
        """
        batch = work if isinstance(work, Batch) else work.batch
        unknown = [name for name in batch.train_groups if name not in self.groups]
        if unknown or not batch.train_groups:
            raise ValueError(
                f"train_groups must name some of {tuple(self.groups)}, got {batch.train_groups}"
            )
        train_groups = batch.train_groups
        if all(example.image is None for example in batch.examples):
            # in every process alike, whichever examples are its share
            train_groups = tuple(name for name in train_groups if name not in VISUAL)
            if not train_groups:
                raise ValueError(f"a batch without images cannot train {batch.train_groups} alone")
        for name, parameters in self.groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name in train_groups)
                parameter.grad = None
        losses = []
        parts = (self.prepare(work) if isinstance(work, Batch) else work).parts
        idle = self._idle(len(parts), batch.examples)
        for part in parts:
            # gradients of the sum, divided afterwards: a mean's could vanish in float16
            loss = self.loss_sum(part)
            # a pass without images may have nothing to train
            if loss.requires_grad:
                with phase("backward"):
                    loss.backward()
            losses.append(loss.detach())
        for part in idle:
            (self.loss_sum(part) * 0).backward()
        trained = [p for name in train_groups for p in self.groups[name]]
        count = max(1, sum(example.n_labels for example in batch.examples))
        with phase("reduce"):
            total = self._total(losses)
            gradients = self._gradients(trained)
            self.world.add(gradients)
        for gradient in gradients:
            gradient.div_(count)
        norm = torch.nn.utils.get_total_norm(gradients)
        loss = total / count
        if not math.isfinite(loss):
            wrong = [part for part, own in zip(parts, losses, strict=True) if not own.isfinite()]
            where = _name(wrong[0].examples) if wrong else "the share of another process"
            raise FloatingPointError(f"the loss is {loss} in {where}")
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"the gradient is not finite in {_name(batch.examples)}")
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
        with phase("optimiser"):
            for name in train_groups:
                for options in self.optimisers[name].param_groups:
                    options["lr"] = lr
                self.optimisers[name].step()
        return loss, float(norm)

    def _idle(self, passes: int, examples: Sequence[Example]) -> list[Collated]:
        """Passes that count for nothing, of a process that has so many of its own.

        Each pass over a sharded base is one of all processes, which bring its weights together:
        who has fewer than another takes part with the first example.
        """
        missing = self.world.most(passes) - passes if self.sharded else 0
        return [self.collate(examples[:1])] * missing if missing else []

    def _total(self, losses: Sequence[Tensor]) -> float:
        """The sum of losses over all micro-batches of all processes."""
        device = self.model.output_weight.device
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for loss in losses:
            total += loss
        self.world.add([total])
        return float(total)

    def _gradients(self, trained: Sequence[Tensor]) -> list[Tensor]:
        """Those of a step; where others share it, zeros in the place of one that is not there."""
        if self.world.size > 1:
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    @torch.no_grad()
    def validate(self, examples: Sequence[Example]) -> float:
        """Loss in nats per label over all `examples`, at least one of which has labels."""

        def parts() -> Iterator[list[Example]]:
            """This process's passes, a few examples in memory at a time."""
            starts = range(0, len(examples), _SHARED_AT_ONCE)
            some = (examples[start : start + _SHARED_AT_ONCE] for start in starts)
            own = (example for few in some for example in self.world.share(few))
            return micro_batches(own, self.micro_batch_tokens, self.prefixes)

        # counted before the first pass, of which every process of a sharded run takes as many
        count = sum(1 for _ in parts()) if self.sharded else 0
        idle = self._idle(count, examples)
        with closing(ahead(parts(), self.collate)) as made:
            losses = [self.loss_sum(part) for part in made]
        for part in idle:
            self.loss_sum(part)
        return self._total(losses) / sum(example.n_labels for example in examples)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, optimiser state by group name, and random states, by name."""
        found = {f"adapter.{name}": value for name, value in self.adapter.state_dict().items()}
        device = self.model.output_weight.device
        return found | optimiser_tensors(self.optimisers) | random_tensors(device)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned.

        Args:
            tensors: by name, on any device.

        Raises:
            RuntimeError: a parameter is missing, surplus or of another shape.
        """
        self.adapter.load_state_dict(named_under("adapter", tensors))
        load_optimisers(self.optimisers, tensors)
        load_random(tensors, self.model.output_weight.device)


def _decayed(
    group: str, parameters: Sequence[torch.nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """A group's parameters for AdamW: matrices, and vectors (one of each layer too) undecayed."""
    plain = [p for p in parameters if group in VECTORS or p.ndim == 1]
    others = [p for p in parameters if not any(p is one for one in plain)]
    parts = ((others, weight_decay), (plain, 0.0))
    return [{"params": some, "weight_decay": decay} for some, decay in parts if some]


def _name(examples: Sequence[Example]) -> str:
    """Records by their index in the file, from 0, a few of many."""
    shown = ", ".join(str(index) for index in sorted(e.index for e in examples)[:_NAMED_RECORDS])
    rest = len(examples) - _NAMED_RECORDS
    more = f" and {rest} more" if rest > 0 else ""
    return f"records {shown}{more} (numbered from 0)"
