"""The tiny models of the multi-modal benchmark, pre-trained in the run, then frozen.

The language model reads the world's facts, and questions in ScienceQA's layout on them and on what
is described in words. The vision encoder, a CLIPVisionModel of transformers, learns as CLIP did:
which caption belongs to which picture. It sees no question and no answer, neither sees what only
the test's pictures combine, and the language model sees no picture.
"""

import io
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.multimodal_task import Question, question
from benchmarks.multimodal_world import (
    ATTRIBUTES,
    CAPTION_QUESTION,
    PHRASINGS,
    SHOWN,
    SIDE,
    STATEMENTS,
    VALUES,
    Scene,
    draw,
    random_scene,
)
from examples.bundled_base.train_base import initialise, optimisers
from llama_adapter.config import LlamaConfig
from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.packed import pack
from llama_adapter.evaluation.scienceqa import LETTERS, prompt_of, target_of
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer

BASE_SHAPE: dict[str, Any] = {
    "dim": 64,
    "n_layers": 6,
    "n_heads": 2,
    "multiple_of": 8,
    "norm_eps": 1e-5,
    "max_seq_len": 128,
}
BASE_BATCH = 48
# what is one piece: the layout's parts, and words; _ is the blank before
_PIECE = re.compile(
    r"\n?_?(?:Question|Context|Options|Answer):|_The_answer_is|_N/A|_?\([A-Z]\)|_?[A-Za-z]+|.".replace(
        "_", "\u2581"
    )
)
BASE_BATCH = 48
CLIP_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "projection_dim": 32,
}
CLIP_BATCH = 64
CLIP_LR = 1e-3
# the words that tell captions apart, for the encoder's training
CAPTION_WORDS = tuple(word for words in ATTRIBUTES.values() for word in words)
# what the base reads, by shares: in the first part of the steps which letter an option has, the
# slowest to learn, and nothing else
PRACTICE = {"letters": 1}
READING = {
    "statement": 1,
    "caption": 2,
    "letters": 1,
    "answers": 3,
    "fact": 4,
    "read": 3,
    "recall": 4,
}
PRACTICE_STEPS = 0.28
_OPTIONS = [value for values in (ATTRIBUTES | VALUES).values() for value in values]
Facts = Mapping[tuple[str, str], str]


def as_item(one: Question) -> dict[str, Any]:
    """A question as the loader of ScienceQA gives it, as far as prompt and target need it."""
    return {
        "question": one.text,
        "hint": one.hint,
        "choices": one.choices,
        "answer": one.answer,
    }


def caption_prompt(context: str) -> str:
    """The question for a caption, in the layout of the others."""
    return f"Question: {CAPTION_QUESTION}\nContext: {context or 'N/A'}\nAnswer:"


def document(rng: random.Random, world: Facts, shares: Mapping[str, int]) -> tuple[str, str]:
    """A text that the base reads: what it is given, and what it learns to say."""
    kind = rng.choices(tuple(shares), tuple(shares.values()))[0]
    if kind == "statement":
        (thing, relation), value = rng.choice(list(world.items()))
        return "", STATEMENTS[relation].format(thing, value)
    if kind == "caption":
        scene = random_scene(rng, "train")
        return caption_prompt(scene.description), f" {scene.caption}"
    if kind in ("letters", "answers"):
        return lettered(rng, kind)
    item = as_item(pretraining_question(rng, kind, world))
    return prompt_of(item), target(item)


def lettered(rng: random.Random, kind: str) -> tuple[str, str]:
    """Options, and the letter of each in turn, right behind it or as the task answers."""
    choices = rng.sample(_OPTIONS, 4)
    item = {"question": "Which letter is each option?", "hint": "", "choices": choices}
    form = " {} {}." if kind == "letters" else " {}. The answer is {}."
    named = [form.format(one, letter) for letter, one in zip(LETTERS, choices, strict=False)]
    rng.shuffle(named)
    return prompt_of(item), "".join(named)


def target(item: Mapping[str, Any]) -> str:
    """What is to be written behind a prompt: the right option, then its letter.

    ScienceQA's layout QCM-EA, the explanation before the answer, with the option as explanation.
    """
    return f" {item['choices'][item['answer']]}.{target_of(item)}"


def pretraining_question(rng: random.Random, kind: str, world: Facts) -> Question:
    """A question as the base reads it: what a picture would show is described instead."""
    if kind == "fact":
        split = rng.choices(("train", "test"), (3, 1))[0]
        return question(rng, kind, split, world, False)
    one = question(rng, kind, "train", world, False)
    hint = one.scene.description if one.scene is not None else one.hint
    return Question(kind, one.asked, one.text, hint, one.choices, one.answer, None)


