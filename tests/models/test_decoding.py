"""Cached decoding against the plainest forward there is, for many architectures, on a ring that wraps many times."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import WORDS, gpt2, tiny_lm, word_tokenizer
from torch import Tensor
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lmgym.models.causal import CausalLM, freeze
from lmgym.models.decoding import Decoder, PlainDecoder, make_decoder
from lmgym.models.ring import RingDecoder

V = len(WORDS) + 3
CAPACITY = 14
SLOTS = 4
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
SIZES = {"vocab_size": V, "max_position_embeddings": 40, **WIDE, **IDS}


def config(name: str, **changes: Any) -> PretrainedConfig:
    """A tiny shape of an architecture, with weights large enough that attention matters."""
    grouped = {**SIZES, "num_key_value_heads": 2}
    shapes: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
        "GPT-2": (GPT2Config, {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, **IDS}),
        "Llama": (LlamaConfig, grouped),
        "Qwen2": (Qwen2Config, grouped),
        "Qwen3": (Qwen3Config, {**grouped, "head_dim": 8}),
        "GPT-NeoX": (GPTNeoXConfig, SIZES),
        "OPT": (OPTConfig, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
        "Phi": (PhiConfig, SIZES),
        "Mistral": (MistralConfig, grouped),
        "Gemma2": (Gemma2Config, {**grouped, "head_dim": 8, "query_pre_attn_scalar": 8}),
        "BLOOM": (BloomConfig, {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS}),
        "GPT-Neo": (
            GPTNeoConfig,
            {**SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        ),
    }
    kind, sizes = shapes[name]
    return kind(**{**sizes, **changes})


RING = ["GPT-2", "Llama", "Qwen2", "Qwen3", "GPT-NeoX", "OPT", "Phi"]


@pytest.fixture(params=RING)
def lm(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_lm(config(request.param))


@pytest.fixture
def gpt2_lm() -> CausalLM:
    return tiny_lm(config("GPT-2"))


def plain_logits(lm: CausalLM, history: list[int]) -> Tensor:
    """(n, V): what the model says after each token of a sequence on its own; no cache, no mask, no padding."""
    with torch.inference_mode():
        logits: Tensor = lm.model(input_ids=torch.tensor([history]), use_cache=False).logits[0, :, : lm.vocab_size]
    return logits


def left_padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(s) for s in sequences)
    ids = torch.zeros((len(sequences), width), dtype=torch.int64)
    mask = torch.zeros((len(sequences), width)).bool()
    for row, s in enumerate(sequences):
        ids[row, width - len(s) :] = torch.tensor(s)
        mask[row, width - len(s) :] = True
    return ids, mask


class Drive:
    """Slots of a decoder and, beside them, their histories; each slot is checked against a forward of its own."""

    def __init__(self, lm: CausalLM, decoder: Decoder, slots: int, seed: int = 0) -> None:
        self.lm = lm
        self.decoder = decoder
        self.rng = torch.Generator().manual_seed(seed)
        self.history: list[list[int]] = [[] for _ in range(slots)]
        self.seen: list[list[Tensor]] = [[] for _ in range(slots)]
        self.starts: list[int] = [0] * slots
        self.worst = 0.0
        self.compared = 0

    def random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self.rng))

    def begin(self, slots: list[int], lengths: list[int] | None = None) -> None:
        """Restarts slots from random prompts."""
        for slot in slots:
            self.check(slot)
        lengths = lengths or [self.random(1, 6) for _ in slots]
        prompts = [[self.random(0, self.lm.vocab_size) for _ in range(length)] for length in lengths]
        self.decoder.begin(torch.tensor(slots), *left_padded(prompts))
        for slot, prompt in zip(slots, prompts, strict=True):
            self.history[slot] = prompt
            self.starts[slot] = len(prompt)
            self.seen[slot] = [self.decoder.logits[slot].clone()]

    def step(self) -> None:
        tokens = torch.randint(0, self.lm.vocab_size, (len(self.history),), generator=self.rng)
        self.decoder.step(tokens)
        for slot, token in enumerate(tokens.tolist()):
            self.history[slot].append(token)
            self.seen[slot].append(self.decoder.logits[slot].clone())

    def keep(self, slots: list[int]) -> None:
        for slot in set(range(len(self.history))) - set(slots):
            self.check(slot)
        self.decoder.keep(torch.tensor(slots))
        self.history = [self.history[slot] for slot in slots]
        self.seen = [self.seen[slot] for slot in slots]
        self.starts = [self.starts[slot] for slot in slots]

    def check(self, slot: int, atol: float = 1e-5) -> None:
        """Compares everything seen of a slot since it was started."""
        if self.seen[slot]:
            plain = plain_logits(self.lm, self.history[slot])[self.starts[slot] - 1 :]
            found = torch.stack(self.seen[slot])
            scale = max(1.0, float(plain.abs().max()))
            gap = float((found - plain).abs().max()) / scale
            assert gap < atol, f"slot {slot}, {len(self.history[slot])} tokens"
            self.compared += len(found)
            self.seen[slot] = []

    def check_all(self, atol: float = 1e-5) -> None:
        for slot in range(len(self.history)):
            self.check(slot, atol)


def drive_with_restarts(lm: CausalLM, decoder: Decoder, steps: int = 64) -> Drive:
    """Ragged slots, restarted alone and together, some exactly at the capacity, others early."""
    drive = Drive(lm, decoder, SLOTS)
    drive.begin(list(range(SLOTS)))
    for _ in range(steps):
        full = [slot for slot in range(SLOTS) if len(drive.history[slot]) == CAPACITY]
        early = [slot for slot in range(SLOTS) if slot not in full and drive.random(0, 12) == 0]
        if full or early:
            drive.begin(full + early)
        drive.step()
    drive.check_all()
    return drive


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- the ring is exact ---------------------------------------------------------------------------------------------


def test_the_ring_is_the_plain_forward(lm: CausalLM) -> None:
    decoder = make_decoder(lm, SLOTS, CAPACITY)
    assert isinstance(decoder, RingDecoder)
    drive = drive_with_restarts(lm, decoder)
    assert drive.compared > 60 * SLOTS


@pytest.mark.parametrize("name", RING)
def test_the_comparison_would_see_a_lost_token(name: str) -> None:
    """The tiny models do look at the oldest token of a full window: a wrong mask cannot hide."""
    lm = tiny_lm(config(name))
    history = list(range(CAPACITY))
    gap = (plain_logits(lm, history)[-1] - plain_logits(lm, [history[5], *history[1:]])[-1]).abs().max()
    assert gap > 1e-3


def test_the_plain_decoder_is_the_plain_forward(gpt2_lm: CausalLM) -> None:
    drive_with_restarts(gpt2_lm, PlainDecoder(gpt2_lm, SLOTS, CAPACITY))


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_eager_attention_works_too(name: str) -> None:
    lm = tiny_lm(config(name))
    lm.model.set_attn_implementation("eager")
    decoder = make_decoder(lm, SLOTS, CAPACITY)
    assert isinstance(decoder, RingDecoder)
    drive_with_restarts(lm, decoder)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen2"])
def test_bfloat16_within_its_rounding(name: str) -> None:
    lm = tiny_lm(config(name, initializer_range=0.1))
    lm.model.to(torch.bfloat16)
    decoder = make_decoder(lm, SLOTS, CAPACITY)
    assert isinstance(decoder, RingDecoder)
    assert decoder.logits.dtype == torch.bfloat16
    drive = Drive(lm, decoder, SLOTS)
    drive.begin(list(range(SLOTS)), [5, 2, 1, 3])
    for _ in range(CAPACITY - 5):
        drive.step()
    drive.check_all(atol=0.05)


def test_rings_of_all_sizes_of_one_model(gpt2_lm: CausalLM) -> None:
    """What is recorded of a model's step serves any number of slots, any capacity, with the hidden state or without."""
    for slots, capacity, keep_hidden in ((1, 9, False), (5, 14, True), (2, 30, False), (3, 9, True), (1, 20, False)):
        drive = Drive(gpt2_lm, make_decoder(gpt2_lm, slots, capacity, keep_hidden=keep_hidden), slots)
        drive.begin(list(range(slots)), [1 + slot for slot in range(slots)])
        for _ in range(capacity - slots):
            drive.step()
        drive.check_all()
        assert (drive.decoder.hidden is not None) == keep_hidden


