"""One training loop for every method and every task.

A `Fit` takes a step at a time, and what it needs to go on can be taken out after each and put back:
a run that was stopped continues bitwise. `fit` runs one to its end.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama_adapter.checkpoints.train_state import (
    load_optimisers,
    load_random,
    named_under,
    optimiser_tensors,
    random_tensors,
)
from llama_adapter.data.feed import shuffled
from llama_adapter.host_training.fit_config import FitConfig, learning_rates
from llama_adapter.hosts.attention import device_of
from llama_adapter.seeded import seeded
from llama_adapter.tasks.task import Task

__all__ = ["Fit", "FitConfig", "Fitted", "evaluate", "fit"]

# the group of a task head's parameters, which has a learning rate of its own
HEAD = "head"

Row = dict[str, Any]


class Trainable(Protocol):
    """What the loop knows of a method that is attached to a host."""

    @property
    def model(self) -> nn.Module:
        """The host, with the method on it."""
        ...

    def groups(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """All that is trained, in named groups; the head's is called HEAD."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """The trained values by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Put back what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes:
        losses: of every step that was taken.
        scores: the validation's, by epoch from 1; empty where the task has no validation.
        best_epoch: whose weights are in the model; None: the last one's.
    """

    losses: tuple[float, ...]
    scores: dict[int, dict[str, float]]
    best_epoch: int | None


def evaluate(
    model: nn.Module, task: Task, split: str = "test", batch_size: int = 64
) -> tuple[list[Any], dict[str, float]]:
    """Predict and score a split.

    Args:
        model: the host, with whatever method is attached.
        task: of the same kind.
        split: "train", "validation" or "test".
        batch_size: items that the task is given at a time.

    Returns:
        A prediction for each item, and the scores in per cent.

    Raises:
        ValueError: the split is unknown or has no items.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, got {split!r}")
    items: Sequence[Any] = getattr(task, split)
    if not items:
        raise ValueError(f"split {split} must have items, this task has none")
    found: list[Any] = []
    for start in range(0, len(items), batch_size):
        found += task.predict(model, items[start : start + batch_size])
    return found, dict(task.score(items, found))


