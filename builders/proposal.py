"""A policy near the optimum, by the cross-entropy method: the proposal of a bound from samples."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from builders.language_model import train_sft
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.optimum.bounds import Mixture
from lmgym.optimum.resampling import stratified
from lmgym.optimum.smc import smc
from lmgym.tasks.base import Task

REFERENCE_SHARE = 0.2  # of the reference in every mixture: it bounds the weights of responses that no fit has found
ROUNDS = 5
PROMPTS = 512  # a round
DRAWS = 64  # a prompt and round
TRAINED_DRAWS = 8  # of them that a fit learns from
EPOCHS = 3
LEARNING_RATE = 1e-3
BATCH_SIZE = 128


def fit_proposal(
    task: Task, generator: torch.Generator, *, rounds: int = ROUNDS, prompts: int = PROMPTS, verbose: bool = False
) -> Mixture:
    """Fits a copy of the reference to pi*, and mixes it with the reference (Rubinstein 1999; de Boer et al. 2005).

    Each round draws from the mixture so far, resamples the responses of each prompt by their weights
    pi_ref(y|x) exp(score / kl_coef) / q(y|x), and trains on the resampled ones by maximum likelihood. That minimises
    KL(pi* || q), which is large where q misses what pi* writes. A policy trained on the return minimises the other KL,
    and may forget all but one of several good answers. While a few draws hold all the weight, the weights are raised
    to a power below 1.

    Args:
        task: the MDP, at gamma = 1; its reference can be trained.
        generator: the source of all randomness.
        rounds: draws and fits. prompts: how many a round draws for. verbose: print a line a round.
    """
    lm = task.reference("cpu")
    prompt_ids = [ids for texts in task.prompts.values() for ids in lm.encode_all(tuple(texts))]
    order = torch.randperm(len(prompt_ids), generator=generator).tolist()
    model = copy.deepcopy(lm.model).requires_grad_(True)
    proposal: Policy = CausalPolicy(lm)
    for k in range(rounds):
        few = [prompt_ids[order[i % len(order)]] for i in range(k * prompts, (k + 1) * prompts)]
        got = smc(task, few, proposal, DRAWS, generator, resample_at=0)
        chosen = resample(got.log_weights, TRAINED_DRAWS, generator)
        sequences = [[*few[x], *got.response(x, s)] for x, row in enumerate(chosen.tolist()) for s in row]
        fit = train_sft(
            model,
            sequences,
            epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            batch_size=BATCH_SIZE,
            generator=generator,
            weight_decay=0.0,
            progress=False,
        )
        frozen = CausalLM(freeze(copy.deepcopy(model)), lm.tokenizer)
        proposal = Mixture([CausalPolicy(frozen), CausalPolicy(lm)], [1 - REFERENCE_SHARE, REFERENCE_SHARE])
        if verbose:
            size = effective_size(got.log_weights).mean().item()
            bound = task.kl_coef * got.log_z.mean().item()
            print(
                f"{task.name:18} round {k + 1}: V* >= {bound:.4f} on {prompts} prompts, {size:.1f} of {DRAWS} draws "
                f"effective, loss {fit['loss']:.3f}",
                flush=True,
            )
    assert isinstance(proposal, Mixture)
    return proposal


def resample(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(X, count) columns drawn by the weights (X, S) to the largest power <= 1 that leaves `count` effective draws."""
    low = 0.0
    high = 1.0
    if effective_size(log_weights).mean() >= count:
        low = 1.0
    else:
        for _ in range(30):
            middle = (low + high) / 2
            if effective_size(middle * log_weights).mean() >= count:
                low = middle
            else:
                high = middle
    uniforms = torch.rand((len(log_weights), count), generator=generator, dtype=torch.float64)
    return stratified(low * log_weights, uniforms)


def effective_size(log_weights: Tensor) -> Tensor:
    """(X,) (sum w)^2 / sum w^2 of (X, S) weights."""
    return (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()
