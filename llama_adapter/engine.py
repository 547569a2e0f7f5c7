"""Continuous batching: requests join and leave a running batch between two steps.

Every request has its own adapter, sampling settings, seed and stop rules. A step admits waiting
requests in the order they came, runs a chunk of the prompts that are not cached yet, then the
newest token of all that are. A request holds the pages for its longest answer from its admission
on, so that nothing running ever waits for memory; one that does not fit waits, and so do those
behind it, which keeps a long request from starving.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from adapter_kernels import load_native
from llama_adapter.adapter_bank import Bank, BankFull, checked_bank
from llama_adapter.cache import PAGE_SIZE, PagePool, packed_span, pages_for
from llama_adapter.completion import Completion, Piece, Row
from llama_adapter.decoder import Decoder, Request
from llama_adapter.model import Llama, Step
from llama_adapter.rotary_angles import rotary_angles
from llama_adapter.sampling import SamplingConfig, choose
from llama_adapter.tokenizer import Tokenizer


class EngineBusy(ValueError):
    """As many requests wait as may; a later one may find a place."""


class Engine:
    """Serves requests with one model, one pool of pages and a bank of adapters.

    One thread at a time: who submits, cancels or loads adapters from others holds the lock that
    also guards `step`. Two engines may share a model and a bank under one lock; the bank must then
    have rows for the images of both, as an engine without requests of its own waits for no other's.

    Attributes:
        pool: pages of keys and values.
        decoder: batch sizes and graphs.
        held_back: steps whose next request had to wait for pages.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        bank: Bank | None = None,
        pool_tokens: int = 16384,
        max_batch: int = 32,
        max_tokens: int | None = None,
        max_waiting: int | None = None,
        prefill_chunk: int = 512,
        graphs: bool | None = None,
    ) -> None:
        """Allocate the pool, and on a CPU compile its kernels, once per machine in 20 seconds.

        On a GPU nothing is compiled before the first step, or `warmup`.

        Args:
            model: the base model.
            tokenizer: the model's.
            bank: where requests find their adapter; None serves the base model.
            pool_tokens: tokens that all running requests hold together, in pages of 64.
            max_batch: requests that run together.
            max_tokens: of one request, its answer included, which ends there; None is the model's
                context. A graph is as wide as this, so a long context costs a little.
            max_waiting: requests that may wait for a place in the batch or for pages; None is no
                limit.
            prefill_chunk: prompt tokens per step, so that long prompts do not hold up the others.
            graphs: capture decoding as CUDA graphs; None does on a GPU.

        Raises:
            ValueError: a number is below 1, or the tokenizer or the bank does not fit the model.
        """
        numbers = {
            "pool_tokens": pool_tokens,
            "max_batch": max_batch,
            "max_tokens": max_tokens,
            "max_waiting": max_waiting,
            "prefill_chunk": prefill_chunk,
        }
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(model, Llama):
            raise ValueError(f"model must be a Llama, as Base.model, got {type(model).__name__}")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer must have at most the model's {model.config.vocab_size} tokens, "
                f"got {tokenizer.vocab_size}"
            )
        weight, context = model.output_weight, model.config.max_seq_len
        self._max_tokens = min(context, max_tokens or context)
        self.model, self.tokenizer, self._bank = model, tokenizer, bank
        self._max_batch, self._max_waiting, self._chunk = max_batch, max_waiting, prefill_chunk
        self.pool = PagePool(
            model.config, pages_for(pool_tokens), dtype=weight.dtype, device=weight.device
        )
        if weight.device.type == "cpu":
            load_native()
        self._prompts = None if bank is None else checked_bank(bank.prompts, model)
        self.decoder = Decoder(
            model,
            self.pool,
            self._prompts,
            largest=max_batch,
            longest=min(self.pool.size, pages_for(self._max_tokens)),
            graphs=weight.device.type == "cuda" if graphs is None else graphs,
        )
        self._tickets = count()
        # text that is decided and not handed out yet
        self._pieces: deque[Piece] = deque()
        self._waiting: deque[Request] = deque()
        # those whose prompts are not wholly cached, then those that are
        self._reading: list[Request] = []
        self._writing: list[Request] = []
        self.held_back = 0

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return len(self._reading) + len(self._writing)

    def submit(
        self,
        text: str,
        sampling: SamplingConfig,
        *,
        adapter: Hashable | None = None,
        image: Tensor | None = None,
        row_seed: int = 0,
        name: str = "text",
    ) -> int:
        """Queue a request.

        Args:
            text: full prompt text; encoded with BOS.
            sampling: how its tokens are chosen and when it stops.
            adapter: name in the bank; None is the base model. The adapter that bears the name now
                is used to the request's end.
            image: features (F,) of an image for that adapter, which need a row of the bank while
                the request runs.
            row_seed: with `sampling.seed` seeds its random numbers.
            name: of the text, for messages.

        Returns:
            A ticket of this engine: the `row` of the request's pieces.

        Raises:
            EngineBusy: as many requests wait as may.
            UnknownAdapter: the bank has no such adapter.
            ValueError: the text is empty, or too long for the context or for the pool; the adapter
                takes no such image.
        """
        if self._max_waiting is not None:
            self._admit()
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise EngineBusy(
                f"at most {self._max_waiting} requests may wait, got one more: try again later"
            )
        if not isinstance(sampling, SamplingConfig):
            raise ValueError(f"sampling must be a SamplingConfig, got {type(sampling).__name__}")
        context = self._max_tokens
        row = Row(next(self._tickets), row_seed, text, self.tokenizer, sampling, context, name)
        request = Request(row, -1)
        if request.need > self.pool.size:
            raise ValueError(
                f"{name} must fit the pool of {self.pool.size} pages of {PAGE_SIZE} tokens, got "
                f"{len(row.prompt)} tokens and up to {row.limit} new ones, {request.need} pages: "
                "raise pool_tokens or lower max_new_tokens"
            )
        if adapter is not None:
            if self._bank is None:
                raise ValueError(f"adapter must be None without a bank, got {adapter!r}")
            request.adapter = self._bank.acquire(adapter)
        elif image is not None:
            raise ValueError("image must be None without an adapter")
        elif self._prompts is not None and self._prompts.tuned is not None:
            raise ValueError(
                "adapter must be named: the bank's biases, scales and norms are of all"
            )
        if image is not None and self._bank is not None:
            try:
                self._bank.check_image(request.adapter, image)
            except ValueError:
                self._end(request)
                raise
            # the caller may use the memory again before the request is admitted
            request.image = image.clone()
        self._waiting.append(request)
        return row.index

    def cancel(self, ticket: int) -> Completion | None:
        """End a request now and free its pages.

        Returns:
            What it has so far, pieces that were not handed out included, which no step brings any
            more; None if it has ended or is not this engine's.
        """
        for group in (self._waiting, self._reading, self._writing):
            for request in group:
                if request.row.index == ticket:
                    self._end(request)
                    self._pieces = deque(one for one in self._pieces if one.row != ticket)
                    return request.row.end("cancelled").completion
        return None

    def run(self) -> Iterator[Piece]:
        """Step until every request has ended, and return; more may be submitted meanwhile.

        A server that waits for requests calls `step` instead, which returns [] where nobody asks.

        Whoever stops listening finds the pieces left over in the next step or run.
        """
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if not self.waiting and not self.running:
                return
            self._step()

    def step(self) -> list[Piece]:
        """Admit what fits, cache a chunk of prompts, and give every running request a token.

        An exception leaves every request as it was or one token further, so that the next step
        goes on; one whose own text raises it ends with "error".

        Returns:
            The text that became decided, in the order of admission; the last piece of a request
            has its completion.
        """
        self._step()
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    def _step(self) -> None:
        self._admit()
        if self._waiting and self.running < self._max_batch:
            self.held_back += 1
        if self._waiting and not self.running:
            # the pool has room for any: its image has no row, and nobody here would make one
            request = self._waiting[0]
            self._end(request)
            self._pieces.append(request.row.fail())
            raise BankFull(
                "the bank must have a free row for an image, got none and no request that frees "
                "one: raise its capacity"
            )
        writing = list(self._writing)
        if writing:
            self._write(writing, self.decoder.step([request.live for request in writing]))
        if self._reading:
            self._read()

    def warmup(self) -> None:
        """Compile and capture everything that serving needs, so that the first request waits for
        nothing: on a GPU seconds to minutes, on a CPU one step of every batch size."""
        if self.waiting or self.running:
            raise ValueError("warmup must come before requests, got an engine that has some")
        self.decoder.warmup()
        pages = self.pool.take(min(self.pool.size, pages_for(self._chunk)))
        try:
            # compilers tell lengths of 1 and multiples of 16 from others
            for tokens in (self._chunk, 32, 17, 1):
                tokens = min(tokens, len(pages) * PAGE_SIZE, self._max_tokens)
                self._run_packed([[0] * tokens], [0], [pages], [-1])
        finally:
            self.pool.give_back(pages)

    def _admit(self) -> None:
        while self._waiting and self.running < self._max_batch:
            request = self._waiting[0]
            if request.need > self.pool.free or not self._see(request):
                return
            request.pages = self.pool.take(request.need)
            request.table = torch.zeros(self.decoder.longest, dtype=torch.int32)
            request.table[: request.need] = torch.tensor(request.pages)
            self._reading.append(self._waiting.popleft())

    def _see(self, request: Request) -> bool:
        """Put a request's image, if any, into a row of the bank; False where it must wait."""
        if request.image is None or self._bank is None:
            return True
        try:
            own = self._bank.see(request.adapter, request.image)
        except BankFull:
            return False
        self._bank.release(request.adapter)
        request.adapter, request.image = own, None
        return True

    @torch.inference_mode()
    def _read(self) -> None:
        """Cache the next chunk of prompts, and choose the first tokens of those that it ends."""
        parts: list[list[int]] = []
        chosen: list[Request] = []
        room = self._chunk
        for request in self._reading:
            part = request.row.prompt[request.read : request.read + room]
            if not part:
                break
            parts.append(part)
            chosen.append(request)
            room -= len(part)
        hidden = self._run_packed(
            parts,
            [request.read for request in chosen],
            [request.pages for request in chosen],
            [request.adapter for request in chosen],
        )
        done, rows, end = [], [], 0
        for request, part in zip(chosen, parts, strict=True):
            end += len(part)
            if request.read + len(part) == len(request.row.prompt):
                # read when its token is chosen; until then the chunk would be run again
                done.append(request)
                rows.append(end - 1)
            else:
                request.read += len(part)
        if done:
            self._write(done, self.model.logits(hidden[0, rows], self._prompts))

    @torch.inference_mode()
    def _run_packed(
        self,
        parts: Sequence[Sequence[int]],
        starts: Sequence[int],
        pages: Sequence[list[int]],
        adapters: list[int],
    ) -> Tensor:
        """Hidden states (1, tokens, C) of the next tokens of several sequences."""
        device = self.pool.device
        used = [
            own[: pages_for(a + len(p))] for own, a, p in zip(pages, starts, parts, strict=True)
        ]
        counts, width = [len(part) for part in parts], self.decoder.longest
        span = packed_span(starts, counts, used, device, width)
        tokens = torch.tensor([[token for part in parts for token in part]]).to(device)
        prompts = self._prompts
        if prompts is not None:
            prompts = prompts.of(torch.tensor(adapters, dtype=torch.int32).to(device))
        angles = rotary_angles(self.model.config, span.positions)
        return self.model.run(tokens, Step(*angles, prompts, self.pool, span))

    @torch.inference_mode()
    def _write(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Choose the next token of requests, one after the other; those that end leave."""
        rows = [request.row for request in requests]
        # rows of the embedding beyond the tokenizer's are padding
        logits = logits[:, : self.tokenizer.vocab_size]
        chosen = choose(logits, [row.sampling for row in rows], [row.draw for row in rows])
        for request, token in zip(requests, chosen, strict=True):
            try:
                piece = request.row.end("error") if token < 0 else request.row.add(token)
            except BaseException:
                # the row may have half a token
                self._end(request)
                self._pieces.append(request.row.fail())
                raise
            if request in self._reading:
                self._reading.remove(request)
                self._writing.append(request)
            if piece.completion is not None:
                self._end(request)
            if piece.text or piece.completion is not None:
                self._pieces.append(piece)

    def _end(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages and its adapter's row are free."""
        for group in (self._waiting, self._reading, self._writing):
            if request in group:
                group.remove(request)
        pages, request.pages = request.pages, []
        self.pool.give_back(pages)
        row, request.adapter = request.adapter, -1
        if self._bank is not None and row >= 0:
            self._bank.release(row)
