"""NLPO: the set that its mask leaves, by hand, and PPO's identities under it."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TinyProblem, learn, shifted
from directions import Ways, agent_of, cosine, direction, flat, parameters_of
from torch import Tensor

from agents.algorithms.nlpo import NLPO, NLPOConfig, mask_to_top_p
from agents.algorithms.ppo import PPO, PPOConfig
from agents.policies.actor_critic import read_logits
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.evaluation import evaluate
from lmgym.kl import episode_kl
from lmgym.models.sampling import Sampler
from lmgym.optimum.tree import Tree

KINDS = ["finetune", "transformer", "gru", "mlp"]


def tiny_envs(num_envs: int = 1, **task: Any) -> RLHFVectorEnv:
    made = TinyProblem(**task).task
    return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=made, device="cpu", prompt_order="sequential")


CONFIG = {"batch_size": 24, "micro_batch_size": 24, "epochs": 2, "minibatches": 2, "lr": 1e-2, "width": 8, "layers": 1}


def tiny_nlpo(envs: RLHFVectorEnv | None = None, *, seed: int = 0, sampler: Any = None, **config: Any) -> NLPO:
    made = NLPOConfig(**(CONFIG | {"mask_top_p": 0.6} | config))
    return NLPO(envs or tiny_envs(), made, seed=shifted(seed), sampler=sampler)


def moved(module: torch.nn.Module, scale: float = 0.3, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def likeliest(probs: Tensor, p: float) -> list[bool]:
    """The smallest set of likeliest tokens whose mass reaches p, by a loop."""
    kept = [False] * len(probs)
    mass = 0.0
    for token in probs.argsort(descending=True).tolist():
        if mass >= p:
            break
        kept[token] = True
        mass = mass + probs[token].item()
    return kept


def sets(agent: NLPO, episodes: Episodes) -> Tensor:
    """(n, V) bool: the mask policy's likeliest tokens at every chosen token."""
    with torch.no_grad():
        probs = agent.policy.mask.read(episodes).logits.softmax(-1)
    return torch.tensor([likeliest(row, agent.config.mask_top_p) for row in probs])


# -- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.55, [1, 3]), (0.79, [1, 3]), (0.81, [1, 3, 0]), (0.96, [0, 1, 2, 3])]
)
def test_the_set_by_hand(top_p: float, kept: list[int]) -> None:
    mask = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log() + 7.0
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.5]], requires_grad=True)
    distribution = mask_to_top_p(logits, mask, top_p).softmax(-1)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5]).exp()
    expected = torch.tensor([[weights[i] / weights[kept].sum() if i in kept else 0.0 for i in range(4)]])
    torch.testing.assert_close(distribution, expected)
    distribution[0, 1].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0] != 0).nonzero().flatten().tolist() in ([], sorted(kept))  # a set of one has no gradient


def test_what_was_chosen_stays() -> None:
    mask = torch.tensor([[0.15, 0.5, 0.05, 0.3]] * 2).log()
    logits = torch.zeros((2, 4))
    distribution = mask_to_top_p(logits, mask, 0.6, torch.tensor([[2], [1]])).softmax(-1)
    torch.testing.assert_close(distribution, torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3], [0.0, 0.5, 0.0, 0.5]]))


def test_at_1_everything_may_be_chosen_and_the_curve_is_ppos() -> None:
    ppo = PPO(tiny_envs(), PPOConfig(**CONFIG), seed=shifted())  # type: ignore[arg-type]
    assert learn(tiny_nlpo(mask_top_p=1.0), 3) == learn(ppo, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["episodes", "steps"])
