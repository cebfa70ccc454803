"""Our own agents as `lmgym.testing.check_trainer` takes trainers: the loop's parts, called with plain tensors.

Shapes: B episodes, T response columns, n chosen tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.advantages import whiten
from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.gspo import GSPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.algorithms.sapo import SAPO
from agents.batch import Batch, Minibatch, read_minibatch
from agents.diagnostics import check_ratio
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import GroupConfig, OnPolicyConfig
from agents.policies.actor_critic import Read, TrainablePolicy, read_logits
from agents.policies.lora import LoRAPolicy
from lmgym.ending import EndRule
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sampling import Sampler
from lmgym.tasks.base import Task
from lmgym.testing import GAEInputs, GroupInputs, LossInputs, Responses, RewardInputs, TrainerAdapter
from lmgym.testing.probes import VOCABULARY, rotary_model, word_tokenizer

HORIZON = 8  # at least the tokens of any response that is checked
ON_POLICY = "it takes one step a batch, so that no token is stale"
LENGTH_MEAN = "it divides by a response's length"
BY_DESIGN: dict[type[OnPolicyAgent], dict[str, str]] = {
    A2C: {"off-policy": ON_POLICY},
    REINFORCE: {"off-policy": ON_POLICY},
    RLOO: {"off-policy": ON_POLICY},
    GRPO: {
        "policy-gradient": f"{LENGTH_MEAN}; `length_mean=False` does not",
        "kl-gradient-token": "k3 in the loss has the gradient of another KL; `kl_estimator=exact` has its own",
        "kl-gradient-response": "a KL in the loss is of each token by itself",
    },
    GSPO: {"policy-gradient": LENGTH_MEAN},
    SAPO: {"off-policy": "the gate is soft: it damps a token before it is far", "policy-gradient": LENGTH_MEAN},
}


def adapt_agent(kind: type[OnPolicyAgent], **config: Any) -> TrainerAdapter:
    """An on-policy agent as a trainer.

    Args:
        kind: an algorithm whose `loss` is of one policy.
        config: its numbers, other than the defaults.
    """
    numbers: Any = {"epochs": 1, "minibatches": 1, "batch_size": 48} | config
    parts = _Parts(kind, kind.Config(**numbers))
    agent = parts.make()
    return TrainerAdapter(
        name=kind.__name__,
        prepare=parts.prepare,
        response_mask=_response_mask,
        log_probs=parts.log_probs,
        lora_log_probs=_lora_log_probs,
        loss=parts.loss,
        token_rewards=parts.token_rewards,
        gae=parts.gae if agent.uses_critic else None,
        group_advantages=parts.group_advantages if isinstance(agent.config, GroupConfig) else None,
        whiten=whiten,
        detect_stale=_detect_stale,
        by_design=BY_DESIGN.get(kind, {}),
    )


class _Parts:
    """An agent over the model and the numbers of each call."""

    def __init__(self, kind: type[OnPolicyAgent], config: OnPolicyConfig) -> None:
        self.kind = kind
        self.config = config
        self.agent: OnPolicyAgent | None = None  # of the model that `prepare` got last
        self.recall = cache(partial(self.make, None))  # agents that no call changes

    def make(
        self,
        model: Any = None,
        *,
        temperature: float = 1.0,
        kl_coef: float = 0.0,
        gamma: float = 1.0,
        **config: Any,
    ) -> OnPolicyAgent:
        """An agent over a task with these numbers."""
        numbers = replace(self.config, **config)
        task = Task(
            name="check",
            model=CausalLM(freeze(model if model is not None else rotary_model()), word_tokenizer()),
            reward=lambda prompts, completions, **_: [0.0] * len(prompts),
            prompts={"train": ["a"]},
            kl_coef=kl_coef,
            gamma=gamma,
            max_new_tokens=HORIZON,
        )
        envs = RLHFVectorEnv(
            numbers.num_envs, group_size=numbers.responses, autoreset_mode="SameStep", task=task, device="cpu"
        )
        return self.kind(envs, numbers, sampler=Sampler(temperature=temperature))

    def prepare(self, model: Any, temperature: float) -> Any:
        """The actor of an agent over a model."""
        self.agent = self.make(model, temperature=temperature)
        return self.agent.policy.actor

    def log_probs(self, model: Any, responses: Responses, temperature: float) -> Tensor:
        """(B, T) as an update reads them."""
        assert self.agent is not None
        assert model is self.agent.policy.actor
        return _read(self.agent.policy, self.agent.sampler, responses)

    def loss(self, inputs: LossInputs) -> Tensor:
        """The loss of a micro-batch, without what it adds for a critic."""
        if inputs.ranks > 1:
            raise NotImplementedError("processes share gradients in the loop, not in the loss")
        agent = self.recall(kl_coef=inputs.kl_coef)
        mask = inputs.mask
        row, positions = mask.nonzero(as_tuple=True)
        zeros = torch.zeros(len(row), dtype=inputs.log_probs.dtype)
        loss, _ = agent.loss(
            Minibatch(
                logits=zeros.unsqueeze(1).expand(-1, VOCABULARY),
                log_probs=inputs.log_probs[mask],
                entropies=zeros,
                old_log_probs=inputs.old_log_probs[mask],
                values=zeros,
                old_values=zeros,
                advantages=inputs.advantages[mask],
                returns=zeros,
                weights=torch.ones_like(zeros) / max(inputs.step_tokens, 1),
                episode_weights=torch.ones_like(zeros) / inputs.step_responses,
                lengths=mask.sum(-1)[row],
                positions=positions,
                ref_log_probs=inputs.ref_log_probs[mask],
            )
        )
        return loss + 0 * inputs.log_probs.sum()  # a graph, where no token is chosen

    def token_rewards(self, inputs: RewardInputs) -> Tensor:
        """(B, T) as the loop makes them."""
        agent = self.recall(kl_coef=inputs.kl_coef)
        return agent.rewards(_episodes_of(inputs))

    def gae(self, inputs: GAEInputs) -> Tensor:
        """(B, T) as the loop makes them, from a critic whose forward has a gradient."""
        agent = self.make(gamma=inputs.gamma)
        mask = inputs.mask
        zeros = torch.zeros(mask.shape)
        episodes = _episodes(mask, zeros, zeros, torch.zeros(len(mask)), ~inputs.truncated)
        critic: Any = SimpleNamespace(
            device=torch.device("cpu"),
            read=lambda _: Read(zeros, inputs.values[mask], zeros),
            read_at=lambda ids, rows, columns: Read(zeros, inputs.next_values, zeros),
        )
        critic.next_values = lambda some: TrainablePolicy.next_values(critic, some)
        agent.policy = critic
        episodes = replace(episodes, values=TrainablePolicy.values(critic, episodes))
        return agent.gae(episodes, inputs.rewards, inputs.gae_lambda)[0]

    def group_advantages(self, inputs: GroupInputs) -> Tensor:
        """(B, T) as the loop makes them."""
        size = inputs.group_size
        agent = self.recall(kl_coef=inputs.kl_coef, group_size=size, batch_size=size)
        episodes = _episodes_of(inputs)
        return agent.advantages(episodes, agent.rewards(episodes))[0]


def _episodes(mask: Tensor, log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, terminated: Tensor) -> Episodes:
    """Episodes whose ids do not matter."""
    ids = torch.full(mask.shape, 3)
    return Episodes(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones_like(ids[:, :1], dtype=torch.bool),
        response_ids=ids,
        response_mask=mask,
        log_probs=log_probs * mask,
        ref_log_probs=ref_log_probs * mask,
        scores=scores,
        values=torch.zeros_like(log_probs),
        terminated=terminated,
        prompt_index=torch.zeros(len(mask), dtype=torch.int64),
    )


def _episodes_of(inputs: RewardInputs) -> Episodes:
    """Episodes as `collect` gives them: what they carry are numbers without a gradient."""
    ended = torch.ones(len(inputs.mask), dtype=torch.bool)
    return _episodes(inputs.mask, inputs.log_probs.detach(), inputs.ref_log_probs.detach(), inputs.scores, ended)


def _episodes_to_read(responses: Responses) -> Episodes:
    """Episodes whose numbers do not matter."""
    mask = responses.response_mask
    zeros = torch.zeros(mask.shape)
    ended = torch.ones(len(mask), dtype=torch.bool)
    return replace(
        _episodes(mask, zeros, zeros, torch.zeros(len(mask)), ended),
        prompt_ids=responses.prompt_ids,
        prompt_mask=responses.prompt_mask,
        response_ids=responses.response_ids,
    )


def _read(policy: TrainablePolicy, sampler: Sampler, responses: Responses) -> Tensor:
    """(B, T) log-probs of a policy as an update reads them; 0 off the mask."""
    mask = responses.response_mask
    zeros = torch.zeros(mask.shape)
    episodes = _episodes_to_read(responses)
    read = read_minibatch(policy, sampler, Batch(episodes, zeros, zeros), mask.sum(), len(mask))
    return zeros.masked_scatter(mask, read.log_probs)


def _response_mask(ids: Tensor, eos: int, pad: int) -> Tensor:
    """(B, T) as the env counts tokens."""
    is_eos = np.arange(VOCABULARY) == eos
    lengths, _ = EndRule(is_eos, 0, ids.shape[1]).find_ends(ids.numpy())
    return torch.arange(ids.shape[1]) < torch.from_numpy(lengths).unsqueeze(1)


def _lora_log_probs(model: Any, responses: Responses, disturb: Callable[[Any], None]) -> tuple[Tensor, Tensor]:
    """(B, T) of the LoRA policy, and of the reference that shares its weights."""
    reference = CausalLM(freeze(model), word_tokenizer())
    policy = LoRAPolicy(reference)
    disturb(policy.actor)
    found = _read(policy, Sampler(), responses)
    mask = responses.response_mask
    log_probs = read_logits(reference, _episodes_to_read(responses)).log_softmax(-1)
    chosen = log_probs.gather(1, responses.response_ids[mask].unsqueeze(1))
    return found, torch.zeros(mask.shape).masked_scatter(mask, chosen.squeeze(1))


def _detect_stale(new: Tensor, old: Tensor, mask: Tensor) -> None:
    """Raises as the loop does after the first step of a batch."""
    check_ratio((new - old)[mask].abs().mean().item(), torch.float32)
