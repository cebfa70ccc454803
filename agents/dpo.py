"""Direct preference optimisation (Rafailov et al. 2023): the policy itself is fitted to preferences, as a reward model.

Shapes: B responses, n pairs, K ranked completions a prompt, P prompt columns, T response columns.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import Callback, OnPolicyConfig, make_policy
from agents.fixed import act
from agents.residual import Network
from lmgym.envs.engine import Engine
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number
from lmgym.feedback.annotators import preference_probability
from lmgym.feedback.preferences import Rankings
from lmgym.kl import check_sampled_law, discounted_return, episode_kl, token_rewards
from lmgym.models.causal import token_log_probs
from lmgym.models.sampling import Sampler
from lmgym.rollout import collect

Mode = Literal["online", "offline"]
Labels = Literal["bradley_terry", "argmax"]


@dataclass(frozen=True)
class DPOConfig:
    """DPO's numbers."""

    num_envs: ClassVar[int] = 1

    mode: Mode = "online"  # pairs sampled from the policy as it is, labelled by the task's score; or those of a file
    rankings: str | None = None  # a file that `lmgym.feedback.preferences.Rankings` wrote, for offline
    labels: Labels = "bradley_terry"  # online: preferred at random, with probability sigmoid(score - other), or always
    beta: float | None = None  # units of the score a nat; null is the task's kl_coef
    batch_size: int = 64  # pairs an optimiser step
    epochs: int = 1  # online: passes over each batch; offline: over the file
    lr: float = 5e-4  # Adam's, at first
    lr_schedule: Literal["constant", "linear"] = "linear"  # linear ends at 0 with the run, offline with the last pass
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 does not clip
    policy: Literal["auto", "finetune", Network] = "auto"  # a copy of the reference, or a residual on its logits
    width: int = 64  # of a residual network's hidden states
    layers: int = 2  # of a residual network

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("labels", self.labels, get_args(Labels))
        check_choice("lr_schedule", self.lr_schedule, ("constant", "linear"))
        check_choice("policy", self.policy, ("auto", "finetune", *get_args(Network)))
        for name in ("batch_size", "epochs", "width", "layers"):
            check_int(name, getattr(self, name), 1)
        for name in ("lr", "adam_eps", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)
        if self.beta is not None:
            check_number("beta", self.beta, 0, open_low=True)
        if (self.rankings is None) != (self.mode == "online"):
            expected = "null where `mode` is 'online'" if self.mode == "online" else "a file where `mode` is 'offline'"
            raise InvalidArgumentError(f"`rankings` must be {expected}, got {self.rankings!r}.")
        if self.rankings is not None and not os.path.isfile(self.rankings):
            raise InvalidArgumentError(f"`rankings` must be a file, and there is none at {self.rankings!r}.")


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to one prompt each.

    Attributes:
        episodes: B responses; one may be in several pairs. `ref_log_probs` are those of the reference.
        chosen: (n,) int64 rows of the preferred ones. rejected: (n,) of the others.
    """

    episodes: Episodes
    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.chosen)


class DPO:
    """Learns from pairs of responses, one of which was preferred; no reward model and no critic.

    Offline, `num_timesteps` counts the response tokens learned from, for no env step is taken. Online, as ever, the
    tokens sampled.

    Args:
        envs: the token MDP.
        config: the algorithm's numbers.
        seed: of the tokens sampled, of the labels, of the order of pairs, and of the weights of a residual.
        sampler: the law that pairs are drawn from, given the policy's logits. The loss is of the policy itself.

    Raises:
        InvalidArgumentError: for a file of rankings that does not fit the task, and at a beta of 0.
    """

    Config: ClassVar[type[DPOConfig]] = DPOConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: DPOConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        self.envs, self.config, self.sampler = envs, config or DPOConfig(), sampler or Sampler()
        config = self.config
        self.beta = envs.kl_coef if config.beta is None else config.beta
        if self.beta == 0:
            raise InvalidArgumentError("`beta` must be given where the task's `kl_coef` is 0, got null.")
        shape = OnPolicyConfig(policy=config.policy, width=config.width, layers=config.layers)
        self.policy = make_policy(envs, shape, seed)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=config.lr, eps=config.adam_eps)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_timesteps = 0
        envs.reset(seed=seed)
        self._file = None if config.rankings is None else pairs_of(Rankings.load(config.rankings), envs.engine)
        self._order, self._passes = torch.zeros(0, dtype=torch.int64), 0  # what is left of a pass; passes begun

    # -- the loop ------------------------------------------------------------------------------------------------

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `num_timesteps` is `total_timesteps` in all; offline at most `epochs` passes over the file.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: sees (num_timesteps, metrics) after every batch; training stops if it returns False.
        """
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            metrics: dict[str, float] = {}
            if self._file is None:
                progress = self.num_timesteps / total_timesteps
                pairs = self._sample()
                metrics |= self._describe(pairs.episodes)
                tokens, updates = pairs.episodes.num_tokens, self.config.epochs
            else:
                progress = (self._passes - len(self._order) / len(self._file)) / self.config.epochs
                rows = self._next_rows(len(self._file))
                if rows is None:
                    return
                pairs = Pairs(self._file.episodes, self._file.chosen[rows], self._file.rejected[rows])
                tokens, updates = int(pairs.episodes.lengths[torch.cat([pairs.chosen, pairs.rejected])].sum()), 1
            lr = self.config.lr * (1 - progress if self.config.lr_schedule == "linear" else 1)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            history = [self._step(pairs) for _ in range(updates)]
            metrics |= {name: sum(row[name] for row in history) / updates for name in history[0]}
            metrics["train/lr"] = lr
            self.num_timesteps += tokens
            metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
            if callback is not None and callback(self.num_timesteps, metrics) is False:
                return

    def _sample(self) -> Pairs:
        """Two responses of the policy to each of `batch_size` prompts, labelled by their scores."""
        prompts = [prompt for prompt in self.envs.next_prompts(self.config.batch_size) for _ in range(2)]
        episodes = collect(self.envs, self.policy, prompts, self.sampler, self.generator)
        if self.envs.kl_coef > 0:
            check_sampled_law(episode_kl(episodes))
        else:  # the env has not asked the reference
            episodes = _with_reference(self.envs.engine, episodes)
        scores = episodes.scores.double().view(-1, 2)
        if self.config.labels == "argmax":
            first = (scores[:, 0] - scores[:, 1]).sign() / 2 + 0.5  # a tie is a coin toss
        else:
            first = torch.from_numpy(preference_probability(scores[:, 0], scores[:, 1], 1.0))
        uniforms = torch.rand(len(first), generator=self.generator, dtype=torch.float64)
        chosen = 2 * torch.arange(len(first)) + (uniforms >= first)
        return Pairs(episodes, chosen, chosen ^ 1)

    def _describe(self, episodes: Episodes) -> dict[str, float]:
        task = self.envs.task
        returns = discounted_return(token_rewards(episodes, task.kl_coef, dense=task.dense_kl), task.gamma)
        metrics = {"rollout/return": returns.mean().item(), "rollout/score": episodes.scores.mean().item()}
        if episodes.gold_scores is not None:
            metrics["rollout/gold_score"] = episodes.gold_scores.mean().item()
        metrics["rollout/kl"] = episode_kl(episodes).mean().item()
        return metrics | {"rollout/length": episodes.lengths.float().mean().item()}

    def _next_rows(self, total: int) -> Tensor | None:
        """The next `batch_size` of `total` pairs, each once a pass, the last ones of a pass fewer; None at the end."""
        if not len(self._order):
            if self._passes == self.config.epochs:
                return None
            self._order, self._passes = torch.randperm(total, generator=self.generator), self._passes + 1
        rows, self._order = self._order[: self.config.batch_size], self._order[self.config.batch_size :]
        return rows

    def _step(self, pairs: Pairs) -> dict[str, float]:
        """One optimiser step on pairs."""
        chosen, rejected = self.log_ratios(pairs.episodes[torch.cat([pairs.chosen, pairs.rejected])]).chunk(2)
        loss = dpo_loss(chosen, rejected, self.beta).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        self.optimizer.step()
        margins = self.beta * (chosen - rejected).detach()
        return {
            "train/loss": loss.item(),
            "train/accuracy": ((margins.sign() + 1) / 2).mean().item(),
            "train/margin": margins.mean().item(),
            "train/grad_norm": norm.item(),
        }

    def log_ratios(self, episodes: Episodes) -> Tensor:
        """(B,) log pi(y|x) / pi_ref(y|x), nats a response; differentiable."""
        episodes = episodes.to(self.policy.device)
        mask = episodes.response_mask
        log_probs = token_log_probs(self.policy.read(episodes).logits, episodes.response_ids[mask])
        gaps = log_probs - episodes.ref_log_probs[mask]
        return gaps.new_zeros(len(episodes)).index_add(0, mask.nonzero()[:, 0], gaps)

    # -- acting, saving, loading ---------------------------------------------------------------------------------

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation, as SB3's `predict`: (actions, None)."""
        horizon = self.envs.engine.horizon
        return act(self.policy, observation, horizon, self.sampler, self.generator, deterministic), None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what a resumed run needs, under a temporary name first.

        `AutoModelForCausalLM` loads a fine-tuned policy; a residual is no model of its own.
        """
        directory = Path(directory)
        scratch, old = (directory.with_name(f".{directory.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.policy.save(scratch)
        training = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        torch.save(training | {"order": self._order.clone()}, scratch / "training.pt")
        state = {"num_timesteps": self.num_timesteps, "passes": self._passes, "config": asdict(self.config)}
        state["prompts"] = self.envs.prompt_state()
        reward = self.envs.engine.reward
        if hasattr(reward, "get_state"):  # one that draws its own noise
            state["reward"] = reward.get_state()
        (scratch / "state.json").write_text(json.dumps(state))
        if directory.exists():
            os.replace(directory, old)
        os.replace(scratch, directory)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote: the same curve as if there had been no break."""
        directory = Path(directory)
        self.policy.load(directory)
        training = torch.load(directory / "training.pt", weights_only=True, map_location=self.policy.device)
        self.optimizer.load_state_dict(training["optimizer"])
        self.generator.set_state(training["generator"].cpu())
        state = json.loads((directory / "state.json").read_text())
        self.num_timesteps, self._passes, self._order = state["num_timesteps"], state["passes"], training["order"].cpu()
        self.envs.restore_prompt_state(state["prompts"])
        if "reward" in state:
            self.envs.engine.reward.set_state(state["reward"])  # type: ignore[attr-defined]


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (h_chosen - h_rejected)), h = log pi / pi_ref (Rafailov et al. 2023, eq. 7).

    Args:
        chosen: (n,) log pi(y|x) / pi_ref(y|x) in nats of the preferred responses. rejected: (n,) of the others.
        beta: units of the score a nat, > 0.

    Returns:
        (n,) nats; log 2 where pi is the reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def pairs_of(rankings: Rankings, engine: Engine) -> Pairs:
    """Every pair of every ranking, as token ids, with the reference's log-probs.

    Args:
        rankings: K completions to each prompt; all K (K - 1) / 2 pairs count alike.
        engine: of the task.

    Raises:
        InvalidArgumentError: for a prompt or a completion that is none of the task's.
    """
    if not len(rankings):
        raise InvalidArgumentError("`rankings` must hold at least one prompt, got none.")
    prompts, responses = [], []
    for text, completions in zip(rankings.prompts, rankings.completions, strict=True):
        prompt = engine.prompts.of_text(text)
        prompts += [prompt] * len(completions)
        responses += [_response_ids(engine, text, prompt, completion) for completion in completions]
    k = rankings.num_ranked
    chosen, rejected = zip(
        *(
            (k * row + order[better], k * row + order[worse])
            for row, order in enumerate(rankings.ranking)
            for better, worse in itertools.combinations(range(k), 2)
        ),
        strict=True,
    )
    return Pairs(_episodes(engine, prompts, responses), torch.tensor(chosen), torch.tensor(rejected))


