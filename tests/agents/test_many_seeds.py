"""Many seeds at once come to what each of them comes to alone; the runs are the slow twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyProblem, shifted
from shipped import ON_POLICY, class_of, fields_of

from agents.algorithms.grpo import GRPO, GRPOConfig
from agents.algorithms.klq import KLQ
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.reinforce import REINFORCE, REINFORCEConfig
from agents.batch import Minibatch
from agents.many_seeds import ManySeeds, check_agent
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.policies.stacked import StackedPolicy
from agents.stack import Stack
from agents.update import Loss
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.padding import pad_left

STACKED = ("a2c", "cispo", "dr_grpo", "grpo", "gspo", "klq", "ppo", "reinforce", "reinforce_pp", "rloo", "sapo")
SMALL = {"batch_size": 16, "width": 16, "layers": 1, "lr": 1e-3}
TOTAL = 400  # env steps of the schedule

Rows = list[tuple[int, dict[str, float]]]


@pytest.fixture(scope="module")
def tiny() -> TinyProblem:
    return TinyProblem(horizon=6)


def agent_of(kind: type[OnPolicyAgent], task: Any, seed: int, **numbers: Any) -> Any:
    config = kind.Config(**fields_of(kind, SMALL | numbers))
    rows: dict[str, Any] = {"group_size": config.responses, "autoreset_mode": "SameStep"}
    return kind(RLHFVectorEnv(config.num_envs, task=task, device="cpu", **rows), config, seed=shifted(seed))


def recording(rows: Rows, batches: int) -> Callable[[int, dict[str, float]], bool]:
    """A callback that notes the metrics, but those of a clock, and stops after so many batches."""

    def note(step: int, metrics: dict[str, float]) -> bool:
        rows.append((step, {name: x for name, x in metrics.items() if not name.startswith("time/")}))
        return len(rows) < batches

    return note


def train_alone(agent: OnPolicyAgent, batches: int, total: int = TOTAL) -> Rows:
    rows: Rows = []
    agent.learn(total, recording(rows, batches))
    return rows


def train_together(agents: list[Any], batches: int, total: int = TOTAL) -> list[Rows]:
    rows: list[Rows] = [[] for _ in agents]
    callbacks = {agent: recording(own, batches) for agent, own in zip(agents, rows, strict=True)}
    ManySeeds(agents).learn(total, callbacks)
    return rows


def check_equal(agent: Any, alone: Any, rows: Rows, expected: Rows) -> None:
    """Both have come to the same: metrics, weights, moments, and where their random numbers stand."""
    assert [step for step, _ in rows] == [step for step, _ in expected]
    for (_, metrics), (_, others) in zip(rows, expected, strict=True):
        assert metrics.keys() == others.keys()
        for name, value in metrics.items():
            assert value == pytest.approx(others[name], rel=1e-3, abs=1e-4, nan_ok=True), name
    for (name, weight), other in zip(agent.policy.named_parameters(), alone.policy.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-4, msg=name)
    own, theirs = (x.updater.optimizer.state_dict() for x in (agent, alone))
    assert own["state"].keys() == theirs["state"].keys()
    for number, state in own["state"].items():
        assert state["step"] == theirs["state"][number]["step"]
        torch.testing.assert_close(state["exp_avg"], theirs["state"][number]["exp_avg"], rtol=1e-2, atol=1e-4)
    assert [group["lr"] for group in own["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]
    assert torch.equal(agent.generator.get_state(), alone.generator.get_state())
    same_prompts = agent.envs.get_state() == alone.envs.get_state()
    assert same_prompts
    assert agent.kl.value == pytest.approx(alone.kl.value, rel=1e-5)
    assert agent.at_rest


@pytest.mark.parametrize("name", STACKED)
def test_each_seed_comes_to_what_it_comes_to_alone(name: str, tiny: TinyProblem) -> None:
    kind = class_of(name)
    numbers = {"kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 100.0, "minibatches": 2, "epochs": 2}
    agents, alone = ([agent_of(kind, tiny.task, seed, **numbers) for seed in (0, 1, 2)] for _ in range(2))
    together = train_together(agents, 3)
    for agent, other, rows in zip(agents, alone, together, strict=True):
        check_equal(agent, other, rows, train_alone(other, 3))


@pytest.mark.parametrize(
    "numbers",
    [
        {"adam": "tensorflow", "critic_lr": 1e-3, "max_grad_norm": 0.05, "lr_schedule": "cosine", "lr_warmup": 0.5},
        {"micro_batch_size": 3, "entropy_coef": 0.01, "loss_mean": "episode", "max_grad_norm": 0.0},
        {"target_kl": 1e-4, "epochs": 3, "minibatches": 2},
    ],
    ids=["optimiser", "micro-batches", "early stop"],
)
def test_a_residual_on_a_table_under_other_numbers(numbers: dict[str, Any]) -> None:
    agents, alone = ([agent_of(PPO, "echo-2", seed, **numbers) for seed in (3, 4)] for _ in range(2))
    together = train_together(agents, 2)
    for agent, other, rows in zip(agents, alone, together, strict=True):
        check_equal(agent, other, rows, train_alone(other, 2))
    if "target_kl" in numbers:
        assert {metrics["train/updates"] for rows in together for _, metrics in rows} != {6}


def test_a_task_that_truncates_and_has_a_noisy_reward() -> None:
    def agent(seed: int) -> Any:
        config = PPOConfig(**fields_of(PPO, SMALL))
        envs = RLHFVectorEnv(1, task="noise-1", truncate=True, autoreset_mode="SameStep", device="cpu")
        return PPO(envs, config, seed=seed)

    agents, alone = ([agent(seed) for seed in (0, 1)] for _ in range(2))
    together = train_together(agents, 2, 10_000)
    for own, other, rows in zip(agents, alone, together, strict=True):
        check_equal(own, other, rows, train_alone(other, 2, 10_000))


def test_seeds_that_end_after_unequal_numbers_of_batches(tiny: TinyProblem) -> None:
    first, agents, alone = (
        [agent_of(PPO, tiny.task, seed, lr_schedule="constant") for seed in range(3)] for _ in range(3)
    )
    total = max(train_alone(agent, 2)[-1][0] for agent in first)  # which some reach in two batches, others do not
    together = train_together(agents, 99, total)
    assert {len(rows) for rows in together} == {2, 3}
    for agent, other, rows in zip(agents, alone, together, strict=True):
        check_equal(agent, other, rows, train_alone(other, 99, total))


def test_a_seed_that_diverges_ends_alone(tiny: TinyProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    agents, alone = ([agent_of(PPO, tiny.task, seed) for seed in (0, 1, 2)] for _ in range(2))
    shape = agents[1].shape
    monkeypatch.setattr(agents[1], "shape", lambda *a: spoiled(shape(*a)))

    def spoiled(batch: Any) -> Any:
        batch.returns[0, 0] = torch.inf
        return batch

    rows: dict[Any, Rows] = {agent: [] for agent in agents}
    many = ManySeeds(agents)
    many.learn(TOTAL, {agent: recording(own, 2) for agent, own in rows.items()})
    assert list(many.failures) == [agents[1]]
    assert "Training has diverged: `returns` has 1 of" in str(many.failures[agents[1]])
    assert not rows[agents[1]]
    assert not agents[1].at_rest
    for i in (0, 2):
        check_equal(agents[i], alone[i], rows[agents[i]], train_alone(alone[i], 2))


def test_what_is_saved_goes_on_alone_and_together(tiny: TinyProblem, tmp_path: Any) -> None:
    agents, alone = ([agent_of(PPO, tiny.task, seed) for seed in (0, 1)] for _ in range(2))
    train_together(agents, 1)
    for i, agent in enumerate(agents):
        agent.save(tmp_path / str(i))
    for i, agent in enumerate(alone):
        train_alone(agent, 2)
        loaded = agent_of(PPO, tiny.task, 7)
        loaded.load(tmp_path / str(i))
        train_alone(loaded, 1)
        torch.testing.assert_close(list(loaded.policy.parameters()), list(agent.policy.parameters()), rtol=0, atol=1e-4)
    again = [agent_of(PPO, tiny.task, 7) for _ in agents]
    for i, agent in enumerate(again):
        agent.load(tmp_path / str(i))
    train_together(again, 1)
    for agent, other in zip(again, alone, strict=True):
        torch.testing.assert_close(list(agent.policy.parameters()), list(other.policy.parameters()), rtol=0, atol=1e-4)


# -- the stacked policy ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["fine-tuned", "residual"])
def policies(request: pytest.FixtureRequest, tiny: TinyProblem) -> list[Any]:
    """Three policies with weights of their own."""
    task = tiny.task if request.param == "fine-tuned" else "echo-4"
    found = [agent_of(PPO, task, seed).policy for seed in range(3)]
    for seed, policy in enumerate(found):
        generator = torch.Generator().manual_seed(seed)
        for weight in policy.parameters():
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return found


def test_a_stack_reads_as_its_policies_do(policies: list[Any]) -> None:
    ids = torch.randint(3, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([[0, 3, 7 + 1, 7 + 6]] * 3)
    read = StackedPolicy(policies).read_at(ids, columns)
    for seed, policy in enumerate(policies):
        one = policy.read_at(ids[seed], columns[seed] // 7, columns[seed] % 7)
        for found, expected in zip(read, one, strict=True):
            torch.testing.assert_close(found[seed], expected, rtol=1e-5, atol=1e-5)


def test_a_stack_has_the_gradients_of_its_policies(policies: list[Any]) -> None:
    ids = torch.randint(3, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([[0, 3, 7 + 1, 7 + 6]] * 3)
    stack = StackedPolicy(policies)

    def loss(read: Any, dim: int) -> torch.Tensor:
        chosen = read.logits.log_softmax(-1)[..., 1].square()
        return (chosen + read.values.square()).sum(dim)  # type: ignore[no-any-return]

    (gradients,) = torch.autograd.grad(loss(stack.read_at(ids, columns), 1).sum(), stack.weights)
    for seed, policy in enumerate(policies):
        weights = stack.ordered(policy)
        expected = torch.autograd.grad(
            loss(policy.read_at(ids[seed], columns[seed] // 7, columns[seed] % 7), 0), weights
        )
        for found, other in zip(stack.split(gradients[seed]), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


def test_a_stack_decodes_as_its_policies_do_and_rows_leave_it_one_by_one(policies: list[Any]) -> None:
    prompts = [[1, 2], [2], [2, 1, 1], [1], [2, 2], [1, 2, 1]]
    ids, mask = pad_left(prompts, 0)
    tokens = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(1))
    left = [torch.arange(6), torch.tensor([0, 1, 3, 5]), torch.tensor([5, 1]), torch.tensor([5])]
    state = StackedPolicy(policies).begin(ids, mask, 5)
    alone = [policies[row // 2].begin(ids[row : row + 1], mask[row : row + 1], 5) for row in range(6)]
    for t, rows in enumerate(left):
        torch.testing.assert_close(state.logits, torch.cat([alone[row].logits for row in rows]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.values, torch.cat([alone[row].values for row in rows]), rtol=1e-5, atol=1e-5)
        if t + 1 < len(left):
            state.keep(torch.tensor([rows.tolist().index(row) for row in left[t + 1]]))
            state.step(tokens[t, left[t + 1]])
            for row in left[t + 1]:
                alone[row].step(tokens[t, row : row + 1])


# -- what is refused -------------------------------------------------------------------------------------------------


class WithItsOwnUpdate(PPO):
    """An algorithm of somebody else's."""

    def update(self, batch: Any) -> dict[str, float]:
        return super().update(batch)


