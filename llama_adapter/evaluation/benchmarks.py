"""Every benchmark by its name: how its files are read, what is asked, how answers are scored.

One table, read by the command `evaluate`, which asks all of them in the same way.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_adapter.answering import Answerer
from llama_adapter.data.checked_files import FileProblem
from llama_adapter.data.records import load_records
from llama_adapter.evaluation import (
    c_vqa,
    coco_caption,
    exact_match,
    judge,
    lvlm_ehub,
    mmbench,
    mme,
    open_llm,
    pope,
    scienceqa,
    vqa,
)
from llama_adapter.evaluation.data_options import DataOptions, SourceOptions
from llama_adapter.evaluation.runner import Item, Scores, mean_scores
from llama_adapter.sampling import SamplingConfig

Loaded = tuple[list[Item], list[FileProblem]]


@dataclass(frozen=True)
class Benchmark:
    """What one benchmark is.

    Attributes:
        load: the items of the data, with the folder of the images or None; an item with "given" is
            not asked, that is its prediction.
        question: of an item.
        score: of an item and its prediction.
        wrapped: the question is an instruction in the papers' template; else it is the whole text.
        sampling: how answers are generated unless told otherwise.
        aggregate: scores of the whole from those of the items.
        corpus: the same from items and predictions, in place of `aggregate`.
        result: file or folder of the official form, in the run's folder; "" for none.
        write: that, with items, predictions, the options and what the run is called.
        takes, needs: the data options that it reads besides data and output; those it needs.
        images: whether its questions are about images.
        root: the folder of the images where it is not the option's: of the data, or one of the run
            for images that are inside the data's files, which is gone after the run.
        options: outputs that an item's question can have, by the prediction that each stands for.
        check: raises where something lacks that scoring needs.
        targets: what a model that is trained on an item answers, a record each, with the blank that
            a prompt does not end with where it is not wrapped; None where nobody trains on it.
        training_split: the split to train on, of files that hold several.
        predict: of an answerer and items per batch, what predicts a batch where nothing is asked.
        bind: the same benchmark for some data, where its functions share what is read first.
    """

    load: Callable[[DataOptions, Path | None], Loaded]
    question: Callable[[Item], str]
    score: Callable[[Item, Any, DataOptions], Mapping[str, float]]
    result: str = ""
    write: Callable[[Path, Sequence[Item], Sequence[Any], DataOptions, str], None] | None = None
    wrapped: bool = True
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=30)
    )
    aggregate: Callable[[list[Scores]], Mapping[str, float]] = mean_scores
    corpus: Callable[[list[Item], list[Any]], Mapping[str, float]] | None = None
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    images: bool = True
    root: Callable[[DataOptions, Path], Path] | None = None
    options: Callable[[Item], Mapping[str, str]] | None = None
    check: Callable[[DataOptions], None] | None = None
    targets: Callable[[Item], Sequence[str]] | None = None
    training_split: Callable[[SourceOptions], str | None] = lambda options: None
    predict: Callable[[Answerer, int], Callable[[list[Item]], list[Any]]] | None = None
    bind: Callable[["Benchmark", DataOptions], "Benchmark"] | None = None


def question_of(benchmark: Benchmark, item: Item, data: SourceOptions) -> str:
    """What an item asks, with the suffix that is asked for."""
    question = benchmark.question(item)
    return f"{question} {data.suffix}" if data.suffix else question


def _asked(item: Item) -> str:
    return item["question"]


def _plain(score: Callable[[Item, Any], Scores]) -> Callable[[Item, Any, DataOptions], Scores]:
    """A score that no option changes."""
    return lambda item, prediction, options: score(item, prediction)


def _written(write: Callable[..., None]) -> Callable[..., None]:
    """A result that neither options nor the run's name are a part of."""
    return lambda path, items, predictions, options, name: write(path, items, predictions)


def _scienceqa(options: DataOptions, images: Path | None) -> Loaded:
    questions, splits = options.data / "problems.json", options.data / "pid_splits.json"
    return scienceqa.load(questions, splits, options.split or "test", images)


def _write_scienceqa(
    path: Path, items: Sequence[Item], texts: Sequence[Any], options: DataOptions, name: str
) -> None:
    scienceqa.write(path, items, texts, fallback=options.fallback, args={"model": name})


