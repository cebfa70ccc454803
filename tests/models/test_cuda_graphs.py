"""Steps that are captured, as on a GPU, and here recorded and replayed on a CPU: the same tokens as without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import WORDS, gpt2, tiny_lm, word_count, word_tokenizer
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import OPTConfig

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.models import cuda_graphs, graph_pool
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.cuda_graphs import StepGraphs, round_up_capacity, round_up_columns
from lmgym.models.policy import CapturedSteps, CausalPolicy
from lmgym.models.ring import RingDecoder
from lmgym.models.sampling import Sampler
from lmgym.rollout import collect
from lmgym.tasks import Task

EOS = 1
V = len(WORDS) + 3
SLOTS = 6
TOLERANCE = 1e-5 if not torch.cuda.is_available() else 1e-4
CAPACITY = 40  # which makes 64 columns


class Recording:
    """What a CUDA graph does, on a CPU: operations on given tensors, and every number of the host baked in."""

    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, run: Callable[[], Any], state: Sequence[Tensor]) -> Callable[[], Any]:
        before = [x.clone() for x in state]
        graph = make_fx(lambda: tuple(run()))()
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        return graph


class Machine:
    """Where models run, and whether their steps are captured.

    Attributes:
        device: "cpu" or "cuda". captured: how many functions have been captured so far.
    """

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = device
        self.captured = 0
        self._monkeypatch = monkeypatch
        pool: Any = Recording if device == "cpu" else cuda_graphs.GraphPool
        capture = pool.capture

        def note(*args: Any) -> Any:
            self.captured += 1
            return capture(*args)

        monkeypatch.setattr(cuda_graphs, "GraphPool", pool)
        monkeypatch.setattr(pool, "capture", note)

    def switch(self, is_on: bool) -> None:
        """Has steps captured, or not."""
        self._monkeypatch.setattr(graph_pool, "CAPTURED_DEVICES", {self.device} if is_on else set())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(request.param, monkeypatch)


def make_lm(kind: str, machine: Machine) -> CausalLM:
    """A tiny model: "GPT-2" has holes in its vocabulary, "OPT" runs as it is, and the responses of both end early."""
    if kind == "GPT-2":  # ends early by itself
        model = gpt2(V, seed=11, scale=0.25, n_positions=60)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
        config = OPTConfig(vocab_size=V, max_position_embeddings=60, word_embed_proj_dim=32, init_std=0.25, **sizes)
        model = tiny_lm(config).model
        with torch.no_grad():  # responses of all lengths, so that the batch gets smaller more than once
            model.model.decoder.final_layer_norm.bias += model.lm_head.weight[EOS] * 0.3
    lm = CausalLM(freeze(model.to(machine.device)), word_tokenizer())
    if kind == "GPT-2":
        lm.holes = [5, 9]
    return lm


@pytest.fixture(params=["GPT-2", "OPT"])
def lm(request: pytest.FixtureRequest, machine: Machine) -> CausalLM:
    return make_lm(request.param, machine)


def drive(decoder: RingDecoder, device: str, steps: int, seed: int) -> list[Tensor]:
    """Logits along a walk that restarts slots, comes round the ring, and drops two slots."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (SLOTS, 5), generator=generator).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    decoder.begin(torch.arange(SLOTS, device=device), ids, mask)
    seen = [decoder.logits.clone()]
    slots = SLOTS
    for t in range(steps):
        if t % 3 == 2:
            decoder.begin(torch.tensor([t // 3 % slots], device=device), ids[:1], mask[:1])
        if t == steps - 10:
            decoder.keep(torch.tensor([4, 0, 2, 1], device=device))
            slots = 4
        decoder.step(torch.randint(2, V, (SLOTS,), generator=generator)[:slots].to(device))
        seen.append(decoder.logits.clone())
    return seen


def test_a_captured_step_is_the_step(lm: CausalLM, machine: Machine) -> None:
    machine.switch(False)
    plain = [drive(RingDecoder(lm, SLOTS, CAPACITY), machine.device, 70, seed) for seed in (0, 1)]
    machine.switch(True)
    for seed in (0, 1):
        captured = machine.captured
        for left, right in zip(
            drive(RingDecoder(lm, SLOTS, CAPACITY), machine.device, 70, seed), plain[seed], strict=True
        ):
            torch.testing.assert_close(left, right, rtol=0, atol=TOLERANCE)
    # 6 slots at 32 and at 64 columns, then 4 at 64; nothing anew for the next decoder.
    assert captured == machine.captured == 3


def test_a_slot_that_is_full_stays_within_the_positions_of_its_model(lm: CausalLM, machine: Machine) -> None:
    ids = torch.full((SLOTS, 55), 4, device=machine.device)
    logits = []
    for is_on in (False, True):
        machine.switch(is_on)
        decoder = RingDecoder(lm, SLOTS, 60)  # as many as the model has positions for; the rings have 64 columns
        decoder.begin(torch.arange(SLOTS, device=machine.device), ids, torch.ones_like(ids, dtype=torch.bool))
        for _ in range(5):
            decoder.step(ids[:, 0])
        logits.append(decoder.logits.clone())
        for _ in range(6):  # of a response that has ended
            decoder.step(ids[:, 0])
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=TOLERANCE)


def test_two_decoders_of_a_model_do_not_share_rings(machine: Machine) -> None:
    lm = make_lm("GPT-2", machine)
    machine.switch(False)
    plain = [drive(RingDecoder(lm, SLOTS, CAPACITY), machine.device, 12, seed) for seed in (0, 1)]
    machine.switch(True)
    decoders = [RingDecoder(lm, SLOTS, CAPACITY) for _ in range(2)]
    for seed, decoder in enumerate(decoders):
        for left, right in zip(drive(decoder, machine.device, 12, seed), plain[seed], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=TOLERANCE)
    assert decoders[0]._rings[0].data_ptr() != decoders[1]._rings[0].data_ptr()


def drawn(lm: CausalLM, head: nn.Module | None, sampler: Sampler, batch: int, horizon: int = 40) -> list[Episodes]:
    """Episodes of two batches."""
    prompts = {"train": ["the film was", "a very good book", "dull"]}
    task = Task(name="t", model=lm, reward=word_count, prompts=prompts, kl_coef=0.1, max_new_tokens=horizon)
    envs = RLHFVectorEnv(1, task=task, device=str(lm.device), prompt_order="sequential")
    generator = torch.Generator().manual_seed(0)
    return [collect(envs, CausalPolicy(lm, head), batch, sampler, generator) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("GPT-2", Sampler()),
        ("GPT-2", Sampler(top_p=0.9, temperature=0.8, greedy_tokens=3)),
        ("OPT", Sampler()),
    ],
    ids=str,
)
def test_what_is_drawn_in_a_graph_is_what_is_drawn(
    kind: str, sampler: Sampler, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(kind, machine)
    head = nn.Linear(32, 1).to(machine.device)
    nn.init.constant_(head.weight, 0.3)
    machine.switch(False)
    plain = drawn(lm, head, sampler, 20)
    advanced: list[int] = []
    advance = CapturedSteps.advance

    def note(self: CapturedSteps) -> None:
        advanced.append(self.drawing.size)
        advance(self)

    monkeypatch.setattr(CapturedSteps, "advance", note)
    machine.switch(True)
    found = drawn(lm, head, sampler, 20)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.response_ids, other.response_ids)
        assert torch.equal(one.response_mask, other.response_mask)
        for name in ("log_probs", "values"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=TOLERANCE, msg=name)
    assert len(set(advanced)) > 1
    assert set(advanced) <= {20, 16, 8}
    assert machine.captured <= 2 * len(set(advanced)) + (2 if sampler.greedy_tokens else 0)


def test_graphs_follow_training_and_other_uniforms(machine: Machine) -> None:
    lm = make_lm("GPT-2", machine)
    machine.switch(True)
    before = drawn(lm, None, Sampler(), 8, 16)
    captured = machine.captured
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1.2)
    after = drawn(lm, None, Sampler(), 8, 16)
    assert machine.captured - captured <= 3  # sizes that had not come up
    machine.switch(False)
    plain = drawn(lm, None, Sampler(), 8, 16)
    assert torch.equal(after[1].response_ids, plain[1].response_ids)
    assert not torch.equal(before[1].response_ids, after[1].response_ids)
    assert not torch.equal(after[0].response_ids, after[1].response_ids)


