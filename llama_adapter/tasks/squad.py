"""SQuAD 1.1 and 2.0 as a task: windows to train on, questions to answer (Table 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llama_adapter.data.checked_files import FileProblem, pairs
from llama_adapter.tasks.running import beside, evaluating
from llama_adapter.tasks.squad_answers import Answering, answer
from llama_adapter.tasks.squad_files import Question, read_squad
from llama_adapter.tasks.squad_scores import best_threshold, exact_match, f1, squad_scores
from llama_adapter.tasks.squad_windows import Window, Windowing
from llama_adapter.tasks.text_batches import batches, pad_id_of, padded


@dataclass(frozen=True)
class SquadTask:
    """Answers as spans of a paragraph, by a host's start and end logits.

    The host is transformers' RobertaForQuestionAnswering, Bert's, or one that is called likewise.

    Attributes:
        windowing: how questions become windows.
        answering: how logits become answers.
        train: windows.
        validation: questions that epochs and learning rates are chosen by.
        test: questions that the tables report.
        batch: windows that predicting gives the host at once.
    """

    windowing: Windowing
    answering: Answering
    train: Sequence[Window]
    validation: Sequence[Question]
    test: Sequence[Question]
    batch: int = 32
    kind: str = field(default="question-answering", init=False)
    labels: tuple[str, ...] = field(default=("start", "end"), init=False)
    metric: str = field(default="f1", init=False)

    @classmethod
    def load(
        cls,
        train: str | Path | None,
        test: str | Path,
        tokenizer: Any,
        *,
        validation: str | Path | None = None,
        version_2: bool | None = None,
        max_length: int = 384,
        stride: int = 128,
        n_best: int = 20,
        max_answer: int = 30,
        threshold: float = 0.0,
        batch: int = 32,
    ) -> tuple["SquadTask", list[FileProblem]]:
        """Read SQuAD's own files.

        SQuAD keeps its test to itself: the papers' tables report the development file, which
        P-tuning v2 also chooses epochs by; `validation=test` does the same.

        Args:
            train: the training file; None for a task that is only answered.
            test: the development file.
            tokenizer: one of transformers' fast ones.
            validation: a file to choose by; None: there is nothing to choose by.
            version_2: whether questions may have no answer; None: whether one of the test file has.
            max_length, stride: as in `Windowing`.
            n_best, max_answer, threshold: as in `Answering`.
            batch: windows that predicting gives the host at once.

        Returns:
            The task, and what in the files cannot be used.

        Raises:
            FileNotFoundError: a file is absent.
            ValueError: a file holds no usable question, or an argument is out of range.
        """
        pad_id_of(tokenizer)
        windowing = Windowing(tokenizer, max_length, stride)
        problems: list[FileProblem] = []
        read: dict[Path, list[Question]] = {}

        def questions(path: str | Path | None) -> list[Question]:
            if path is None:
                return []
            if Path(path) not in read:
                found, refused = read_squad(path, version_2=version_2)
                read[Path(path)] = found
                problems.extend(refused)
            return read[Path(path)]

        tested = questions(test)
        if version_2 is None:
            version_2 = any(not question.answers for question in tested)
        task = cls(
            windowing,
            Answering(version_2, n_best, max_answer, threshold),
            windowing.training(questions(train)),
            questions(validation),
            tested,
            batch,
        )
        return task, problems

    def loss(self, model: nn.Module, batch: Sequence[Window]) -> Tensor:
        """Mean of the cross-entropies of start and end, over the windows.

        Where shorter windows were filled up no span begins or ends, so that a window's loss is the
        same in any batch.

        Args:
            model: the host.
            batch: some of `train`.

        Returns:
            A scalar.
        """
        start, end = self._logits(model, [window.inputs for window in batch])
        first = beside(torch.tensor([window.start for window in batch]), model)
        last = beside(torch.tensor([window.end for window in batch]), model)
        return (cross_entropy(start, first) + cross_entropy(end, last)) / 2

    def _logits(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Logits of start and of end, (B, T) each, none where a window was filled up."""
        inputs = padded(rows, pad_id_of(self.windowing.tokenizer), model)
        found = model(**inputs)
        filled = inputs["attention_mask"] == 0
        start, end = found.start_logits.float(), found.end_logits.float()
        return start.masked_fill(filled, float("-inf")), end.masked_fill(filled, float("-inf"))

    def predict(self, model: nn.Module, items: Sequence[Question]) -> list[dict[str, Any]]:
        """One answer for every question, as `answer` gives it; the model keeps its modes."""
        encoded = [*self.windowing.encoded(items)]
        every = [encoding for _, encodings in encoded for encoding in encodings]
        starts: list[Tensor] = []
        ends: list[Tensor] = []
        with evaluating(model):
            for some in batches(every, self.batch):
                start, end = self._logits(model, [self.windowing.inputs(row) for row in some])
                for place, encoding in enumerate(some):
                    starts.append(start[place, : len(encoding.ids)].cpu())
                    ends.append(end[place, : len(encoding.ids)].cpu())
        answers, at = [], 0
        for question, encodings in encoded:
            own = slice(at, at + len(encodings))
            at += len(encodings)
            cls = [self.windowing.cls_of(encoding) for encoding in encodings]
            answers.append(answer(question, encodings, starts[own], ends[own], cls, self.answering))
        return answers

    def score(
        self, items: Sequence[Question], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Exact match and F1 in per cent, as `squad_scores` has them.

        For version 2.0 also best_exact and best_f1: what the best threshold on the odds of no
        answer makes of every question's best span.

        Raises:
            ValueError: there are no items, or not one prediction for each.
        """
        version_2 = self.answering.version_2
        texts = [prediction["text"] for _, prediction in pairs(items, predictions)]
        scores = squad_scores(items, texts, version_2=version_2)
        if version_2:
            spans = [prediction["span"] for prediction in predictions]
            odds = [prediction["null_odds"] for prediction in predictions]
            for name, measure in (("best_exact", exact_match), ("best_f1", f1)):
                scores[name], _ = best_threshold(items, spans, odds, measure)
        return scores