def _mmbench(options: DataOptions, images: Path | None) -> Loaded:
    """The images of the table become files, once each, where there is a folder for them."""
    items, problems = mmbench.load(options.data)
    found: list[Item] = []
    for item in items:
        row = {**item, "image": None}
        if images is not None:
            images.mkdir(parents=True, exist_ok=True)
            path = images / f"{item['group']}.jpg"
            content = mmbench.image_of(item)
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
            row["image"] = str(path)
        found.append(row)
    return found, problems


def _score_mmbench(item: Item, prediction: Any, options: DataOptions) -> Scores:
    # a test split is scored by its owner
    return {} if item["answer"] is None else mmbench.score(item, prediction)


def _aggregate_mmbench(rows: list[Scores]) -> Scores:
    scored = [row for row in rows if row]
    return mmbench.aggregate(scored) if scored else {}


def _agreed(item: Item) -> list[str]:
    """The answer that most people gave, of equally many the first; none where none is known."""
    return [answer for answer, _ in Counter(item["answers"]).most_common(1)]


def _vqa(name: str) -> Benchmark:
    own = name in ("vqav2", "okvqa")

    def load(options: DataOptions, images: Path | None) -> Loaded:
        more = {"annotations": options.annotations, "image_name": options.image_name}
        return vqa.load(name, options.data, images or "", **(more if own else {}))

    return Benchmark(
        load,
        _asked,
        _plain(vqa.score),
        "results.json",
        _written(vqa.write),
        takes=("annotations", "image_name", "suffix") if own else ("suffix",),
        targets=_agreed,
    )


def _needs_pycocoevalcap(options: DataOptions) -> None:
    if options.metric in (None, "caption"):
        coco_caption.java_tokenizer_runs()


def _questions(options: DataOptions, images: Path | None) -> Loaded:
    return judge.load_questions(options.data)


def _judged(options: DataOptions, images: Path | None) -> Loaded:
    assert options.answers is not None
    assert options.baseline is not None
    items, problems = judge.load(options.data, options.answers, options.baseline)
    if options.reviews is None:
        return items, problems
    kept, texts, more = judge.load_reviews(options.reviews, items)
    given: list[Item] = [{**item, "given": text} for item, text in zip(kept, texts, strict=True)]
    return given, [*problems, *more]


def _verdict(items: Sequence[Item], reviews: Sequence[str]) -> Scores:
    """The judge's counts; where no review can be read a person must look at all of them."""
    if all(judge.marks_of(review) is None for review in reviews):
        return {"malformed": float(len(reviews))}
    return judge.aggregate(items, reviews)


def _records(options: DataOptions, images: Path | None) -> Loaded:
    records, problems = load_records(options.data)
    found = [FileProblem(one.index, one.reason, str(options.data), "record") for one in problems]
    items = exact_match.instruction_items(records)
    if images is not None:
        items = [
            {**item, "image": str(images / item["image"])} if "image" in item else item
            for item in items
        ]
    return items, found


def _needs_lm_eval(options: DataOptions) -> None:
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "open_llm needs lm-evaluation-harness: pip install 'lm-eval[hf]>=0.4.13'"
        )


def _unbound(*given: Any) -> Any:
    """In place of what `bind` gives."""
    raise RuntimeError("this benchmark must be bound to its data first")


def _open_llm(benchmark: Benchmark, options: DataOptions) -> Benchmark:
    """With the tasks of lm-evaluation-harness, which imports much."""
    from llama_adapter.evaluation.open_llm_tasks import OpenLlm

    documents, problems = open_llm.read_documents(options.data)
    tasks = OpenLlm(documents)
    return replace(
        benchmark,
        load=lambda options, images: (tasks.items, problems),
        question=lambda item: item["context"],
        score=_plain(tasks.score),
        predict=tasks.predictor,
        result="results.json",
        write=lambda path, items, predictions, options, name: tasks.write(
            path, items, predictions, model=name
        ),
    )


def _exact(item: Item, prediction: Any) -> Scores:
    return {"exact_match": float(exact_match.exact_match(prediction, item["target"]))}


