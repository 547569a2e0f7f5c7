"""Named entities and semantic roles as a task: a tag for every word of a sentence (Table 10)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llama_adapter.data.checked_files import FileProblem, pairs
from llama_adapter.tasks.conll_files import Sentence, read_conll03, read_conll04
from llama_adapter.tasks.running import beside, evaluating
from llama_adapter.tasks.spans import OUTSIDE, span_scores
from llama_adapter.tasks.srl_files import read_roles
from llama_adapter.tasks.tagged_tokens import NO_LABEL, Tagged, Tokenised
from llama_adapter.tasks.text_batches import batches, pad_id_of, padded

Reader = Callable[[str | Path], tuple[list[Sentence], list[FileProblem]]]
Paths = str | Path | Sequence[str | Path]

# data sets by name: how their files are read
READERS: dict[str, Reader] = {
    "conll03": read_conll03,
    "conll04": read_conll04,
    "conll05": read_roles,
    "conll12": read_roles,
}
# the role of the predicate itself, which CoNLL05's own scorer does not count
VERB = "V"


@dataclass(frozen=True)
class TaggingTask:
    """A tag for every word, by a host's logits at the word's first token.

    The host is transformers' RobertaForTokenClassification, Bert's, or one that is called likewise,
    with an output for every label.

    Attributes:
        tagged: how sentences become tokens.
        labels: the tags, in the order of the host's outputs.
        train: sentences.
        validation: sentences that epochs and learning rates are chosen by.
        test: sentences that the tables report.
        strict: spans are read as IOB2 is defined, not as conlleval does.
        batch: sentences that predicting gives the host at once.
    """

    tagged: Tagged
    labels: tuple[str, ...]
    train: Sequence[Sentence]
    validation: Sequence[Sentence]
    test: Sequence[Sentence]
    strict: bool = False
    batch: int = 32
    kind: str = field(default="token-classification", init=False)
    metric: str = field(default="f1", init=False)

    @classmethod
    def load(
        cls,
        train: Paths | None,
        test: Paths,
        tokenizer: Any,
        *,
        data: str = "conll03",
        validation: Paths | None = None,
        labels: Sequence[str] | None = None,
        max_length: int = 128,
        separator: str | None = None,
        strict: bool = False,
        batch: int = 32,
    ) -> tuple["TaggingTask", list[FileProblem]]:
        """Read a data set's own files.

        Args:
            train: training file or files; None for a task that is only answered.
            test: file or files that the tables report, scored also one by one where they are many.
            tokenizer: one of transformers' fast ones.
            data: one of `READERS`.
            validation: files to choose by; None: there is nothing to choose by.
            labels: the tags in the order of a host's outputs; None: those of the training files,
                sorted.
            max_length, separator: as in `Tagged`.
            strict: spans are read as IOB2 is defined, not as conlleval does.
            batch: sentences that predicting gives the host at once.

        Returns:
            The task, and what in the files cannot be used, or can never be predicted: the first
            occurrence of every tag that is no label.

        Raises:
            FileNotFoundError: a file is absent.
            ValueError: a file holds no usable sentence, or an argument is out of range.
        """
        if data not in READERS:
            raise ValueError(f"data must be one of {', '.join(READERS)}, got {data!r}")
        if train is None and labels is None:
            raise ValueError("labels must be given where train is None")
        pad_id_of(tokenizer)
        tagged = Tagged(tokenizer, max_length, separator)
        problems: list[FileProblem] = []
        read: dict[str, list[Sentence]] = {}
        splits: list[list[Sentence]] = []
        for paths in (train, validation, test):
            for path in _each(paths):
                if str(path) not in read:
                    read[str(path)], refused = READERS[data](path)
                    problems += refused
            splits.append([sentence for path in _each(paths) for sentence in read[str(path)]])
        if any(one.predicate is not None for split in splits for one in split):
            tagged.before_predicate()
        if labels is None:
            labels = sorted({OUTSIDE, *(tag for one in splits[0] for tag in one.tags)})
        problems += _unknown([one for split in splits for one in split], {*labels})
        train_, validation_, test_ = splits
        return cls(tagged, tuple(labels), train_, validation_, test_, strict, batch), problems

    def loss(self, model: nn.Module, batch: Sequence[Sentence]) -> Tensor:
        """Mean cross-entropy over the words of a batch that have a token and a known tag.

        Args:
            model: the host.
            batch: some of `train`.

        Returns:
            A scalar; 0 where no word has both.
        """
        known = {label: place for place, label in enumerate(self.labels)}
        rows = [self.tagged.tokenised(sentence) for sentence in batch]
        logits = self._logits(model, rows)
        wanted = torch.full(logits.shape[:2], NO_LABEL)
        for place, (sentence, row) in enumerate(zip(batch, rows, strict=True)):
            for tag, token in zip(sentence.tags, row.first_tokens, strict=True):
                if token is not None and tag in known:
                    wanted[place, token] = known[tag]
        count = int((wanted != NO_LABEL).sum())
        total = cross_entropy(
            logits.flatten(0, 1),
            beside(wanted, model).flatten(),
            ignore_index=NO_LABEL,
            reduction="sum",
        )
        return total / max(count, 1)

    def _logits(self, model: nn.Module, rows: Sequence[Tokenised]) -> Tensor:
        """The host's logits (B, T, labels)."""
        pad_id = pad_id_of(self.tagged.tokenizer)
        logits = model(**padded([row.inputs for row in rows], pad_id, model)).logits
        if logits.shape[-1] != len(self.labels):
            raise ValueError(
                f"model must have an output for each of {len(self.labels)} labels, "
                f"got {logits.shape[-1]}"
            )
        return logits.float()

    def predict(self, model: nn.Module, items: Sequence[Sentence]) -> list[list[str]]:
        """The tags of every sentence: O for words without a token; the model keeps its modes."""
        predictions = []
        with evaluating(model):
            for some in batches(items, self.batch):
                rows = [self.tagged.tokenised(sentence) for sentence in some]
                best = self._logits(model, rows).argmax(-1).tolist()
                for row, found in zip(rows, best, strict=True):
                    predictions.append(
                        [
                            OUTSIDE if token is None else self.labels[found[token]]
                            for token in row.first_tokens
                        ]
                    )
        return predictions

    def words_without_token(self, items: Iterable[Sentence]) -> int:
        """How many words the host is not given: beyond max_length, or nothing to the tokenizer."""
        return sum(self.tagged.tokenised(item).first_tokens.count(None) for item in items)

    def score(
        self, items: Sequence[Sentence], predictions: Sequence[Sequence[str]]
    ) -> Mapping[str, float]:
        """Micro-averaged precision, recall and F1 of spans and each type's F1, in per cent.

        Where the sentences are of more than one file, also "FILE f1" of each; where they have
        predicates, "f1 without V": of the roles alone. "words without token" is the share of words
        that were O unseen.

        Raises:
            ValueError: there are no items, or not one prediction for each.
        """
        wanted = [item.tags for item, _ in pairs(items, predictions)]
        scores = span_scores(wanted, predictions, strict=self.strict)
        if any(item.predicate is not None for item in items):
            rest = span_scores(wanted, predictions, strict=self.strict, without=(VERB,))
            scores["f1 without V"] = rest["f1"]
        files = _file_names([item.path for item in items])
        for path, name in files.items() if len(files) > 1 else ():
            own = [place for place, item in enumerate(items) if item.path == path]
            truth, guess = ([rows[place] for place in own] for rows in (wanted, predictions))
            scores[f"{name} f1"] = span_scores(truth, guess, strict=self.strict)["f1"]
        words = sum(len(item.words) for item in items)
        scores["words without token"] = 100 * self.words_without_token(items) / words
        return scores


def _file_names(paths: Iterable[str]) -> dict[str, str]:
    """For every path what tells it from the others: its last part, or all where two share that."""
    names = {path: Path(path).name for path in paths}
    return names if len({*names.values()}) == len(names) else {path: path for path in names}


def _each(paths: Paths | None) -> Sequence[str | Path]:
    if paths is None:
        return ()
    return (paths,) if isinstance(paths, str | Path) else paths


def _unknown(sentences: Iterable[Sentence], labels: set[str]) -> list[FileProblem]:
    """The first occurrence of every tag that no host can predict."""
    found: dict[str, FileProblem] = {}
    for sentence in sentences:
        for tag in sentence.tags:
            if tag not in labels and tag not in found:
                reason = f"tag {tag} is none of the labels, so it is always missed"
                found[tag] = FileProblem(sentence.at, reason, sentence.path, "sentence at")
    return [*found.values()]