def _response_ids(engine: Engine, text: str, prompt: Prompt, completion: str) -> list[int]:
    """Token ids of a completion: those that the text of both has behind the prompt's."""
    tokenizer = engine.lm.tokenizer
    added = len(tokenizer(text)["input_ids"]) - len(prompt.ids)  # what the tokenizer puts behind every text
    ids = tokenizer(text + completion)["input_ids"]
    ids = ids[: len(ids) - added]
    response, start = ids[len(prompt.ids) :], engine.task.min_new_tokens
    if tuple(ids[: len(prompt.ids)]) != prompt.ids or not 1 <= len(response) <= engine.horizon:
        raise InvalidArgumentError(
            f"`completions` must add 1 to {engine.horizon} tokens to those of their prompt, and {completion!r} behind "
            f"{text!r} does not."
        )
    if any(engine.is_eos[i] for i in response[start:-1]):
        raise InvalidArgumentError(f"`completions` must end at their first EOS, and {completion!r} goes on behind it.")
    return response


def _episodes(engine: Engine, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> Episodes:
    """Responses that nobody has scored."""
    b, horizon = len(prompts), engine.horizon
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(horizon) < lengths.unsqueeze(1)
    ids = torch.full((b, horizon), engine.lm.pad_token_id)
    ids[mask] = torch.tensor([token for response in responses for token in response])
    prompt_ids, prompt_mask = engine.left_padded(prompts)
    episodes = Episodes(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids,
        response_mask=mask,
        log_probs=torch.zeros((b, horizon)),
        ref_log_probs=torch.zeros((b, horizon)),
        scores=torch.full((b,), math.nan),
        values=None,
        terminated=torch.ones(b, dtype=torch.bool),
        prompt_index=torch.tensor([prompt.index for prompt in prompts]),
    )
    return _with_reference(engine, episodes)


def _with_reference(engine: Engine, episodes: Episodes) -> Episodes:
    parts = (episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, episodes.response_mask)
    return replace(episodes, ref_log_probs=engine.lm.response_log_probs(*parts).clone())
