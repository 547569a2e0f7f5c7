"""Does a host's adapter come back from its file, on the host and on the lean model?"""

from pathlib import Path

import pytest
import torch

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import load_adapter, read_header, save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.hosts import adapt, adapter_of, unadapt
from llama_adapter.hosts.files import FILE, save_adapted
from llama_adapter.model import Llama
from tests.llama_adapter.hf_models import host, on_transformers, peft_model, tokens


def test_an_adapter_of_the_lean_model_works_on_the_host(
    tiny_model: Llama, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a.safetensors", tiny_adapter, fingerprint(tiny_model, "base"))
    theirs = on_transformers(tiny_model)
    adapt(theirs, adapter=tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = tiny_model(tokens(), tiny_model.project(tiny_adapter))
        got = theirs(input_ids=tokens()).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_adapter_of_the_host_works_on_the_lean_model(
    tiny_model: Llama, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    theirs = on_transformers(tiny_model)
    theirs.config.name_or_path = "/models/base/"
    adapt(theirs, adapter=tiny_adapter)
    save_adapted(theirs, tmp_path / "new")
    assert read_header(tmp_path / "new" / FILE).base.name == "base"
    loaded = load_adapter(tmp_path / "new" / FILE, tiny_model, "base")
    for name, value in tiny_adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with torch.no_grad():
        expected = theirs(input_ids=tokens()).logits
        got = tiny_model(tokens(), tiny_model.project(loaded))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_gathered_state_is_what_is_written(tmp_path: Path) -> None:
    model = host("qwen2")
    adapter = adapt(model, prompt_length=3)
    state = {name: x + 1 for name, x in model.state_dict().items()}
    save_adapted(model, tmp_path, state_dict=state, is_main_process=False)
    assert not list(tmp_path.iterdir())
    save_adapted(model, tmp_path, state_dict=state)
    other = host("qwen2")
    adapt(other, adapter=tmp_path)
    loaded = adapter_of(other)
    assert loaded is not None
    assert torch.equal(loaded.prompts, adapter.prompts + 1)
    assert torch.equal(loaded.gates, torch.ones(2, 8))


def test_another_base_and_a_bare_host_are_refused(tmp_path: Path) -> None:
    model = host()
    with pytest.raises(ValueError, match="model must have an adapter"):
        save_adapted(model, tmp_path)
    adapt(model)
    save_adapted(model, tmp_path)
    other = host()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"one shape, but \d+ of \d+ sampled weights differ"):
        adapt(other, adapter=tmp_path)
    assert adapter_of(other) is None
    with pytest.raises(FileNotFoundError, match="does not exist"):
        adapt(other, adapter=tmp_path / "nothing.safetensors")


def test_a_quantised_hosts_adapter_is_saved_with_the_shape_of_its_base(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = host()
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    adapter = adapt(model, generator=torch.Generator().manual_seed(3))
    torch.nn.init.normal_(adapter.gates, std=1.5)
    model.save_pretrained(tmp_path)
    assert read_header(tmp_path / FILE).base.samples == ()
    plain = host()
    for one in (model, plain):
        if one is model:
            unadapt(one)
        with pytest.warns(UserWarning, match="comes from a quantised base, which does not tell"):
            loaded = adapt(one, adapter=tmp_path)
        assert torch.equal(loaded.gates, adapter.gates)
    with torch.no_grad():
        got, expected = (one(input_ids=tokens()).logits for one in (model, plain))
    # rounded to 8 bits
    assert (got - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ValueError, match="n_layers"):
        adapt(host("mistral", num_hidden_layers=3), adapter=tmp_path)


def test_a_folder_of_peft_is_named_with_the_remedy(tmp_path: Path) -> None:
    peft_model(host()).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder of PEFT: llama-adapter convert .* --base"):
        adapt(host(), adapter=tmp_path)


def test_saving_a_gathered_state_draws_no_number_and_needs_all_of_it(tmp_path: Path) -> None:
    model = host("qwen2")
    adapt(model, prompt_length=3)
    state = dict(model.state_dict())
    before = torch.get_rng_state()
    model.save_pretrained(str(tmp_path), state_dict=state)
    assert torch.equal(torch.get_rng_state(), before)
    del state["llama_adapter.prompts"]
    with pytest.raises(ValueError, match=r"state_dict must .* none of \['llama_adapter.prompts'\]"):
        model.save_pretrained(str(tmp_path), state_dict=state)
