"""A GPU beside a CPU: the same episodes, and a whole training run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS, gpt2, word_count, word_tokenizer

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.rollout import collect
from lmgym.tasks import Task

EOS = 1
V = len(WORDS) + 3


def on_gpu(lm: CausalLM) -> CausalLM:
    return CausalLM(freeze(copy.deepcopy(lm.model).to("cuda")), lm.tokenizer)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [5, 64])
def test_a_gpu_collects_what_a_cpu_collects(batch: int) -> None:
    model = gpt2(V, seed=11, scale=0.25)
    with torch.no_grad():  # responses of all lengths, so that the batch is halved more than once
        model.transformer.ln_f.bias += model.lm_head.weight[EOS]
    lm = CausalLM(freeze(model), word_tokenizer())
    prompts = {"train": ["the film was", "a very good book", "dull"]}
    task = Task(name="t", model=lm, reward=word_count, prompts=prompts, kl_coef=0.1, max_new_tokens=30)
    head = torch.nn.Linear(32, 1)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        reference = lm if device == "cpu" else on_gpu(lm)
        envs = RLHFVectorEnv(1, task=task, model=reference, device=device, prompt_order="sequential")
        policy = CausalPolicy(reference, copy.deepcopy(head).to(device))
        found[device] = collect(envs, policy, batch, None, torch.Generator().manual_seed(0))
    one = found["cpu"]
    other = found["cuda"]
    # A uniform may fall between the two roundings of a distribution.
    alike = (one.response_ids == other.response_ids).all(1)
    assert alike.float().mean() > 0.9
    assert one.lengths.float().std() > 5
    for name in ("log_probs", "ref_log_probs", "values"):
        left = getattr(one, name)[alike]
        right = getattr(other, name)[alike]
        torch.testing.assert_close(left, right, rtol=0, atol=1e-3, msg=name)
    assert torch.equal(one.response_mask[alike], other.response_mask[alike])


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agents.train", "device=cuda", "total_timesteps=4000", "evaluation.samples=2"]
    done = subprocess.run([*command, f"hydra.run.dir={tmp_path / 'run'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["return"]["mean"] > summary["before"]["return"]["mean"]