def test_never_a_token_off_the_set(kind: Any, way: Any) -> None:
    agent = tiny_nlpo(tiny_envs(num_envs=96), policy=kind, collect=way, batch_size=96)
    moved(agent.policy.policy)
    moved(agent.policy.mask, seed=4)  # three distributions that differ: the policy, its mask, the reference
    agent.num_timesteps = 1
    episodes = agent.collect()
    kept = sets(agent, episodes)
    assert 0.1 < kept.float().mean() < 0.9
    chosen = episodes.response_ids[episodes.response_mask]
    assert kept.gather(1, chosen.unsqueeze(1)).all()
    with torch.no_grad():
        log_pi = agent.policy.policy.read(episodes).logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(agent.policy.read(episodes).logits.log_softmax(-1), log_pi)
    expected = log_pi.gather(1, chosen.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(episodes.log_probs[episodes.response_mask], expected, rtol=0, atol=1e-5)
    off = agent.policy.policy.read(episodes).logits.softmax(-1).masked_fill(kept, 0.0).sum(-1).mean()
    assert off > 0.05  # the unmasked policy would have left it


def test_predict_and_evaluation_stay_in_the_set() -> None:
    agent = tiny_nlpo(mask_top_p=0.3)
    envs = tiny_envs(num_envs=3)
    found = evaluate(agent.policy, envs, samples=50, generator=torch.Generator().manual_seed(0))
    chosen = found.episodes.response_ids[found.episodes.response_mask].unsqueeze(1)
    assert sets(agent, found.episodes).gather(1, chosen).all()
    observation, _ = envs.reset(seed=1)
    ids, mask = (torch.as_tensor(observation[name]) for name in ("input_ids", "attention_mask"))
    for row, use in zip(range(3), mask.bool(), strict=True):
        prompt = ids[row, use].unsqueeze(0)
        logits = agent.envs.engine.lm.model(input_ids=prompt).logits[0, -1, :6]
        kept = likeliest(logits.softmax(-1), 0.3)
        one = {name: x[row] for name, x in observation.items()}
        assert all(kept[int(agent.predict(one)[0])] for _ in range(30))
        assert int(agent.predict(one, deterministic=True)[0]) == logits.argmax()


# -- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_the_ratio_is_one_and_the_kl_is_that_of_the_mask(kind: Any) -> None:
    agent = tiny_nlpo(policy=kind, epochs=1, minibatches=1)
    episodes = agent.collect()
    probs = read_logits(agent.envs.engine.lm, episodes).softmax(-1)
    mass = (probs * sets(agent, episodes)).sum(-1)
    rows = episodes.response_mask.nonzero()[:, 0]
    expected = torch.zeros(24).index_add(0, rows, -mass.log())
    torch.testing.assert_close(episode_kl(episodes), expected, rtol=0, atol=1e-4)
    assert expected.min() > 0
    first, second = learn(tiny_nlpo(policy=kind, epochs=1, minibatches=1), 2)
    assert first["rollout/kl"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert 0 < first["rollout/exact_kl"] <= -3 * math.log(0.6)
    for metrics in (first, second):
        assert metrics["train/ratio_error"] < 1e-5
        assert all(math.isfinite(x) for x in metrics.values())
    assert first["train/clip_fraction"] == 0


@pytest.mark.parametrize("part", ["policy", "mask"])
def test_a_start_that_is_not_the_reference_is_loud(part: str) -> None:
    agent = tiny_nlpo()
    moved(getattr(agent.policy, part))
    with pytest.raises(RuntimeError, match="does not start as the reference"):
        learn(agent, 1)


def test_a_token_on_the_edge_of_the_set_does_not_fall_out_of_it() -> None:
    agent = tiny_nlpo(mask_top_p=0.6, batch_size=200, mask_update_every=10**6)
    episodes = agent.collect()
    agent.policy.top_p = 0.3  # as if rounding had made every set smaller
    with torch.no_grad():
        log_pi = agent.policy.read(episodes).logits.log_softmax(-1)
    chosen = episodes.response_ids[episodes.response_mask].unsqueeze(1)
    assert log_pi.gather(1, chosen).isfinite().all()


# -- the mask policy -------------------------------------------------------------------------------------------------


def parameters_of_policy(module: torch.nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {k: x.clone() for k, x in state.items() if k.split(".")[0] not in ("critic", "value_head")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("kind", "critic"), [*((k, "shared") for k in KINDS), ("finetune", "reference")])
def test_the_mask_policy_follows_every_few_batches(kind: Any, critic: Any) -> None:
    agent = tiny_nlpo(policy=kind, critic=critic, mask_update_every=3)
    policies = [parameters_of_policy(agent.policy.policy)]
    masks = [parameters_of_policy(agent.policy.mask)]
    for _ in range(7):
        learn(agent, 1)
        policies.append(parameters_of_policy(agent.policy.policy))
        masks.append(parameters_of_policy(agent.policy.mask))
    assert not any(same(a, b) for a, b in itertools.pairwise(policies))
    for n, mask in enumerate(masks):
        assert same(mask, policies[n - n % 3])
    assert not any(p.requires_grad for p in agent.policy.mask.parameters())
    episodes = agent.collect()
    with torch.no_grad():  # and what it says is its own
        assert not torch.equal(agent.policy.mask.read(episodes).logits, agent.policy.policy.read(episodes).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "critic"), [("finetune", "reference"), ("gru", "shared")])
def test_an_interrupted_run_goes_on_to_the_same_curve(tmp_path: Any, kind: Any, critic: Any) -> None:
    def agent() -> NLPO:
        return tiny_nlpo(policy=kind, critic=critic, mask_update_every=2)

    whole = learn(agent(), 5, total=400)
    first = agent()
    second = agent()
    curve = learn(first, 3, total=400)
    first.save(tmp_path / "checkpoint")
    first.save(tmp_path / "checkpoint")  # over an older one
    learn(second, 1, total=400)  # a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert same(parameters_of_policy(second.policy.mask), parameters_of_policy(first.policy.mask))
    assert not same(parameters_of_policy(second.policy.mask), parameters_of_policy(second.policy.policy))
    assert curve + learn(second, 2, total=400) == whole


def masked_distribution(agent: NLPO, episodes: Episodes) -> Tensor:
    """(n, V) logits of what is played; `policy.read` would keep every response of a tree possible."""
    with torch.no_grad():
        mask = agent.policy.mask.read(episodes).logits
    return mask_to_top_p(agent.unmasked.read(episodes).logits, mask, agent.config.mask_top_p)


# -- the expected direction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.6, 0.9])
def test_the_expected_update_is_along_the_gradient_of_js_masked_distribution(top_p: float) -> None:
    """With the mask held, by a sum over all responses; those off the mask's sets have probability 0."""
    tree = Tree.of(TinyProblem().task, "train")
    numbers = {"gae_lambda": 1.0, "vf_coef": 0.0, "whiten_advantages": "none", "mask_top_p": top_p}
    agent: Any = agent_of(NLPO, tree.task, **numbers)

    def unmasked(episodes: Episodes) -> Tensor:
        return agent.unmasked.read(episodes).logits

    def masked(episodes: Episodes) -> Tensor:
        return masked_distribution(agent, episodes)

    def gradient(distribution: Any) -> Tensor:
        return flat(tree.gradient(distribution, parameters)[1], parameters)

    parameters = parameters_of(agent)
    probs = tree.evaluate(masked).log_probs.exp() / len(tree.prompts)
    assert 0 < (probs > 0).double().mean() < 0.2
    found = direction(agent, tree, Ways(torch.arange(len(probs)), probs)) * (probs @ tree.episodes.lengths.double())
    right = gradient(masked)
    assert cosine(found, right) > 1 - 1e-5
    assert found.norm().item() == pytest.approx(right.norm().item(), rel=1e-3)
    assert cosine(gradient(unmasked), right) < 0.95


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Sampler(temperature=0.7), Sampler(top_k=2)])
def test_the_samplers_distribution_is_of_what_the_mask_leaves(sampler: Sampler) -> None:
    for metrics in learn(tiny_nlpo(sampler=sampler, entropy_coef=0.01), 3):
        assert metrics["train/ratio_error"] < 1e-5
        assert all(math.isfinite(x) for x in metrics.values())