def test_decoding_follows_a_model_in_training() -> None:
    """The policy's weights change in place between batches; steps must never run on those of the batch before."""
    lm = tiny_lm(config("GPT-2"))
    histories = []
    for _ in range(3):
        drive = Drive(lm, make_decoder(lm, 2, CAPACITY, keep_hidden=True), 2)
        drive.begin([0, 1], [2, 5])
        for _ in range(6):
            drive.step()
        histories.append(torch.stack([x for slot in drive.seen for x in slot]))
        drive.check_all()
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=drive.rng))
    assert (histories[0] - histories[1]).abs().max() > 1e-2
    state = {name: tensor * 0.9 for name, tensor in lm.model.state_dict().items()}
    lm.model.load_state_dict(state)  # as a checkpoint is put back
    drive = Drive(lm, make_decoder(lm, 2, CAPACITY), 2)
    drive.begin([0, 1])
    for _ in range(6):
        drive.step()
    drive.check_all()


@pytest.mark.parametrize("cls", [RingDecoder, PlainDecoder])
def test_keep_drops_and_reorders(gpt2_lm: CausalLM, cls: type) -> None:
    drive = Drive(gpt2_lm, cls(gpt2_lm, SLOTS, CAPACITY), SLOTS)
    drive.begin(list(range(SLOTS)), [4, 1, 2, 3])
    for kept in ([3, 0, 2], [2, 0], [1, 0], [1]):
        for _ in range(2):
            drive.step()
        before = drive.decoder.logits.clone()
        drive.keep(kept)
        assert torch.equal(drive.decoder.logits, before[kept])
    drive.begin([0], [5])  # a slot that was moved can be restarted
    drive.step()
    drive.check_all()
    assert drive.compared > 20


