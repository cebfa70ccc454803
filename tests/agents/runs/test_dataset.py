"""`python -m agents.dataset`: which data sets it writes, whose rewards they have, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest

from agents.dataset import write
from agents.runs.command_line import prepared
from agents.runs.datasets import names_of, split_policies
from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.scores import reference_return
from lmgym.tasks import make_task

SAMPLER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy_tokens": 0}


def asked(out: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"task": "echo-2", "policies": ["reference"], "sampler": SAMPLER, "samples": 2, "seed": 0}
    return {**values, "prompts": 4, "split": "train", "device": "cpu", "out": str(out), "trust": None, **changes}


def returns(name: str) -> np.ndarray:
    return np.array([episode.rewards.sum() for episode in minari.load_dataset(name).iterate_episodes()])


def test_each_policy_has_a_data_set_and_mixed_has_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write(asked(tmp_path, policies=["reference", "medium", "optimal", "mixed"], samples=8))
    names = [f"lmgym/echo-2/{name}-v0" for name in ("reference", "medium", "optimal", "mixed")]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / name) for name in names]
    reference, medium, optimal, mixed = (returns(name) for name in names)
    assert [len(x) for x in (reference, medium, optimal, mixed)] == [32, 32, 32, 96]
    assert sorted(mixed) == sorted([*reference, *medium, *optimal])
    optimum = make_task("echo-2").optima["train"]
    assert np.allclose(optimal.reshape(4, 8), optimal[::8, None], atol=1e-4)  # each earns its prompt's V*
    assert reference.mean() < medium.mean() < optimal.mean()
    assert minari.load_dataset(names[0]).storage.metadata["ref_max_score"] == optimum.value
    assert minari.load_dataset(names[0]).storage.metadata["ref_min_score"] == reference_return(optimum).mean
    with pytest.raises(InvalidArgumentError, match="`out` must not have"):
        write(asked(tmp_path, policies=["optimal"]))


def test_the_same_seed_samples_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(found))
        write(asked(out, seed=seed))
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(out))
        found.append(returns("lmgym/echo-2/reference-v0"))
    assert (found[0] == found[1]).all()
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policies": ["mixed", "reference"]}, InvalidArgumentError, "`policies` must have two others beside 'mixed'"),
        ({"policies": ["refrence"]}, UnknownNameError, "reference"),
        ({"policies": []}, InvalidArgumentError, "`policies` must name an agent"),
        ({"policies": ["reference", "best_of_n:4"]}, InvalidArgumentError, "must know the log-probs of their tokens"),
        ({"samples": 0}, InvalidArgumentError, "samples"),
        ({"task": "echoes-2"}, UnknownNameError, "echo-2"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write(asked(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_names_are_those_of_policies_and_of_directories() -> None:
    from agents.runs.completions import Request

    names = names_of(Request(["reference", "sft"], SAMPLER), "echo-2")
    assert names == {
        "reference": "lmgym/echo-2/reference-v0",
        "sft": "lmgym/echo-2/sft-v0",
    }
    assert split_policies(["a", "mixed", "b"]) == (["a", "b"], True)


def test_policies_with_commas_are_a_list() -> None:
    given = ["policies=a,b", "policies=[a,b]", "policies='a,b'", "policies=a", "task=a,b"]
    assert prepared(given) == ["policies=[a,b]", *given[1:]]
    assert prepared([*given, "-m"]) == [*given, "-m"]
