"""The recipe's numbers, what a run learns, and what it leaves behind."""

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter import assets, trainer, training
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.adapter_file import load_adapter, read_adapter
from llama_adapter.checkpoints.train_state import list_checkpoints
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.data import run_data
from llama_adapter.data.dataset import Dataset, load_dataset
from llama_adapter.data.examples import Batch, encode_record
from llama_adapter.data.records import Record, load_records
from llama_adapter.model import Llama
from llama_adapter.recipe import FinetuneConfig, learning_rate
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.trainer import Prepared, Trainer
from llama_adapter.training import finetune

# runs here are as short as they can be
pytestmark = pytest.mark.filterwarnings("ignore:.*too few to learn much")

WORDS = ["stone", "river", "green", "light", "under", "seven", "birds", "follow", "quiet", "paper"]


def write_data(path: Path, count: int, broken: dict[int, Any] | None = None) -> Path:
    items: list[Any] = [
        {"instruction": f"{WORDS[i % 10]} {i}", "input": "", "output": WORDS[i * 7 % 10]}
        for i in range(count)
    ]
    for index, item in (broken or {}).items():
        items[index] = item
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def small_config(tiny_tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        dim=16,
        n_layers=4,
        n_heads=2,
        n_kv_heads=1,
        vocab_size=tiny_tokenizer.vocab_size,
        multiple_of=8,
        max_seq_len=128,
    )


@pytest.fixture
def base(small_config: LlamaConfig, tiny_tokenizer: Tokenizer) -> Base:
    """A random frozen model, as small as runs go, the same in every test."""
    with torch.random.fork_rng([]):
        torch.manual_seed(17)
        model = Llama(small_config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return Base(model.requires_grad_(False).eval(), tiny_tokenizer, "small")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """A short run over a handful of records, with changes by keyword."""

    def make(count: int = 11, broken: dict[int, Any] | None = None, **changes: Any) -> Any:
        usual: dict[str, Any] = {
            "data": write_data(tmp_path / "data.json", count, broken),
            "output": tmp_path / "run",
            "epochs": 3,
            "warmup_epochs": 1.0,
            "batch_size": 4,
            "micro_batch_tokens": 100,
            "lr": 0.02,
            "val_size": 2,
            "adapter": AdapterConfig(prompt_length=3),
        }
        return FinetuneConfig(**usual | changes)

    return make


def test_a_run_memorises_a_tiny_task(
    tiny_model: Llama, tiny_tokenizer: Tokenizer, config: Callable[..., FinetuneConfig]
) -> None:
    """Four questions with answers that depend on them: none right before, all right after."""
    layers = AdapterConfig(n_layers=4)
    run = config(
        4, epochs=40, warmup_epochs=4.0, micro_batch_tokens=150, lr=0.3, val_size=0, adapter=layers
    )
    items = [
        {"instruction": f"{WORDS[i]} {i}", "input": "", "output": ("stone", "river")[i % 2]}
        for i in range(4)
    ]
    run.data.write_text(json.dumps(items))
    result = finetune(run, base=Base(tiny_model, tiny_tokenizer, "tiny"))
    assert len(result.losses) == 40
    assert result.losses[-1] < 0.15 * result.losses[0]
    right = {}
    with torch.no_grad():
        for name, adapter in (
            ("before", Adapter(layers, tiny_model.config)),
            ("after", result.adapter),
        ):
            right[name] = 0
            for item in items:
                record = Record(0, item["instruction"], "", item["output"])
                example = encode_record(record, tiny_tokenizer, 160)
                logits = tiny_model(torch.tensor([example.tokens]), tiny_model.project(adapter))
                chosen = logits[0, -example.n_labels - 1 : -1].argmax(-1).tolist()
                right[name] += tuple(chosen) == example.tokens[-example.n_labels :]
    assert right == {"before": 0, "after": 4}


def test_a_run_leaves_config_metrics_checkpoints_adapter_and_curve(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    run = config(save_every=4)
    seen: list[dict[str, Any]] = []
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    result = finetune(run, base=base, on_step=seen.append)

    rows = read_metrics(run.output)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 10))
    assert [row["loss"] for row in steps] == result.losses
    for row in steps:
        assert row["epoch"] == row["step"] / 3
        assert row["lr"] == learning_rate(run, (row["step"] - 1) / 3)
        assert math.isfinite(row["grad_norm"])
        assert row["tokens_per_second"] > 0
        assert row["tflops"] > 0
    validations = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(validations) == [0, 3, 6, 9]
    assert validations == result.val_losses
    assert all(math.isfinite(loss) for loss in validations.values())
    assert [{**row, "time": 0} for row in seen] == [
        {**row, "time": 0} for row in json.loads(json.dumps(rows))
    ]

    assert json.loads((run.output / "config.json").read_text()) == json.loads(
        json.dumps(asdict(run), default=str)
    )
    assert list(list_checkpoints(run.output / "checkpoints")) == [8, 9]
    for name in ("adapter.safetensors", "best.safetensors", "loss.png", "environment.json"):
        assert (run.output / name).stat().st_size > 0
    assert (run.output / "skipped.jsonl").read_text() == ""
    assert list(run.output.glob("events.out.tfevents.*"))
    assert result.adapter_path == run.output / "adapter.safetensors"
    assert result.curve_path.read_bytes()[:4] == b"\x89PNG"

    header, tensors = read_adapter(result.adapter_path)
    assert header.layers == (2, 3)
    for name, value in result.adapter.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, tensors[name])
    assert float(result.adapter.gates.detach().abs().min()) > 0
    for name, value in base.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_the_best_adapter_is_that_of_the_lowest_validation_loss(
    base: Base, config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(epochs=4)
    # the untrained adapter does not count; the third epoch is no better than the second
    losses = iter([0.5, 4.0, 2.0, 2.0, 3.0])
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "validate", lambda *_: next(losses))
        result = finetune(run, base=base)
    assert result.val_losses == {0: 0.5, 3: 4.0, 6: 2.0, 9: 2.0, 12: 3.0}
    stopped = finetune(replace(run, output=run.output.parent / "short", max_steps=6), base=base)
    tensors = read_adapter(run.output / "best.safetensors")[1]
    for name, value in stopped.adapter.state_dict().items():
        assert torch.equal(value, tensors[name])
        assert not torch.equal(value, result.adapter.state_dict()[name])


