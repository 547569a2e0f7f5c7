"""What training and evaluation know of a task: data, a loss, predictions and scores."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """One data set, in the form that a kind of host takes.

    Attributes:
        kind: "image-classification", "question-answering", "token-classification" or "contrastive".
        labels: names of the outputs of the host's head, in order; none where it has no head.
        metric: the score that chooses epochs and learning rates; more is better.
        train: what a step takes a batch of.
        validation: what epochs and learning rates are chosen by.
        test: what the papers' tables report.
    """

    kind: str
    labels: tuple[str, ...]
    metric: str
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]

    def loss(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        """Mean loss of some of `train`, differentiable in what the model trains."""
        ...

    def predict(self, model: nn.Module, items: Sequence[Any]) -> list[Any]:
        """What the model answers to some of `validation` or `test`, as JSON holds it."""
        ...

    def score(self, items: Sequence[Any], predictions: Sequence[Any]) -> Mapping[str, float]:
        """Scores of predictions, in per cent, the task's metric among them."""
        ...
