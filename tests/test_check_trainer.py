"""What `check_trainer` says: statuses, errors, and no alarm for right code that is written in another way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_trainer as plain
import pytest
import torch
from plain_trainer import plain_trainer
from torch import Tensor

from lmgym.errors import UnknownNameError
from lmgym.testing import GroupInputs, LossInputs, TrainerAdapter, TrainerError, check_trainer
from lmgym.testing.invariants.base import angle_gap
from lmgym.testing.trainer import INVARIANTS

# -- the report ------------------------------------------------------------------------------------------------------


def test_a_function_that_is_missing_is_not_checked_and_not_passed() -> None:
    report = check_trainer(TrainerAdapter(name="empty"))
    assert report.named("not checked") == list(INVARIANTS)
    assert report["gae"].detail == "needs `gae`"


def test_a_function_that_is_not_implemented_is_not_checked() -> None:
    def gae(inputs: Any) -> Tensor:
        if inputs.truncated.any():
            raise NotImplementedError("a length limit is an end")
        return plain.gae(inputs)

    report = check_trainer(plain_trainer(gae=gae), only=["gae", "truncation"])
    assert report.named("ok") == ["gae"]
    assert report["truncation"].detail == "a length limit is an end"


def test_a_failure_raises_with_the_report_unless_it_is_asked_for() -> None:
    wrong = plain_trainer(loss=lambda inputs: -plain.loss(inputs))
    with pytest.raises(TrainerError, match=r"plain: 1 FAILS\n  FAILS      ratio-one  At the first step"):
        check_trainer(wrong, only=["ratio-one"])
    report = check_trainer(wrong, raises=False, only=["ratio-one", "padding-out-of-loss"])
    assert report.failures == ["ratio-one"]
    assert report["ratio-one"].detail.startswith("direction of response 0: 1 (at most 1e-05")


def test_a_failure_by_design_does_not_raise_and_keeps_its_numbers() -> None:
    wrong = plain_trainer(loss=lambda inputs: -plain.loss(inputs), by_design={"ratio-one": "it climbs"})
    result = check_trainer(wrong, only=["ratio-one"])["ratio-one"]
    assert result.status == "by design"
    assert result.detail.startswith("it climbs; direction of response 0: 1")


def test_a_function_that_raises_is_an_error_and_no_finding() -> None:
    report = check_trainer(plain_trainer(whiten=lambda numbers: numbers), raises=False, only=["whitening"])
    assert report.failures == ["whitening"]
    assert report["whitening"].status == "error"
    assert report["whitening"].detail.startswith("TypeError: ")


def test_nan_fails() -> None:
    wrong = plain_trainer(gae=lambda inputs: plain.gae(inputs) * float("nan"))
    assert check_trainer(wrong, raises=False, only=["gae"]).failures == ["gae"]


def test_an_unknown_invariant_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ratio-one'"):
        check_trainer(plain_trainer(), only=["ratio_one"])
    with pytest.raises(UnknownNameError, match="`invariant` must be"):
        check_trainer(plain_trainer(by_design={"no": ""}))


def test_the_table_names_at_its_end_what_was_not_checked() -> None:
    report = check_trainer(TrainerAdapter(name="mine", whiten=plain.whiten), only=["gae", "truncation", "whitening"])
    lines = str(report).splitlines()
    assert lines[0] == "mine: 1 ok, 2 not checked"
    assert lines[1].split()[:2] == ["ok", "whitening"]
    assert lines[-1] == "  not checked: gae, truncation (needs `gae`)"


def test_the_page_lists_every_invariant() -> None:
    page = (Path(__file__).parent.parent / "docs" / "check_trainer.md").read_text(encoding="utf-8")
    first_table = page.split("| invariant |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(.*?)`", first_table, flags=re.MULTILINE) == list(INVARIANTS)
    for invariant in INVARIANTS.values():
        assert f"| `{invariant.name}` | {invariant.statement.replace('|', chr(92) + '|')} |" in first_table


def test_every_invariant_says_what_holds_and_why_it_may_be_off() -> None:
    for invariant in INVARIANTS.values():
        assert invariant.statement.endswith(".")
        assert len(invariant.statement) < 120
        assert invariant.reason


def test_an_angle_is_to_a_positive_multiple() -> None:
    x = torch.tensor([3.0, 4.0])
    assert angle_gap(2 * x, x) == pytest.approx(0, abs=1e-12)
    assert angle_gap(-x, x) == 1
    assert angle_gap(0 * x, x) == 1
    assert angle_gap(torch.tensor([4.0, 3.0]), x) == pytest.approx((1 - 0.96**2) ** 0.5)


# -- right code, written in another way ------------------------------------------------------------------------------


def log_ratio_of(inputs: LossInputs) -> Tensor:
    return (inputs.log_probs - inputs.old_log_probs) * inputs.mask


def sequence_ratio(inputs: LossInputs) -> Tensor:
    """RLOO's in TRL: one ratio a response, the mean over responses."""
    ratio = log_ratio_of(inputs).sum(1).exp()
    advantages = inputs.advantages[:, 0]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / inputs.step_responses


