"""Is every task what training and evaluation ask for?"""

from dataclasses import fields

import pytest

from llama_adapter.tasks.base_to_novel import BaseToNovelTask
from llama_adapter.tasks.conll import TaggingTask
from llama_adapter.tasks.squad import SquadTask
from llama_adapter.tasks.task import Task
from llama_adapter.tasks.vtab import VtabTask

ASKED = {name for name, member in vars(Task).items() if isinstance(member, property)}


def test_a_task_says_what_it_trains_on_and_is_scored_by() -> None:
    assert {"kind", "labels", "metric", "train", "validation", "test"} == ASKED


@pytest.mark.parametrize("task", [BaseToNovelTask, SquadTask, TaggingTask, VtabTask])
def test_every_task_has_what_is_asked_for(task: type) -> None:
    has = {spec.name for spec in fields(task)}
    has |= {name for name, member in vars(task).items() if isinstance(member, property)}
    assert has >= ASKED
    assert all(callable(getattr(task, name)) for name in ("loss", "predict", "score"))
