"""Cached tokens are those made directly, or made anew, whatever changes, breaks or dies."""

import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama_adapter.data import token_cache
from llama_adapter.data.dataset import Dataset, load_dataset
from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.mixture import check_any, encode_any
from llama_adapter.data.records import checked
from llama_adapter.data.token_cache import Examples, TokenFile, default_folder, tokenised
from llama_adapter.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 240
WORDS = ["under", "a", "green", "light", "seven", "birds", "follow", "the", "quiet", "river"]


def items(count: int, seed: int = 3) -> list[Any]:
    """Records of many lengths and kinds, some that are none, one with a prompt beyond LENGTH."""
    rng = random.Random(seed)
    made: list[Any] = [
        {
            "instruction": " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + f" {i}",
            "input": rng.choice(["", "stone é東"]),
            "output": " ".join(rng.choices(WORDS, k=rng.randint(1, 60))),
        }
        for i in range(count)
    ]
    made[2], made[5] = {"instruction": "x", "output": " "}, "text"
    made[7]["instruction"] = "stone river " * LENGTH
    for i in range(10, count, 4):
        # of every length that fills a word of four bytes up to another part
        made[i]["image"] = "a/é東"[: 1 + i % 5] + "b" * (i % 7) + ".png"
    for i in range(11, count, 5):
        said = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2 + i % 2 * 2)]
        turns = [{"from": ("human", "gpt")[n % 2], "value": said[n]} for n in range(len(said))]
        made[i] = {"conversations": turns} | ({"image": f"{i}.jpg"} if i % 3 else {})
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items(60)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@dataclass
class Counted:
    """Which records were tokenised."""

    indices: list[int]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted([])

    def encode(record: Any, *rest: Any) -> Example:
        counted.indices.append(record.index)
        return encode_any(record, *rest)

    monkeypatch.setattr(token_cache, "encode_any", encode)
    return counted


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tokens"))


def everything(found: TokenFile) -> tuple[Any, ...]:
    examples = [found.example(row) for row in range(len(found.rows))]
    return examples, found.rows.tolist(), found.items, found.problems, found.digest


def test_cached_examples_are_those_made_directly(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer, counted: Counted
) -> None:
    records, problems = checked(data, check_any)
    direct = [encode_any(record, tiny_tokenizer, LENGTH) for record in records]
    cold = tokenised(data, tiny_tokenizer, LENGTH, folder)
    assert counted.indices == [record.index for record in records]
    warm = tokenised(data, tiny_tokenizer, LENGTH, folder)
    assert len(counted.indices) == len(records) == 58
    for found in (cold, warm):
        assert everything(found)[0] == direct
        assert found.problems == problems
        assert found.items == 60
        assert not found.words.flags.writeable
    assert len({len(example.tokens) for example in direct}) > 8
    assert any(len(example.tokens) == LENGTH for example in direct)
    assert 0 in [example.n_labels for example in direct]
    assert len({example.image for example in direct}) > 15
    turns = [sum(a == IGNORE_INDEX != b for a, b in pairwise(e.labels)) for e in direct]
    assert {1, 2} <= set(turns)
    assert len(files(folder)) == 1


def test_examples_are_a_sequence_and_so_are_their_parts(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer
) -> None:
    found = tokenised(data, tiny_tokenizer, LENGTH, folder)
    rows = [row for row in range(len(found.rows)) if row % 3]
    some = Examples(found, found.rows["index"].argsort()[rows])
    plain = [found.example(row) for row in rows]
    assert list(some) == plain
    assert len(some) == len(plain)
    assert (some[0], some[-1], some[7]) == (plain[0], plain[-1], plain[7])
    assert list(some[3:30:4]) == plain[3:30:4]
    assert random.Random(1).sample(some, 9) == random.Random(1).sample(plain, 9)
    with pytest.raises(IndexError):
        some[len(plain)]


def test_a_warm_cache_reports_what_a_cold_one_does(
    data: Path, tmp_path: Path, folder: Path, tiny_tokenizer: Tokenizer, counted: Counted
) -> None:
    val = tmp_path / "val.json"
    val.write_text(json.dumps([*items(60)[10:14], *items(20, seed=4)]))

    def load(**more: Any) -> Dataset:
        return load_dataset(
            data, tiny_tokenizer, LENGTH, token_cache=folder, unusable=lambda _: {}, **more
        )

    for more in ({"val_fraction": 0.2}, {"val_data": val}):
        cold = load(**more)
        done = len(counted.indices)
        warm = load(**more)
        assert len(counted.indices) == done
        assert warm.skipped_lines() == cold.skipped_lines()
        assert len(warm.skipped_lines()) == (3 if "val_fraction" in more else 10)
        assert (warm.warnings, warm.digests) == (cold.warnings, cold.digests)
        assert list(warm.train) == list(cold.train)
        assert list(warm.held_out) == list(cold.held_out)
        messages = []
        for _ in range(2):
            with pytest.raises(ValueError, match="records cannot be used") as caught:
                load(strict=True, **more)
            messages.append(str(caught.value))
        assert messages[0] == messages[1] == "; ".join(cold.warnings)