class WithItsOwnLoss(PPO):
    """An algorithm of somebody else's, for which nothing is in the way."""

    def loss(self, batch: Minibatch) -> Loss:
        return super().loss(batch)


def test_which_agents_are_refused() -> None:
    for name in ON_POLICY:
        kind = class_of(name)
        if name in STACKED:
            check_agent(kind, kind.Config())
        else:
            with pytest.raises(
                InvalidArgumentError, match=r"`agent` must be one without a `\w+` of its own where `seeds`"
            ):
                check_agent(kind, kind.Config())
    check_agent(WithItsOwnLoss, PPOConfig())
    with pytest.raises(InvalidArgumentError, match="without a `update` of its own"):
        check_agent(WithItsOwnUpdate, PPOConfig())
    for name in ("sft", "uniform"):
        with pytest.raises(InvalidArgumentError, match="must be one that learns from its own episodes, such as 'ppo'"):
            check_agent(class_of(name), class_of(name).Config())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (PPO, PPOConfig(policy="gru")),
        (PPO, PPOConfig(critic="reference")),
        (PPO, PPOConfig(collect="steps")),
        (PPO, PPOConfig(recompute_log_probs=True)),
        (PPO, PPOConfig(whiten_advantages="minibatch")),
        (GRPO, GRPOConfig(kl_estimator="exact")),
        (REINFORCE, REINFORCEConfig(gradient_checkpointing=True)),
        (REINFORCE, REINFORCEConfig(autocast="bfloat16")),
    ],
)
def test_which_numbers_are_refused(kind: type[OnPolicyAgent], config: OnPolicyConfig) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`agent\.\w+` must be .* where `seeds` is above 1, got"):
        check_agent(kind, config)


def test_weights_that_cannot_be_stacked_are_refused() -> None:
    agents = [agent_of(KLQ, "echo-2", seed, policy="mlp") for seed in (0, 1)]
    with pytest.raises(InvalidArgumentError, match="`agent.policy` must be 'auto', 'finetune' or 'transformer'"):
        Stack(agents)
