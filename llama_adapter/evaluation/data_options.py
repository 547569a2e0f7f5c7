"""The options that say what data a benchmark reads, of the commands `evaluate` and `records`."""

from dataclasses import dataclass, field
from pathlib import Path

from llama_adapter.evaluation import lvlm_ehub, scienceqa


@dataclass(frozen=True)
class SourceOptions:
    """Data."""

    data: Path = field(
        metadata={
            "help": "the benchmark's file; of scienceqa the folder of problems.json and "
            "pid_splits.json, of mme that of the subtasks, of open_llm that of the folders arc, "
            "hellaswag, mmlu and truthfulqa"
        }
    )
    split: str | None = field(
        default=None,
        metadata={"help": "of scienceqa and coco_caption; default: test, and of records train"},
    )
    annotations: Path | None = field(
        default=None, metadata={"help": "file of people's answers, of vqav2 and okvqa"}
    )
    image_name: str = field(
        default="COCO_val2014_{:012d}.jpg",
        metadata={"help": "an image's name by its number, of vqav2 and okvqa"},
    )
    suffix: str | None = field(
        default=None,
        metadata={"help": "text behind every question, in the benchmarks that have none"},
    )

    def __post_init__(self) -> None:
        try:
            different = self.image_name.format(1) != self.image_name.format(2)
        except (ValueError, LookupError, AttributeError, TypeError):
            different = False
        if not different:
            raise ValueError(
                "--image-name must have one place for a number, as in COCO_val2014_{:012d}.jpg, "
                f"got {self.image_name!r}"
            )


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Data."""

    output: Path = field(kw_only=True, metadata={"help": "run folder to create, or to go on with"})
    metric: str | None = field(
        default=None,
        metadata={"help": "of lvlm_ehub's data set", "choices": tuple(lvlm_ehub.MAIN_SCORE)},
    )
    fallback: str = field(
        default="random",
        metadata={
            "help": "what an answer of scienceqa without a letter counts as",
            "choices": scienceqa.FALLBACKS,
        },
    )
    answers: Path | None = field(
        default=None, metadata={"help": "answer.jsonl of the model that is judged, of judge"}
    )
    baseline: Path | None = field(
        default=None,
        metadata={"help": "answer.jsonl of the model that it is compared with, of judge"},
    )
    reviews: Path | None = field(
        default=None, metadata={"help": "review.jsonl of a judge elsewhere, of judge"}
    )
    choose: bool = field(
        default=False,
        metadata={
            "help": "take the option with the least loss in place of a generated answer, of "
            "mmbench and scienceqa"
        },
    )
    blind: bool = field(default=False, metadata={"help": "answer without the images"})