def test_whatever_decides_the_tokens_makes_a_cache_of_its_own(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "corpus.txt").write_text("\n".join(WORDS * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "other"), vocab_size=290,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2,
    )  # fmt: skip
    other = Tokenizer(tmp_path / "other.model")

    def new(tokenizer: Tokenizer = tiny_tokenizer, length: int = LENGTH, path: Path = data) -> bool:
        before, done = len(files(folder)), len(counted.indices)
        tokenised(path, tokenizer, length, folder)
        assert (len(files(folder)) > before) == (len(counted.indices) > done)
        return len(files(folder)) > before

    assert new()
    assert new(length=LENGTH + 1)
    assert new(other)
    assert not new()
    # a copy has the same content, and another name does not matter
    (tmp_path / "copy.jsonl").write_bytes(data.read_bytes())
    assert not new(path=tmp_path / "copy.jsonl")
    data.write_text(data.read_text().replace("quiet", "loud!"))
    assert new()
    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "templates", lambda: ["Do \0:"])
        assert new()
    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "FORMAT", 0)
        assert new()
    # one text as a list of one record, or as a line whose value is a list
    (tmp_path / "one.json").write_text(json.dumps([items(9)[0]]))
    (tmp_path / "one.jsonl").write_text(json.dumps([items(9)[0]]))
    assert new(path=tmp_path / "one.json")
    assert len(tokenised(tmp_path / "one.jsonl", tiny_tokenizer, LENGTH, folder).problems) == 1