def test_what_drifts_off_the_mask_shows_at_the_next_copy_alone() -> None:
    """A token off the set may gain any mass under the policy: the masked one does not change, until it is copied."""
    logits = torch.tensor([[2.0, 1.5, -3.0, -4.0]])
    drifted = torch.tensor([[2.0, 1.5, 1.8, -4.0]])
    distribution, same = (mask_to_top_p(x, logits, 0.9).softmax(-1) for x in (logits, drifted))
    assert torch.equal(distribution, same)
    copied = mask_to_top_p(drifted, drifted, 0.9).softmax(-1)
    assert copied[0, 2] == pytest.approx(drifted.softmax(-1)[0, 2].item() / (1 - drifted.softmax(-1)[0, 3].item()))
    assert copied[0, 2] > 0.3


@pytest.mark.slow
def test_nlpo_learns() -> None:
    """Graded without sampling, after its third copy; at eight seeds the gain is 0.30 to 0.62, of at most 0.73."""
    numbers = {"batch_size": 96, "micro_batch_size": 96, "mask_top_p": 0.9, "epochs": 4, "lr": 1e-3}
    agent = tiny_nlpo(tiny_envs(kl_coef=0.1), **numbers)
    tree = Tree.of(agent.envs.task, "train")
    before = tree.evaluate(partial(masked_distribution, agent)).value
    learn(agent, 15)
    after = tree.evaluate(partial(masked_distribution, agent)).value
    assert before + 0.12 < after <= tree.solve().value


@pytest.mark.parametrize(
    ("name", "value"), [("mask_top_p", 0.0), ("mask_top_p", 1.5), ("mask_update_every", 0), ("clip_range", 0.0)]
)
def test_bad_numbers_are_told(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{name}`"):
        NLPOConfig(**{name: value})  # type: ignore[arg-type]