class Fit:
    """A training on a task, step by step.

    Attributes:
        step: optimiser steps done, of `total`.
        losses: of the steps that this object took.
        scores: the validation's, by epoch from 1.
        best_epoch: the one with the largest score; of equal ones the first.
    """

    def __init__(self, attached: Trainable, task: Task, config: FitConfig) -> None:
        """Prepare; nothing is changed.

        Args:
            attached: a method on a host.
            task: of the host's kind.
            config: the options.

        Raises:
            ValueError: the task has nothing to train on.
        """
        if not task.train:
            raise ValueError("task must have items to train on, got none")
        self.attached, self.task, self.config = attached, task, config
        self.groups = {name: list(group.values()) for name, group in attached.groups().items()}
        self.optimisers = {
            name: _optimiser(parameters, config)
            for name, parameters in self.groups.items()
            if parameters
        }
        self.per_epoch = -(-len(task.train) // config.batch_size)
        self.total = config.epochs * self.per_epoch
        self.step = 0
        self.losses: list[float] = []
        self.scores: dict[int, dict[str, float]] = {}
        self.best_epoch: int | None = None
        self._best: dict[str, Tensor] = {}

    @property
    def best_score(self) -> float | None:
        """The largest score of a validation."""
        return None if self.best_epoch is None else self.scores[self.best_epoch][self.task.metric]

    @property
    def kept_score(self) -> float:
        """The score of the epoch that remains; 0 where nothing was validated."""
        epoch = self.best_epoch if self.config.keep == "best" else max(self.scores, default=None)
        return 0.0 if epoch is None else self.scores[epoch][self.task.metric]

    def rows(self) -> Iterator[Row]:
        """Take the steps that are left, and validate where an epoch ends.

        torch's random state must be the run's own: `seeded`, or put back by `restore`.

        Yields:
            A row for each: "step", "epoch", "loss", "lr", "grad_norm", "items_per_second", and at
            the end of an epoch with validation its scores, as "val_" and their name.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; names the step. Nothing was
                changed by it.
        """
        model = self.attached.model
        was_training = model.training
        order: Sequence[int] = ()
        try:
            # nothing to train is a run of no steps, with the host's own scores
            while self.step < self.total and self.optimisers:
                epoch, place = divmod(self.step, self.per_epoch)
                if place == 0 or not order:
                    order = shuffled(range(len(self.task.train)), self.config.seed, epoch)
                size = self.config.batch_size
                batch = [self.task.train[i] for i in order[place * size : (place + 1) * size]]
                model.train()
                row = self._step(batch)
                if self.step % self.per_epoch == 0:
                    row |= self._validate(self.step // self.per_epoch)
                yield row
        finally:
            model.train(was_training)

    def _step(self, batch: Sequence[Any]) -> Row:
        rates = learning_rates(self.config, self.step / self.per_epoch)
        started = time.perf_counter()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
        where = f"step {self.step + 1}, learning rate {rates[0]:g}"
        loss = self.task.loss(self.attached.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{where}: the loss is {value}")
        loss.backward()
        trained = [p for parameters in self.groups.values() for p in parameters]
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm.item()):
            raise FloatingPointError(f"{where}: the gradient is not finite")
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.clip, norm)
        for name, optimiser in self.optimisers.items():
            for options in optimiser.param_groups:
                options["lr"] = rates[name == HEAD]
            optimiser.step()
        self.step += 1
        self.losses.append(value)
        return {
            "step": self.step,
            "epoch": self.step / self.per_epoch,
            "loss": value,
            "lr": rates[0],
            "grad_norm": norm.item(),
            "items_per_second": round(len(batch) / (time.perf_counter() - started), 1),
        }

    def _validate(self, epoch: int) -> Row:
        """Scores of an epoch, where it has any, and its weights, where they are the best yet."""
        due = epoch % self.config.eval_every == 0 or self.step == self.total
        if not self.task.validation or not due:
            return {}
        _, scores = evaluate(self.attached.model, self.task, "validation")
        best = self.best_score
        self.scores[epoch] = scores
        if best is None or scores[self.task.metric] > best:
            self.best_epoch = epoch
            if self.config.keep == "best":
                self._best = copied(self.attached.state_dict())
        return {f"val_{name}": value for name, value in scores.items()}

    def finish(self) -> Fitted:
        """Put the weights that remain into the model."""
        if self._best:
            self.attached.load_state_dict(self._best)
        kept = self.best_epoch if self._best else None
        return Fitted(tuple(self.losses), self.scores, kept)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, optimisers' and random states and the best epoch's parameters, by name."""
        device = device_of(self.attached.model)
        return {
            **under("trained", self.attached.state_dict()),
            **under("best", self._best),
            **optimiser_tensors(self.optimisers),
            **random_tensors(device),
        }

    def values(self) -> dict[str, Any]:
        """The rest of what `restore` takes, as JSON holds it."""
        scores = {str(epoch): scores for epoch, scores in self.scores.items()}
        return {"step": self.step, "scores": scores, "best_epoch": self.best_epoch}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from where `tensors` and `values` were taken.

        Raises:
            RuntimeError: a parameter is missing, surplus or of another shape.
        """
        self.attached.load_state_dict(named_under("trained", tensors))
        self._best = named_under("best", tensors)
        load_optimisers(self.optimisers, tensors)
        load_random(tensors, device_of(self.attached.model))
        self.step, self.best_epoch = values["step"], values["best_epoch"]
        self.scores = {int(epoch): scores for epoch, scores in values["scores"].items()}


def fit(
    attached: Trainable,
    task: Task,
    config: FitConfig,
    *,
    on_step: Callable[[Row], None] | None = None,
    on_epoch: Callable[[Row], None] | None = None,
) -> Fitted:
    """Train a method on a task to the end; the weights of the best epoch remain in the model.

    The same seed gives the same result, on the CPU bitwise. A task without validation keeps the
    last epoch.

    Args:
        attached: a method on a host; one that trains nothing takes no step.
        task: of the host's kind.
        config: the options.
        on_step: called with every step's row, as `Fit.rows` yields it.
        on_epoch: called with the last row of every epoch.

    Returns:
        Losses, scores by epoch and the epoch that was kept.

    Raises:
        ValueError: the task has nothing to train on.
        FloatingPointError: the loss or its gradient is not finite; names the step.
    """
    run = Fit(attached, task, config)
    with seeded(config.seed, device_of(attached.model)):
        for row in run.rows():
            if on_step is not None:
                on_step(row)
            if on_epoch is not None and run.step % run.per_epoch == 0:
                on_epoch(row)
    return run.finish()


def _optimiser(parameters: Sequence[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    """A group's own, in which vectors are not decayed."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    parts = ((matrices, config.weight_decay), (vectors, 0.0))
    groups = [{"params": some, "weight_decay": decay} for some, decay in parts if some]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that later steps leave alone."""
    return {name: value.detach().clone() for name, value in state.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `named_under` finds again."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
