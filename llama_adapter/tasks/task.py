"""What training and evaluation know of a task: data, a loss, predictions and scores."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """One data set, in the form that a kind of host takes; concrete ones are frozen."""

    @property
    def kind(self) -> str:
        """image-classification, question-answering, token-classification or contrastive."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs of the host's head, in order; none where it has no head."""
        ...

    @property
    def metric(self) -> str:
        """The score that chooses epochs and learning rates; more is better."""
        ...

    @property
    def train(self) -> Sequence[Any]:
        """What a step takes a batch of."""
        ...

    @property
    def validation(self) -> Sequence[Any]:
        """What epochs and learning rates are chosen by."""
        ...

    @property
    def test(self) -> Sequence[Any]:
        """What the papers' tables report."""
        ...

    def loss(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        """Mean loss of some of `train`, differentiable in what the model trains."""
        ...

    def predict(self, model: nn.Module, items: Sequence[Any]) -> list[Any]:
        """What the model answers to some of `validation` or `test`, as JSON holds it."""
        ...

    def score(self, items: Sequence[Any], predictions: Sequence[Any]) -> Mapping[str, float]:
        """Scores of predictions, in per cent, the task's metric among them."""
        ...
