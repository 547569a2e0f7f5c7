"""How is one cell of the ablations trained and scored?

A `Run` says what is trained: the adapter as the papers have it, the adapter without its zero gate,
without its separate softmax, PEFT's LoRA, or every weight. All take the same steps through
`llama_adapter.trainer.Trainer` and are scored on the same held-out instructions.
"""

import copy
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import llama_adapter.model
from adapter_kernels import zero_init_attention, zero_init_attention_varlen
from llama_adapter import assets
from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.adapter_file import save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import AdapterConfig
from llama_adapter.data.dataset import Dataset, load_dataset
from llama_adapter.data.examples import Example
from llama_adapter.data.feed import EpochBatches
from llama_adapter.data.packed import PackedBatch, pack
from llama_adapter.model import Llama
from llama_adapter.quickstart import bundled_config
from llama_adapter.recipe import FinetuneConfig, learning_rate
from llama_adapter.trainer import Trainer

METHODS = ("zero_init", "gate_one", "joint", "lora", "full", "timing")
TIMED = ("zero_init", "lora", "full")
# Alpaca-LoRA's: the query and value projections, rank 8, alpha 16
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["wq", "wv"], "lora_dropout": 0.0}
SCORE_BATCH = 64
# training records on which the final training loss is taken
FITTED = 256

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one run trains, completely: equal runs give equal numbers.

    Attributes:
        method: one of METHODS; "timing" takes the steps of TIMED in turns.
        n_layers: adapted layers, from the top.
        prompt_std: standard deviation of the prompts' initial values.
        lr: peak learning rate.
        epochs: passes over the records.
        records: training records, drawn by the seed.
        seed: of the records, their order and all initial values.
    """

    method: str
    n_layers: int
    prompt_std: float
    lr: float
    epochs: int
    records: int
    seed: int


@dataclass(frozen=True)
class Laboratory:
    """What all runs share: the frozen base, the data, and the recipe that the bundled model has."""

    base: Base
    data: Dataset
    recipe: FinetuneConfig

    def config(self, run: Run) -> FinetuneConfig:
        """The recipe with the run's own values; the warm-up keeps its share of the epochs."""
        adapter = replace(self.recipe.adapter, n_layers=run.n_layers, prompt_std=run.prompt_std)
        if run.method in ("gate_one", "joint"):
            adapter = replace(adapter, gate_activation="identity")
        warmup = self.recipe.warmup / self.recipe.epochs * run.epochs
        changes = {"epochs": run.epochs, "warmup_epochs": warmup, "lr": run.lr, "seed": run.seed}
        return replace(self.recipe, adapter=adapter, **changes)

    def records(self, run: Run) -> list[Example]:
        """The run's training examples."""
        return random.Random(f"records {run.seed}").sample(self.data.train, run.records)


@lru_cache(maxsize=1)
def laboratory(base: Path, held_out: int | None) -> Laboratory:
    """Load what all runs of a process share.

    Args:
        base: folder of the base model.
        held_out: held-out records to score on; None takes all.

    Returns:
        The base in float32, the "follow" instructions and the bundled recipe.
    """
    recipe = bundled_config(Path("unused"), max_steps=None)
    loaded = load_base(base, dtype=torch.float32)
    length = min(recipe.max_length, loaded.model.config.max_seq_len)
    data = load_dataset(
        assets.FOLLOW_TRAIN, loaded.tokenizer, length, val_data=assets.FOLLOW_HELDOUT
    )
    return Laboratory(loaded, replace(data, held_out=data.held_out[:held_out]), recipe)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    **bounds: Any,
) -> Tensor:
    """One softmax over prompt and tokens together, without a gate: the papers' "rand-init".

    Composed exactly of the two segments' own softmaxes and their log sums of exponentials:

        w = sigmoid(lse_prompt - lse_tokens)        out = w out_prompt + (1 - w) out_tokens

    Args:
        q: (total_q, H, D) queries of packed sequences.
        k, v: (total_k, G, D) keys and values, causal.
        prompt_k, prompt_v: (P, G, D), seen by every query; None is attention to the tokens alone.
        gate, adapter_index, prompt_lengths: without a meaning here.
        **bounds: of the sequences, as zero_init_attention_varlen takes them.

    Returns:
        (total_q, H, D), differentiable in all five.
    """
    out, lse = zero_init_attention_varlen(q, k, v, return_lse=True, **bounds)
    if prompt_k is None or prompt_v is None:
        return out
    prompt_out, prompt_lse = zero_init_attention(
        q[None], prompt_k[None], prompt_v[None], causal=False, return_lse=True
    )
    weight = torch.sigmoid(prompt_lse[0] - lse).T[..., None].to(out.dtype)
    return torch.lerp(out, prompt_out[0], weight)


