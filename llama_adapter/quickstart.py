"""The main job on the bundled model, start to finish, with what it shows printed as it happens.

Score the frozen base on held-out instructions, fine-tune an adapter, score again, and put five
answers side by side. It takes no road of its own: every step is the one that users take.
"""

from dataclasses import fields, is_dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llama_adapter import assets
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.adapter_file import load_adapter
from llama_adapter.data.records import Record, load_records
from llama_adapter.evaluation.exact_match import evaluate_instructions
from llama_adapter.evaluation.runner import Evaluation
from llama_adapter.options import build, read_config
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.training import finetune

SHOWN = 5


def departures(config: FinetuneConfig, papers: FinetuneConfig, n_layers: int) -> list[str]:
    """Where a recipe is not the papers', as "name value (papers: value)".

    Args:
        config: the recipe.
        papers: the papers' recipe on the same data.
        n_layers: layers of the base model.
    """

    def values(recipe: FinetuneConfig) -> dict[str, Any]:
        both = (recipe, recipe.adapter)
        found = {
            spec.name: getattr(part, spec.name)
            for part in both
            for spec in fields(part)
            if spec.metadata.get("recipe", True) and not is_dataclass(getattr(part, spec.name))
        }
        # what None stands for
        found["lr"], found["warmup_epochs"] = recipe.peak_lr, recipe.warmup
        found["n_layers"] = len(recipe.adapter.layers_of(n_layers))
        return found

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    ours, theirs = values(config), values(papers)
    return [
        f"{name} {shown(value)} (papers: {shown(theirs[name])})"
        for name, value in ours.items()
        if value != theirs[name]
    ]


def bundled_config(output: Path, **changes: Any) -> FinetuneConfig:
    """The bundled recipe (assets/recipe.json), writing to `output`."""
    given = read_config(assets.RECIPE, FinetuneConfig)
    given.update(changes)
    return build(FinetuneConfig, given, data=assets.FOLLOW_TRAIN, output=output)


def score(base: Base, records: list[Record], adapter: Path | None, folder: Path) -> Evaluation:
    """Answer held-out records greedily, with the adapter in `adapter` or with the base alone."""
    prompts = None
    if adapter is not None:
        with torch.no_grad():
            prompts = base.model.project(load_adapter(adapter, base.model, base.name))
    name = "base" if adapter is None else "adapter"
    return evaluate_instructions(
        base.model,
        base.tokenizer,
        records,
        prompts,
        folder=folder / f"answers_{name}",
        settings={"base": base.name, "adapter": adapter is not None},
        progress=name,
    )


def _share(evaluation: Evaluation) -> str:
    return f"{evaluation.scores['exact_match']:.1%}"


def _print_answers(records: list[Record], before: Evaluation, after: Evaluation) -> None:
    rows = list(zip(records, before.predictions, after.predictions, strict=True))
    for record, old, new in rows[:: max(1, len(rows) // SHOWN)][:SHOWN]:
        about = f" | {record.input}" if record.input else ""
        print(f"\n  instruction  {record.instruction}{about}")
        print(f"  base         {old.strip()}")
        print(f"  adapter      {new.strip()}")
        print(f"  expected     {record.output}")


def unused(folder: Path) -> Path:
    """The folder, or with a number behind it where a finished run took its name."""
    number, free = 1, folder
    while (free / "run" / "adapter.safetensors").exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def quickstart(output: Path, *, steps: int | None = None, items: int | None = None) -> int:
    """Run the main job on the bundled model.

    Args:
        output: folder for the run and the answers; what was interrupted there is continued, and
            where it holds a finished run a number is put behind it.
        steps: stop training after so many steps (for trying the machinery out).
        items: held-out instructions to score; None takes all.

    Returns:
        0, the exit code.

    Raises:
        ValueError: items is below 1.
    """
    if items is not None and items < 1:
        raise ValueError(f"items must be at least 1, got {items}")
    start, output = perf_counter(), unused(output)
    stop = {} if steps is None else {"max_steps": steps}
    config = bundled_config(output / "run", **stop)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(assets.BASE)
    count = sum(parameter.numel() for parameter in base.model.parameters())
    records = load_records(assets.FOLLOW_HELDOUT)[0][:items]
    print(f"base model   {base.name}: {base.model.config.describe()}, {count:,} parameters, frozen")
    before = score(base, records, None, output)
    print(f"base         {_share(before)} of {len(records)} held-out instructions answered")

    papers = build(FinetuneConfig, {}, data=config.data, output=config.output)
    changes = departures(config, papers, base.model.config.n_layers)
    print("recipe       the papers', but " + ", ".join(changes))
    result = finetune(config, base=base, resume=True)
    trained = sum(parameter.numel() for parameter in result.adapter.parameters())
    after = score(base, records, result.adapter_path, output)
    print(f"adapter      {_share(after)} of {len(records)} held-out instructions answered")
    _print_answers(records, before, after)

    size = result.adapter_path.stat().st_size
    print(f"\nadapter      {result.adapter_path} ({trained:,} parameters, {size / 1e3:.0f} kB)")
    print(f"loss curve   {result.curve_path}")
    print(f"total time   {perf_counter() - start:.0f} s")
    first = records[0]
    asked = f'"{first.instruction}"' + (f' --input "{first.input}"' if first.input else "")
    print("\nNext, with llama-adapter from the same environment:")
    print(f"  llama-adapter generate {asked} --adapter {result.adapter_path}")
    print(f"  llama-adapter chat --adapter {result.adapter_path}")
    recipe = config.output / "config.json"
    print(f"  llama-adapter finetune --config {recipe} --data your.json --output runs/yours")
    return 0
