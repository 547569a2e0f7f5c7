"""Is a task's head trained as a part of the adapter, and do positions begin where they should?"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llama_adapter.hosts import adapt, unadapt
from llama_adapter.hosts.attention import NAME
from tests.llama_adapter.encoder_models import BERT, SIZES, bert, pixels, roberta, vit, words
from tests.llama_adapter.hosts.test_adapt_encoders import output_of, unadapt_new, with_gates


@pytest.mark.parametrize(
    ("make", "module", "labels"),
    [
        (lambda: vit(7), "classifier", tuple(f"LABEL_{n}" for n in range(7))),
        (lambda: roberta(labels=3), "classifier", ("LABEL_0", "LABEL_1", "LABEL_2")),
        (lambda: roberta("QuestionAnswering", 2), "qa_outputs", ("start", "end")),
        (lambda: bert("QuestionAnswering", 2), "qa_outputs", ("start", "end")),
        (lambda: roberta("SequenceClassification", 3), "classifier", None),
    ],
)
def test_the_tasks_head_is_trained_and_is_the_adapters(
    make: Callable[[], Any], module: str, labels: tuple[str, ...] | None
) -> None:
    model = make()
    own = model.get_submodule(module)
    before = {n: x.clone() for n, x in own.named_parameters()}
    adapter = with_gates(model, None)
    assert adapter.host.head is not None
    assert adapter.host.head.name == module
    if labels is not None:
        assert adapter.host.head.labels == labels
    assert {n: tuple(x.shape) for n, x in own.named_parameters()} == adapter.host.head.shapes
    assert set(adapter.groups()) == {"prompts", "gates", "head"}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter.parameters()}
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, before[n] + 1) for n, x in adapter.head.named_parameters())
    unadapt(model)
    assert all(torch.equal(x, before[n]) for n, x in own.named_parameters())
    assert adapt(model, head=False).head is None
    assert not any(p.requires_grad for p in own.parameters())


def test_a_head_of_another_task_is_refused() -> None:
    adapter = unadapt_new(vit(5))
    with pytest.raises(ValueError, match=r"classifier with .*\(5, 48\).*got classifier with .*\(6"):
        adapt(vit(6), adapter=adapter)
    body = transformers.ViTModel(vit().config, add_pooling_layer=False).eval()
    with pytest.raises(ValueError, match=r"must have the head .* got none"):
        adapt(body, adapter=adapter)
    assert body.config._attn_implementation != NAME


def test_a_host_in_half_precision_has_its_head_in_float32() -> None:
    model = vit().to(torch.bfloat16)
    adapter = with_gates(model, None)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    logits = model(pixel_values=pixels().bfloat16()).logits
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    whole = vit()
    adapt(whole, adapter=unadapt(model))
    torch.testing.assert_close(logits, output_of(whole), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("make", [roberta, bert])
def test_positions_may_begin_behind_the_prompt(make: Callable[..., Any]) -> None:
    model = make()
    first = 2 if make is roberta else 0
    adapter = with_gates(model, None, shift_positions=True)
    assert adapter.host.shift_positions
    # what transformers counts by itself, five on; padding keeps its own in a RoBERTa
    plain = torch.arange(13).expand(3, 13) + first + 5
    with torch.no_grad():
        got = model(input_ids=words()).logits
        unadapt(model)
        adapt(model, adapter=adapter)
        again = model(input_ids=words()).logits
        unshifted = model(input_ids=words(), position_ids=plain - 5).logits
        given = model(input_ids=words(), position_ids=plain).logits
    assert torch.equal(got, again)
    torch.testing.assert_close(got, given, rtol=0, atol=1e-6)
    assert not torch.allclose(got, unshifted, atol=1e-2)
    with torch.no_grad():
        model(input_ids=words(count=38 - 5), attention_mask=None)
        with pytest.raises(
            ValueError, match=r"tokens must be at most 3[35] with positions shifted"
        ):
            model(input_ids=words(count=36), attention_mask=None)


def test_a_head_that_was_replaced_stays_and_is_not_saved(tmp_path: Path) -> None:
    model = bert("SequenceClassification")
    own = model.classifier
    weight = own.weight
    adapt(model)
    model.classifier = torch.nn.Linear(48, 7)
    with pytest.raises(ValueError, match=r"must have the head that adapt.*replaced"):
        model.save_pretrained(tmp_path)
    unadapt(model)
    assert model.classifier.weight.shape == (7, 48)
    assert own.weight is weight
    assert not own._forward_pre_hooks


def test_numbers_that_were_assigned_are_not_lost_in_silence(tmp_path: Path) -> None:
    model = bert("SequenceClassification")
    adapt(model)
    model.load_state_dict({n: x.clone() for n, x in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="assign=True"):
        model.save_pretrained(tmp_path)


def test_a_head_that_cannot_be_trained_is_refused_by_name() -> None:
    # a type checker knows no num_labels
    sizes: dict[str, Any] = SIZES | BERT | {"num_labels": 0}
    config = transformers.BertConfig(**sizes)
    empty = transformers.BertForSequenceClassification(config)
    offloaded = bert("SequenceClassification")
    offloaded.classifier.to("meta")
    quantised = bert("SequenceClassification")
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    for model, got in ((empty, "of shape"), (offloaded, "offloaded"), (quantised, "quantised")):
        with pytest.raises(ValueError, match=f"head must be False for a classifier .*{got}"):
            adapt(model)
        assert adapt(model, head=False).head is None


def test_labels_are_in_the_order_of_the_outputs_and_others_are_warned_of() -> None:
    model = bert("SequenceClassification", labels=3)
    model.config.id2label = {1: "dog", 0: "cat", 2: "cow"}
    adapter = adapt(model)
    assert adapter.host.head is not None
    assert adapter.host.head.labels == ("cat", "dog", "cow")
    unadapt(model)
    model.config.id2label = {0: "dog", 1: "cat", 2: "cow"}
    with pytest.warns(UserWarning, match="cat, dog, cow, got dog, cat, cow"):
        adapt(model, adapter=adapter)


def test_a_pooler_that_is_not_the_one_trained_beside_is_warned_of(tmp_path: Path) -> None:
    """A base without a pooler gets a random one, anew each time that it is loaded."""
    model = bert("SequenceClassification", 3)
    with_gates(model, None)
    model.save_pretrained(tmp_path)
    same = bert("SequenceClassification", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(same, adapter=tmp_path)
    other = bert("SequenceClassification", 3)
    torch.nn.init.normal_(other.bert.pooler.dense.weight)
    with pytest.warns(UserWarning, match=r"should have the pooler\.dense\.weight that the adapter"):
        adapt(other, adapter=tmp_path)
    # a model that has none does not use it
    words_alone = bert("TokenClassification", 3)
    words_alone.bert.load_state_dict(model.bert.state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(words_alone, adapter=tmp_path)


def test_a_head_left_alone_that_is_another_is_warned_of(tmp_path: Path) -> None:
    model = vit()
    with_gates(model, None, head=False)
    model.save_pretrained(tmp_path)
    other = vit()
    torch.nn.init.normal_(other.classifier.weight)
    with pytest.warns(UserWarning, match=r"should have the classifier\.weight that the adap"):
        adapt(other, adapter=tmp_path)