@contextmanager
def joint_softmax() -> Iterator[None]:
    """While entered, the lean LLaMA attends by `joint_attention`."""
    with mock.patch.object(llama_adapter.model, "zero_init_attention_varlen", joint_attention):
        yield


class WeightTrainer(Trainer):
    """The same optimiser step for weights of the model itself, in place of an adapter beside it."""

    def __init__(self, model: Llama, weights: list[nn.Parameter], config: FinetuneConfig) -> None:
        """Prepare to train `weights`, parameters of `model`, which is frozen but for its steps."""
        unused = Adapter(AdapterConfig(prompt_length=1, n_layers=1), model.config)
        size = config.micro_batch_tokens
        super().__init__(model, unused, micro_batch_tokens=size, clip=config.clip)
        options = {"betas": config.betas, "weight_decay": config.weight_decay}
        self.groups = {"weights": weights}
        self.optimisers = {"weights": torch.optim.AdamW(weights, lr=0.0, **options)}

    def project(self, batch: PackedBatch) -> None:
        """No prompts."""


def make_trainer(lab: Laboratory, run: Run) -> Trainer:
    """What `run` trains, at its initial values; all trainable parameters are in its groups."""
    config = lab.config(run)
    if run.method in ("lora", "full"):
        model = copy.deepcopy(lab.base.model)
        if run.method == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            torch.manual_seed(run.seed)
            inject_adapter_in_model(LoraConfig(**LORA), model)
        weights = [p for p in model.parameters() if p.requires_grad or run.method == "full"]
        return WeightTrainer(model.requires_grad_(False), weights, config)
    generator = torch.Generator().manual_seed(run.seed)
    adapter = Adapter(config.adapter, lab.base.model.config, generator=generator)
    if run.method in ("gate_one", "joint"):
        nn.init.ones_(adapter.gates)
    trainer = Trainer(
        lab.base.model,
        adapter,
        micro_batch_tokens=config.micro_batch_tokens,
        weight_decay=config.weight_decay,
        betas=config.betas,
        clip=config.clip,
    )
    if run.method != "zero_init":
        # a gate that stays 1 is no parameter
        del trainer.groups["gates"], trainer.optimisers["gates"]
    return trainer


def prompts_of(trainer: Trainer) -> Prompts | None:
    """The projected prompts of what a trainer trains; weights of the model have none."""
    return None if isinstance(trainer, WeightTrainer) else trainer.model.project(trainer.adapter)


@torch.no_grad()
def score(
    model: Llama, prompts: Prompts | None, examples: Sequence[Example]
) -> tuple[float, list[bool]]:
    """Loss, and which answers greedy decoding gets right, from one forward pass.

    Greedy decoding writes exactly the expected tokens if and only if each of them, EOS included, is
    the likeliest one after those before it, so nothing has to be generated.

    Args:
        model: the base, or what was made of it.
        prompts: the adapter's projection, or None.
        examples: at least one with labels.

    Returns:
        Loss in nats per label, and for each example whether it is answered exactly.
    """
    total, count, right = 0.0, 0, [False] * len(examples)
    for start in range(0, len(examples), SCORE_BATCH):
        batch = pack(examples[start : start + SCORE_BATCH])
        hidden = model.hidden_packed(batch.tokens, batch.packing, prompts)
        logits = model.logits(hidden[batch.rows])
        total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
        count += len(batch.targets)
        hits = (logits.argmax(-1) == batch.targets).split(batch.counts)
        for index, hit in enumerate(hits, start):
            right[index] = bool(hit.all())
    return total / count, right


@torch.no_grad()
def attention_input_rms(lab: Laboratory) -> list[float]:
    """Root mean square of each layer's normed attention input, over tokens of training examples.

    It is what a prompt row stands beside, so the unit in which a prompt's scale is told.
    """
    batch = pack(lab.data.train[:SCORE_BATCH])
    found: list[float] = []
    hooks = [
        layer.get_submodule("attention_norm").register_forward_hook(
            lambda _module, _inputs, out: found.append(float(out.square().mean().sqrt()))
        )
        for layer in lab.base.model.layers
    ]
    lab.base.model.hidden_packed(batch.tokens, batch.packing)
    for hook in hooks:
        hook.remove()
    return found


