"""The command `chat`: instructions as they are typed, each by itself or as turns of a conversation.

From a pipe the output holds the answers alone.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial

from llama_adapter.answering import Answerer, ModelOptions
from llama_adapter.data.chat import SEPARATOR, Turn, chat_text
from llama_adapter.data.template import prompt_text
from llama_adapter.generate_command import tell
from llama_adapter.options import UsageError, add_options, build
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions

HELP = """Type an instruction and press Enter. Each answer stands alone, but with --conversation.
  /input TEXT   text that the next instruction is about
  /image FILE   image that instructions from here on are about; /image alone: none
  /new          forget the turns of the conversation
  /base         answer without the adapter from here on; /adapter switches back
  /quit         leave (or Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes."""
    parser.add_argument(
        "--conversation",
        action="store_true",
        help="answer in the light of the turns before, in the template that conversations are "
        "trained in",
    )
    for cls in (ModelOptions, VisionOptions, SamplingConfig):
        add_options(parser, cls)


def chat(options: argparse.Namespace) -> int:
    """Answer until the input ends.

    Raises:
        UsageError: there is no input, or an instruction from a pipe cannot be answered.
        OSError, ValueError: as whatever loads the model.
    """
    sampling = build(SamplingConfig, vars(options))
    if options.conversation:
        # the model ends its turn so
        sampling = replace(sampling, stop=(*sampling.stop, SEPARATOR))
    adapted = build(ModelOptions, vars(options)).load(build(VisionOptions, vars(options)))
    if sys.stdin is None:
        raise UsageError("instructions come from standard input, which is closed")
    typed = sys.stdin.isatty()
    chatting = _Chat(adapted, sampling, options.conversation)
    if typed:
        having = "without" if adapted.adapter is None else "with"
        print(f"{adapted.base.name}, {having} adapter. /help lists commands.")
    say = partial(print, file=sys.stdout if typed else sys.stderr)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line.startswith("/"):
            if said := chatting.command(line):
                say(said)
        elif line:
            try:
                chatting.ask(line)
            except (OSError, ValueError) as error:
                if not typed:
                    raise UsageError(f"{error}, in the instruction {line!a}") from error
                print(error)


class _Chat:
    """What has been said, and what the next instruction is about."""

    def __init__(self, adapted: Answerer, sampling: SamplingConfig, conversation: bool) -> None:
        self._adapted, self._base = adapted, Answerer(adapted.base)
        self._answerer, self._sampling = adapted, sampling
        self._turns: list[Turn] | None = [] if conversation else None
        self._input, self._image = "", None

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash; what to say about it, if anything."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/input":
            if self._turns is not None:
                return "/input is for instructions that stand alone: put the text into the question"
            self._input = rest
        elif name == "/image":
            self._image = rest or None
        elif name == "/new" and self._turns is not None:
            self._turns.clear()
        elif name in ("/base", "/adapter"):
            self._answerer = self._adapted if name == "/adapter" else self._base
            if name == "/adapter" and self._adapted.adapter is None:
                return "no adapter is loaded: start with --adapter FILE"
        else:
            return HELP
        return None

    def ask(self, line: str) -> None:
        """Print the answer, and remember both in a conversation.

        Raises:
            OSError: there is no such image.
            ValueError: the text is too long or no text, or the image cannot be used.
        """
        if self._turns is None:
            text, self._input = prompt_text(line, self._input), ""
        else:
            text = chat_text([*self._turns, Turn(line, None)])
        answer = tell(self._answerer, text, self._sampling, self._image)
        if self._turns is not None:
            self._turns.append(Turn(line, answer.strip()))