def test_a_damaged_cache_is_made_anew(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer, counted: Counted
) -> None:
    right = everything(tokenised(data, tiny_tokenizer, LENGTH, folder))
    (path,) = files(folder)
    whole = path.read_bytes()
    # a file is one for the cache of its name alone
    other = whole.replace(path.stem[:8].encode(), b"01234567", 1)
    flips = [bytearray(whole) for _ in range(6)]
    for number, flipped in enumerate(flips):
        flipped[len(whole) * (number + 1) // 7] ^= 1
    damaged = [b"", whole[:100], whole[:-1], whole + b"x", bytes(len(whole)), other, *flips]
    damaged += [whole.replace(b'"records": 58', b'"records": 5x', 1)]
    damaged += [whole.replace(b'"items": 60', b'"items": 61', 1)]
    for number, content in enumerate(damaged, 1):
        path.write_bytes(content)
        with pytest.warns(
            UserWarning, match=f"{path} is damaged: its records are tokenised again"
        ) as caught:
            found = tokenised(data, tiny_tokenizer, LENGTH, folder)
        assert len(caught) == 1
        assert everything(found) == right
        assert path.read_bytes() == whole
        assert len(counted.indices) == 58 * (number + 1)


def test_an_error_leaves_nothing_behind(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = data.read_text()
    data.write_bytes(lines.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"{data}: not UTF-8 text"):
        tokenised(data, tiny_tokenizer, LENGTH, folder)
    data.write_text(lines)

    def change(record: Any, *rest: Any) -> Example:
        data.write_text(lines + lines)
        return encode_any(record, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "encode_any", change)
        with pytest.raises(ValueError, match=f"{data}: was changed while it was read"):
            tokenised(data, tiny_tokenizer, LENGTH, folder)

    def lose(record: Any, *rest: Any) -> Example:
        data.unlink(missing_ok=True)
        return encode_any(record, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "encode_any", lose)
        with pytest.raises(ValueError, match=f"{data}: was changed while it was read"):
            tokenised(data, tiny_tokenizer, LENGTH, folder)
    data.write_text(lines)

    def vanish(_: Path) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "stream_items", vanish)
        with pytest.raises(ValueError, match=rf"{data}: cannot be read \(No such file"):
            tokenised(data, tiny_tokenizer, LENGTH, folder)
    assert {path.suffix for path in folder.iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(
    data: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "tokens"
    message = (
        f"tokens cannot be cached in {inside} (Not a directory): name another folder with "
        "--token-cache"
    )
    with pytest.raises(OSError, match="cannot be cached") as caught:
        tokenised(data, tiny_tokenizer, LENGTH, inside)
    assert str(caught.value) == message
    # a disk that fills up has no room for the last of it
    if Path("/dev/full").exists():
        folder = tmp_path / "cache"
        with monkeypatch.context() as patched:
            full = io.FileIO("/dev/full", "r+")
            patched.setattr(token_cache.tempfile, "TemporaryFile", lambda dir: full)
            with pytest.raises(
                OSError, match=r"cannot be cached in .*No space left on device.*--to"
            ):
                tokenised(data, tiny_tokenizer, LENGTH, folder)
        assert {path.suffix for path in folder.iterdir()} == {".lock"}
    # what is there can be read where nothing can be written
    there = tmp_path / "there"
    tokenised(data, tiny_tokenizer, LENGTH, there)
    monkeypatch.setattr(token_cache, "replacing", None)
    monkeypatch.setattr(Path, "mkdir", None)
    assert tokenised(data, tiny_tokenizer, LENGTH, there).items == 60


def test_a_system_without_locks_has_whole_files_too(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("No locks available")

    first = tokenised(data, tiny_tokenizer, LENGTH, folder)
    (path,) = files(folder)
    path.unlink()
    # another process may be at work on this one
    (folder / f".{path.name}.0123.tmp").write_text("begun")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert everything(tokenised(data, tiny_tokenizer, LENGTH, folder)) == everything(first)
    assert (folder / f".{path.name}.0123.tmp").read_text() == "begun"


def test_the_default_folder_is_among_the_users_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert default_folder() == Path(os.environ["LLAMA_ADAPTER_CACHE"]) / "tokens"
    monkeypatch.delenv("LLAMA_ADAPTER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "llama-adapter" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "llama-adapter" / "tokens"
    # as in a container whose user the system does not know
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(OSError, match="no home: name a folder with --token-cache, or with LLAMA_"):
        default_folder()


def homeless(_: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_kills_leave_no_cache_and_of_many_processes_one_makes_it(
    data: Path, folder: Path, tiny_tokenizer: Tokenizer, tiny_tokenizer_path: Path, tmp_path: Path,
    counted: Counted,
) -> None:  # fmt: skip
    """Real processes, killed by SIGKILL in the middle of a file, others waiting for it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, __file__, str(data), str(tiny_tokenizer_path), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # half of it was on the disk, none of it under the file's name
    assert found["begun"] > token_cache.HEADER
    assert found["whole"] == 0
    # one that waited took over from the dead one, the other found what that had made
    assert found["waited"]
    assert sorted(found["said"]) == ["found 58", "made 58"]
    assert len(files(folder)) == 1
    assert not list(folder.glob(".*.tmp"))
    theirs = everything(tokenised(data, tiny_tokenizer, LENGTH, folder))
    assert not counted.indices
    assert theirs == everything(tokenised(data, tiny_tokenizer, LENGTH, tmp_path / "other"))


# from here on: the program that starts processes and kills one


def start(data: Path, tokenizer: Path, folder: Path, mark: Path, last: int = 0) -> int:
    """Fork a process that asks for the tokens and says into `mark` whether it made them.

    At its record `last` it says so instead, and waits to be killed.
    """
    process = os.fork()
    if process:
        return process
    count = 0

    def counting(*arguments: Any) -> Example:
        nonlocal count
        count += 1
        if count == last:
            mark.write_text("there")
            time.sleep(600)
        return encode_any(*arguments)

    try:
        token_cache.encode_any, token_cache._FLUSH = counting, 8
        found = tokenised(data, Tokenizer(tokenizer), LENGTH, folder)
        mark.write_text(f"{'made' if count else 'found'} {len(found.rows)}")
    finally:
        os._exit(0)


def until(happened: Callable[[], bool]) -> bool:
    """Wait for it, a minute at most."""
    deadline = time.monotonic() + 60
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened()


def waits(process: int, folder: Path) -> bool:
    """Whether a process has the lock's file open."""
    held = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir() if path.exists()]
    return any(name.startswith(str(folder)) and name.endswith(".lock") for name in held)


def main(data: Path, tokenizer: Path, folder: Path) -> None:
    """Carry it out and print what happened as JSON."""
    first, *others = (folder.with_name(f"mark-{number}") for number in range(3))
    doomed = start(data, tokenizer, folder, first, last=40)
    until(first.exists)
    (begun,) = folder.glob(".*.tmp")
    found: dict[str, Any] = {"begun": begun.stat().st_size, "whole": len(files(folder))}
    waiting = [start(data, tokenizer, folder, mark) for mark in others]
    found["waited"] = until(lambda: all(waits(process, folder) for process in waiting))
    os.kill(doomed, signal.SIGKILL)
    for process in (doomed, *waiting):
        os.waitpid(process, 0)
    found["said"] = [mark.read_text() for mark in others]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
