"""Known bugs of RLHF trainers, as functions: each must break the invariant of `check_trainer` named beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import plain_trainer as plain
import pytest
import torch
from plain_trainer import plain_trainer
from torch import Tensor

from lmgym.testing import GAEInputs, GroupInputs, LossInputs, Responses, RewardInputs, check_trainer
from lmgym.testing.trainer import INVARIANTS


def reinforce(inputs: LossInputs, weights: Tensor) -> Tensor:
    """- sum of weights A log pi over the mask."""
    return -(weights * inputs.advantages * inputs.log_probs * inputs.mask).sum()


def with_kl(kl: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """A trainer whose KL is in the loss, the mean over tokens of an estimate from log pi and log pi_ref."""

    def loss(inputs: LossInputs) -> Tensor:
        estimate = (kl(inputs.log_probs, inputs.ref_log_probs) * inputs.mask).sum() / inputs.mask.sum()
        return plain.loss(inputs) + inputs.kl_coef * estimate

    return {"loss": loss, "token_rewards": None, "group_advantages": no_kl_advantages}


def no_kl_advantages(inputs: GroupInputs) -> Tensor:
    return plain.group_advantages(replace(inputs, kl_coef=0.0))


def k2(new: Tensor, ref: Tensor) -> Tensor:
    return 0.5 * (new - ref).square()


def k3(new: Tensor, ref: Tensor) -> Tensor:
    return torch.expm1(ref - new) - (ref - new)


# -- mask and log-probs ----------------------------------------------------------------------------------------------


def mask_of_what_is_not_padding(ids: Tensor, eos: int, pad: int) -> Tensor:
    return ids != pad


def mask_without_eos(ids: Tensor, eos: int, pad: int) -> Tensor:
    return (ids == eos).int().cumsum(1) == 0


def mask_of_everything(ids: Tensor, eos: int, pad: int) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def read(model: Any, responses: Responses, shift: int = 1, **inputs: Any) -> Tensor:
    """(B, T) log-probs, `shift` logits before their token."""
    found = model(input_ids=responses.input_ids, **inputs).logits.log_softmax(-1)
    start = responses.prompt_ids.shape[1]
    found = found[:, start - shift : found.shape[1] - shift]
    return found.gather(2, responses.response_ids.unsqueeze(2)).squeeze(2)


def logits_of_the_token_itself(model: Any, responses: Responses, temperature: float) -> Tensor:
    return read(model, responses, shift=0, attention_mask=responses.attention_mask)


def temperature_forgotten(model: Any, responses: Responses, temperature: float) -> Tensor:
    return plain.log_probs(model, responses, 1.0)


def temperature_after_the_softmax(model: Any, responses: Responses, temperature: float) -> Tensor:
    return plain.log_probs(model, responses, 1.0) / temperature


def attends_to_padding(model: Any, responses: Responses, temperature: float) -> Tensor:
    return read(model, responses)


def positions_of_columns(model: Any, responses: Responses, temperature: float) -> Tensor:
    return read(model, responses, attention_mask=responses.attention_mask)


def width_that_is_fixed(model: Any, responses: Responses, temperature: float) -> Tensor:
    found = plain.log_probs(model, responses, temperature)
    return torch.roll(found, found.shape[1] - 5, 1)


def mask_of_the_first_row(model: Any, responses: Responses, temperature: float) -> Tensor:
    first = responses.attention_mask[:1].expand_as(responses.attention_mask)
    return read(model, responses, attention_mask=first)


def reference_with_the_adapter(model: Any, responses: Responses, disturb: Any) -> tuple[Tensor, Tensor]:
    policy, _ = plain.lora_log_probs(model, responses, disturb)
    return policy, policy


def loss_on_prompts_too(model: Any, responses: Responses, advantages: Tensor) -> Tensor:
    ids = responses.input_ids
    mask = responses.attention_mask
    found = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    chosen = found.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return -(advantages.unsqueeze(1) * chosen * mask[:, 1:] * mask[:, :-1]).sum() / mask.sum()


# -- losses ----------------------------------------------------------------------------------------------------------


def sign_of_the_loss(inputs: LossInputs) -> Tensor:
    return -plain.loss(inputs)


def mask_not_applied(inputs: LossInputs) -> Tensor:
    return plain.loss(replace(inputs, mask=torch.ones_like(inputs.mask)))


def padding_in_the_mean(inputs: LossInputs) -> Tensor:
    return plain.loss(inputs) * inputs.step_tokens / inputs.mask.numel()


def ratio_to_the_reference(inputs: LossInputs) -> Tensor:
    return plain.loss(replace(inputs, old_log_probs=inputs.ref_log_probs))


def stale_tokens_taken_as_new(inputs: LossInputs) -> Tensor:
    return plain.loss(replace(inputs, old_log_probs=inputs.log_probs.detach()))


def clamp_without_a_minimum(inputs: LossInputs) -> Tensor:
    ratio = (inputs.log_probs - inputs.old_log_probs).exp().clamp(0.8, 1.2)
    return -(ratio * inputs.advantages * inputs.mask).sum() / max(inputs.step_tokens, 1)


def mean_over_the_micro_batch(inputs: LossInputs) -> Tensor:
    return plain.loss(replace(inputs, step_tokens=int(inputs.mask.sum()))) / inputs.parts


def mean_over_the_rank(inputs: LossInputs) -> Tensor:
    return plain.loss(replace(inputs, step_tokens=int(inputs.mask.sum()), ranks=1))


def ranks_forgotten(inputs: LossInputs) -> Tensor:
    return plain.loss(replace(inputs, ranks=1))


def mean_over_no_tokens(inputs: LossInputs) -> Tensor:
    means = (inputs.log_probs * inputs.advantages * inputs.mask).sum(1) / inputs.mask.sum(1)
    return -means.sum() / inputs.step_responses


def length_mean(inputs: LossInputs) -> Tensor:
    return reinforce(inputs, 1 / inputs.mask.sum(1, keepdim=True).clamp(min=1) / inputs.step_responses)


# -- rewards and advantages ------------------------------------------------------------------------------------------


def score_on_the_last_column(inputs: RewardInputs) -> Tensor:
    rewards = plain.token_rewards(replace(inputs, scores=torch.zeros_like(inputs.scores)))
    rewards[:, -1] += inputs.scores
    return rewards


def score_on_the_padding_after(inputs: RewardInputs) -> Tensor:
    rewards = plain.token_rewards(replace(inputs, scores=torch.zeros_like(inputs.scores)))
    last = inputs.mask.sum(1).clamp(max=inputs.mask.shape[1] - 1)
    rewards[torch.arange(len(rewards)), last] += inputs.scores
    return rewards


def score_on_every_token(inputs: RewardInputs) -> Tensor:
    return plain.token_rewards(inputs) + inputs.scores.unsqueeze(1) * inputs.mask


def sign_of_the_kl(inputs: RewardInputs) -> Tensor:
    return plain.token_rewards(replace(inputs, kl_coef=-inputs.kl_coef))


def mean_kl(inputs: RewardInputs) -> Tensor:
    counts = inputs.mask.sum(1, keepdim=True)
    paid = plain.token_rewards(replace(inputs, scores=torch.zeros_like(inputs.scores))) / counts
    return paid + plain.token_rewards(replace(inputs, kl_coef=0.0))


def shift_left(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


def gae_of(inputs: GAEInputs, following: Tensor, decay: float, values: Tensor | None = None) -> Tensor:
    """(B, T) of given values after each token."""
    values = inputs.values.detach() if values is None else values
    errors = torch.where(inputs.mask, inputs.rewards + inputs.gamma * following - values, 0.0)
    advantages = torch.zeros_like(errors)
    last = torch.zeros(len(errors))
    for t in reversed(range(errors.shape[1])):
        last = errors[:, t] + decay * last
        advantages = advantages.index_fill(1, torch.tensor([t]), 0.0) + torch.eye(errors.shape[1])[t] * last[:, None]
    return advantages


def masked_values(inputs: GAEInputs) -> Tensor:
    return torch.where(inputs.mask, inputs.values.detach(), 0.0)


def value_of_padding_leaks(inputs: GAEInputs) -> Tensor:
    return gae_of(inputs, shift_left(inputs.values.detach()), inputs.gamma * inputs.gae_lambda)


def gamma_left_out_of_the_sum(inputs: GAEInputs) -> Tensor:
    return gae_of(inputs, shift_left(masked_values(inputs)), inputs.gae_lambda)


def every_end_is_terminal(inputs: GAEInputs) -> Tensor:
    return plain.gae(replace(inputs, truncated=torch.zeros_like(inputs.truncated)))


def no_end_is_terminal(inputs: GAEInputs) -> Tensor:
    return plain.gae(replace(inputs, truncated=torch.ones_like(inputs.truncated)))


def values_with_their_graph(inputs: GAEInputs) -> Tensor:
    following = shift_left(torch.where(inputs.mask, inputs.values, 0.0))
    return gae_of(inputs, following, inputs.gamma * inputs.gae_lambda, inputs.values)


def whitening_of_padding_too(numbers: Tensor, mask: Tensor) -> Tensor:
    return (numbers - numbers.mean()) / (numbers.std() + 1e-8)


def whitening_without_the_mean(numbers: Tensor, mask: Tensor) -> Tensor:
    return numbers / (numbers[mask].std() + 1e-8)


def groups_of_other_prompts(inputs: GroupInputs) -> Tensor:
    prompts = len(inputs.scores) // inputs.group_size
    groups = inputs.scores.view(inputs.group_size, prompts)  # should be (prompts, group_size)
    return (groups - groups.mean(0)).flatten()


def one_baseline_for_all(inputs: GroupInputs) -> Tensor:
    return inputs.scores - inputs.scores.mean()


def standardised(inputs: GroupInputs, epsilon: float) -> Tensor:
    groups = inputs.scores.view(-1, inputs.group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + epsilon)).flatten()


class Mutant(NamedTuple):
    """A bug and the invariant that it breaks; `changes` are of the plain trainer."""

    name: str
    breaks: str
    changes: dict[str, Any]


def detached(inputs: GroupInputs) -> Tensor:
    kl = ((inputs.log_probs - inputs.ref_log_probs) * inputs.mask).sum(1)
    return inputs.scores - kl


MUTANTS = [
    Mutant("padding is masked by its id", "eos-in-mask", {"response_mask": mask_of_what_is_not_padding}),
    Mutant("EOS is left out of the mask", "eos-in-mask", {"response_mask": mask_without_eos}),
    Mutant("padding is in the mask", "eos-in-mask", {"response_mask": mask_of_everything}),
    Mutant("logits of the token itself", "token-log-probs", {"log_probs": logits_of_the_token_itself}),
    Mutant("temperature forgotten", "temperature", {"log_probs": temperature_forgotten}),
    Mutant("temperature after the softmax", "temperature", {"log_probs": temperature_after_the_softmax}),
    Mutant("responses are cut to a fixed width", "right-padding", {"log_probs": width_that_is_fixed}),
    Mutant("padding is attended to", "left-padding", {"log_probs": attends_to_padding}),
    Mutant("positions count padding", "positions", {"log_probs": positions_of_columns}),
    Mutant("every row has the first row's padding", "row-mates", {"log_probs": mask_of_the_first_row}),
    Mutant("dropout left on", "dropout-off", {"prepare": lambda model, temperature: model}),
    Mutant("reference with the adapter on", "lora-reference", {"lora_log_probs": reference_with_the_adapter}),
    Mutant("EOS masked as padding", "eos-gradient", {"response_mask": mask_of_what_is_not_padding}),
    Mutant("EOS left out of the loss", "eos-gradient", {"response_mask": mask_without_eos}),
    Mutant("prompts are learned", "prompt-out-of-loss", {"model_loss": loss_on_prompts_too}),
    Mutant("padding is learned", "padding-unlearned", {"response_mask": mask_of_everything}),
    Mutant("sign of the loss", "all-tokens-learn", {"loss": sign_of_the_loss}),
    Mutant("mask not applied", "padding-out-of-loss", {"loss": mask_not_applied}),
    Mutant("padding counts in the mean", "more-padding", {"loss": padding_in_the_mean}),
    Mutant("ratio to the reference", "ratio-one", {"loss": ratio_to_the_reference}),
    Mutant("stale tokens taken as new", "off-policy", {"loss": stale_tokens_taken_as_new}),
    Mutant("ratio clamped without a minimum", "clip-comes-back", {"loss": clamp_without_a_minimum}),
    Mutant("mean of means over micro-batches", "micro-batches", {"loss": mean_over_the_micro_batch}),
    Mutant("mean of means over ranks", "ranks", {"loss": mean_over_the_rank}),
    Mutant("ranks are averaged and not undone", "ranks", {"loss": ranks_forgotten}),
    Mutant("0 tokens in a mean", "masked-response", {"loss": mean_over_no_tokens}),
    Mutant("a long response's tokens count less", "policy-gradient", {"loss": length_mean}),
    Mutant("k1 in the loss", "kl-gradient-token", with_kl(lambda new, ref: new - ref)),
    Mutant("k3 in the loss", "kl-gradient-token", with_kl(k3)),
    Mutant("sign of the KL in the loss", "kl-gradient-token", with_kl(lambda new, ref: -k2(new, ref))),
    Mutant("k2 of tokens in the loss", "kl-gradient-response", with_kl(k2)),
    Mutant("score on the last column", "score-at-last-token", {"token_rewards": score_on_the_last_column}),
    Mutant("score on the padding after", "score-at-last-token", {"token_rewards": score_on_the_padding_after}),
    Mutant("score on every token", "score-at-last-token", {"token_rewards": score_on_every_token}),
    Mutant("sign of the KL in the reward", "kl-in-reward", {"token_rewards": sign_of_the_kl}),
    Mutant("mean KL of a response", "kl-in-reward", {"token_rewards": mean_kl}),
    Mutant("gamma left out of lambda's sum", "gae", {"gae": gamma_left_out_of_the_sum}),
    Mutant("value of padding leaks", "gae-not-through-padding", {"gae": value_of_padding_leaks}),
    Mutant("truncation taken as termination", "truncation", {"gae": every_end_is_terminal}),
    Mutant("termination taken as truncation", "truncation", {"gae": no_end_is_terminal}),
    Mutant("values with their graph", "advantages-constant", {"gae": values_with_their_graph}),
    Mutant("log-probs with their graph", "advantages-constant", {"group_advantages": detached}),
    Mutant("padding is whitened", "whitening", {"whiten": whitening_of_padding_too}),
    Mutant("whitening leaves the mean", "whitening", {"whiten": whitening_without_the_mean}),
    Mutant("groups over the wrong axis", "group-axis", {"group_advantages": groups_of_other_prompts}),
    Mutant("one baseline for all prompts", "group-axis", {"group_advantages": one_baseline_for_all}),
    Mutant("0 / 0 in a group", "equal-scores", {"group_advantages": lambda inputs: standardised(inputs, 0.0)}),
    Mutant("rounding over 1e-8", "equal-scores", {"group_advantages": lambda inputs: standardised(inputs, 1e-8)}),
    Mutant("nobody looks at the ratio", "stale-detected", {"detect_stale": lambda new, old, mask: False}),
    Mutant(
        "the ratio of padding is looked at",
        "stale-detected",
        {"detect_stale": lambda new, old, mask: (new - old).abs().mean() > 1e-3},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_invariant_catches_the_mutant(mutant: Mutant) -> None:
    result = check_trainer(plain_trainer(**mutant.changes), raises=False, only=[mutant.breaks])[mutant.breaks]
    assert result.status == "FAILS"


def test_every_invariant_has_a_mutant() -> None:
    assert {mutant.breaks for mutant in MUTANTS} == set(INVARIANTS)


def test_the_plain_trainer_breaks_nothing() -> None:
    report = check_trainer(plain_trainer())
    assert set(report.named("ok")) == set(INVARIANTS)
