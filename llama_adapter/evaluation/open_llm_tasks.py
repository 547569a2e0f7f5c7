"""The Open LLM benchmark's prompts and scores, of lm-evaluation-harness' own tasks.

Nothing is loaded from a hub. Every choice's log-likelihood behind its question is a prediction;
lm-evaluation-harness scores these, and its form of results is written.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import datasets  # pyright: ignore[reportMissingImports]
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.api.metrics import mean_stderr  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "the Open LLM benchmark needs lm-evaluation-harness: pip install 'lm-eval[hf]>=0.4.13' "
        f"({error})"
    ) from None

from llama_adapter.answering import Answerer
from llama_adapter.data.checked_files import pairs, write_json
from llama_adapter.evaluation.open_llm import AVERAGE, MMLU, Documents, aggregate
from llama_adapter.evaluation.runner import Item, Scores, mean_scores
from llama_adapter.integrations.lm_eval import LeanLM
from llama_adapter.quiet import quiet

# folders of lm-evaluation-harness' tasks that hold the four
_FOLDERS = ("arc", "hellaswag", "truthfulqa", "mmlu/default")
# what its command draws examples by
_SEED = 1234


class OpenLlm:
    """The tasks that documents are for.

    Attributes:
        items: every question with its prompt, examples included, and what may follow it.
    """

    def __init__(self, documents: Sequence[Documents]) -> None:
        """Make the tasks.

        Args:
            documents: of each.

        Raises:
            ValueError: lm-evaluation-harness has no such task.
        """
        self._documents = {one.task: one for one in documents}
        own = Path(lm_eval.tasks.__file__).parent
        with quiet(), _no_bars():
            manager = lm_eval.tasks.TaskManager(
                include_defaults=False, include_path=[str(own / name) for name in _FOLDERS]
            )
            unknown = sorted({*self._documents} - {*manager.all_subtasks})
            if unknown:
                raise ValueError(
                    f"{unknown[0]} must be a task of lm-evaluation-harness, which has none such"
                )
            members = [_configured(one) for one in documents]
            self._tasks = manager.load({"group": "open_llm", "task": members})["tasks"]
        for task in self._tasks.values():
            task.set_fewshot_seed(_SEED)
        # once: examples are drawn question after question
        self.items = self._items()

    def score(self, item: Item, prediction: Any) -> Scores:
        """lm-evaluation-harness' scores of one question, named task/metric.

        Args:
            item: one of `items`.
            prediction: for each continuation its log-likelihood and whether it is the greedy one.
        """
        task = self._tasks[item["task"]]
        scores = task.process_results(item["doc"], [tuple(one) for one in prediction])
        return {f"{item['task']}/{name}": float(value) for name, value in scores.items()}

    def predictor(self, answerer: Answerer, batch_size: int) -> Callable[[list[Item]], list[Any]]:
        """What gives a batch of items their predictions.

        Args:
            answerer: the base with its adapter, which sees no images.
            batch_size: continuations that are computed together.
        """
        model = LeanLM.of(answerer.base, answerer.prompts, batch_size=batch_size)

        told = False

        def predict(batch: list[Item]) -> list[Any]:
            nonlocal told
            cut = None if told else _beyond(batch, model)
            if cut is not None:
                warnings.warn(cut, stacklevel=2)
                told = True
            requests = [
                Instance("loglikelihood", item["doc"], (item["context"], continuation), place)
                for item in batch
                for place, continuation in enumerate(item["continuations"])
            ]
            found = iter(model.loglikelihood(requests, disable_tqdm=True))
            return [[[*next(found)] for _ in item["continuations"]] for item in batch]

        return predict

    def write(
        self, path: str | Path, items: Sequence[Item], predictions: Sequence[Any], *, model: str
    ) -> None:
        """Write the results as lm-evaluation-harness writes its own, scores from 0 to 1.

        The group mmlu is the mean of its subjects whatever their sizes, as the leaderboard has it.

        Args:
            path: of the file.
            items: all of a run.
            predictions: of each.
            model: what the results call the model.
        """
        rows = [self.score(item, prediction) for item, prediction in pairs(items, predictions)]
        values: dict[str, list[float]] = {}
        for row in rows:
            for name, value in row.items():
                values.setdefault(name, []).append(value)
        results: dict[str, Any] = {name: {"alias": name} for name in self._tasks}
        for name, mean in mean_scores(rows).items():
            task, metric = name.split("/")
            own = values[name]
            results[task][f"{metric},none"] = mean
            results[task][f"{metric}_stderr,none"] = mean_stderr(own) if len(own) > 1 else "N/A"
        whole = aggregate(rows)
        groups = {
            name: {"alias": name, "acc,none": whole[name] / 100}
            for name in (MMLU, AVERAGE)
            if name in whole
        }
        subjects = [name for name, one in self._documents.items() if one.part == MMLU]
        counts = {name: len(one.questions) for name, one in self._documents.items()}
        content = {
            "results": results | groups,
            "groups": groups,
            "group_subtasks": {MMLU: subjects} if subjects else {},
            "versions": {name: task.VERSION for name, task in self._tasks.items()},
            "n-shot": {name: one.shots for name, one in self._documents.items()},
            "higher_is_better": {
                name: task.higher_is_better() for name, task in self._tasks.items()
            },
            "n-samples": {name: {"original": n, "effective": n} for name, n in counts.items()},
            "config": {"model": "llama-adapter", "fewshot_seed": _SEED},
            "model_name": model,
        }
        write_json(path, content)

    def _items(self) -> list[Item]:
        """Every question with its prompt, examples included, and what may follow it."""
        found: list[Item] = []
        with quiet(), _no_bars():
            for name, documents in self._documents.items():
                task = self._tasks[name]
                for key, doc in zip(documents.questions, task.eval_docs, strict=True):
                    context = task.fewshot_context(doc, documents.shots)
                    requests = task.construct_requests(doc, context, metadata=(name, 0, 1))
                    found.append(
                        {
                            "id": f"{name}/{key}",
                            "task": name,
                            "doc": doc,
                            "context": context,
                            "continuations": [one.args[1] for one in requests],
                        }
                    )
        return found


def _beyond(batch: list[Item], model: LeanLM) -> str | None:
    """What to say of a prompt that leaves no room for an answer, of the first; None if all do."""
    for item in batch:
        count = len(model.tok_encode(item["context"]))
        if count >= model.max_length:
            return (
                f"prompts of more than {model.max_length - 1} tokens lose their beginning, the "
                f"first examples: that of {item['id']} has {count}"
            )
    return None


def _configured(documents: Documents) -> dict[str, Any]:
    """What differs from lm-evaluation-harness' own settings of a task."""
    asked = [*documents.questions.values()]
    splits = {"test": asked, "validation": asked, "train": documents.examples}
    # of MMLU examples are in dev, which its own settings say; ARC's and HellaSwag's are in train
    splits["dev"] = documents.examples
    more = {} if documents.part == MMLU or not documents.shots else {"fewshot_split": "train"}
    return {
        "task": documents.task,
        "num_fewshot": documents.shots,
        "custom_dataset": lambda **_: {
            name: datasets.Dataset.from_list([*rows]) for name, rows in splits.items() if rows
        },
        **more,
    }


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of datasets, one a task."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