def test_rings_keep_graphs_of_the_newest_drawings_alone(machine: Machine) -> None:
    machine.switch(True)
    lm = make_lm("GPT-2", machine)
    for temperature in (0.5, 0.6, 0.7):
        drawn(lm, None, Sampler(temperature=temperature), 4, 4)
    (graphs,) = [graphs for _, graphs in lm.remember(cuda_graphs._waiting_graphs)]
    assert isinstance(graphs, StepGraphs)
    kept = [drawing.sampler.temperature for drawing, _ in graphs._drawings.values()]
    assert kept == [0.6, 0.7]


def test_rings_are_read_at_few_numbers_of_columns() -> None:
    assert [round_up_capacity(columns) for columns in (1, 32, 33, 64)] == [32, 32, 64, 64]
    assert [round_up_columns(used, 160) for used in (1, 32, 33, 159, 500)] == [32, 32, 64, 160, 160]
    assert {round_up_columns(used, 1024) for used in range(1, 1025)} == {128 * i for i in range(1, 9)}
    assert all(used <= round_up_columns(used, 288) for used in range(1, 289))


def test_a_copy_of_a_model_has_graphs_of_its_own(machine: Machine) -> None:
    lm = make_lm("GPT-2", machine)
    machine.switch(True)
    drawn(lm, None, Sampler(), 4, 4)
    other = CausalLM(copy.deepcopy(lm.model), lm.tokenizer)
    assert not other.remember(cuda_graphs._waiting_graphs)


@pytest.mark.gpu
def test_no_token_has_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm("GPT-2", Machine("cuda", monkeypatch))
    drawn(lm, None, Sampler(), 20)  # captures
    advance = CapturedSteps.advance
    advanced: list[int] = []

    def check(self: CapturedSteps) -> None:
        advanced.append(self.drawing.size)
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(CapturedSteps, "advance", check)
    drawn(lm, None, Sampler(), 20)
    assert advanced
