"""A checkpoint comes back bit by bit, or is refused by name and the one before it is used."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from llama_adapter.checkpoints.train_state import (
    TrainState,
    checkpoint_path,
    list_checkpoints,
    load_latest,
    load_optimisers,
    load_random,
    named_under,
    optimiser_tensors,
    random_tensors,
    read_train_state,
    save_train_state,
)


def state_at(step: int) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "adapter.prompts": torch.randn(3, 5, 7, generator=generator),
        "optimiser.gates.0.step": torch.tensor(float(step)),
        "half": torch.randn(11, generator=generator).bfloat16().t(),
        "strided": torch.randn(4, 6, generator=generator)[:, ::2],
        "empty": torch.zeros(0, 3),
        "random.cpu": torch.get_rng_state(),
    }
    return TrainState(step, tensors, {"best": 0.1 + step, "base": {"name": "x", "n": [1, 2.5]}})


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert (a.step, a.values) == (b.step, b.values)
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        other: Tensor = b.tensors[name]
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


def test_a_state_comes_back_bitwise(tmp_path: Path) -> None:
    state = state_at(120)
    path = save_train_state(tmp_path, state, keep=2)
    assert path == tmp_path / "step-00000120.safetensors"
    assert_equal(state, read_train_state(path))
    latest = load_latest(tmp_path)
    assert latest is not None
    assert_equal(state, latest)


def test_floats_in_the_values_keep_every_bit(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1e-310, -1 / 3, 2.0**60 + 256]
    save_train_state(tmp_path, TrainState(1, {"x": torch.ones(1)}, {"numbers": numbers}), keep=1)
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.values["numbers"] == numbers


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / ".step-00000003.safetensors.0a1b2c3d.tmp").write_bytes(b"torn")
    assert load_latest(tmp_path) is None


def test_the_newest_by_step_is_used_and_only_so_many_are_kept(tmp_path: Path) -> None:
    for step in (5, 90, 100, 110):
        save_train_state(tmp_path, state_at(step), keep=2)
    assert list(list_checkpoints(tmp_path)) == [100, 110]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.step == 110


@pytest.mark.parametrize("damage", ["empty", "header", "half", "last byte", "flipped", "text"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_used(
    tmp_path: Path, damage: str
) -> None:
    save_train_state(tmp_path, state_at(10), keep=2)
    path = save_train_state(tmp_path, state_at(20), keep=2)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        # one bit of a weight: a file that safetensors itself reads without complaint
        data[-3] ^= 4
    elif damage == "text":
        # the loss among the plain values
        position = data.index(b"20.1")
        data[position : position + 4] = b"20.2"
    else:
        cut = {"empty": 0, "header": 5, "half": len(data) // 2, "last byte": len(data) - 1}
        del data[cut[damage] :]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"checkpoint {path} is (truncated or )?damaged"):
        read_train_state(path)
    with pytest.warns(UserWarning, match=path.name) as caught:
        state = load_latest(tmp_path)
    assert str(caught[0].message).endswith("using step-00000010.safetensors instead")
    assert state is not None
    assert_equal(state, state_at(10))


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    path.write_bytes(save({"x": torch.ones(2)}))
    with pytest.raises(ValueError, match="must have the format 'llama-adapter training state 1'"):
        read_train_state(path)


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save_train_state(tmp_path, state_at(step), keep=2).write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be used") as caught:
        load_latest(tmp_path)
    for step in (1, 2):
        assert str(checkpoint_path(tmp_path, step)) in str(caught.value)


def test_a_refused_later_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    save_train_state(tmp_path, state_at(10), keep=2)
    save_train_state(tmp_path, state_at(20), keep=2).write_bytes(b"torn")
    # the run continued from step 10 and now saves at 15
    save_train_state(tmp_path, state_at(15), keep=2)
    assert list(list_checkpoints(tmp_path)) == [10, 15]


def test_a_failing_write_leaves_the_other_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_train_state(tmp_path, state_at(10), keep=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_train_state(tmp_path, state_at(20), keep=1)
    assert list(list_checkpoints(tmp_path)) == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.safetensors"]


def test_at_least_one_checkpoint_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_train_state(tmp_path, state_at(1), keep=0)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_train_state(tmp_path, state_at(3), keep=1)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickling")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    state = load_latest(tmp_path)
    assert state is not None
    assert_equal(state, state_at(3))


def test_a_folder_in_the_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save_train_state(tmp_path, TrainState(3, {"x": torch.ones(2)}, {}), 2)
    checkpoint_path(tmp_path, 5).mkdir()
    with pytest.warns(UserWarning, match="step-00000003.safetensors instead"):
        state = load_latest(tmp_path)
    assert state is not None
    assert state.step == 3


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimisers_and_random_states_are_tensors_by_name(
    kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    def begin() -> dict[str, torch.optim.Optimizer]:
        torch.manual_seed(5)
        groups = {"prompts": torch.randn(3, 2), "head": torch.randn(4)}
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return {
            name: kind([value.requires_grad_()], lr=0.1, **options)
            for name, value in groups.items()
        }

    def step(optimisers: dict[str, torch.optim.Optimizer]) -> list[Tensor]:
        values = [optimiser.param_groups[0]["params"][0] for optimiser in optimisers.values()]
        for value in values:
            value.grad = torch.randn_like(value)
        for optimiser in optimisers.values():
            optimiser.step()
        return [value.detach().clone() for value in values]

    first, cpu = begin(), torch.device("cpu")
    weights = step(first)
    tensors = optimiser_tensors(first) | random_tensors(cpu)
    key = "exp_avg" if kind is torch.optim.AdamW else "momentum_buffer"
    assert f"optimiser.head.0.{key}" in tensors
    save_train_state(tmp_path, TrainState(1, tensors, {}), keep=1)
    expected = step(first)
    held = load_latest(tmp_path)
    assert held is not None
    second = begin()
    for optimiser, value in zip(second.values(), weights, strict=True):
        optimiser.param_groups[0]["params"][0].data.copy_(value)
    load_optimisers(second, held.tensors)
    load_random(held.tensors, cpu)
    for one, other in zip(step(second), expected, strict=True):
        assert torch.equal(one, other)


def test_names_are_cut_at_the_dot() -> None:
    tensors = {"best.a.b": torch.ones(1), "bester.a": torch.ones(2), "best": torch.ones(3)}
    assert list(named_under("best", tensors)) == ["a.b"]
