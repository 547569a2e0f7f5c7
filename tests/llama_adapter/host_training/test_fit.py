"""The loop is torch's own steps written out, keeps the best epoch, and resumes bitwise."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_hosts import Biases, Shades, make_items, make_vit
from torch import Tensor, nn

from llama_adapter.data.feed import shuffled
from llama_adapter.host_training.fit import Fit, evaluate, fit
from llama_adapter.host_training.fit_config import FitConfig
from llama_adapter.seeded import seeded

CONFIG = FitConfig(epochs=4, batch_size=5, lr=0.02, head_lr=0.05, warmup_epochs=1.0, seed=7)
CPU = torch.device("cpu")


def weights(attached: Biases) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in attached.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "items_per_second"}


def test_steps_are_those_of_torch_written_out() -> None:
    """One optimiser per group with rates of its own; matrices are decayed, vectors are not."""
    config = replace(CONFIG, epochs=1, warmup_epochs=0.0, weight_decay=0.1, clip=0.5, keep="last")
    task = Shades(validation=())
    attached = Biases(make_vit(dropout=0.0))
    fitted = fit(attached, task, config)

    model = make_vit(dropout=0.0).train()
    other = Biases(model)
    matrix = other.groups()["head"].pop("classifier.weight")
    body = torch.optim.AdamW(other.groups()["method"].values(), betas=(0.9, 0.999), weight_decay=0)
    bias = torch.optim.AdamW(other.groups()["head"].values(), betas=(0.9, 0.999), weight_decay=0)
    head = torch.optim.AdamW([matrix], betas=(0.9, 0.999), weight_decay=0.1)
    order = shuffled(range(22), 7, 0)
    losses = []
    for step in range(5):
        share = (1 + torch.cos(torch.tensor(torch.pi * step / 5, dtype=torch.float64)).item()) / 2
        for optimiser, peak in ((body, 0.02), (bias, 0.05), (head, 0.05)):
            optimiser.param_groups[0]["lr"] = peak * share
            optimiser.zero_grad()
        loss = task.loss(model, [task.train[i] for i in order[5 * step : 5 * step + 5]])
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for optimiser in (body, bias, head):
            optimiser.step()
        losses.append(loss.item())
    assert fitted.losses == pytest.approx(losses, rel=1e-6)
    assert fitted.best_epoch is None
    for name, value in attached.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_sgd_has_momentum() -> None:
    config = replace(CONFIG, optimizer="sgd", momentum=0.9, epochs=1, schedule="constant")
    run = Fit(Biases(make_vit()), Shades(), config)
    assert isinstance(run.optimisers["method"], torch.optim.SGD)
    with seeded(7, CPU):
        assert len(list(run.rows())) == 5
    assert any("momentum_buffer" in name for name in run.tensors())


def test_training_learns_and_only_what_it_should() -> None:
    attached = Biases(make_vit())
    frozen = {
        name: value.clone()
        for name, value in attached.model.named_parameters()
        if not value.requires_grad
    }
    fitted = fit(attached, Shades(), replace(CONFIG, epochs=12))
    assert fitted.losses[-1] < fitted.losses[0] / 2
    assert evaluate(attached.model, Shades(), "test")[1]["accuracy"] > 90
    for name, value in attached.model.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name])
    assert not attached.model.training


def test_the_same_seed_is_the_same_training() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, third = (Biases(make_vit()) for _ in range(3))
    one = fit(first, Shades(), CONFIG)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    torch.manual_seed(2)
    two = fit(second, Shades(), CONFIG)
    assert one == two
    assert_same(weights(first), weights(second))
    assert fit(third, Shades(), replace(CONFIG, seed=8)).losses != one.losses


class Swinging(Shades):
    """A validation whose scores rise, fall and rise to what they were."""

    def score(self, items: Any, predictions: Any) -> dict[str, float]:
        scores = self.__dict__.setdefault("given", [10.0, 30.0, 20.0, 30.0])
        return {"accuracy": scores.pop(0), "other": 1.0}


def test_the_best_epoch_remains_and_of_equal_ones_the_first() -> None:
    attached = Biases(make_vit())
    by_epoch: list[dict[str, Tensor]] = []
    rows: list[dict[str, Any]] = []
    fitted = fit(
        attached,
        Swinging(),
        CONFIG,
        on_step=rows.append,
        on_epoch=lambda row: by_epoch.append(weights(attached)),
    )
    assert fitted.best_epoch == 2
    assert [fitted.scores[epoch]["accuracy"] for epoch in (1, 2, 3, 4)] == [10, 30, 20, 30]
    assert_same(weights(attached), by_epoch[1])
    assert [row["step"] for row in rows if "val_accuracy" in row] == [5, 10, 15, 20]
    assert rows[9]["val_other"] == 1.0
    assert rows[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", "items_per_second"}

    last = Biases(make_vit())
    assert fit(last, Swinging(), replace(CONFIG, keep="last")).best_epoch is None
    assert_same(weights(last), by_epoch[3])


def test_validation_every_few_epochs_and_after_the_last() -> None:
    fitted = fit(Biases(make_vit()), Shades(), replace(CONFIG, epochs=5, eval_every=2))
    assert list(fitted.scores) == [2, 4, 5]
    assert fit(Biases(make_vit()), Shades(validation=()), CONFIG).scores == {}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 5, 7, 19, 20])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(optimizer: str, stop: int) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole = Biases(make_vit())
    expected: list[dict[str, Any]] = []
    fitted = fit(whole, Shades(), config, on_step=expected.append)

    first = Fit(Biases(make_vit()), Shades(), config)
    with seeded(7, CPU):
        rows = first.rows()
        got = [next(rows) for _ in range(stop)]
        tensors = {name: value.clone() for name, value in first.tensors().items()}
        values = json.loads(json.dumps(first.values()))
        rows.close()
    second = Fit(Biases(make_vit(seed=99)), Shades(), config)
    # what the method does not train is the host's, and there before
    second.attached.model.load_state_dict(first.attached.model.state_dict())
    with seeded(1234, CPU):
        second.restore(tensors, values)
        got += second.rows()
    result = second.finish()
    assert [plain(row) for row in got] == [plain(row) for row in expected]
    assert (result.scores, result.best_epoch) == (fitted.scores, fitted.best_epoch)
    assert isinstance(second.attached, Biases)
    assert_same(weights(second.attached), weights(whole))


class Broken(Shades):
    """A loss, or a gradient, that is not finite from the third step on."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        calls = self.__dict__.setdefault("calls", [])
        calls.append(1)
        loss = super().loss(model, batch)
        if len(calls) < 3:
            return loss
        if self.metric == "accuracy":
            return loss * torch.inf
        # finite, with the gradient of a square root at zero
        return loss + ((loss - loss.detach()) * 0).sqrt()


