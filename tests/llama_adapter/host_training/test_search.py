"""The learning rate with the best validation is chosen, the smallest of equals; it resumes."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_hosts import Biases, Shades, make_vit

from llama_adapter.host_training.fit import fit
from llama_adapter.host_training.fit_config import FitConfig
from llama_adapter.host_training.search import Search, choose_lr
from llama_adapter.seeded import seeded

CONFIG = FitConfig(epochs=2, batch_size=8, lr=0.5, seed=7)
CPU = torch.device("cpu")
STEPS = 6


class Scored(Shades):
    """Validation scores given in advance, an epoch at a time."""

    def with_scores(self, *scores: float) -> "Scored":
        self.__dict__["given"] = list(scores)
        return self

    def score(self, items: Any, predictions: Any) -> dict[str, float]:
        return {"accuracy": self.__dict__["given"].pop(0)}


def make() -> Biases:
    return Biases(make_vit())


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "items_per_second"}


def test_the_rate_of_the_best_epoch_wins_and_the_smallest_of_equals() -> None:
    assert choose_lr(make, Scored().with_scores(1, 5, 7, 2, 3, 7), CONFIG, [0.3, 0.1, 0.2]) == 0.2
    assert choose_lr(make, Scored().with_scores(1, 5, 4, 2, 3, 8), CONFIG, [0.3, 0.1, 0.2]) == 0.3
    last = replace(CONFIG, keep="last")
    assert choose_lr(make, Scored().with_scores(9, 5, 7, 6, 8, 1), last, [0.3, 0.1, 0.2]) == 0.2


def test_every_fit_is_one_of_its_own() -> None:
    rows: list[dict[str, Any]] = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    choose_lr(make, Shades(), CONFIG, [0.05, 0.01], on_step=rows.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert [row["step"] for row in rows] == list(range(1, 2 * STEPS + 1))
    assert [row["peak_lr"] for row in rows] == [0.01] * STEPS + [0.05] * STEPS
    alone: list[dict[str, Any]] = []
    fit(make(), Shades(), replace(CONFIG, lr=0.05), on_step=alone.append)
    assert [row["loss"] for row in rows[STEPS:]] == [row["loss"] for row in alone]


def test_a_rate_that_diverges_is_out() -> None:
    grid = [0.02, 1e30]
    sgd = replace(CONFIG, optimizer="sgd")
    search = Search(make, Shades(), sgd, grid)
    with seeded(7, CPU):
        rows = list(search.rows())
    assert len(rows) < 2 * STEPS
    assert search.results[1e30] is None
    assert search.rate == 0.02
    with pytest.raises(
        FloatingPointError, match=r"no learning rate of 1e\+29, 1e\+30 has a finite"
    ):
        choose_lr(make, Shades(), sgd, [1e30, 1e29])
    with pytest.raises(FloatingPointError, match=r"step 2, learning rate .*: the loss is nan"):
        choose_lr(make, Shades(), sgd, [1e30])


def test_without_a_last_fit_the_chosen_weights_remain() -> None:
    search = Search(make, Scored().with_scores(3, 4, 2, 1), CONFIG, [0.01, 0.05])
    with seeded(7, CPU):
        list(search.rows())
        attached = search.finish()
    alone = make()
    fit(alone, Scored().with_scores(3, 4), replace(CONFIG, lr=0.01))
    for name, value in alone.state_dict().items():
        assert torch.equal(attached.state_dict()[name], value)


def joined(task: Shades) -> Shades:
    return replace(task, train=[*task.train, *task.validation], validation=())


@pytest.mark.parametrize("stop", [1, STEPS, STEPS + 2, 2 * STEPS, 2 * STEPS + 3])
@pytest.mark.parametrize("again", [True, False])
def test_a_stopped_search_goes_on_bitwise(stop: int, again: bool) -> None:
    """In the middle of any fit, and at its end; with a last fit on all data and without one."""
    task, grid = Shades(), [0.05, 0.01]
    if not again and stop >= 2 * STEPS:
        stop = 2 * STEPS
    final = joined(task) if again else None

    def begin() -> Search:
        return Search(make, task, CONFIG, grid, final)

    whole = begin()
    with seeded(7, CPU):
        expected = list(whole.rows())
        weights = whole.finish().state_dict()
    assert len(expected) == whole.total == (2 * STEPS + 8 if again else 2 * STEPS)

    first = begin()
    with seeded(7, CPU):
        rows = first.rows()
        got = [next(rows) for _ in range(stop)]
        tensors = {name: value.clone() for name, value in first.tensors().items()}
        values = json.loads(json.dumps(first.values()))
        rows.close()
    second = begin()
    with seeded(99, CPU):
        second.restore(tensors, values)
        got += second.rows()
        result = second.finish().state_dict()
    assert [plain(row) for row in got] == [plain(row) for row in expected]
    assert (second.rate, second.results) == (whole.rate, whole.results)
    for name, value in weights.items():
        assert torch.equal(result[name], value), name


def test_one_rate_is_not_searched() -> None:
    task = Shades()
    search = Search(make, task, CONFIG, [0.02], joined(task))
    with seeded(7, CPU):
        assert {row["peak_lr"] for row in search.rows()} == {0.02}
    assert search.stages == 1
    # the configuration's rate where there is no grid
    assert Search(make, task, CONFIG).tried == (0.5,)


def test_a_task_without_validation_has_nothing_to_choose_by() -> None:
    with pytest.raises(ValueError, match="must have validation items to choose a learning rate"):
        choose_lr(make, Shades(validation=()), CONFIG, [0.1, 0.2])
    assert choose_lr(make, Shades(validation=()), CONFIG, [0.1]) == 0.1
