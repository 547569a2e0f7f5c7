"""The command `llama-adapter`: fine-tune, generate, chat, look at files, check the environment.

Options come from the dataclasses of the library. A request that cannot be carried out ends in one
line on stderr and exit code 2; `--debug` shows the traceback instead.
"""

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_adapter import assets, chat_command, generate_command
from llama_adapter.chat_command import chat
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_formats import adapter_path
from llama_adapter.convert import add_arguments, convert, describe_adapter
from llama_adapter.evaluation import command, records_command
from llama_adapter.evaluation import host_command as host_evaluation
from llama_adapter.generate_command import generate
from llama_adapter.host_training import command as host_command
from llama_adapter.host_training.host_config import TASKS
from llama_adapter.host_training.method_file import describe_trained
from llama_adapter.options import Parser, UsageError, add_options, build, read_config
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.step_profile import TABLE
from llama_adapter.training import finetune


def _given(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Option values: the command line's, over those of `--config`."""
    config = getattr(options, "config", None)
    return {**(read_config(config, cls) if config else {}), **vars(options)}


def _finetune(options: argparse.Namespace) -> int:
    held = getattr(options, "output", Path()) / "config.json"
    if options.resume and options.config is None:
        if held.is_file():
            # a run to be continued knows its own options
            options.config = held
        elif "data" not in vars(options):
            raise UsageError(f"--resume: {held.parent} holds no run (config.json is missing)")
    if options.config is None and "base" not in vars(options):
        # the papers' recipe does not move a model as small as the bundled one
        options.config = assets.RECIPE
    config = build(FinetuneConfig, _given(options, FinetuneConfig))
    result = finetune(config, resume=options.resume, progress=False if options.quiet else None)
    if result.folder.follows:
        return 0
    losses, data = result.losses, result.dataset
    if options.config == assets.RECIPE:
        print(f"recipe      the bundled model's, {assets.RECIPE}")
    print(f"trained     {len(data.train)} records, {len(data.held_out)} held out", end="")
    print(f", {len(losses)} steps", end="")
    for label, points in result.folder.training_losses().items():
        if points:
            of = label.removeprefix("training").replace(",", " of")
            print(f", loss{of} {points[0][1]:.3f} to {points[-1][1]:.3f}", end="")
    print()
    if result.speed is not None:
        print(f"speed       {result.speed}, the median of a step")
    print(f"adapter     {result.adapter_path}")
    print(f"loss curve  {result.curve_path}")
    if (profile := result.folder.path / TABLE).is_file():
        print(f"profile     {profile}")
    return 0


def _info(options: argparse.Namespace) -> int:
    path: Path = options.path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (lines := describe_trained(path)) is not None:
        print("\n".join(lines))
        return 0
    if adapter_path(path) is None:
        base = load_base(path)
        count = sum(parameter.numel() for parameter in base.model.parameters())
        print(f"base model  {base.name}\nshape       {base.model.config.describe()}")
        print(f"parameters  {count:,}\ntokenizer   {base.tokenizer.vocab_size} pieces")
        return 0
    print("\n".join(describe_adapter(path)))
    return 0


def _quickstart(options: argparse.Namespace) -> int:
    from llama_adapter.quickstart import quickstart

    return quickstart(options.output, steps=options.steps, items=options.items)


def _doctor(options: argparse.Namespace) -> int:
    from llama_adapter import doctor

    return doctor.main()


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(call=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _version() -> str:
    try:
        return f"llama-adapter {importlib.metadata.version('llama-adapter-kernels')}"
    except importlib.metadata.PackageNotFoundError:
        return "llama-adapter, from a source tree that is not installed"


def _finetune_options(tune: argparse.ArgumentParser, words: list[str]) -> None:
    """What `finetune` takes: two kinds of model have options of their own."""
    if words[:1] == ["finetune"] and host_command.is_wanted(words[1:]):
        tune.set_defaults(call=host_command.finetune)
        host_command.add_arguments(tune)
        return
    tune.add_argument(
        "--host",
        help="train a vit, roberta, bert or clip in place of a LLaMA; `finetune --host vit --help` "
        "shows the options of that",
    )
    tune.add_argument("--config", type=Path, help="JSON file of options; the command line wins")
    tune.add_argument(
        "--resume", action="store_true", help="continue the run in --output, with its own options"
    )
    tune.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(tune, FinetuneConfig)


def _parser(words: list[str]) -> Parser:
    about = "Fine-tune a LLaMA-Adapter and talk to the result. Each command has --help of its own."
    parser = Parser(prog="llama-adapter", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    tune = _command(commands, "finetune", _finetune, "Train an adapter on instruction data.")
    _finetune_options(tune, words)

    make = _command(commands, "generate", generate, "Answer one instruction, or a file of them.")
    generate_command.add_arguments(make)
    talk = _command(commands, "chat", chat, "Answer instructions as they are typed.")
    chat_command.add_arguments(talk)

    about = "Ask a benchmark's questions and score."
    test = _command(commands, "evaluate", command.run, about)
    if words[:1] == ["evaluate"] and host_evaluation.is_wanted(words[1:]):
        test.set_defaults(call=host_evaluation.run)
        host_evaluation.add_arguments(test)
    else:
        command.add_arguments(test)
        test.epilog = (
            f"{test.epilog} Also {', '.join(TASKS)}: what runs of finetune --host have learnt; see "
            "evaluate vtab --run RUN --help."
        )

    kept = _command(
        commands, "records", records_command.run, "Write a benchmark's files as data to train on."
    )
    records_command.add_arguments(kept)

    info = _command(commands, "info", _info, "Say what an adapter file or a model folder is.")
    info.add_argument("path", type=Path, help="adapter file or folder of a base model")

    change = _command(commands, "convert", convert, "Bring an adapter into another format.")
    add_arguments(change)

    quick = _command(
        commands, "quickstart", _quickstart, "Fine-tune the bundled model, in minutes."
    )
    quick.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder to create"
    )
    quick.add_argument("--steps", type=int, help="stop training early")
    quick.add_argument("--items", type=int, help="held-out instructions to score (default: all)")

    _command(commands, "doctor", _doctor, "Say what is installed, what runs where, what is wrong.")
    return parser


def _print_warning(message: Warning | str, *rest: Any) -> None:
    """One line for a person, without the source line that raised it."""
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        0 on success, 2 for a request that cannot be carried out, 130 after Ctrl-C; `doctor`
        returns 1 when it finds a problem.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser(words).parse(words)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            code = options.call(options)
            # a reader who left is met here, not at the interpreter's end
            print(end="", flush=True)
            return code
    except KeyboardInterrupt as stop:
        print(f"\nllama-adapter {options.command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output left; a second attempt at flushing must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        # other errors of the runtime are ours, and their traceback is wanted
        foreign = not isinstance(error, RuntimeError) or "memory" in str(error)
        if options.debug or not foreign:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"llama-adapter {options.command}: error: {message}", file=sys.stderr)
        return 2