def clipped_weight(inputs: LossInputs) -> Tensor:
    """CISPO's: the ratio is a weight without a gradient, clipped from above."""
    weight = log_ratio_of(inputs).exp().clamp(max=2).detach()
    gain = weight * inputs.advantages * inputs.log_probs * inputs.mask
    return -gain.sum() / max(inputs.step_tokens, 1)


def constant_length(inputs: LossInputs) -> Tensor:
    """Dr. GRPO's: every token counts alike, divided by a constant."""
    gain = log_ratio_of(inputs).exp() * inputs.advantages * inputs.mask
    return -gain.sum() / (inputs.step_responses * 7)


def k2_of_responses(inputs: LossInputs) -> Tensor:
    """The KL in the loss, half the square of a response's whole log-ratio."""
    log_ratio = ((inputs.log_probs - inputs.ref_log_probs) * inputs.mask).sum(1)
    return (
        plain.loss(replace(inputs, ranks=1)) + inputs.kl_coef * 0.5 * log_ratio.square().sum() / inputs.step_responses
    )


def leave_one_out(inputs: GroupInputs) -> Tensor:
    kl = ((inputs.log_probs - inputs.ref_log_probs) * inputs.mask).sum(1).detach()
    groups = (inputs.scores - inputs.kl_coef * kl).view(-1, inputs.group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (inputs.group_size - 1)
    return (groups - others).flatten()


def without_kl(inputs: GroupInputs) -> Tensor:
    groups = inputs.scores.view(-1, inputs.group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def on_one_rank(loss: Callable[[LossInputs], Tensor]) -> Callable[[LossInputs], Tensor]:
    """Undoes the average over ranks, as a loss must that divides by the numbers of the whole step."""
    return lambda inputs: loss(inputs) * inputs.ranks


RIGHT = {
    "one ratio a response": {"loss": on_one_rank(sequence_ratio)},
    "a weight that is clipped": {"loss": on_one_rank(clipped_weight)},
    "a constant length": {"loss": on_one_rank(constant_length)},
    "k2 of responses in the loss": {
        "loss": on_one_rank(k2_of_responses),
        "token_rewards": None,
        "group_advantages": without_kl,
    },
    "leave one out": {"group_advantages": leave_one_out},
    "advantages of tokens": {"group_advantages": lambda inputs: leave_one_out(inputs)[:, None] * inputs.mask},
    "no groups": {"group_advantages": None},
    "the biased deviation": {
        "whiten": lambda x, mask: torch.where(mask, (x - x[mask].mean()) / x[mask].std(correction=0), 0.0)
    },
    "a mask of ints": {"response_mask": lambda ids, eos, pad: plain.response_mask(ids, eos, pad).int()},
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_in_another_form_raises_no_alarm(name: str) -> None:
    adapter = plain_trainer(**RIGHT[name])
    needed = set(RIGHT[name]) | {"loss"}
    only = [one.name for one in INVARIANTS.values() if needed & set(one.needs) and "model_loss" not in one.needs]
    assert not check_trainer(adapter, only=only).failures
