"""The table says how each benchmark is asked: lengths and temperatures as the papers have them."""

from llama_adapter.evaluation.benchmarks import BENCHMARKS
from llama_adapter.evaluation.data_options import DataOptions
from llama_adapter.sampling import SamplingConfig


def test_answers_are_greedy_but_for_chat() -> None:
    sampled = [name for name, one in BENCHMARKS.items() if one.sampling.temperature > 0]
    assert sampled == ["questions", "judge"]
    assert BENCHMARKS["mme"].sampling == SamplingConfig(temperature=0.0, max_new_tokens=30)
    assert BENCHMARKS["coco_caption"].sampling.max_new_tokens == 64
    asked = BENCHMARKS["questions"].sampling
    assert (asked.temperature, asked.top_p, asked.max_new_tokens) == (0.1, 0.75, 256)


def test_options_of_one_benchmark_are_options_of_the_command() -> None:
    known = set(DataOptions.__dataclass_fields__)
    for name, benchmark in BENCHMARKS.items():
        assert {*benchmark.takes, *benchmark.needs} <= known, name
        assert {*benchmark.needs} <= {*benchmark.takes}, name
        assert (benchmark.write is None) == (benchmark.result == ""), name
    used = {option for one in BENCHMARKS.values() for option in one.takes}
    assert used | {"data", "output", "blind"} == known
