"""A trainer written out plainly, which every invariant holds for: what mutants are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmgym.testing import GAEInputs, GroupInputs, LossInputs, Responses, RewardInputs, TrainerAdapter


def prepare(model: Any, temperature: float) -> Any:
    return model.eval()


def response_mask(ids: Tensor, eos: int, pad: int) -> Tensor:
    is_eos = (ids == eos).int()
    return is_eos.cumsum(1) - is_eos == 0


def log_probs(model: Any, responses: Responses, temperature: float) -> Tensor:
    mask = responses.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=responses.input_ids, attention_mask=mask, position_ids=positions).logits
    start = responses.prompt_ids.shape[1]
    distribution = (logits[:, start - 1 : -1] / temperature).log_softmax(-1)
    return distribution.gather(2, responses.response_ids.unsqueeze(2)).squeeze(2)


def lora_log_probs(model: Any, responses: Responses, disturb: Callable[[Any], None]) -> tuple[Tensor, Tensor]:
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    disturb(policy)
    with policy.disable_adapter():
        reference = log_probs(policy, responses, 1.0)
    return log_probs(policy, responses, 1.0), reference


def loss(inputs: LossInputs) -> Tensor:
    """PPO's, the mean over the tokens of the whole step."""
    ratio = (inputs.log_probs - inputs.old_log_probs).exp()
    gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
    return -(gain * inputs.mask).sum() / max(inputs.step_tokens, 1) * inputs.ranks


def token_rewards(inputs: RewardInputs) -> Tensor:
    rewards = inputs.kl_coef * (inputs.ref_log_probs - inputs.log_probs) * inputs.mask
    rewards[torch.arange(len(rewards)), inputs.mask.sum(1) - 1] += inputs.scores
    return rewards


def gae(inputs: GAEInputs) -> Tensor:
    values = inputs.values.detach()
    advantages = torch.zeros_like(inputs.rewards)
    for row, length in enumerate(inputs.mask.sum(1).tolist()):
        after = inputs.next_values[row].detach() if inputs.truncated[row] else torch.zeros(())
        last = torch.zeros(())
        for t in reversed(range(length)):
            error = inputs.rewards[row, t] + inputs.gamma * after - values[row, t]
            last = error + inputs.gamma * inputs.gae_lambda * last
            advantages[row, t] = last
            after = values[row, t]
    return advantages


def group_advantages(inputs: GroupInputs) -> Tensor:
    """GRPO's, of returns with the KL in them."""
    kl = ((inputs.log_probs - inputs.ref_log_probs) * inputs.mask).sum(1).detach()
    groups = (inputs.scores - inputs.kl_coef * kl).view(-1, inputs.group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def whiten(numbers: Tensor, mask: Tensor) -> Tensor:
    chosen = numbers[mask]
    return torch.where(mask, (numbers - chosen.mean()) / (chosen.std() + 1e-8), 0.0)


def detect_stale(new: Tensor, old: Tensor, mask: Tensor) -> bool:
    return bool((new - old)[mask].abs().mean() > 1e-3)


def plain_trainer(**changes: Any) -> TrainerAdapter:
    functions: dict[str, Any] = {
        "name": "plain",
        "prepare": prepare,
        "response_mask": response_mask,
        "log_probs": log_probs,
        "lora_log_probs": lora_log_probs,
        "loss": loss,
        "token_rewards": token_rewards,
        "gae": gae,
        "group_advantages": group_advantages,
        "whiten": whiten,
        "detect_stale": detect_stale,
    }
    return TrainerAdapter(**functions | changes)