@pytest.mark.parametrize("cls", [RingDecoder, PlainDecoder])
def test_sequences_of_exactly_the_capacity(cls: type) -> None:
    lm = tiny_lm(config("GPT-2", n_positions=6))  # nor has the model a position more
    drive = Drive(lm, cls(lm, 2, 6), 2)
    drive.begin([0, 1], [6, 6])
    drive.check_all()
    drive.begin([0, 1], [1, 5])
    for _ in range(5):  # slot 1 goes on over the edge, as rows do that have ended and wait
        drive.step()
        drive.seen[1] = []
    assert len(drive.history[0]) == 6
    drive.check(0)
    for _ in range(3):
        drive.begin([0, 1], [5, 2])
        for _ in range(4):
            drive.step()
            drive.seen[0] = []
        drive.check(1)
    assert bool(drive.decoder.logits.isfinite().all())


def test_a_slot_does_not_feel_its_mates(gpt2_lm: CausalLM) -> None:
    """Alone or among others that restart all the time: the same to rounding, whatever lies in their columns."""
    alone = RingDecoder(gpt2_lm, 1, CAPACITY)
    crowd = RingDecoder(gpt2_lm, 3, CAPACITY)
    prompt = torch.tensor([[3, 4, 5]])
    rng = torch.Generator().manual_seed(0)
    crowd.begin(torch.arange(3), *left_padded([[7] * 6, [8], [9, 9]]))
    for _ in range(9):
        crowd.step(torch.randint(0, V, (3,), generator=rng))
    for decoder, slot in ((alone, 0), (crowd, 1)):
        decoder.begin(torch.tensor([slot]), prompt, torch.ones_like(prompt).bool())
    for t in range(CAPACITY - 3):
        torch.testing.assert_close(crowd.logits[1], alone.logits[0], rtol=1e-5, atol=1e-5)
        tokens = torch.randint(0, V, (3,), generator=rng)
        alone.step(tokens[1:2])
        crowd.step(tokens)
        if t % 3 == 0:
            crowd.begin(torch.tensor([2, 0]), *left_padded([[t], [t + 1] * 4]))


def test_reading_ahead_does_not_touch_the_ring(gpt2_lm: CausalLM) -> None:
    decoder = RingDecoder(gpt2_lm, 2, CAPACITY)
    ids, mask = left_padded([[3, 4, 5], [6]])
    decoder.begin(torch.arange(2), ids, mask)
    waiting = decoder.prefill(*left_padded([[9, 8], [7, 7, 7, 2]]))
    drive = Drive(gpt2_lm, decoder, 2)
    drive.history = [[3, 4, 5], [6]]
    drive.starts = [3, 1]
    drive.seen = [[decoder.logits[0].clone()], [decoder.logits[1].clone()]]
    for _ in range(3):
        drive.step()
    drive.check(1)
    decoder.insert(torch.tensor([1]), waiting, torch.tensor([0]))
    drive.history[1] = [9, 8]
    drive.starts[1] = 2
    drive.seen[1] = [decoder.logits[1].clone()]
    for _ in range(4):
        drive.step()
    drive.check_all()