def train_tokenizer(world: Facts) -> bytes:
    """A sentencepiece model, LLaMA's conventions, in which the task's words are one piece each."""
    rng = random.Random("tokenizer")
    lines = ["".join(document(rng, world, READING)) for _ in range(2000)]
    lines += [both[new].format(SHOWN) for both in PHRASINGS.values() for new in (0, 1)]
    marked = [line.replace(" ", "\u2581") for line in lines]
    pieces = {piece for line in marked for piece in _PIECE.findall("\u2581" + line)}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in lines for line in text.split("\n")),
        model_writer=model,
        model_type="unigram",
        # the bytes, the three marks, the words, and single characters besides
        vocab_size=256 + 3 + len(pieces) + 100,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=sorted(pieces),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def encode(tokenizer: Tokenizer, prompt: str, target: str, index: int = 0) -> Example:
    """A text as tokens with labels on the target and the end alone.

    Raises:
        ValueError: the target's tokens are not those behind the prompt's.
    """
    before = tokenizer.encode(prompt, bos=True)
    tokens = tokenizer.encode(prompt + target, bos=True, eos=True)
    if tokens[: len(before)] != before:
        raise ValueError(f"prompt must end where a token ends, got {prompt[-20:]!r}")
    labels = [IGNORE_INDEX] * len(before) + tokens[len(before) :]
    return Example(index, tuple(tokens), tuple(labels))


def packed_loss(model: Llama, examples: Sequence[Example]) -> Tensor:
    """Mean cross entropy in nats of examples' labels, without an adapter."""
    batch = pack(examples)
    hidden = model.hidden_packed(batch.tokens, batch.packing)
    return F.cross_entropy(model.logits(hidden[batch.rows]), batch.targets)


def train_base(tokenizer: Tokenizer, world: Facts, steps: int, seed: int = 0) -> Llama:
    """Pre-train the language model on `document`s, each read once.

    Args:
        tokenizer: of `train_tokenizer`.
        world: the facts.
        steps: of BASE_BATCH documents.
        seed: of the documents.
    """
    model = Llama(LlamaConfig(**BASE_SHAPE, vocab_size=tokenizer.vocab_size))
    initialise(model, tokenizer)
    optims, rng = optimisers(model), random.Random(f"base {seed}")
    rates = [[group["lr"] for group in optim.param_groups] for optim in optims]
    for step in range(steps):
        share = rate_of(step, steps)
        for optim, rate in zip(optims, rates, strict=True):
            for group, lr in zip(optim.param_groups, rate, strict=True):
                group["lr"] = lr * share
        shares = PRACTICE if step < PRACTICE_STEPS * steps else READING
        texts = [document(rng, world, shares) for _ in range(BASE_BATCH)]
        loss = packed_loss(model, [encode(tokenizer, *text) for text in texts])
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
    return model.requires_grad_(False)


def rate_of(step: int, steps: int) -> float:
    """Part of the peak learning rate: 100 steps up, or a tenth of all, and a cosine down."""
    warm = max(1, min(100, steps // 10))
    return min(1.0, (step + 1) / warm) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train_encoder(steps: int, seed: int = 0) -> CLIPVisionModelWithProjection:
    """Pre-train the vision encoder on pictures and captions, each seen once, then freeze it.

    A picture's projection is to be nearest that of its own caption, a sum of its words' vectors, as
    in CLIP; captions that are equal are one. The scenes are of pairs that training may show.

        loss = (CE(s z_v z_t') + CE(s z_t z_v')) / 2

    Args:
        steps: of CLIP_BATCH pictures.
        seed: of weights and pictures.
    """
    rng = random.Random(f"encoder {seed}")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_SHAPE))
        words = nn.Parameter(torch.randn(len(CAPTION_WORDS), CLIP_SHAPE["projection_dim"]))
    scale = nn.Parameter(torch.tensor(math.log(10.0)))
    parameters = [*model.parameters(), words, scale]
    optim = torch.optim.AdamW(parameters, lr=CLIP_LR, betas=(0.9, 0.98), weight_decay=0.01)
    prepare = image_processor()
    for step in range(steps):
        for group in optim.param_groups:
            group["lr"] = CLIP_LR * rate_of(step, steps)
        scenes = [random_scene(rng, "train") for _ in range(CLIP_BATCH)]
        pixels = prepare([draw(scene, rng) for scene in scenes], return_tensors="pt")
        loss = contrast(model(pixels["pixel_values"]).image_embeds, words, scale, scenes)
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step()
    return model.requires_grad_(False).eval()


def image_processor() -> CLIPImageProcessor:
    """What prepares a picture: its size is right already."""
    return CLIPImageProcessor(do_resize=False, do_center_crop=False)


def contrast(seen: Tensor, words: Tensor, scale: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """CLIP's loss of pictures' projections (B, E) and their captions' words (W, E)."""
    number = {word: index for index, word in enumerate(CAPTION_WORDS)}
    captions = [tuple(number[word] for word in asdict(scene).values()) for scene in scenes]
    unique = list(dict.fromkeys(captions))
    texts = F.normalize(torch.stack([words[list(one)].sum(0) for one in unique]), dim=-1)
    own = torch.tensor([unique.index(one) for one in captions])
    logits = scale.exp() * F.normalize(seen, dim=-1) @ texts.T
    # of a caption that several pictures have, each of them
    back = F.log_softmax(logits.T, -1)[own, torch.arange(len(scenes))]
    return (F.cross_entropy(logits, own) - back.mean()) / 2
