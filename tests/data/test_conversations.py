"""Prompts as conversations: the chat template's text, one start token, and rewards that are given messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from conftest import gpt2, word_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import lmgym  # noqa: F401
from lmgym.data.prompts import PromptText, read_prompts
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM, freeze
from lmgym.tasks import Task, make_task

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
CHAT = [{"role": "system", "content": "it is good"}, {"role": "user", "content": "the film was"}]
ROWS = [{"prompt": CHAT, "answer": "good"}, {"prompt": CHAT[1:], "answer": "bad"}]


def chat_tokenizer(*, adds_start: bool = True, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A word tokenizer with special tokens for roles, which puts a start token in front of every text."""
    tokenizer = word_tokenizer()
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": roles})
    if adds_start:
        start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[start])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chat_lm() -> CausalLM:
    tokenizer = chat_tokenizer()
    return CausalLM(freeze(gpt2(len(tokenizer))), tokenizer)


@pytest.mark.parametrize("adds_start", [True, False])
def test_the_template_s_tokens_are_fed_with_one_start_token(adds_start: bool) -> None:
    tokenizer = chat_tokenizer(adds_start=adds_start)
    lm = CausalLM(freeze(gpt2(len(tokenizer))), tokenizer)
    prompts = read_prompts(ROWS, tokenizer=tokenizer)
    for prompt, row in zip(prompts, ROWS, strict=True):
        expected = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert lm.encode(prompt) == expected
        assert expected.count(tokenizer.bos_token_id) == 1


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    tokenizer = chat_tokenizer()
    begun = [*CHAT, {"role": "assistant", "content": "the film was"}]
    (text,) = read_prompts([{"prompt": begun}], tokenizer=tokenizer)
    assert text.endswith("<|assistant|> the film was")


def test_rewards_are_given_messages_as_in_trl(chat_lm: CausalLM) -> None:
    seen: list[Any] = []

    def contents(prompts: Any, completions: Any, answer: list[str], **_: Any) -> list[float]:
        seen.append((prompts, completions, answer))
        return [float(a in c[0]["content"]) for a, c in zip(answer, completions, strict=True)]

    fields = {"model": chat_lm, "prompts": ROWS, "max_new_tokens": 1, "kl_coef": 0.0, "device": "cpu"}
    for reward in (contents, [contents]):
        env = gym.make("lmgym/RLHF-v0", reward=reward, **fields)
        env.reset(options={"prompt_index": 0})
        good = chat_lm.tokenizer.convert_tokens_to_ids("good")
        assert env.step(good)[1] == 1.0
        prompts, completions, answer = seen[-1]
        assert (prompts, answer) == ([CHAT], ["good"])
        assert [(m["role"], m["content"].strip()) for m in completions[0]] == [("assistant", "good")]


def test_a_reward_model_reads_the_template_s_text(chat_lm: CausalLM, reward_dir: str) -> None:
    fields = {"model": chat_lm, "reward": reward_dir, "max_new_tokens": 1, "kl_coef": 0.0, "device": "cpu"}
    chat = gym.make("lmgym/RLHF-v0", prompts=ROWS, **fields)
    text = gym.make("lmgym/RLHF-v0", prompts=[str(p) for p in chat.unwrapped.task.prompts["train"]], **fields)
    scores = []
    for env in (chat, text):
        env.reset(options={"prompt_index": 1})
        scores.append(env.step(5)[1])
    assert scores[0] == scores[1]


def test_another_model_has_another_template(chat_lm: CausalLM, tmp_path: Path) -> None:
    task = make_task("reviews", model=chat_lm, reward="r", prompts=ROWS)
    other = chat_tokenizer(template=TEMPLATE.replace("<|end|>", "."))
    other.save_pretrained(tmp_path)
    gpt2(len(other)).save_pretrained(tmp_path)
    changed = make_task(task, model=str(tmp_path))
    assert task.prompts["train"][1] == "<|user|> the film was <|end|> <|assistant|> "
    assert changed.prompts["train"][1] == "<|user|> the film was . <|assistant|> "
    prompt = changed.prompts["test"][0]
    assert isinstance(prompt, PromptText)
    assert (prompt.messages, prompt.columns) == (CHAT, {"answer": "good"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": CHAT}, {"prompt": "the film"}], "all texts or all conversations, got 1 conversations among 2"),
        ([{"prompt": [{"role": "user"}]}], "messages with texts under .* and item 0 has {'role': 'user'}"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "messages with texts under"),
        ([{"prompt": [*CHAT, 3]}], "messages with texts under"),
        ([{"prompt": []}], "must hold non-empty texts"),
        ([{"messages": CHAT}], r"rows with a \"prompt\", and item 0 has the columns \['messages'\]"),
    ],
)
def test_what_is_no_conversation_is_named(rows: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompts(rows, tokenizer=chat_tokenizer())


def test_a_tokenizer_without_a_template_and_a_template_that_refuses_are_named(model_dir: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the tokenizer has no chat template"):
        Task(name="t", model=model_dir, reward="r", prompts={"train": ROWS}, kl_coef=0.1, max_new_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="the chat template refuses item 0: no system role"):
        read_prompts(ROWS, tokenizer=chat_tokenizer(template="{{ raise_exception('no system role') }}"))
    with pytest.raises(InvalidArgumentError, match="must be texts where there is no tokenizer"):
        read_prompts(ROWS)


def test_conversations_in_a_file(chat_lm: CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = chat_lm.tokenizer
    assert read_prompts(path, tokenizer=lambda: tokenizer) == read_prompts(ROWS, tokenizer=tokenizer)