class Prompts:
    """An endless stream of prompts for each slot, and what a decoder was told of them."""

    def __init__(self, slots: int) -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.next = [self.draw() for _ in range(slots)]

    def draw(self) -> tuple[int, ...]:
        length = int(torch.randint(1, 6, (1,), generator=self.rng))
        return tuple(torch.randint(2, V, (length,), generator=self.rng).tolist())

    def take(self, slots: list[int]) -> dict[int, tuple[int, ...]]:
        taken = {slot: self.next[slot] for slot in slots}
        for slot in slots:
            self.next[slot] = self.draw()
        return taken


@pytest.mark.parametrize("guesses", ["right", "wrong", "none"])
@pytest.mark.parametrize("cls", [RingDecoder, PlainDecoder])
def test_slots_start_from_sequences_whatever_was_read_ahead(cls: type, guesses: str, gpt2_lm: CausalLM) -> None:
    decoder = cls(gpt2_lm, SLOTS, CAPACITY)
    prompts = Prompts(SLOTS)
    drive = Drive(gpt2_lm, decoder, SLOTS)
    upcoming = {"right": lambda slot: prompts.next[slot], "wrong": lambda slot: (3, 4), "none": None}[guesses]
    for t in range(30):
        ended = [slot for slot in range(SLOTS) if t == 0 or t == 20 or (t + slot) % 5 == 0]
        if ended:
            for slot in ended:
                drive.check(slot)
            taken = prompts.take(ended)
            decoder.start(taken, upcoming)
            for slot, ids in taken.items():
                drive.history[slot] = list(ids)
                drive.starts[slot] = len(ids)
                drive.seen[slot] = [decoder.logits[slot].clone()]
        drive.step()
    drive.check_all()
    tokens = torch.arange(SLOTS) + 3
    expected = decoder.logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(decoder.log_probs(tokens), expected, rtol=0, atol=1e-5)