def file_bytes(lab: Laboratory, trainer: Trainer) -> int:
    """Size of the file that keeps what was trained: adapter file, or the weights as safetensors."""
    if isinstance(trainer, WeightTrainer):
        weights = trainer.groups["weights"]
        named = trainer.model.named_parameters()
        kept = {n: p.detach().clone() for n, p in named if any(p is other for other in weights)}
        return len(save(kept))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(path, trainer.adapter, fingerprint(lab.base.model, lab.base.name))
        return path.stat().st_size


def train(lab: Laboratory, run: Run, trainer: Trainer) -> tuple[list[float], str | None]:
    """Take all steps of a run.

    Returns:
        The training loss before each step, and why the run broke off, or None.
    """
    config, examples = lab.config(run), lab.records(run)
    per_epoch = math.ceil(len(examples) / config.batch_size)
    losses: list[float] = []
    for epoch in range(run.epochs):
        batches = EpochBatches(examples, config.batch_size, run.seed, epoch, tuple(trainer.groups))
        for position, batch in enumerate(batches):
            try:
                loss, _ = trainer.step(batch, learning_rate(config, epoch + position / per_epoch))
            except FloatingPointError as error:
                return losses, str(error)
            losses.append(loss)
    return losses, None


def time_steps(lab: Laboratory, run: Run) -> Row:
    """Processor milliseconds per optimiser step of each of TIMED, which take turns.

    Taking turns lets whatever else the machine does fall on all of them alike.
    """
    trainers = {method: make_trainer(lab, replace(run, method=method)) for method in TIMED}
    spent: dict[str, list[float]] = {method: [] for method in TIMED}
    batches = EpochBatches(lab.records(run), lab.recipe.batch_size, run.seed, 0, ())
    for batch in batches:
        for method, trainer in trainers.items():
            start = time.process_time()
            trainer.step(replace(batch, train_groups=tuple(trainer.groups)), run.lr * 1e-3)
            spent[method].append(round(1e3 * (time.process_time() - start), 3))
    # the first step of each allocates
    return {"step_ms": {method: times[1:] or times for method, times in spent.items()}}


def train_and_score(lab: Laboratory, run: Run) -> Row:
    """The part of `measure` for runs that train."""
    trainer = make_trainer(lab, run)
    held_out = lab.data.held_out
    with joint_softmax() if run.method == "joint" else nullcontext():
        step0 = score(trainer.model, prompts_of(trainer), held_out)[0]
        losses, failure = train(lab, run, trainer)
        prompts = prompts_of(trainer)
        loss, right = score(trainer.model, prompts, held_out)
        train_loss = score(trainer.model, prompts, lab.records(run)[:FITTED])[0]
    return {
        "step0_loss": _finite(step0),
        "held_out_loss": _finite(loss),
        "train_loss": _finite(train_loss),
        "accuracy": sum(right) / len(right),
        "losses": [round(value, 4) for value in losses],
        "parameters": sum(p.numel() for group in trainer.groups.values() for p in group),
        "file_bytes": file_bytes(lab, trainer),
        "failure": failure,
    }


def measure(lab: Laboratory, run: Run) -> Row:
    """Train and score one run.

    Args:
        lab: what all runs share.
        run: what is trained.

    Returns:
        Plain data: step0_loss, held_out_loss (nats per label, held-out), train_loss (the same on
        training records, afterwards), accuracy (exact match, 0 to 1), losses (training, by step),
        parameters, file_bytes, failure; for "timing" step_ms instead. A loss that is not finite is
        None. For all, seconds by the clock and processor_seconds.
    """
    start, busy = time.perf_counter(), time.process_time()
    with torch.random.fork_rng([]):
        row = time_steps(lab, run) if run.method == "timing" else train_and_score(lab, run)
    return {
        **row,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
    }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def measure_in_process(base: Path, held_out: int | None, run: Run) -> tuple[Run, Row]:
    """`measure` for a worker process, which keeps its laboratory; returns the run with its row."""
    return run, measure(laboratory(base, held_out), run)
