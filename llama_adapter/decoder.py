"""One step of decoding for whichever sequences are live: a few batch sizes, each a CUDA graph.

A graph replays fixed shapes from fixed memory, so live sequences fill the first rows of the next
larger of a few sizes, the buckets, and the rest are empty slots of length 0. On a CPU the same
function runs eagerly. Prompts of a bank and pages of a pool are read where they lie, so adapters
and sequences may change between two replays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_adapter.adapter import Prompts
from llama_adapter.cache import PAGE_SIZE, PagePool, decode_span, pages_for
from llama_adapter.completion import Row
from llama_adapter.model import Llama, Step
from llama_adapter.rotary_angles import rotary_angles

# eager steps of a bucket after which its graph is captured: sooner it would cost more than it saves
EAGER_STEPS = 12
# numbers of a row before its pages: newest token, cached tokens, adapter
HEAD = 3


@dataclass(frozen=True)
class Live:
    """One sequence's next step.

    Attributes:
        token: its newest token, not cached yet.
        length: its tokens, the newest included.
        adapter: its row of the bank, -1 for none.
        table: (longest,) int32 on the host: its pages in order, then anything.
    """

    token: int
    length: int
    adapter: int
    table: Tensor


@dataclass(eq=False)
class Request:
    """A row on its way through the engine.

    Attributes:
        row: its prompt and its tokens.
        adapter: its row of the bank, held until it ends; -1 for the base model.
        image: features of its image, until they are in a row of their own.
        pages: its pages, none while it waits.
        table: the same as the decoder takes them.
        read: tokens of its prompt that are cached; those after them are, but for the newest.
    """

    row: Row
    adapter: int
    image: Tensor | None = None
    pages: list[int] = field(default_factory=list)
    table: Tensor = field(default_factory=lambda: torch.empty(0))
    read: int = 0

    @property
    def need(self) -> int:
        """Pages for the prompt and the longest answer, whose last token is never cached."""
        return pages_for(len(self.row.prompt) + self.row.limit - 1)

    @property
    def live(self) -> Live:
        """The next step of a request whose prompt is read."""
        row = self.row
        length = len(row.prompt) + len(row.tokens)
        return Live(row.tokens[-1], length, self.adapter, self.table)


def bucket_sizes(largest: int) -> list[int]:
    """1, 2, 4, the multiples of 8 below `largest`, and `largest`."""
    return [*(n for n in (1, 2, 4) if n < largest), *range(8, largest, 8), largest]


class Decoder:
    """Runs a model on the newest token of up to `largest` sequences.

    Attributes:
        buckets: batch sizes that are run.
        longest: pages of a sequence at most.
        graphs: whether steps are captured and replayed.
    """

    def __init__(
        self,
        model: Llama,
        pool: PagePool,
        prompts: Prompts | None,
        *,
        largest: int,
        longest: int,
        graphs: bool,
    ) -> None:
        """Prepare; nothing is captured yet.

        Args:
            model: what runs.
            pool: the pages of all sequences.
            prompts: a bank's, or None for the base model alone.
            largest: sequences at most.
            longest: pages of a sequence at most.
            graphs: capture CUDA graphs.

        Raises:
            ValueError: graphs on a device other than CUDA.
        """
        self.device = pool.device
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs must be False on {self.device}, got True")
        self.model, self.pool, self.prompts = model, pool, prompts
        self.buckets, self.graphs = bucket_sizes(largest), graphs
        self.longest = longest
        # a base may be made for more than any sequence here can hold
        reach = min(model.config.max_seq_len, longest * PAGE_SIZE)
        self._angles = rotary_angles(model.config, torch.arange(reach, device=self.device))
        self._steps = dict.fromkeys(self.buckets, 0)
        self._captured: dict[int, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle() if graphs else None

    def bucket(self, count: int) -> int:
        """The batch size that runs `count` sequences."""
        return next(size for size in self.buckets if size >= count)

    @torch.inference_mode()
    def step(self, live: Sequence[Live]) -> Tensor:
        """Run every sequence's newest token; its key and value are cached then.

        Returns:
            Logits (len(live), V), valid until the next step.
        """
        size = self.bucket(len(live))
        replayed = self.graphs and self._steps[size] >= EAGER_STEPS
        self._steps[size] += 1
        pages = self.longest
        if not replayed:
            pages = max(1, *(pages_for(one.length) for one in live))
        numbers = torch.zeros(size, HEAD + pages, dtype=torch.int32)
        numbers[len(live) :, 2] = -1
        numbers[: len(live), :HEAD] = torch.tensor(
            [(one.token, one.length, one.adapter) for one in live]
        )
        numbers[: len(live), HEAD:] = torch.stack([one.table[:pages] for one in live])
        if not replayed:
            return self._run(numbers.to(self.device))[: len(live)]
        with torch.cuda.device(self.device):
            return self._replay(size, numbers)[: len(live)]

    @torch.inference_mode()
    def warmup(self) -> None:
        """Compile every kernel and capture every graph now, on empty slots, and not while serving.

        Batches of other sizes than the buckets do not occur.
        """
        empty = Live(0, 0, -1, torch.zeros(self.longest, dtype=torch.int32))
        for size in self.buckets:
            self._steps[size] = max(self._steps[size], EAGER_STEPS)
            self.step([empty] * size)

    def _run(self, numbers: Tensor) -> Tensor:
        """Logits of (size, HEAD + pages) int32 numbers on the device; waits for nothing."""
        lengths, adapters = numbers[:, 1].contiguous(), numbers[:, 2].contiguous()
        span = decode_span(lengths, numbers[:, HEAD:].contiguous())
        cos, sin = (table[span.positions] for table in self._angles)
        prompts = self.prompts
        if prompts is not None:
            prompts = prompts.of(adapters)
        step = Step(cos, sin, prompts, self.pool, span)
        hidden = self.model.run(numbers[:, :1].long(), step)
        return self.model.logits(hidden[:, 0], prompts)

    def _replay(self, size: int, numbers: Tensor) -> Tensor:
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(size)
        captured.numbers.copy_(numbers, non_blocking=True)
        captured.graph.replay()
        return captured.logits

    def _capture(self, size: int) -> "_Captured":
        """Record one step of empty slots, which writes to no page; on the current device."""
        empty = torch.zeros(size, HEAD + self.longest, dtype=torch.int32, device=self.device)
        empty[:, 2] = -1
        # libraries make their workspaces at a first call, which must not be the recorded one
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            self._run(empty)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # a stream of this device: torch's own is one of the device that is current
        with torch.cuda.graph(graph, pool=self._memory, stream=aside):
            logits = self._run(empty)
        return _Captured(graph, empty, logits)


@dataclass(frozen=True)
class _Captured:
    """A graph, the numbers that it reads and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    logits: Tensor