BENCHMARKS: dict[str, Benchmark] = {
    "scienceqa": Benchmark(
        _scienceqa,
        scienceqa.prompt_of,
        lambda item, text, options: scienceqa.score(item, text, fallback=options.fallback),
        "results.json",
        _write_scienceqa,
        wrapped=False,
        aggregate=scienceqa.aggregate,
        takes=("split", "fallback", "choose"),
        options=scienceqa.targets_of,
        targets=lambda item: [scienceqa.target_of(item)],
        training_split=lambda options: "train",
    ),
    "mme": Benchmark(
        lambda options, images: mme.load(options.data, with_images=images is not None),
        mme.prompt_of,
        _plain(mme.score),
        "mme",
        _written(mme.write),
        aggregate=mme.aggregate,
        takes=("suffix",),
        root=lambda options, unpacked: options.data,
    ),
    "mmbench": Benchmark(
        _mmbench,
        mmbench.prompt_of,
        _score_mmbench,
        "mmbench.tsv",
        _written(mmbench.write),
        aggregate=_aggregate_mmbench,
        takes=("suffix", "choose"),
        options=lambda item: item["options"],
        root=lambda options, unpacked: unpacked,
    ),
    "pope": Benchmark(
        lambda options, images: pope.load(options.data, images),
        pope.prompt_of,
        _plain(pope.score),
        "answers.jsonl",
        _written(pope.write),
        aggregate=pope.aggregate,
        takes=("suffix",),
    ),
    "c_vqa": Benchmark(
        lambda options, images: c_vqa.load(options.data, images),
        c_vqa.prompt_of,
        _plain(c_vqa.score),
        "responses.csv",
        _written(c_vqa.write),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=64),
        aggregate=c_vqa.aggregate,
        takes=("suffix",),
    ),
    "coco_caption": Benchmark(
        lambda options, images: coco_caption.load(options.data, images or "", options.split),
        _asked,
        _plain(coco_caption.score),
        "captions_results.json",
        _written(coco_caption.write),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=64),
        corpus=coco_caption.aggregate,
        takes=("split",),
        targets=lambda item: item["references"],
        training_split=lambda options: (
            None if coco_caption.is_one_split(options.data) else "train+restval"
        ),
        check=_needs_pycocoevalcap,
    ),
    **{name: _vqa(name) for name in vqa.BENCHMARKS},
    "lvlm_ehub": Benchmark(
        lambda options, images: lvlm_ehub.load(options.data, images or "", options.metric or ""),
        _asked,
        _plain(lvlm_ehub.score),
        "results.json",
        lambda path, items, texts, options, name: lvlm_ehub.write(
            path, items, texts, model_name=name
        ),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=64),
        corpus=lvlm_ehub.aggregate,
        takes=("metric", "suffix"),
        needs=("metric",),
        check=_needs_pycocoevalcap,
    ),
    # LLaMA-Adapter, section 4.1: temperature 0.1, top-p 0.75, up to 256 tokens in its code
    "questions": Benchmark(
        _questions,
        _asked,
        lambda item, text, options: {"words": float(len(text.split()))},
        "answer.jsonl",
        lambda path, items, texts, options, name: judge.write_answers(
            path, items, texts, model=name
        ),
        sampling=SamplingConfig(max_new_tokens=256),
        images=False,
    ),
    # the judge's own settings, of FastChat's script
    "judge": Benchmark(
        _judged,
        lambda item: f"{judge.SYSTEM}\n\n{item['prompt']}",
        _plain(judge.score),
        "review.jsonl",
        lambda path, items, texts, options, name: judge.write(path, items, texts, reviewer=name),
        sampling=SamplingConfig(temperature=0.2, max_new_tokens=1024),
        corpus=_verdict,
        takes=("answers", "baseline", "reviews"),
        needs=("answers", "baseline"),
        images=False,
    ),
    "open_llm": Benchmark(
        _unbound,
        _unbound,
        _unbound,
        aggregate=open_llm.aggregate,
        images=False,
        check=_needs_lm_eval,
        bind=_open_llm,
    ),
    "exact_match": Benchmark(
        _records,
        lambda item: item["prompt"],
        _plain(_exact),
        wrapped=False,
        sampling=exact_match.GREEDY,
        images=False,
    ),
}
