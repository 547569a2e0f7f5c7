"""Does lm-evaluation-harness score adapted models as transformers' logits say, by its own command?

It brings many packages of its own: tests/version_matrix.py runs this file where it is installed.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter import assets
from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.adapter_file import save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import AdapterConfig
from llama_adapter.hosts import adapt, adapter_of
from llama_adapter.hosts.files import save_adapted
from tests.llama_adapter.hf_models import host, on_transformers, peft_model

ROOT = Path(__file__).parents[3]
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: make test-all runs this"
)
QUESTIONS = [
    {"question": "Write the plural of bus.", "choices": ["buses", "busses", "bus"], "answer": 0},
    {"question": "What is the first word? | river stone", "choices": ["stone", "river"],
     "answer": 1},
    {"question": "Say hello.", "choices": ["hello", "lamp horse", "ash", "cow"], "answer": 0},
]  # fmt: skip
TASK = """
task: toy
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
"""


class Request:
    """What lm-eval hands to a model."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def base() -> Base:
    """The bundled base."""
    return load_base(assets.BASE, dtype=torch.float32)


@pytest.fixture
def adapter_file(base: Base, tmp_path: Path) -> Path:
    """An adapter of the base with random gates per head, some above 1."""
    generator = torch.Generator().manual_seed(3)
    adapter = Adapter(AdapterConfig(prompt_length=5), base.model.config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    save_adapter(tmp_path / "a.safetensors", adapter, fingerprint(base.model, base.name))
    return tmp_path / "a.safetensors"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task of three questions."""
    folder = tmp_path / "task"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    (folder / "toy.yaml").write_text(TASK.format(data=data))
    return folder


def command(
    task: Path, output: Path, model: str, arguments: str, batch_size: int = 2
) -> list[list[float]]:
    """Run lm-eval's command offline; returns the choices' log-likelihoods, question by question."""
    words = ["--model", model, "--model_args", arguments, "--tasks", "toy", "--include_path"]
    words += [str(task), "--output_path", str(output), "--log_samples", "--device", "cpu"]
    words += ["--batch_size", str(batch_size)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(output / "home"),
        "PYTHONPATH": os.pathsep.join(
            [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]
        ).strip(os.pathsep),
    }
    done = subprocess.run(
        [sys.executable, "-m", "llama_adapter.integrations.lm_eval", "run", *words],
        cwd=output,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = output.rglob("samples_toy_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    return [[float(answer[0][0]) for answer in row["resps"]] for row in rows]


def from_logits(model: Any, encode: Any) -> list[list[float]]:
    """The same log-likelihoods from transformers' logits, one choice at a time."""
    found = []
    for row in QUESTIONS:
        context = f"Question: {row['question']} Answer:"
        scores = []
        for choice in row["choices"]:
            start, ids = len(encode(context)), encode(f"{context} {choice}")
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(chances[n - 1, ids[n]]) for n in range(start, len(ids))))
        found.append(scores)
    return found


def test_without_lm_eval_the_remedy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == "lm_eval"]
    for name in ("lm_eval", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "llama_adapter.integrations.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lm-eval\[hf\]>=0.4.13'") as caught:
        __import__("llama_adapter.integrations.lm_eval")
    assert "\n" not in str(caught.value)


@needs_lm_eval
def test_the_lean_model_scores_as_transformers(
    base: Base, adapter_file: Path, task: Path, tmp_path: Path
) -> None:
    arguments = f"base={assets.BASE},adapter={adapter_file},dtype=float32"
    got = command(task, tmp_path, "llama-adapter", arguments, batch_size=4)
    theirs = on_transformers(base.model)

    def encode(text: str) -> list[int]:
        return base.tokenizer.encode(text, bos=True)

    alone = from_logits(theirs, encode)
    adapt(theirs, adapter=adapter_file)
    torch.testing.assert_close(flat(got), flat(from_logits(theirs, encode)), rtol=0, atol=1e-4)
    assert (flat(got) - flat(alone)).abs().max() > 0.1


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([score for row in rows for score in row])


def word_tokenizer(folder: Path) -> Any:
    """A tokenizer of whole words, written to a folder; returns its encoder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "<s>": 1, "</s>": 2}
    for row in QUESTIONS:
        for word in f"Question : Answer {row['question']} {' '.join(row['choices'])}".split():
            for part in (word, word.strip(".?"), word[-1]):
                words.setdefault(part, len(words))
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)
    return made.encode


@needs_lm_eval
@pytest.mark.parametrize("kind", ["adapter", "peft"])
def test_a_model_of_transformers_scores_as_transformers(
    task: Path, tmp_path: Path, kind: str
) -> None:
    model = host()
    model.save_pretrained(tmp_path / "base")
    encode = word_tokenizer(tmp_path / "base")
    if kind == "adapter":
        adapt(model, prompt_length=5)
        adapter = adapter_of(model)
        assert adapter is not None
        torch.nn.init.normal_(adapter.gates, std=1.5)
        save_adapted(model, tmp_path / "it")
    else:
        model = peft_model(model)
        model.save_pretrained(tmp_path / "it")
    arguments = f"pretrained={tmp_path / 'base'},{kind}={tmp_path / 'it'},dtype=float32"
    # lm-eval resizes a base under PEFT to its tokenizer, whose other words never appear
    if kind == "peft":
        model.resize_token_embeddings(len(word_vocabulary(tmp_path / "base")))
    got = command(task, tmp_path, "llama-adapter-hf", arguments)
    torch.testing.assert_close(flat(got), flat(from_logits(model, encode)), rtol=0, atol=1e-4)


def word_vocabulary(folder: Path) -> Any:
    """The tokenizer that `word_tokenizer` wrote."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@needs_lm_eval
