"""How many instructions does a model answer exactly, with an adapter or without?

Items are Alpaca records, predictions are greedy completions of the papers' prompt template, and a
prediction scores 1 where it equals the record's output apart from blanks at its ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_adapter.adapter import Prompts
from llama_adapter.data.records import Record
from llama_adapter.data.template import prompt_text
from llama_adapter.evaluation.runner import Evaluation, Item, evaluate
from llama_adapter.generation import generate
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=64)


def exact_match(prediction: str, target: str) -> bool:
    """Whether two texts are equal apart from blanks at their ends."""
    return prediction.strip() == target.strip()


def instruction_items(records: Sequence[Record]) -> list[Item]:
    """Evaluation items of instruction records.

    Args:
        records: checked records of one file.

    Returns:
        Mappings with id (the record's index), prompt (the template's text) and target; with image,
        where a record has one.
    """
    return [
        {
            "id": str(record.index),
            "prompt": prompt_text(record.instruction, record.input),
            "target": record.output,
            **({} if record.image is None else {"image": record.image}),
        }
        for record in records
    ]


def evaluate_instructions(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    prompts: Prompts | None = None,
    *,
    sampling: SamplingConfig = GREEDY,
    batch_size: int = 100,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: str | None = None,
) -> Evaluation:
    """Answer every instruction and compare with its output.

    exact_match = (1 / n) sum_i [strip(answer_i) = strip(output_i)]

    Args:
        model: the base model.
        tokenizer: the model's.
        records: checked records of one file.
        prompts: the adapter's projection, shared by all records; None is the base model alone.
        sampling: greedy unless told otherwise; a sampled answer is seeded by the record's index.
        batch_size: records per batch, batched by the length of their prompts.
        folder: where predictions and scores are kept and resumed from; None keeps nothing.
        settings: names the model and the adapter in the folder, which cannot tell them apart
            otherwise; the sampling is added. Required with a folder.
        progress: caption of a progress bar; None shows none.

    Returns:
        scores {"exact_match": 0 to 1}, and the answers as predictions in the records' order.

    Raises:
        ValueError: a folder is given without settings; else as `runner.evaluate` and
            `generation.stream`.
    """
    if folder is not None and not settings:
        raise ValueError("settings must name the model and the adapter where a folder is given")

    def predict(batch: list[Item]) -> list[str]:
        texts = [item["prompt"] for item in batch]
        seeds = [int(item["id"]) for item in batch]
        completions = generate(model, tokenizer, texts, sampling, prompts=prompts, row_seeds=seeds)
        return [completion.text for completion in completions]

    return evaluate(
        instruction_items(records),
        predict,
        lambda item, answer: {"exact_match": exact_match(answer, item["target"])},
        folder,
        settings={**(settings or {}), **asdict(sampling)},
        batch_size=batch_size,
        batch_key=lambda item: len(item["prompt"]),
        progress=progress,
    )


def accuracy(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    prompts: Prompts | None = None,
    *,
    batch_size: int = 100,
    progress: str | None = None,
) -> float:
    """Share of instructions answered exactly, greedily; arguments as `evaluate_instructions`."""
    evaluation = evaluate_instructions(
        model, tokenizer, records, prompts, batch_size=batch_size, progress=progress
    )
    return evaluation.scores["exact_match"]
