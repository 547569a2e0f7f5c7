"""Tokenizers and hosts of transformers' own classes, made here: small, and without a network."""

import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForTokenClassification,
    RobertaTokenizer,
)

TEXTS = (
    "The Eiffel Tower stands in Paris, the capital of France, since 1889.",
    "Who designed the old bridge? The engineer Ana Ruiz from Bilbao designed it.",
    "U.N. official Ekeus heads for Baghdad. naïve café 日本 words; 😀",
)
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def roberta_tokenizer(*, add_prefix_space: bool = True, size: int = 330) -> Any:
    """RoBERTa's own class with a byte-level BPE of few merges, so that words are several tokens."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=ROBERTA_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, add_prefix_space=add_prefix_space)


def bert_tokenizer() -> Any:
    """BERT's own class with word pieces: letters, and a few words whole."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?;-"
    pieces = [*BERT_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    pieces += ["the", "tower", "paris", "in", "of", "##er", "designed"]
    return BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)})


def word_tokenizer(words: int = 60, **more: Any) -> Any:
    """A token for each of the words w0, w1, ..., and BERT's special ones: for counting by hand."""
    vocabulary = [*BERT_SPECIAL, *(f"w{place}" for place in range(words))]
    whole = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **(special | more))


def _config(kind: Any, tokenizer: Any, **more: Any) -> Any:
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=160,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **more,
    )


def host(tokenizer: Any, *, labels: int | None = None, seed: int = 0) -> nn.Module:
    """A host for a tokenizer: for question answering, or with `labels` tags for each token."""
    torch.manual_seed(seed)
    if isinstance(tokenizer, BertTokenizer):
        config = _config(BertConfig, tokenizer)
        kinds: Any = BertForQuestionAnswering, BertForTokenClassification
    else:
        config = _config(RobertaConfig, tokenizer, type_vocab_size=1)
        kinds = RobertaForQuestionAnswering, RobertaForTokenClassification
    if labels is None:
        return kinds[0](config).eval()
    config.num_labels = labels
    return kinds[1](config).eval()