def test_letters_behind_one_context_are_read_off_one_row(
    base: Base, adapter_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets what it gets alone, in the order of the requests; words stay rows of their own."""
    from llama_adapter.integrations.lm_eval import LeanLM

    model = LeanLM(str(assets.BASE), str(adapter_file), dtype="float32", device="cpu")
    g = torch.Generator().manual_seed(6)
    vocabulary = base.model.config.vocab_size
    contexts = [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in (9, 14, 9)]
    continuations = [[7], [11, 12], [8], [9], [11, 13]]
    requests = [(None, one, other) for other in continuations for one in contexts]
    alone = [model._loglikelihood_tokens([one], disable_tqdm=True)[0] for one in requests]
    rows: list[int] = []
    hidden = model._model.hidden

    def counted(tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return hidden(tokens, *more)

    monkeypatch.setattr(model._model, "hidden", counted)
    got = model._loglikelihood_tokens(requests, disable_tqdm=True)
    # three letters and two words whose first token is the same, behind each of three contexts
    assert sum(rows) == 6
    for (score, greedy), (expected, also) in zip(got, alone, strict=True):
        assert abs(score - expected) < 1e-4
        assert greedy == also
    # what has no room loses its beginning
    model.max_length = 6
    short = model._loglikelihood_tokens(requests, disable_tqdm=True)
    cut = [(None, one[-6 + len(other) - 1 :], other) for _, one, other in requests]
    for (score, _), (expected, _) in zip(
        short, model._loglikelihood_tokens(cut, disable_tqdm=True), strict=True
    ):
        assert abs(score - expected) < 1e-4


@needs_lm_eval
def test_rolling_likelihood_of_windows(base: Base, adapter_file: Path) -> None:
    from lm_eval import utils  # pyright: ignore[reportMissingImports]

    from llama_adapter.integrations.lm_eval import LeanLM

    model = LeanLM(str(assets.BASE), str(adapter_file), dtype="float32", device="cpu")
    model.max_length = 16
    text = "Write the plural of bus. What is the first word of these words: cow brush shelf lion?"
    (got,) = model.loglikelihood_rolling([Request(text)])
    ids = base.tokenizer.encode(text)
    assert len(ids) > 16

    def score(context: list[int], continuation: list[int]) -> float:
        row = context + continuation
        with torch.no_grad():
            logits = base.model(torch.tensor([row[:-1]]), model._prompts)[0]
        chances = logits.log_softmax(-1)[len(context) - 1 :]
        return sum(float(chances[n, token]) for n, token in enumerate(continuation))

    windows = utils.get_rolling_token_windows(ids, base.tokenizer.bos_id, 16, 1)
    expected = [score(*utils.make_disjoint_window(window)) for window in windows]
    assert len(expected) > 1
    assert abs(got - sum(expected)) < 1e-4
    model.max_length = base.model.config.max_seq_len
    (whole,) = model.loglikelihood_rolling([Request(text)])
    assert abs(whole - score([base.tokenizer.bos_id], ids)) < 1e-4


@needs_lm_eval
def test_texts_are_greedy_and_end_at_stop_texts(base: Base, adapter_file: Path) -> None:
    from llama_adapter.integrations.lm_eval import LeanLM

    model = LeanLM(str(assets.BASE), str(adapter_file), dtype="float32", device="cpu")
    text = "Write the plural of bus. What is the first word of these words: cow brush shelf lion?"
    start = base.tokenizer.encode(text, bos=True)
    ids = list(start)
    with torch.no_grad():
        while len(ids) < len(start) + 8:
            best = int(base.model(torch.tensor([ids]), model._prompts)[0, -1].argmax())
            if best == base.tokenizer.eos_id:
                break
            ids.append(best)
    assert len(ids) > len(start) + 1
    expected = base.tokenizer.decode(ids)[len(base.tokenizer.decode(start)) :]
    options: dict[str, Any] = {"until": [], "max_gen_toks": 8, "do_sample": False}
    (got,) = model.generate_until([Request(text, options)])
    assert got == expected
    stop = expected[len(expected) // 2]
    (cut,) = model.generate_until([Request(text, options | {"until": [stop]})])
    assert cut == expected.split(stop)[0]
    # a context of which only the end fits
    model.max_length = 20
    (short,) = model.generate_until([Request(text, options)])
    assert isinstance(short, str)


@needs_lm_eval
def test_arguments_that_do_not_fit_are_refused(adapter_file: Path) -> None:
    from llama_adapter.integrations.lm_eval import AdaptedHFLM, LeanLM

    with pytest.raises(ValueError, match="batch_size must be a number of at least 1, got 'auto'"):
        LeanLM(str(assets.BASE), batch_size="auto")
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int'"):
        LeanLM(str(assets.BASE), dtype="int")
    with pytest.raises(ValueError, match="adapter and peft must not be given together"):
        AdaptedHFLM("base", adapter=str(adapter_file), peft="folder")
    model = LeanLM(str(assets.BASE), device="cpu")
    with pytest.raises(ValueError, match="max_gen_toks must leave room"):
        model.generate_until([Request("a", {"until": [], "max_gen_toks": 10**6})])
    # a task that says nothing gets an answer, whatever the context
    short = LeanLM(str(assets.BASE), max_length=12)
    half = {"until": [], "max_gen_toks": 6}
    answers = [
        short.generate_until([Request("Say hello.", given)]) for given in ({"until": []}, half)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0]
    for length in (1, 10**6):
        with pytest.raises(ValueError, match=r"max_length must be from 2 to the base's \d+, got"):
            LeanLM(str(assets.BASE), max_length=length)