def test_one_forward_reads_what_is_due_and_what_comes_next(gpt2_lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RingDecoder(gpt2_lm, SLOTS, CAPACITY)
    prompts = Prompts(SLOTS)
    reads = []
    prefill = RingDecoder.prefill
    monkeypatch.setattr(
        RingDecoder, "prefill", lambda self, ids, mask: reads.append(len(ids)) or prefill(self, ids, mask)
    )
    upcoming = prompts.next.__getitem__
    decoder.start(prompts.take(list(range(SLOTS))), upcoming)
    for slot in range(SLOTS):
        decoder.start(prompts.take([slot]), upcoming)
    assert reads == [SLOTS, SLOTS]  # the first slot to end has the next prompts of all the others read with its own
    decoder.keep(torch.tensor([2, 0]))
    decoder.start({0: (3, 4)}, None)
    assert reads[2:] == [1]


# --- what the head reads ---------------------------------------------------------------------------------------------


def test_the_hidden_state_is_that_of_the_plain_forward(lm: CausalLM) -> None:
    decoder = make_decoder(lm, 2, CAPACITY, keep_hidden=True)
    sequences = [[3, 4, 5, 6], [7, 8]]
    decoder.begin(torch.arange(2), *left_padded(sequences))
    for t in range(6):
        ids = torch.zeros((2, 12), dtype=torch.int64)
        rows = torch.arange(2)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        columns = torch.tensor([len(s) - 1 for s in sequences])
        with torch.inference_mode():
            hidden, logits = lm.response_hidden(ids, rows, columns)
        assert decoder.hidden is not None
        torch.testing.assert_close(decoder.hidden, hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.logits, logits, rtol=1e-5, atol=1e-5)
        head = lm.model.get_output_embeddings()(decoder.hidden)[:, : lm.vocab_size]
        torch.testing.assert_close(decoder.logits, head, rtol=1e-5, atol=1e-5)
        if t == 3:
            decoder.begin(torch.tensor([1]), *left_padded([[9, 9, 2]]))
            sequences[1] = [9, 9, 2]
            continue
        decoder.step(torch.tensor([t, 5]))
        sequences = [[*sequences[0], t], [*sequences[1], 5]]


def test_hidden_states_are_kept_only_where_asked(gpt2_lm: CausalLM) -> None:
    decoder = RingDecoder(gpt2_lm, 1, CAPACITY)
    decoder.begin(torch.tensor([0]), *left_padded([[3]]))
    decoder.step(torch.tensor([4]))
    assert decoder.hidden is None


@pytest.mark.parametrize("cls", [RingDecoder, PlainDecoder])
def test_padded_embeddings_are_cut_off(cls: type) -> None:
    lm = tiny_lm(config("GPT-2", vocab_size=V + 5))
    assert lm.vocab_size == V
    decoder = cls(lm, 2, CAPACITY)
    assert decoder.logits.shape == (2, V)
    drive = Drive(lm, decoder, 2)
    drive.begin([0, 1])
    for _ in range(6):
        drive.step()
    assert decoder.logits.shape == (2, V)
    drive.check_all()


@pytest.mark.parametrize("cls", [RingDecoder, PlainDecoder])
def test_ids_that_the_tokenizer_lacks_are_impossible(cls: type) -> None:
    tokenizer = word_tokenizer()
    tokenizer.get_vocab = lambda: {w: i for w, i in word_tokenizer().get_vocab().items() if i != 5}  # a hole
    lm = CausalLM(freeze(gpt2(V)), tokenizer)
    decoder = cls(lm, 1, CAPACITY)
    decoder.begin(torch.tensor([0]), *left_padded([[3, 4]]))
    for token in (7, 8):
        assert decoder.logits[0, 5] == -torch.inf
        assert decoder.logits[0].isfinite().sum() == V - 1
        decoder.step(torch.tensor([token]))


# --- models that a ring cannot drive ---------------------------------------------------------------------------------


def falls_back(lm: CausalLM, capacity: int = CAPACITY) -> Decoder:
    message = f"{type(lm.model).__name__} cannot .* full forward a token, whose cost a token grows with the length"
    with pytest.warns(UserWarning, match=message) as caught:
        decoder = make_decoder(lm, SLOTS, capacity)
    assert len(caught) == 1
    assert isinstance(decoder, PlainDecoder)
    return decoder


@pytest.mark.parametrize("window", [4, 13])  # one that the probe meets, and one that only a longer ring would
@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_a_window_smaller_than_the_capacity_falls_back(name: str, window: int) -> None:
    lm = tiny_lm(config(name, sliding_window=window))
    drive_with_restarts(lm, falls_back(lm), steps=40)


def test_local_attention_by_another_name_falls_back() -> None:
    lm = tiny_lm(config("GPT-Neo", window_size=12))
    drive_with_restarts(lm, falls_back(lm), steps=40)


def test_position_biases_fall_back() -> None:
    lm = tiny_lm(config("BLOOM"))
    drive_with_restarts(lm, falls_back(lm), steps=40)


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_a_window_that_holds_the_capacity_does_not_matter(name: str) -> None:
    lm = tiny_lm(config(name, sliding_window=CAPACITY))
    decoder = make_decoder(lm, SLOTS, CAPACITY)
    assert isinstance(decoder, RingDecoder)
    drive_with_restarts(lm, decoder)


def test_forcing_the_ring_on_a_window_is_silently_wrong() -> None:
    """Why the probe is there: nothing raises, and the numbers are off."""
    lm = tiny_lm(config("Mistral", sliding_window=4))
    with pytest.raises(AssertionError, match="slot"):
        drive_with_restarts(lm, RingDecoder(lm, SLOTS, CAPACITY))


@pytest.mark.parametrize("name", ["GPT-2", "BLOOM"])
def test_a_model_that_has_decoded_is_freed_when_dropped(name: str) -> None:
    lm = tiny_lm(config(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = make_decoder(lm, 2, CAPACITY)
    decoder.begin(torch.arange(2), *left_padded([[3], [4, 5]]))
    decoder.step(torch.tensor([5, 6]))
    gone = weakref.ref(lm)
    weights = weakref.ref(lm.model)
    del lm, decoder
    gc.collect()
    assert gone() is None
    assert weights() is None


def test_a_model_is_probed_once(gpt2_lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    make_decoder(gpt2_lm, 1, 8)
    forwards: list[int] = []
    monkeypatch.setattr(type(gpt2_lm.model), "forward", lambda *a, **k: forwards.append(1))
    make_decoder(gpt2_lm, 2, CAPACITY)
    assert not forwards
