"""A host answers in eval mode without gradients and is then as it was."""

import pytest
import torch
from torch import nn

from llama_adapter.tasks.running import beside, evaluating


def test_every_module_goes_back_to_its_own_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.randn(2, 3)).requires_grad
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.randn(2, 7))
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_fractions_take_the_hosts_dtype_and_numbers_keep_theirs() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    assert beside(torch.randn(2), model).dtype == torch.bfloat16
    assert beside(torch.arange(2), model).dtype == torch.int64
