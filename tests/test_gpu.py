"""What only a GPU runs: captured decoding steps, batches that are halved, and whole training runs."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS, gpt2, tiny_lm, word_count, word_tokenizer
from transformers import LlamaConfig

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models import cuda_graphs
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.models.ring import RingDecoder
from lmgym.rollout import collect
from lmgym.tasks import Task

EOS = 1
V = len(WORDS) + 3
SLOTS = 6
CAPACITY = 12


def on_gpu(lm: CausalLM) -> CausalLM:
    return CausalLM(freeze(copy.deepcopy(lm.model).to("cuda")), lm.tokenizer)


@pytest.fixture(params=["GPT-2", "Llama"])
def lm(request: pytest.FixtureRequest) -> CausalLM:
    if request.param == "GPT-2":
        return CausalLM(freeze(gpt2(V)), word_tokenizer())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_lm(LlamaConfig(vocab_size=V, intermediate_size=48, max_position_embeddings=40, **sizes))


def drive(decoder: RingDecoder, steps: int, seed: int) -> list[torch.Tensor]:
    """Logits along a walk that wraps around the ring, restarts a slot, and drops two."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (SLOTS, 5), generator=generator).cuda()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    decoder.begin(torch.arange(SLOTS).cuda(), ids, mask)
    seen = [decoder.logits.clone()]
    slots = SLOTS
    for t in range(steps):
        if t == steps // 2:
            decoder.begin(torch.tensor([2]).cuda(), ids[:1], mask[:1])
        if t == steps // 2 + 2:
            decoder.keep(torch.tensor([4, 0, 2, 1]).cuda())
            slots = 4
        decoder.step(torch.randint(2, V, (SLOTS,), generator=generator)[:slots].cuda())
        seen.append(decoder.logits.clone())
    return seen


def assert_alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_a_captured_step_is_the_step(lm: CausalLM) -> None:
    lm = on_gpu(lm)
    plain = [drive(RingDecoder(lm, SLOTS, CAPACITY, record=False), 20, seed) for seed in (0, 1)]
    assert_alike(drive(RingDecoder(lm, SLOTS, CAPACITY), 20, 0), plain[0])
    gc.collect()
    assert len(lm.remember(cuda_graphs._waiting_graphs)) == 1
    assert_alike(drive(RingDecoder(lm, SLOTS, CAPACITY), 20, 1), plain[1])  # on the same graphs


@pytest.mark.gpu
def test_two_decoders_of_a_model_do_not_share_rings(lm: CausalLM) -> None:
    lm = on_gpu(lm)
    plain = [drive(RingDecoder(lm, SLOTS, CAPACITY, record=False), 6, seed) for seed in (0, 1)]
    first = RingDecoder(lm, SLOTS, CAPACITY)
    second = RingDecoder(lm, SLOTS, CAPACITY)
    seen = drive(first, 6, 0), drive(second, 6, 1)
    assert_alike(seen[0], plain[0])
    assert_alike(seen[1], plain[1])
    assert first._rings[0].data_ptr() != second._rings[0].data_ptr()


@pytest.mark.gpu
def test_captured_steps_follow_the_training_of_their_model(lm: CausalLM) -> None:
    lm = on_gpu(lm)
    before = drive(RingDecoder(lm, SLOTS, CAPACITY), 4, 0)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1.1)
    after = drive(RingDecoder(lm, SLOTS, CAPACITY), 4, 0)
    assert_alike(after, drive(RingDecoder(lm, SLOTS, CAPACITY, record=False), 4, 0))
    assert (after[-1] - before[-1]).abs().max() > 1e-2


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
