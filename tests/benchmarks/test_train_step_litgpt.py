"""litgpt's step, where litgpt is installed: with one key head it is ours; with more it errs."""

from dataclasses import replace

import pytest
import torch

from benchmarks.generate_models import CONFIGS
from benchmarks.harness import check
from benchmarks.train_step_problem import Problem, Setting

pytest.importorskip("litgpt")
CPU = torch.device("cpu")


def problem(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> Problem:
    config = replace(CONFIGS["toy"], n_kv_heads=kv_heads)
    monkeypatch.setitem(CONFIGS, "grouped", config)
    return Problem(Setting("grouped", 5, 200, 2, "float32"), CPU)


def test_with_one_key_head_its_step_is_the_truth_in_every_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = problem(monkeypatch, 1)
    assert given.comparable("litgpt_padded")
    expected = given.expected()
    # again: what the first pass left behind must not answer the second
    for _ in range(2):
        assert check(given.call("litgpt_padded")(), expected)[1] == ""


def test_with_more_key_heads_litgpt_itself_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day that this fails litgpt can be compared in `comparable`."""
    given = problem(monkeypatch, 2)
    assert not given.comparable("litgpt_padded")
    assert "dprompts" in check(given.call("litgpt_padded")(), given.expected())[1]
