"""Texts and ids: what the user wrote and what was generated are kept to the letter, over tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import WORDS, gpt2, word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerFast

from agents.algorithms.dpo import read_pairs
from agents.algorithms.sft import episodes_of
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.records import Choice, Record
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.texts import Texts
from lmgym.rewards.classifier import ClassifierReward

TEXT = [
    "the film was good",
    "the soup was very bad",
    "the end. the films are the best films",
    "what is it? Answer: yes",
]
EMOJI = "the film \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467!"
RTL = "\u05e9\u05dc\u05d5\u05dd the film"


def fast(backend: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def bpe(*, add: str = "") -> PreTrainedTokenizerFast:
    """Byte-level, as GPT-2's; `add` is a template of special tokens around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 20, trainer)
    if add:
        backend.post_processor = processors.TemplateProcessing(single=add, special_tokens=[("<s>", 0), ("<|end|>", 1)])
    return fast(backend, bos_token="<s>", eos_token="<|end|>")


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before the first word, pieces with blanks of their own, and bytes for what it lacks."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        TEXT * 20, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    described = json.loads(backend.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # bytes are tokens like others
    backend = Tokenizer.from_str(json.dumps(described))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, and [CLS] and [SEP] around a text."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s", "##ing", "wa", "filming", "!"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return fast(backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]")


KINDS = {"bpe": bpe, "metaspace": metaspace, "wordpiece": wordpiece, "words": word_tokenizer}


def lm_of(tokenizer: Any, positions: int = 96) -> CausalLM:
    return CausalLM(freeze(gpt2(len(tokenizer), n_positions=positions, n_embd=16, n_layer=1)), tokenizer)


def paid(seen: list[tuple[str, str]]) -> Any:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    return reward


def make(lm: CausalLM, prompts: Any, reward: Any = None, **changes: Any) -> Any:
    kwargs = {"max_new_tokens": 12, "kl_coef": 0.1, "device": "cpu"} | changes
    return gym.make("lmgym/RLHF-v0", model=lm, reward=reward or paid([]), prompts=prompts, **kwargs)


# -- to ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("add", "text", "expected"),
    [
        ("", "the<|end|>", "the <|end|>"),  # the user's own end token stays
        ("$A <|end|>", "the", "the"),  # that of the tokenizer does not
        ("$A <|end|>", "the<|end|>", "the <|end|>"),
        ("$A <|end|>", "<|end|>", "<|end|>"),
        ("<s> $A", "the", "<s> the"),
        ("<s> $A", "<s>the", "<s> the"),  # one start token
        ("<s> $A", "<s><s>the", "<s> <s> the"),  # those that the user wrote
        ("<s> $A <|end|>", "<s>the<|end|>", "<s> the <|end|>"),
        ("<|end|> $A", "<|end|>", "<|end|>"),
        ("<s> $A <|end|>", "<|end|>", "<s> <|end|>"),
    ],
)
def test_only_what_the_tokenizer_adds_is_told_apart(add: str, text: str, expected: str) -> None:
    texts = Texts(bpe(add=add))
    assert texts.tokenizer.convert_ids_to_tokens(texts.encode(text)) == expected.split()
    assert texts.encode_all((text, "film")) == [texts.encode(text), texts.encode("film")]


def test_a_prompt_of_which_nothing_is_left_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("film", "")
    lm = lm_of(tokenizer)
    message = "`prompt` must have a token at least, and the tokenizer makes none of 'film'"
    for prompts in (["film"], ["the", "film"]):
        with pytest.raises(InvalidArgumentError, match=message):
            make(lm, prompts)
    env = make(lm, ["the"])
    for options in ({"prompt": "film"}, {"prompt_ids": []}):
        with pytest.raises(InvalidArgumentError, match="`prompt.*` must have .* token"):
            env.reset(options=options)
    path = tmp_path / "demonstrations.jsonl"
    path.write_text('{"prompt": "the", "completion": " book"}\n\n{"prompt": "film", "completion": " book"}\n')
    with pytest.raises(InvalidArgumentError, match=rf"Line 3 of '.*{path.name}': {message}"):
        episodes_of(path, env.unwrapped.engine)


@pytest.mark.parametrize(
    ("kind", "prompt", "completion"),
    [
        ("bpe", "the film was ", "good<|end|>"),
        ("bpe", "the film", "s are"),
        ("bpe", "the film was", " good"),
        ("bpe", "the film\U0001f600", "\U0001f600"),
        ("metaspace", "the film was", " good</s>"),
        ("metaspace", "the film was ", "good"),
        ("metaspace", "the film", "s are"),
        ("wordpiece", "the book was", " good"),
    ],
)
def test_a_completion_is_written_after_its_prompt(kind: str, prompt: str, completion: str) -> None:
    texts = Texts(KINDS[kind]())  # type: ignore[operator]
    prompt_ids = texts.encode(prompt)
    response = texts.encode_response(prompt, prompt_ids, completion)
    assert texts._written([*prompt_ids, *response]) == texts._written(prompt_ids) + completion
    assert texts.completions([prompt_ids], [response]) == [completion.replace("<|end|>", "").replace("</s>", "")]


