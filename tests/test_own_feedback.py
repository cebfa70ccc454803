"""docs/own_feedback.md as it stands: own feedback on a model of one's own, SFT, a reward model, PPO."""

from __future__ import annotations

import json
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run_command_here
from pages import ROOT, blocks, execute

PAGE = ROOT / "docs" / "own_feedback.md"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory whose modules can be imported, as `python -m` has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_people", None)


@pytest.mark.slow
@pytest.mark.usefixtures("directory")
def test_the_page_runs_and_people_like_the_policy_better() -> None:
    module = types.ModuleType("own_feedback")
    for block in blocks(PAGE):
        if block.path is not None:
            Path(block.path).write_text(block.code)
        elif block.language == "bash":
            for command in block.code.splitlines():
                program, option, name, *arguments = shlex.split(command)
                assert (program, option) == ("python", "-m")
                run_command_here(name, *arguments)
        else:
            execute(block, module)
    reward = json.loads(Path("mine/reward/summary.json").read_text())
    assert reward["feedback"]["judgements"] == {"choice": 200}
    assert reward["feedback"]["held_out_prompts"] == 8
    assert reward["held_out"]["accuracy"]["mean"] > 0.6
    ppo = json.loads(Path("mine/ppo/summary.json").read_text())
    assert ppo["after"]["return"]["mean"] > ppo["before"]["return"]["mean"] + 0.5
    assert module.likes["ppo"] > module.likes["sft"] + 0.7
