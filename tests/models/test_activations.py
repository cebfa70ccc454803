"""Activations as one kernel: the same function, the same saved model, and no other function in its place."""

from __future__ import annotations

import copy
import filecmp
from pathlib import Path

import pytest
import torch
from conftest import tiny_lm
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from agents.policies.actor_critic import ActorCritic
from lmgym.models.activations import fuse_activations, is_same_function

SHAPE = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}


class Holder(nn.Module):
    """A module with one activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class NewGELUActivation(nn.Module):
    """Another function under the name of one that is written out."""

    def __init__(self, scale: float, is_wrong_in_slope_alone: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.is_wrong_in_slope_alone = is_wrong_in_slope_alone

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(x, approximate="tanh")
        if self.is_wrong_in_slope_alone:
            return y.detach() + self.scale * (y - y.detach())
        return self.scale * y


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python"])
def test_a_written_out_activation_becomes_one_kernel_with_its_values_and_gradients(name: str) -> None:
    plain = ACT2FN[name]
    holder = fuse_activations(Holder(copy.deepcopy(plain)))
    assert type(holder.activation) is nn.GELU
    x = torch.linspace(-8, 8, 1001, requires_grad=True)
    torch.testing.assert_close(holder(x), plain(x), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(holder(x).sum(), x)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", [NewGELUActivation(1.001), NewGELUActivation(1.001, True)])
def test_another_function_is_left_alone(activation: nn.Module) -> None:
    assert fuse_activations(Holder(activation)).activation is activation


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_10", "silu", "relu"])
def test_the_probe_tells_other_activations_apart(name: str) -> None:
    for approximation in ("tanh", "none"):
        assert not is_same_function(ACT2FN[name], nn.GELU(approximate=approximation))


def test_the_two_kernels_are_told_apart() -> None:
    assert not is_same_function(nn.GELU(), nn.GELU(approximate="tanh"))


def test_bloom_is_prepared_and_says_the_same() -> None:
    plain = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=16, n_layer=1, n_head=2)).eval()
    fused = fuse_activations(copy.deepcopy(plain))
    assert any(isinstance(module, nn.GELU) for module in fused.modules())
    ids = torch.arange(8)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


def test_what_is_saved_is_the_same_model(tmp_path: Path) -> None:
    plain = GPT2LMHeadModel(GPT2Config(**SHAPE))
    fused = fuse_activations(copy.deepcopy(plain))
    assert any(isinstance(module, nn.GELU) for module in fused.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    _, differing, missing = filecmp.cmpfiles(tmp_path / "plain", tmp_path / "fused", names, shallow=False)
    assert not differing
    assert not missing


def test_a_policy_is_prepared_and_a_model_that_was_given_is_not() -> None:
    lm = tiny_lm(GPT2Config(**SHAPE))
    policy = ActorCritic(lm, "reference")
    for trunk in (policy.actor, policy.critic):
        assert isinstance(trunk, nn.Module)
        assert any(isinstance(module, nn.GELU) for module in trunk.modules())
    assert not any(isinstance(module, nn.GELU) for module in lm.model.modules())


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_they_are_found_where_gradients_are_off(without_gradients: type) -> None:
    with without_gradients():
        assert isinstance(fuse_activations(Holder(ACT2FN["gelu_new"])).activation, nn.GELU)
