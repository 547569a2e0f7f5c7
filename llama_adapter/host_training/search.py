"""The choice of a learning rate: one fit for each, and what of it a stopped run needs to go on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama_adapter.checkpoints.train_state import named_under
from llama_adapter.host_training.fit import Fit, Row, Trainable, copied, under
from llama_adapter.host_training.fit_config import FitConfig
from llama_adapter.tasks.task import Task


class Search:
    """A fit for each learning rate, and then one of the chosen rate on what `final` holds.

    Chosen is the rate whose fit has the largest validation score, of equal ones the smallest. A
    rate at which the loss is not finite is out.

    Attributes:
        step: optimiser steps done, in all fits together.
        stage: fits done, of `stages`.
        results: the validation score of every rate that has been tried; None of one that is out.
        attached: the method of the current fit.
    """

    def __init__(
        self,
        make: Callable[[], Trainable],
        task: Task,
        config: FitConfig,
        rates: Sequence[float] = (),
        final: Task | None = None,
    ) -> None:
        """Prepare; nothing is changed.

        Args:
            make: a method newly attached to the host; called once for every fit.
            task: of the host's kind.
            config: the options of every fit; the rate replaces its lr.
            rates: to choose from; none: config.lr is the only one.
            final: what the last fit trains on; None: the chosen rate's weights remain.

        Raises:
            ValueError: there are rates to choose from and nothing to choose by.
        """
        self.rates = tuple(sorted(set(rates))) or (config.lr,)
        if len(self.rates) > 1 and not task.validation:
            raise ValueError(
                "task must have validation items to choose a learning rate by, it has none"
            )
        self._make, self.task, self.config, self.final = make, task, config, final
        # a single rate needs no fit to be chosen
        self.tried = self.rates if final is None or len(self.rates) > 1 else ()
        self.stages = len(self.tried) + (final is not None)
        self.step = self.stage = 0
        self.results: dict[float, float | None] = {}
        self.attached: Trainable | None = None
        self._fit: Fit | None = None
        self._kept: dict[str, Tensor] = {}

    @property
    def rate(self) -> float | None:
        """The chosen learning rate, of those that have been tried."""
        if not self.tried:
            return self.rates[0]
        found = [(score, -rate) for rate, score in self.results.items() if score is not None]
        return -max(found)[1] if found else None

    @property
    def takes_steps(self) -> bool:
        """Whether the method trains anything at all."""
        return bool((self._fit or self._begin()).optimisers)

    @property
    def at_an_end(self) -> bool:
        """Whether the current fit has taken all of its steps."""
        return self._fit is not None and self._fit.step == self._fit.total

    @property
    def total(self) -> int:
        """Steps of all fits, those that a rate that is out does not take among them."""

        def steps(task: Task) -> int:
            return self.config.epochs * -(-len(task.train) // self.config.batch_size)

        final = 0 if self.final is None else steps(self.final)
        return len(self.tried) * steps(self.task) + final

    def rows(self) -> Iterator[Row]:
        """Take the steps that are left of all fits; the caller has `seeded` torch.

        Yields:
            A fit's rows, with "step" counted over all fits, "fit" the number of the fit from 0 and
            "peak_lr" its learning rate.

        Raises:
            FloatingPointError: no rate's loss stays finite, or that of the last fit does not.
        """
        while self.stage < self.stages:
            fit = self._fit or self._begin()
            try:
                for row in fit.rows():
                    self.step += 1
                    own = {"fit": self.stage, "peak_lr": fit.config.lr}
                    yield {**row, "step": self.step, **own}
                self._end(fit)
            except FloatingPointError as error:
                if self.stage >= len(self.tried) or len(self.tried) == 1:
                    raise
                self._end(None, error)
            self.stage += 1
            self._fit = None

    def _begin(self) -> Fit:
        searching = self.stage < len(self.tried)
        rate = self.tried[self.stage] if searching else self.rate
        assert rate is not None
        task = self.task if searching or self.final is None else self.final
        torch.manual_seed(self.config.seed)
        self.attached = self._make()
        self._fit = Fit(self.attached, task, replace(self.config, lr=rate))
        return self._fit

    def _end(self, fit: Fit | None, error: FloatingPointError | None = None) -> None:
        """Note what a fit has reached, and keep its weights where they are the best yet."""
        if fit is not None:
            fit.finish()
        if self.stage >= len(self.tried):
            return
        before, rate = self.rate, self.tried[self.stage]
        self.results[rate] = None if fit is None else fit.kept_score
        if fit is not None and self.final is None and self.rate != before:
            self._kept = copied(fit.attached.state_dict())
        if self.stage + 1 == len(self.tried) and self.rate is None:
            tried = ", ".join(f"{rate:g}" for rate in self.tried)
            raise FloatingPointError(f"no learning rate of {tried} has a finite loss: {error}")

    def finish(self) -> Trainable:
        """The method with the weights that remain: the last fit's, or the chosen rate's."""
        if self.attached is None:
            self.attached = self._make()
        if self._kept:
            self.attached.load_state_dict(self._kept)
        return self.attached

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` takes, after any row: the current fit's, and the chosen rate's weights."""
        fit = self._fit or self._begin()
        return {**fit.tensors(), **under("chosen", self._kept)}

    def values(self) -> dict[str, Any]:
        """The rest of it, as JSON holds it."""
        fit = self._fit or self._begin()
        results = list(self.results.values())
        return {"stage": self.stage, "step": self.step, "results": results, "fit": fit.values()}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from where `tensors` and `values` were taken."""
        self.stage, self.step = values["stage"], values["step"]
        self.results = dict(zip(self.tried, values["results"], strict=False))
        self._kept = named_under("chosen", tensors)
        self._begin().restore(tensors, values["fit"])


def choose_lr(
    make_attached: Callable[[], Trainable],
    task: Task,
    config: FitConfig,
    grid: Sequence[float],
    *,
    on_step: Callable[[Row], None] | None = None,
) -> float:
    """The learning rate of a grid with the largest validation score, of equal ones the smallest.

    Args:
        make_attached: a method newly attached to the host, called for every rate.
        task: with validation items.
        config: the options of every fit; the rate replaces its lr.
        grid: rates.
        on_step: called with every step's row, as `Search.rows` yields it.

    Raises:
        ValueError: the task has nothing to train on, or to choose by.
        FloatingPointError: the loss is finite with none of them.
    """
    search = Search(make_attached, task, config, grid)
    with torch.random.fork_rng():
        for row in search.rows():
            if on_step is not None:
                on_step(row)
    assert search.rate is not None
    return search.rate
