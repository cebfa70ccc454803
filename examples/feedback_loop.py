"""The loop of RLHF, a row a round: completions, labels, a reward model, a policy trained against it, and again.

    python -m examples.feedback_loop --rounds 3 --labels 300 --steps 20000

The first completions are the reference's, the next ones the new policy's. The annotators are simulated: they feel the
hidden score of `reviews`, with noise. So the accuracy of the reward model is known, and so is what the policy is worth.
One run is noisy, and need not rise: `python -m agents.worth rounds=3` gives means over seeds.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from typing import Any

import gymnasium as gym

import lmgym
from agents.algorithms.ppo import PPO
from agents.algorithms.reference import Reference
from agents.runs.completions import Request, Writer, write_completions
from agents.runs.worth_cell import order_agreement
from lmgym.evaluation import Evaluation
from lmgym.feedback.records import Record
from lmgym.feedback.scoring import score_records
from lmgym.feedback.simulation import Annotators
from lmgym.reward_models.training import train_reward


def accuracy(evaluation: Evaluation) -> float:
    """Share of pairs of a prompt's completions that the score orders as the hidden score does."""
    scores = evaluation.episodes.scores.view(PROMPTS, -1)
    gold: Any = evaluation.episodes.gold_scores
    return order_agreement(scores, gold.view(PROMPTS, -1)).nanmean().item()


PROMPTS = 64  # of the test split

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rounds of feedback on lmgym/Reviews-v0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=300, help="choices between two completions, in each round")
    parser.add_argument("--steps", type=int, default=20_000, help="tokens that each policy is trained on")
    args = parser.parse_args()
    task = lmgym.make_task("reviews")
    lm = task.reference("cpu")
    config = PPO.Config()
    make: Any = {"num_envs": config.num_envs, "autoreset_mode": "SameStep", "device": "cpu"}
    writer: Any = Reference(gym.make_vec("lmgym/RLHF-v0", task=task, **make).unwrapped)
    people = Annotators(temperature=1.0)
    records: list[Record] = []
    print("labels  accuracy on the old and on the new policy's pairs  gold score  KL  gold return")
    for number in range(args.rounds):
        request = Request(["reference"], {}, samples=2, seed=number)
        completions = write_completions(request, [Writer("policy", "reviews", writer, writer.envs)])
        fresh = (replace(record, id=f"{record.id}-{number}") for record in completions)
        records += itertools.islice(people.judge(score_records(fresh, "reviews")), args.labels)
        learned = replace(task, reward=train_reward(records, lm.model, lm.tokenizer, seed=number).reward(), optima={})
        old = writer
        envs: Any = gym.make_vec("lmgym/RLHF-v0", task=learned, **make).unwrapped
        writer = PPO(envs, config, seed=number)
        writer.learn(args.steps, lambda step, metrics: True)
        test: Any = gym.make_vec("lmgym/RLHF-v0", task=learned, split="test", **make).unwrapped
        before, after = (agent.evaluate(test, samples=8, prompts=PROMPTS) for agent in (old, writer))
        gold = after.metrics["gold_score"].mean
        kl = after.metrics["kl"].mean
        row = f"{accuracy(before):.3f} {accuracy(after):.3f}  {gold:.3f}  {kl:.2f}  {gold - task.kl_coef * kl:.3f}"
        print(f"{len(records):>6}  {row}", flush=True)
