"""A task is what training and evaluation ask for."""

from llama_adapter.tasks.task import Task


def test_a_task_says_what_it_trains_on_and_is_scored_by() -> None:
    wanted = {"kind", "labels", "metric", "train", "validation", "test"}
    asked = {name for name, member in vars(Task).items() if isinstance(member, property)}
    assert wanted == asked
