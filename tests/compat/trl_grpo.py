"""TRL: two steps of GRPO on a built-in task, then J of what it learned."""

import copy
import tempfile

import gymnasium as gym
from trl import GRPOConfig, GRPOTrainer

from lmgym.evaluation import evaluate
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.tasks import make_task
from lmgym.trl import as_trl

task = make_task("reviews")
data, reward = as_trl(task, device="cpu")
lm = task.reference("cpu")
model = copy.deepcopy(lm.model).requires_grad_(True)
config = GRPOConfig(
    output_dir=tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=16, num_generations=8, report_to=[],
    max_completion_length=task.max_new_tokens, beta=task.kl_coef, use_cpu=True, bf16=False, logging_steps=1,
)  # fmt: skip
trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=lm.tokenizer)
trainer.train()
logged = [row for row in trainer.state.log_history if f"rewards/{reward.__name__}/mean" in row]
assert len(logged) == 2, trainer.state.log_history
envs = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
policy = CausalPolicy(CausalLM(freeze(model.eval()), lm.tokenizer))
found = evaluate(policy, envs, samples=2, prompts=16)
print("J", found.metrics["return"].mean, "reward", logged[-1][f"rewards/{reward.__name__}/mean"])
