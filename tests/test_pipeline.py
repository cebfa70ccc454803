"""docs/pipeline.md as it stands: own data and model, SFT, a verifiable reward, PPO, grading, and plain transformers."""

from __future__ import annotations

import collections
import json
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command_here
from pages import ROOT, blocks, execute

from lmgym.models.sharing import load_causal_lm

PAGE = ROOT / "docs" / "pipeline.md"


def run(command: str) -> None:
    """A command of the page, which knows of the modules of the page no more than what it finds in the directory."""
    program, option, name, *arguments = shlex.split(command)
    assert (program, option) == ("python", "-m")
    sys.modules.pop("my_rewards", None)
    run_command_here(name, *arguments)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory whose modules can be imported, as `python -m` has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.slow
@pytest.mark.usefixtures("directory")
def test_the_page_runs_and_its_checkpoint_generates_the_policy_s_distribution() -> None:
    module = types.ModuleType("pipeline")
    for block in blocks(PAGE):
        if block.path is not None:
            Path(block.path).write_text(block.code)
        elif block.language == "bash":
            for command in block.code.splitlines():
                run(command)
        else:
            execute(block, module)

    sft, ppo = (json.loads(Path(f"mine/{name}/summary.json").read_text()) for name in ("sft", "ppo"))
    assert sft["before"]["score"]["mean"] < 0.1 < 0.25 < sft["after"]["score"]["mean"]
    assert ppo["after"]["return"]["mean"] > ppo["before"]["return"]["mean"] + 0.1
    again = json.loads(Path("mine/ppo/evaluation.json").read_text())
    assert again["after"]["return"]["mean"] == pytest.approx(ppo["after"]["return"]["mean"], abs=0.05)

    # What `generate` drew, against the probabilities that lmgym reads off the same checkpoint.
    lm = load_causal_lm("mine/ppo/checkpoint", "cpu")
    generated: torch.Tensor = module.generated
    counts = collections.Counter(tuple(row) for row in generated.tolist())
    responses = torch.tensor(list(counts))
    ended = (responses == 1).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (responses == 1))
    prompt = torch.tensor([lm.encode("3+4=")] * len(counts))
    log_probs = lm.response_log_probs(prompt, torch.ones_like(prompt).bool(), responses, mask)
    expected = log_probs.sum(1).exp().numpy()
    n = len(generated)
    seen = np.array(list(counts.values())) / n
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 3 / n).all()
    assert expected.sum() > 0.98