def test_a_completion_that_no_tokens_have_is_named_with_its_line(tmp_path: Path) -> None:
    engine = make(lm_of(wordpiece()), ["the book"]).unwrapped.engine
    path = tmp_path / "demonstrations.jsonl"
    path.write_text('{"prompt": "the book", "completion": " was"}\n{"prompt": "the film", "completion": "ing"}\n')
    assert len(episodes_of(path, make(lm_of(bpe()), ["the book"]).unwrapped.engine)) == 2
    engine.lm.tokenizer.backend_tokenizer.model = models.WordPiece(
        {piece: i for piece, i in engine.lm.tokenizer.get_vocab().items() if piece != "##ing"}, unk_token="[UNK]"
    )
    with pytest.raises(InvalidArgumentError, match=r"Line 2 of .*'ing' after 'the film' is not: the tokenizer merges"):
        episodes_of(path, engine)
    with pytest.raises(InvalidArgumentError, match=r"Record 1 of `preferences`: .*'ing' after 'the film' is not"):
        read_pairs([Record("the film", ("ing", " was"), Choice(0, 1))], engine)


# -- to texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_what_was_generated(kind: str) -> None:
    texts = Texts(KINDS[kind]())  # type: ignore[operator]
    tokenizer = texts.tokenizer
    generator = torch.Generator().manual_seed(0)
    for text in ("the film was", "the film was ", "the  film", EMOJI, RTL):
        try:
            prompt = texts.encode(text)
        except InvalidArgumentError:
            continue
        for length in (0, 1, 2, 7):
            response = torch.randint(0, len(tokenizer), (length,), generator=generator).tolist()
            (completion,) = texts.completions([prompt], [response])
            whole = tokenizer.decode([*prompt, *response], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            before = texts.decode_prompt(prompt)
            # Bytes that spoil a run of bytes which the prompt has begun: the run decodes to nothing but marks.
            spoilt = kind == "metaspace" and not whole.startswith(before)
            assert completion == texts.decode(response) if spoilt else before + completion == whole
            pieces = texts.pieces(prompt, response)
            special = [f" {t}" for t in tokenizer.convert_ids_to_tokens(response) if t in tokenizer.all_special_tokens]
            joined = "".join(pieces)
            assert len(pieces) == length
            assert len(joined) == len(completion) + sum(map(len, special))


def test_blanks_before_a_mark_stay() -> None:
    tokenizer = bpe()
    tokenizer.clean_up_tokenization_spaces = True
    texts = Texts(tokenizer)
    prompt = texts.encode("the film was good !")
    assert texts.decode(prompt) == "the film was good !"
    assert texts.completions([prompt], [texts.encode(" .")]) == [" ."]


@pytest.mark.parametrize("text", [EMOJI, RTL])
def test_a_frame_shows_characters(text: str) -> None:
    lm = lm_of(bpe())
    env = make(lm, ["the film"], render_mode="ansi", max_new_tokens=60)
    env.reset(seed=0)
    tokens = lm.encode(text)
    for token in tokens:
        env.step(token)
        shown = env.render().split("response: ")[1]
        assert "\u0120" not in shown  # how a byte is written that is no character
    assert text in shown
    pieces = lm.pieces(lm.encode("the film"), tokens)
    assert "".join(pieces) == text
    assert "" in pieces
    assert lm.pieces([2], [*lm.encode("the"), 1])[-1] == " <|end|>"


# -- what the reward is given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "read"),
    [
        ("wordpiece", "The FILM was", "the film was"),
        ("words", "the xyzzy was", "the <unk> was"),
        ("bpe", "The FILM", None),
    ],
)
def test_the_reward_is_given_the_users_own_text(kind: str, text: str, read: str | None) -> None:
    seen: list[tuple[str, str]] = []
    lm = lm_of(KINDS[kind]())  # type: ignore[operator]
    make_it = lambda: make(lm, [text, "the"], paid(seen), max_new_tokens=2, prompt_order="sequential")  # noqa: E731
    if read is None:
        env = make_it()
    else:
        with pytest.warns(UserWarning, match=f"changes 1 of 2 prompts: where '{text}' was written, .* reads '{read}'"):
            env = make_it()
    seen.clear()
    env.reset(seed=0)
    token = lm.encode(" good")[-1]
    env.step(token)
    info = env.step(token)[-1]
    assert seen == [(text, lm.completions([lm.encode(text)], [[token, token]])[0])]
    assert info["prompt"] == text
    assert not info["response"].startswith(text)


def test_special_tokens_that_the_user_wrote_are_no_change(recwarn: pytest.WarningsRecorder) -> None:
    text = "<s>the film<|end|>"
    env = make(lm_of(bpe(add="<s> $A")), [text])
    env.reset(seed=0)
    assert env.unwrapped.engine.prompts[0].text == text
    assert not [w for w in recwarn if "changes" in str(w.message)]


def test_a_reward_model_reads_one_start_token() -> None:
    tokenizer = bpe(add="<s> $A")
    model = freeze(gpt2(len(tokenizer), cls=GPT2ForSequenceClassification, num_labels=1))
    reward = ClassifierReward(model, tokenizer).for_tokenizer(word_tokenizer())
    assert not reward.reads_ids
    assert reward(["<s>the film"], [" was"]) == reward(["the film"], [" was"])
