"""The arithmetic tasks: the reward against Python's own sums, the prompts, and the shipped references."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.decoding import ring_is_exact
from lmgym.models.sharing import load_causal_lm
from lmgym.tasks import arithmetic, make_task
from lmgym.tasks.arithmetic import SETTINGS, SumReward, token_ids
from lmgym.tasks.stored import ARTEFACTS

ROOT = Path(__file__).parents[2]
TOKENS = range(13)


def score(prompt: str, response: tuple[int, ...]) -> float:
    (found,) = SumReward()([prompt], ["any text"], completion_ids=[list(response)], prompt_ids=[token_ids(prompt)])
    return found


# --- the reward


def test_the_reward_is_that_of_integer_arithmetic_for_every_sum_of_one_digit() -> None:
    ids = {symbol: i for i, symbol in enumerate("0123456789+=", start=1)}
    for a, b, claimed in itertools.product(range(10), range(10), range(20)):
        response = (*(ids[digit] for digit in str(claimed)), 0)
        assert score(f"{a}+{b}=", response) == float(a + b == claimed)


@pytest.mark.parametrize("response", ["19", "019 ", "1 9 ", "19  ", "91 ", "1", " ", "", "+19 ", "19= ", "18 ", "199 "])
def test_only_the_sum_and_then_the_eos_is_right(response: str) -> None:
    ids = tuple(0 if symbol == " " else token_ids(symbol)[0] for symbol in response)
    assert score("12+7=", (*token_ids("19"), 0)) == 1.0
    assert score("12+7=", ids) == 0.0


def test_the_accepted_responses_are_those_that_score_one() -> None:
    horizon = arithmetic.max_new_tokens(1)
    assert horizon == 3
    endings = [
        (*start, last)
        for length in range(1, horizon + 1)
        for start in itertools.product(TOKENS[1:], repeat=length - 1)
        for last in (TOKENS if length == horizon else [0])
    ]  # every response there is: an EOS ends it, and so does the horizon
    assert len(endings) == 1 + 12 + 12 * 12 * 13
    for prompt in (*arithmetic.prompts(1, "test")[:6], "0+0=", "9+9="):
        right = [response for response in endings if score(prompt, response) == 1.0]
        assert SumReward().accepted_responses(token_ids(prompt)) == right


NO_SUM = r"`prompts` must be sums such as '12\+7=', got "


@pytest.mark.parametrize("prompt", ["12+7", "+7=", "12-7=", "1+2+3=", "twelve", "12+7= ", "", "\u0661+\u0662="])
def test_a_text_that_is_no_sum_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidArgumentError, match=NO_SUM):
        SumReward()([prompt], [""], completion_ids=[[0]])


@pytest.mark.parametrize("prompt_ids", [[], [1, 2], [0, 2, 11, 2, 12], [99, 11, 2, 12]])
def test_token_ids_that_are_no_sum_are_refused(prompt_ids: list[int]) -> None:
    with pytest.raises(InvalidArgumentError, match=NO_SUM):
        SumReward().accepted_responses(prompt_ids)


def test_answers_have_room() -> None:
    for digits in SETTINGS:
        most = str(10**digits - 1)
        assert len(f"{most}+{most}=") == arithmetic.max_prompt_tokens(digits)
        assert len(arithmetic.answer(f"{most}+{most}=")) + 1 == arithmetic.max_new_tokens(digits)


# --- the prompts


@pytest.mark.parametrize("digits", SETTINGS)
def test_prompts_are_different_sums_and_stay_the_same(digits: int) -> None:
    train, test = (arithmetic.prompts(digits, split) for split in ("train", "test"))
    assert (len(train), len(test)) == {1: (80, 20), 2: (1024, 256)}[digits]
    assert len({*train, *test}) == len(train) + len(test)
    number = rf"(0|[1-9]\d{{0,{digits - 1}}})"
    assert all(re.fullmatch(rf"{number}\+{number}=", prompt) for prompt in (*train, *test))
    assert {*train, *test} <= set(arithmetic.all_prompts(digits))
    assert len(set(arithmetic.all_prompts(digits))) == 100**digits
    first = {1: ("3+6=", "8+2="), 2: ("39+46=", "2+67=")}[digits]
    assert (train[0], test[0]) == first


# --- the shipped references


def test_the_task_is_made_without_torch() -> None:
    code = (
        "import sys; from lmgym.tasks import make_task\n"
        "make_task('arithmetic-1'), make_task('arithmetic-2')\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(params=SETTINGS)
def digits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def lm(digits: int) -> CausalLM:
    return load_causal_lm(str(Path(ARTEFACTS) / "arithmetic" / f"reference-{digits}"), "cpu")


def test_the_tokenizer_has_one_token_a_character(digits: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(ARTEFACTS) / "arithmetic" / f"reference-{digits}")
    assert tokenizer.get_vocab() == {"<eos>": 0, **{symbol: token_ids(symbol)[0] for symbol in "0123456789+="}}
    assert tokenizer.eos_token_id == 0
    assert tuple(tokenizer("12+7=")["input_ids"]) == token_ids("12+7=") == (2, 3, 11, 8, 12)
    assert tokenizer.decode(token_ids("12+7=19")) == "12+7=19"


def test_the_task_is_what_it_says(digits: int, lm: CausalLM) -> None:
    task = make_task(f"arithmetic-{digits}")
    task.validate()
    assert (task.kl_coef, task.gamma, task.max_new_tokens) == (0.1, 1.0, digits + 2)
    assert (lm.vocab_size, lm.holes, lm.eos_token_ids) == (13, [], frozenset({0}))
    assert ring_is_exact(lm)  # it decodes with a cache
    assert task.max_prompt_tokens == max(len(lm.encode(text)) for texts in task.prompts.values() for text in texts)


def test_the_reference_errs_as_often_as_its_card_says(digits: int, lm: CausalLM) -> None:
    reward = SumReward()
    prompts = arithmetic.prompts(digits, "test")
    exact = []
    for prompt in prompts:
        ids = lm.encode(prompt)
        (response,) = reward.accepted_responses(ids)
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*ids, *response]])).logits[0].double()
        steps = logits.log_softmax(-1)[len(ids) - 1 : -1]  # the last prompt token predicts the first digit
        exact.append(steps.gather(1, torch.tensor(response)[:, None]).sum().exp().item())
    accuracy = sum(exact) / len(exact)
    assert 0.2 < accuracy < 0.5
    card = (Path(ARTEFACTS) / "arithmetic" / "README.md").read_text(encoding="utf-8")
    figures = {
        name: float(cells.split("|")[SETTINGS.index(digits)])
        for name, cells in re.findall(r"^\| ([^|]+?) \| ([\d. |]+) \|$", card, re.MULTILINE)
        if "|" in cells
    }
    assert figures["exact accuracy on test prompts"] == pytest.approx(accuracy, abs=1e-4)
    assert figures["sampled accuracy on test prompts"] == pytest.approx(accuracy, abs=0.05)
    assert figures["least exact accuracy of a test prompt"] == pytest.approx(min(exact), abs=1e-4)
    assert figures["greatest exact accuracy of a test prompt"] == pytest.approx(max(exact), abs=1e-4)
    assert sum(file.stat().st_size for file in (Path(ARTEFACTS) / "arithmetic").rglob("*") if file.is_file()) < 700_000
