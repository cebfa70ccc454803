"""`python -m agents.sample`: who writes, what is written, and what is refused before anything loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from agents.runs.completions import Request, check_sampler, load_writers, write_completions
from agents.sample import sample
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.feedback.files import read_records
from lmgym.feedback.records import Record
from lmgym.models.causal import token_log_probs

SAMPLER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy_tokens": 0}


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {"task": "echo-2", "policies": ["reference"], "sampler": SAMPLER, "prompts": 6}
    return Request(**{**values, **changes})


def written(**changes: Any) -> list[Record]:
    asked = request(**changes)
    return list(write_completions(asked, load_writers(asked)))


def test_completions_of_several_policies_stand_in_one_record_each_text_once() -> None:
    records = written(policies=["reference", "best_of_n:3"], samples=5)
    assert len(records) == 6
    for i, record in enumerate(records):
        texts = [completion.text for completion in record.completions]
        assert len(set(texts)) == len(texts) <= 10
        assert record.columns["prompt_index"] == i
        assert record.judgement is None
    writers = {completion.policy for record in records for completion in record.completions}
    assert writers == {"reference", "best_of_n:3"}


def test_log_prob_is_that_of_the_text_under_the_reference() -> None:
    asked = request(samples=3)
    (writer,) = load_writers(asked)
    lm = writer.envs.engine.lm
    for record in write_completions(asked, [writer]):
        prompt = lm.encode(str(record.prompt))
        for completion in record.completions:
            response = lm.encode_response(str(record.prompt), prompt, str(completion.text))
            if completion.ended:
                response.append(lm.tokenizer.eos_token_id)
            total = 0.0
            for t, token in enumerate(response):
                logits = writer.agent.policy.begin(*_batch([*prompt, *response[:t]]), 1).logits  # type: ignore[attr-defined]
                total += token_log_probs(logits, _tensor([token])).item()
            assert completion.log_prob is not None
            assert math.isclose(completion.log_prob, total, abs_tol=1e-4)


def _tensor(values: list[int]) -> Any:
    import torch

    return torch.tensor(values)


def _batch(ids: list[int]) -> tuple[Any, Any]:
    tensor = _tensor(ids).unsqueeze(0)
    return tensor, tensor >= 0


def test_the_seed_decides_what_is_written() -> None:
    assert written(seed=1) == written(seed=1) != written(seed=2)


def texts_of(policy: str, **changes: Any) -> list[object]:
    records = written(task="keyword-32", prompts=3, **changes)
    return [each.text for record in records for each in record.completions if each.policy == policy]


def test_the_second_policy_of_a_seed_has_not_the_numbers_of_the_next_seeds_first() -> None:
    of_the_next_seed = texts_of("reference", seed=1)
    assert texts_of("best_of_n:1", policies=["best_of_n:1"], seed=1) == of_the_next_seed  # from the same numbers
    assert texts_of("best_of_n:1", policies=["reference", "best_of_n:1"], seed=0) != of_the_next_seed


def test_a_prompt_with_one_text_alone_is_left_out() -> None:
    assert written(samples=1) == []
    assert written(samples=4, sampler={**SAMPLER, "temperature": 0.0}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["bestofn"]}, "Did you mean 'best_of_n'"),
        ({"policies": ["ppo:3"]}, "best_of_n:16"),
        ({"policies": ["runs/none"]}, "config.yaml"),
        ({"policies": []}, "at least"),
        ({"samples": 0}, "samples"),
        ({"prompts": 0}, "prompts"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        request(**changes)


def test_a_sampler_for_a_run_is_refused(tmp_path: Path) -> None:
    """It would be ignored: a run draws as it was trained."""
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InvalidArgumentError, match=f"`sampler` must be left out .* as it was trained: {tmp_path}"):
        check_sampler({"policies": ["reference", str(tmp_path)]}, is_given=True)
    check_sampler({"policies": [str(tmp_path)]}, is_given=False)
    check_sampler({"policies": "reference"}, is_given=True)


def test_the_file_holds_the_records_and_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "to_label.jsonl"
    values: dict[str, Any] = vars(request(samples=3)) | {"out": str(out), "trust": None, "policies": "reference"}
    values["disagreement"] = None
    sample(dict(values))
    assert "6 prompts with up to 3 completions" in capsys.readouterr().out
    assert list(read_records(out)) == written(samples=3)
    with pytest.raises(InvalidArgumentError, match="not there yet"):
        sample(dict(values))
    values |= {"disagreement": str(tmp_path), "out": str(tmp_path / "other.jsonl")}
    with pytest.raises(InvalidArgumentError, match="`disagreement` must be a directory of several reward models"):
        sample(dict(values))
