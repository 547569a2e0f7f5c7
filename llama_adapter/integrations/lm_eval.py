"""lm-evaluation-harness on adapted models, by its own command line.

`python -m llama_adapter.integrations.lm_eval` is its command with two more models: `llama-adapter`,
a base of ours with an adapter file, and `llama-adapter-hf`, a model of transformers with an adapter
file or with PEFT's adaption prompts. Its version 0.4.13 finds models of other packages in no other
way; a script of your own imports this module before it evaluates.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
        normalize_gen_kwargs,
    )
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError(
        f"evaluation by lm-evaluation-harness needs it: pip install 'lm-eval[hf]>=0.4.13' ({error})"
    ) from None

from llama_adapter.adapter import Prompts
from llama_adapter.checkpoints import Base, default_device, load_base
from llama_adapter.checkpoints.adapter_file import load_adapter
from llama_adapter.generation import generate
from llama_adapter.hosts import adapt
from llama_adapter.integrations.peft import patch
from llama_adapter.recipe import DTYPES
from llama_adapter.sampling import SamplingConfig

Row = TypeVar("Row")
# lm-eval's own default, where the context has room for it
_MAX_NEW_TOKENS = 256


@register_model("llama-adapter")
class LeanLM(TemplateLM):
    """A base of ours, with an adapter or without.

    On its command line: `--model llama-adapter --model_args base=FOLDER,adapter=FILE`.
    """

    def __init__(
        self,
        base: str,
        adapter: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            base: folder of the base model.
            adapter: adapter file; None is the base alone.
            dtype: of the weights, as "bfloat16"; None keeps the files' own.
            quantize: "int8", "nf4", "fp8" or "int4", or None.
            device: "cpu" or "cuda"; None, or a GPU that is not there, is the best that is.
            batch_size: requests that are computed together, a number.
            max_batch_size: at most so many.
            max_length: tokens of context and answer; None is what the base was made for.

        Raises:
            FileNotFoundError: a folder or file does not exist.
            ValueError: base and adapter do not fit, or an argument is none of these.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
        wanted = None if dtype is None else getattr(torch, dtype)
        # lm-eval says cuda:0 where nobody says anything
        absent = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        where = default_device() if absent or device is None else device
        loaded = load_base(Path(base), dtype=wanted, device=where, quantize=quantize)
        self._hold(loaded, None, max_length)
        if adapter is not None:
            read = load_adapter(adapter, loaded.model, loaded.name, base=loaded.fingerprint)
            with torch.no_grad():
                self._prompts = loaded.model.project(read)

    @classmethod
    def of(cls, base: Base, prompts: Prompts | None = None, *, batch_size: int = 8) -> "LeanLM":
        """The same of a base that is loaded already, with an adapter's projected prompts."""
        made = cls.__new__(cls)
        TemplateLM.__init__(made)
        made.batch_size = batch_size
        made._hold(base, prompts, None)
        return made

    def _hold(self, base: Base, prompts: Prompts | None, max_length: int | None) -> None:
        self._model, self._tokenizer, self._prompts = base.model, base.tokenizer, prompts
        self._where = base.model.output_weight.device
        longest = base.model.config.max_seq_len
        self.max_length = longest if max_length is None else int(max_length)
        if not 2 <= self.max_length <= longest:
            raise ValueError(f"max_length must be from 2 to the base's {longest}, got {max_length}")

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, BOS first unless it is declined."""
        return self._tokenizer.encode(string, bos=add_special_tokens is not False)

    @torch.no_grad()
    def _batch(
        self, rows: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[list[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """Log-likelihood of continuations and whether each is the greedy one, row by row.

        Args:
            rows: for each the context and what is common to its continuations, all but their last
                tokens.
            continuations: of each row.
        """
        seen = [row[-self.max_length :] for row in rows]
        tokens = torch.zeros(len(seen), max(map(len, seen)), dtype=torch.int64)
        for n, row in enumerate(seen):
            # padding lies behind the tokens, which do not look there
            tokens[n, : len(row)] = torch.tensor(row)
        hidden = self._model.hidden(tokens.to(self._where), self._prompts)
        found = []
        for n, row in enumerate(seen):
            own = []
            for continuation in continuations[n]:
                whole = [*row, *continuation[-1:]]
                count = min(len(continuation), len(row))
                last = hidden[n, len(row) - count : len(row)]
                logits = self._model.logits(last, self._prompts)
                own.append(_score(logits, whole[len(whole) - count :]))
            found.append(own)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        # of single tokens behind one context, as the letters of a question, one row tells all
        same: dict[tuple[int, ...], list[int]] = {}
        for n, (_, context, continuation) in enumerate(requests):
            same.setdefault(tuple((context + continuation)[:-1]), []).append(n)
        # rows of a length together, the longest first: what does not fit fails at once
        order = sorted(same, key=len, reverse=True)
        found: list[tuple[float, bool]] = [(-math.inf, False)] * len(requests)
        for rows in tqdm(list(_chunks(order, self.batch_size)), disable=disable_tqdm):
            answers = self._batch(rows, [[requests[n][2] for n in same[row]] for row in rows])
            for row, own in zip(rows, answers, strict=True):
                for n, answer in zip(same[row], own, strict=True):
                    found[n] = answer
                    if requests[n][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[n][0], answer)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context's length side by side."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            found.append(sum(score for score, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop text; one that leaves no room loses its beginning."""
        found = []
        for seed, request in enumerate(tqdm(requests, disable=disable_tqdm)):
            text, given = request.args
            options = normalize_gen_kwargs(given, min(_MAX_NEW_TOKENS, self.max_length // 2))
            sampling = SamplingConfig(
                max_new_tokens=options["max_gen_toks"],
                temperature=float(options.get("temperature") or 0.0),
                top_p=float(options.get("top_p", 1.0)),
                seed=seed,
                stop=tuple(one for one in options["until"] if one),
            )
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks must leave room in a context of {self.max_length} tokens, got "
                    f"{sampling.max_new_tokens}"
                )
            ids = self.tok_encode(text, add_special_tokens=False)
            shown = text if len(ids) < room else self._tokenizer.decode(ids[len(ids) - room + 1 :])
            (answer,) = generate(
                self._model, self._tokenizer, [shown], sampling, prompts=self._prompts
            )
            found.append(answer.text)
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return found


def _score(logits: Tensor, tokens: list[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities of tokens (T,) under logits (T, V), and whether all are top."""
    wanted = torch.tensor(tokens, device=logits.device)
    chances = logits.float().log_softmax(-1)
    total = chances.gather(-1, wanted[:, None]).sum()
    return float(total), bool((logits.argmax(-1) == wanted).all())


def _chunks(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@register_model("llama-adapter-hf")
class AdaptedHFLM(HFLM):
    """A model of transformers, as lm-eval's `hf`, with an adapter of ours or of PEFT.

    On its command line: `--model llama-adapter-hf --model_args pretrained=NAME,adapter=FILE`, or
    `peft=FOLDER`, whose attention then runs through our kernels.
    """

    def __init__(self, pretrained: Any, adapter: str | None = None, **options: Any) -> None:
        """Load the model; `adapter` is an adapter file or folder, the rest is that of `hf`.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: the adapter is of another base, or there is a peft= beside it.
        """
        if adapter is not None and options.get("peft"):
            raise ValueError("adapter and peft must not be given together")
        self._adapter = adapter
        super().__init__(pretrained, **options)

    def _create_model(self, pretrained: str, *args: Any, **options: Any) -> None:
        super()._create_model(pretrained, *args, **options)
        if self._adapter is not None:
            adapt(self._model, adapter=self._adapter)
        elif options.get("peft"):
            patch(self._model)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.exit(cli_evaluate())