@pytest.mark.parametrize(
    ("metric", "said"),
    [("accuracy", "the loss is inf"), ("gradient", "the gradient is not finite")],
)
def test_what_is_not_finite_is_named_by_its_step(metric: str, said: str) -> None:
    attached = Biases(make_vit())
    seen: list[dict[str, Tensor]] = []
    with pytest.raises(FloatingPointError, match=rf"step 3, learning rate 0.008: {said}"):
        fit(
            attached,
            Broken(metric=metric),
            CONFIG,
            on_step=lambda row: seen.append(weights(attached)),
        )
    assert len(seen) == 2
    assert_same(weights(attached), seen[1])


class Nothing(Biases):
    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def test_a_method_that_trains_nothing_takes_no_step() -> None:
    fitted = fit(Nothing(make_vit()), Shades(), CONFIG)
    assert (fitted.losses, fitted.scores, fitted.best_epoch) == ((), {}, None)


def test_evaluate_asks_in_batches_and_refuses_an_empty_split() -> None:
    model, task = make_vit(), Shades(test=make_items(10, 8))
    predictions, scores = evaluate(model, task, "test", batch_size=3)
    assert predictions == task.predict(model, task.test)
    assert scores == task.score(task.test, predictions)
    with pytest.raises(ValueError, match="split must be train, validation or test, got 'dev'"):
        evaluate(model, task, "dev")
    with pytest.raises(ValueError, match="split validation must have items, this task has none"):
        evaluate(model, replace(task, validation=()), "validation")
    with pytest.raises(ValueError, match="task must have items to train on, got none"):
        fit(Biases(model), replace(task, train=()), CONFIG)