def test_the_result_does_not_depend_on_micro_batches(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    run = config(epochs=2)
    whole = finetune(replace(run, output=run.output / "a", micro_batch_tokens=10**6), base=base)
    parts = finetune(replace(run, output=run.output / "b", micro_batch_tokens=1), base=base)
    assert len(whole.losses) == 6
    for a, b in zip(whole.losses, parts.losses, strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)


def test_the_same_seed_gives_the_same_run_and_the_callers_random_state_is_kept(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    run = config(epochs=1, warmup_epochs=0.0)
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = finetune(replace(run, output=run.output / "a", threads=1), base=base)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(100)
    second = finetune(replace(run, output=run.output / "b", threads=1), base=base)
    other = finetune(replace(run, output=run.output / "c", threads=1, seed=1), base=base)
    assert first.losses == second.losses
    assert first.losses != other.losses
    assert torch.equal(first.adapter.prompts, second.adapter.prompts)


def test_neither_the_cache_nor_the_thread_changes_a_bit(
    base: Base, config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(epochs=2)
    cold = finetune(replace(run, output=run.output / "a", token_cache=run.output / "c"), base=base)
    warm = finetune(replace(run, output=run.output / "b", token_cache=run.output / "c"), base=base)
    assert len(list((run.output / "c").glob("*.tokens"))) == 1

    def directly(*arguments: Any, **more: Any) -> Dataset:
        found = load_dataset(*arguments, **more)
        records = load_records(run.data)[0]
        made = {r.index: encode_record(r, base.tokenizer, 128) for r in records}
        parts = [
            [made[example.index] for example in part] for part in (found.train, found.held_out)
        ]
        return replace(found, train=parts[0], held_out=parts[1])

    def at_once(items: Iterable[Any], make: Callable[[Any], Any]) -> Iterator[Any]:
        yield from map(make, items)

    monkeypatch.setattr(run_data, "load_dataset", directly)
    monkeypatch.setattr(training, "ahead", at_once)
    monkeypatch.setattr(trainer, "ahead", at_once)
    plain = finetune(replace(run, output=run.output / "d"), base=base)
    assert cold.losses == warm.losses == plain.losses
    assert cold.val_losses == warm.val_losses == plain.val_losses
    assert torch.equal(cold.adapter.prompts, plain.adapter.prompts)
    assert torch.equal(cold.adapter.gates, plain.adapter.gates)


def test_an_error_of_the_packing_thread_comes_at_its_step_and_no_thread_is_left(
    base: Base, config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()
    prepare, calls = Trainer.prepare, []

    def failing(self: Trainer, batch: Batch) -> Prepared:
        calls.append(threading.current_thread().name)
        if len(calls) == 4:
            raise ValueError("this batch cannot be packed")
        return prepare(self, batch)

    monkeypatch.setattr(Trainer, "prepare", failing)
    with pytest.raises(ValueError, match="this batch cannot be packed"):
        finetune(run, base=base)
    assert [row["step"] for row in read_metrics(run.output) if "loss" in row] == [1, 2, 3]
    assert {name[:5] for name in calls} == {"ahead"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_unusable_records_are_warned_of_listed_and_never_a_nan(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    long = {"instruction": "stone " * 300, "input": "", "output": "x"}
    run = config(broken={2: "text", 5: {"instruction": "a", "input": "", "output": ""}, 7: long})
    with pytest.warns(UserWarning, match="3 of 11 records cannot be used"):
        result = finetune(run, base=base)
    listed = [json.loads(x) for x in (run.output / "skipped.jsonl").read_text().splitlines()]
    assert [(x["record"], x["reason"]) for x in listed] == [
        (2, "must be an object, got a string"),
        (5, "output is empty"),
        # the model's context is the limit here, not max_length
        (7, "its prompt leaves no label within 128 tokens (max_length, context)"),
    ]
    assert {x["file"] for x in listed} == {str(run.data)}
    assert len(result.dataset.train) + len(result.dataset.held_out) == 8
    assert all(math.isfinite(loss) for loss in result.losses)


def test_strict_makes_them_an_error_before_anything_is_written(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    run = config(broken={2: None}, strict=True)
    with pytest.raises(ValueError, match="1 of 11 records cannot be used"):
        finetune(run, base=base)
    assert not run.output.exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_records(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    # the byte of a sign that only one record holds
    with torch.no_grad():
        base.model.tok_embeddings.weight[base.tokenizer.encode("~")[-1]] = math.nan
    run = config(val_size=0, batch_size=2)
    outputs = ["river"] * 4 + ["~", "river"]
    items = [{"instruction": f"stone {i}", "output": output} for i, output in enumerate(outputs)]
    run.data.write_text(json.dumps(items))
    message = r"^step [123], learning rate .*: the loss is nan in records (4|[0-3], 4|4, 5) \(n"
    with pytest.raises(FloatingPointError, match=message) as caught:
        finetune(run, base=base)
    done = [row["step"] for row in read_metrics(run.output)]
    assert done == list(range(1, int(str(caught.value)[5])))
    assert not (run.output / "adapter.safetensors").exists()


def test_progress_goes_to_stderr_and_only_where_asked(
    base: Base, config: Callable[..., FinetuneConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    run = config(epochs=1, warmup_epochs=0.0)
    finetune(replace(run, output=run.output / "a"), base=base)
    assert capfd.readouterr() == ("", "")
    finetune(replace(run, output=run.output / "b"), base=base, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "loss=" in err
    assert "tokens/s=" in err
    # elapsed and left
    assert "<00:0" in err


def test_max_steps_stops_the_unchanged_schedule_and_a_later_run_goes_on(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    run = config()
    whole = finetune(replace(run, output=run.output / "whole"), base=base)
    stopped = finetune(replace(run, output=run.output / "parts", max_steps=4), base=base)
    assert stopped.losses == whole.losses[:4]
    resumed = finetune(replace(run, output=run.output / "parts"), base=base, resume=True)
    assert resumed.losses == whole.losses
    assert torch.equal(resumed.adapter.prompts, whole.adapter.prompts)


def test_an_interrupt_says_how_to_go_on_and_leaves_whole_files(
    base: Base, config: Callable[..., FinetuneConfig]
) -> None:
    run = config(save_every=2)

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        finetune(run, base=base, on_step=interrupt)
    assert str(caught.value) == (
        f"stopped at step 5 of 9; llama-adapter finetune --output {run.output} --resume "
        "continues from step 4"
    )
    assert [row["step"] for row in read_metrics(run.output)] == [0, 1, 2, 3, 3, 4, 5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert not list(run.output.rglob("*.tmp"))
    finished = finetune(run, base=base, resume=True)
    assert finished.losses == finetune(
        replace(run, output=run.output.parent / "whole"), base=base
    ).losses  # fmt: skip


def test_the_base_is_read_from_its_folder_in_the_dtype_asked_for(
    base: Base,
    small_config: LlamaConfig,
    tiny_tokenizer_path: Path,
    config: Callable[..., FinetuneConfig],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    torch.save(base.model.state_dict(), folder / "consolidated.00.pth")
    shape = {
        name: getattr(small_config, name)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len")
    }
    (folder / "params.json").write_text(json.dumps(shape | {"vocab_size": -1}))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_path.read_bytes())
    run = config(base=folder, device="cpu", epochs=2)
    single = finetune(replace(run, output=tmp_path / "single"))
    expected = finetune(replace(run, output=tmp_path / "given"), base=base)
    assert single.losses == expected.losses
    half = finetune(replace(run, output=tmp_path / "half", dtype="bfloat16"))
    assert half.adapter.prompts.dtype == half.adapter.gates.dtype == torch.float32
    assert half.losses != expected.losses
    for a, b in zip(half.losses[:2], expected.losses[:2], strict=True):
        assert math.isclose(a, b, rel_tol=0.02)


@pytest.mark.parametrize(("name", "near"), [("int8", 0.01), ("nf4", 0.1)])
def test_an_adapter_trained_on_a_quantised_base_is_the_whole_bases(
    name: str, near: float, config: Callable[..., FinetuneConfig]
) -> None:
    pytest.importorskip("torchao.quantization")
    plain = config(base=None, data=assets.FOLLOW_TRAIN, max_steps=3, batch_size=16, val_size=4)
    whole = finetune(replace(plain, output=plain.output / "whole"), progress=False)
    small = finetune(replace(plain, output=plain.output / name, quantize=name), progress=False)
    for one, other in zip(whole.losses, small.losses, strict=True):
        assert one != other
        assert math.isclose(one, other, rel_tol=near)
    loaded = load_base(assets.BASE)
    adapter = load_adapter(small.adapter_path, loaded.model, loaded.name)
    assert torch.equal(adapter.prompts, small.adapter.prompts)
    with pytest.raises(ValueError, match=f"quantize was '{name}', is now None"):
        finetune(replace(plain, output=plain.output / name), resume=True, progress=False)


def test_a_run_that_computes_again_is_the_same_run_and_may_change_that_when_continued(
    config: Callable[..., FinetuneConfig],
) -> None:
    plain = config(epochs=2)
    expected = finetune(replace(plain, output=plain.output / "plain"))
    again = replace(plain, output=plain.output / "again", recompute="mlp")
    finetune(replace(again, max_steps=2))
    found = finetune(replace(again, recompute="block"), resume=True)
    assert len(found.losses) > 2
    assert found.losses == expected.losses
    # and once more where it stopped
    assert {**found.val_losses, **expected.val_losses} == found.val_losses
