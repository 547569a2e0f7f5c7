"""The command `finetune --host`: a method on a ViT, RoBERTa, BERT or CLIP, for one of the tasks.

Options come from the command line, then from `--config`, then from `--recipe`, then from defaults.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_adapter.host_training.host_config import HostRunConfig
from llama_adapter.host_training.run import HostResult, train_host
from llama_adapter.hosts.methods import METHODS, MethodOptions
from llama_adapter.options import UsageError, add_options, build, read_config, read_object

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe: one of the package's by its name, or any file.

    Raises:
        UsageError: there is no such recipe.
    """
    own, path = RECIPES / f"{name}.yaml", Path(name)
    if own.is_file():
        return own
    if path.suffix in (".yaml", ".yml", ".json"):
        return path
    raise UsageError(f"--recipe must be one of {', '.join(recipe_names())}, or a file, got {name}")


def is_wanted(arguments: list[str]) -> bool:
    """Whether words of `finetune` are about a host: by --host, a recipe, or the run they name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--host", "--recipe"):
        parser.add_argument(name, nargs="?", const="")
    for name in ("--config", "--output"):
        parser.add_argument(name, nargs="?", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        found = parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:
        # whichever parser takes the words says what is wrong with them
        return any(word.split("=")[0] in ("--host", "--recipe") for word in arguments)
    if found.host is not None or found.recipe is not None:
        return True
    held = found.output / "config.json" if found.resume and found.output else None
    for path in (found.config, held):
        if path is not None and path.is_file():
            try:
                return "host" in read_object(path)
            except UsageError:
                return False
    return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `finetune --host` takes."""
    parser.description = "Train a ViT, RoBERTa, BERT or CLIP for a task."
    parser.add_argument(
        "--recipe",
        metavar="name",
        help=f"options of a paper's runs, which others overrule: {', '.join(recipe_names())}, or a "
        "YAML file",
    )
    parser.add_argument("--config", type=Path, help="JSON file of options; the command line wins")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --output, with its own options"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(parser, HostRunConfig)
    parser.epilog = "Methods: " + "; ".join(
        f"{name} ({one.source}), for {', '.join(one.hosts)}, reads "
        + (", ".join(f"--{x.replace('_', '-')}" for x in one.options) or "none of these")
        for name, one in METHODS.items()
    )


def finetune(options: argparse.Namespace) -> int:
    """Train what the options ask for, and say what came of it.

    Raises:
        UsageError: options are missing, unknown or do not go together.
        OSError, ValueError, ImportError, FloatingPointError: as `train_host`.
    """
    given = vars(options)
    output = given.get("output", Path())
    held = output / "config.json"
    if options.resume and options.config is None:
        if held.is_file():
            options.config = held
        elif "model" not in given:
            raise UsageError(f"--resume: {output} holds no run (config.json is missing)")
    try:
        config = build(HostRunConfig, _chosen(options))
    except UsageError as error:
        if options.recipe is None:
            raise
        raise UsageError(f"{error} (with what --recipe {options.recipe} says)") from error
    for spec in fields(MethodOptions):
        if spec.name in given and spec.name not in METHODS[config.method].options:
            flag = f"--{spec.name.replace('_', '-')}"
            raise UsageError(f"{flag} is no option of the method {config.method}")
    try:
        result = train_host(
            config, resume=options.resume, progress=False if options.quiet else None
        )
    except ImportError as error:
        raise UsageError(str(error)) from error
    _tell(result)
    return 0


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Option values by name: the command line's over the config's over the recipe's."""
    found: dict[str, Any] = {}
    if options.recipe is not None:
        found |= read_config(recipe_path(options.recipe), HostRunConfig, "--recipe")
    if options.config is not None:
        found |= read_config(options.config, HostRunConfig)
    return {**found, **vars(options)}


def _tell(result: HostResult) -> None:
    """What was trained, how well, and where it is."""
    folder, score = result.folder, result.folder.kind.score
    rows = [row for row in folder.rows if "loss" in row]
    count = sum(parameter.numel() for parameter in result.attached.parameters().values())
    print(
        f"trained     {count:,} parameters of {result.attached.name} on {result.items} "
        f"items, {len(rows)} steps"
    )
    for rate, found in result.results.items() if len(result.results) > 1 and rows else ():
        said = "not finite" if found is None else f"{found:.2f}"
        chosen = ", chosen" if rate == result.rate else ""
        print(f"lr          {rate:g}: {score.removeprefix('val_')} {said}{chosen}")
    scores = [row[score] for row in rows if score in row and row["peak_lr"] == result.rate]
    if scores:
        best = folder.options["fit.keep"] == "best"
        found, which = (max(scores), "best") if best else (scores[-1], "last")
        print(f"validation  {score.removeprefix('val_')} {found:.2f} in the {which} epoch")
    print(f"{'adapter' if result.attached.name == 'zero_init' else 'weights':11} {folder.adapter}")
    print(f"loss curve  {folder.curve}")
