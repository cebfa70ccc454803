"""Gives an agent an engine, once it has been found to be one of the policy's model that takes the policy's weights.

Shapes: B episodes, T response columns.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.batch import recompute
from agents.diagnostics import log_prob_gap
from agents.faults.swapping import swapped
from agents.on_policy import OnPolicyAgent
from agents.policies.actor_critic import ActorCritic
from agents.remote.config import EngineConfig
from agents.remote.policy import RemotePolicy
from lmgym.envs.engine import Engine
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError, read_json
from lmgym.models.padding import pad_left
from lmgym.models.sampling import Sampler
from lmgym.remote.client import Client
from lmgym.remote.protocol import EngineError

_PROMPTS = 16  # that the check of the weights asks
_NOISE = 0.3  # of a weight's standard deviation, by which the weights of the check differ from the policy's
_NEAR = 0.25  # share of their difference by which an engine may be off the weights that it has been sent


def connect(agent: OnPolicyAgent, config: EngineConfig) -> None:
    """Has an engine sample the batches of an agent from now on.

    Raises:
        InvalidArgumentError: for an agent whose policy no engine can have, or an engine of another model.
        EngineError: for an engine that does not answer, or samples from other weights than it is sent.
    """
    assert config.url is not None
    policy = agent.policy
    if type(policy) is not ActorCritic:
        raise InvalidArgumentError(
            "`agent.policy` must be 'finetune' where an engine samples, which has a whole model and nothing beside it, "
            f"got a {type(policy).__name__}."
        )
    client = Client(config.url, config.timeout)
    engine = agent.envs.engine
    _check_lengths(client, engine)
    _check_log_probs(
        client, Sampler(agent.sampler.temperature * engine.lm.temperature, agent.sampler.top_k, agent.sampler.top_p)
    )
    _check_shape(client, engine.lm.model.config.to_dict())
    _check_vocabulary(client, engine)
    remote = RemotePolicy(policy, client, _directory(agent, config.weights))
    if config.check:
        _check_takes_weights(agent, policy, remote)
    agent.remote = remote


def _directory(agent: OnPolicyAgent, weights: str | None) -> Path:
    """The directory by which weights go; one that is removed with the agent where none is named."""
    if weights is not None:
        directory = Path(weights).absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFileError(f"`engine.weights` must be a directory, and {directory} is none: {error}.") from error
        return directory
    made = tempfile.TemporaryDirectory(prefix="lmgym-engine-")
    weakref.finalize(agent, made.cleanup)
    return Path(made.name)


def _check_lengths(client: Client, engine: Engine) -> None:
    length = engine.width + engine.horizon
    if client.max_tokens is not None and client.max_tokens < length:
        raise InvalidArgumentError(
            f"`engine.url` must take sequences of {length} tokens, prompt and response together, and {client.url} "
            f"takes {client.max_tokens}."
        )


def _check_log_probs(client: Client, sampler: Sampler) -> None:
    """Log-probs of the model's own distribution are those of another one than tokens are drawn from."""
    if sampler != Sampler() and client.logprobs_mode != "processed_logprobs":
        raise InvalidArgumentError(
            f"`engine.url` must give the log-probs of the distribution that it draws from, and {client.url} gives "
            f"{client.logprobs_mode}: start vLLM with --logprobs-mode processed_logprobs."
        )


def _check_shape(client: Client, own: Mapping[str, Any]) -> None:
    """Compares the sizes of two configs, where that of the engine can be read here."""
    path = Path(client.root) / "config.json"
    if not path.is_file():
        return
    served = read_json(path)
    if served.get("model_type") != own["model_type"]:
        raise InvalidArgumentError(
            f"`engine.url` must serve a model of type {own['model_type']!r}, and {client.url} serves {client.root!r}, "
            f"a {served.get('model_type')!r}."
        )
    for name, size in own.items():
        if type(size) is int and not name.endswith("token_id") and served.get(name, size) != size:
            raise InvalidArgumentError(
                f"`engine.url` must serve a model of the policy's shape, with {name}={size}, and {client.url} serves "
                f"{client.root!r}, with {name}={served[name]}."
            )


def _check_vocabulary(client: Client, engine: Engine) -> None:
    """The last token must be one for the engine, and the one after it none."""
    lm = engine.lm
    if not client.knows_token(lm.vocab_size - 1) or client.knows_token(lm.embedded):
        raise InvalidArgumentError(
            f"`engine.url` must serve a model of {lm.embedded} tokens, and {client.url} serves {client.root!r}, which "
            "has another vocabulary."
        )


def _check_takes_weights(agent: OnPolicyAgent, policy: ActorCritic, remote: RemotePolicy) -> None:
    """Sends other weights than the policy's, and compares the log-probs that come back with both."""
    parameters = policy.policy_parameters()
    with swapped(parameters, _noisy(parameters)):
        episodes = _ask(agent, remote)
        told = recompute(policy, agent.sampler, episodes, agent.config.micro_batch_size).episodes
    own = recompute(policy, agent.sampler, episodes, agent.config.micro_batch_size).episodes
    from_told = log_prob_gap(told, episodes.log_probs)
    from_own = log_prob_gap(told, own.log_probs)
    if not from_told < _NEAR * from_own:
        raise EngineError(
            f"The engine at {remote.client.url} must sample from the weights that it is sent: it was sent others than "
            f"the policy's, {from_own:.2g} nats a token apart, and its log-probs are {from_told:.2g} off those. Stale "
            "weights do that, a cache, and kernels that keep a copy. `engine.check=false` takes it as it is."
        )


def _noisy(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Weights near others, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        spread = parameter.detach().float().std(correction=0).to(parameter.dtype)
        found.append(parameter.detach() + _NOISE * spread * noise)
    return found


def _ask(agent: OnPolicyAgent, remote: RemotePolicy) -> Episodes:
    """Responses to a few prompts, with the log-probs that the engine gave; nothing is paid for them."""
    engine = agent.envs.engine
    step = max(1, len(engine.prompts) // _PROMPTS)
    prompts = [list(engine.prompts[i].ids) for i in range(0, len(engine.prompts), step)][:_PROMPTS]
    uniforms = torch.rand(
        (len(prompts), engine.horizon), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    response_ids, log_probs = remote.complete(engine.lm, prompts, agent.sampler, uniforms, engine.end_rule)
    lengths = torch.from_numpy(engine.end_rule.find_ends(response_ids.numpy())[0])
    prompt_ids, prompt_mask = pad_left(prompts, engine.lm.pad_token_id)
    return Episodes(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=torch.arange(engine.horizon) < lengths.unsqueeze(1),
        log_probs=log_probs,
        ref_log_probs=torch.zeros_like(log_probs),
        scores=torch.zeros(len(prompts)),
        values=None,
        terminated=torch.ones(len(prompts), dtype=torch.bool),
        prompt_index=torch.zeros(len(prompts), dtype=torch.int64),
    ).to(agent.policy.device)
