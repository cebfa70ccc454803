"""An agent's defaults are written once: what is parsed of its dataclass is what the dataclass has."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf
from shipped import AGENTS

import agents.train  # noqa: F401  has Hydra read conf as the commands do
from agents.runs.config import CONF
from agents.runs.defaults import find_defaults, find_types
from lmgym.models.sampling import Sampler
from lmgym.ranges import field_types, number_type

ROOT = CONF.parent


def target_of(agent: str) -> str:
    return OmegaConf.load(CONF / "agent" / f"{agent}.yaml")._target_


@pytest.mark.parametrize("agent", AGENTS)
def test_what_is_parsed_is_what_the_dataclass_has(agent: str) -> None:
    kind: Any = get_class(target_of(agent)).Config  # type: ignore[attr-defined]
    expected = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(kind)}  # type: ignore[misc]
    found = find_defaults(target_of(agent))
    assert {name: default.value for name, default in found.items()} == expected
    assert list(found) == list(expected)
    types = {name: default.type for name, default in found.items()}
    assert types == {name: Any if kind == dict[str, Any] else kind for name, kind in field_types(kind).items()}


@pytest.mark.parametrize("agent", AGENTS)
def test_every_number_says_what_it_may_be(agent: str) -> None:
    """A range in a type is checked before torch is imported, and in Python; one that is left out is checked nowhere."""
    found = find_defaults(target_of(agent))
    numbers = {name: default.type for name, default in found.items() if number_type(default.type) in (int, float)}
    assert not [name for name, kind in numbers.items() if "Range(" not in repr(kind)]


def test_the_sampler_is_read_too() -> None:
    assert find_types("lmgym.models.sampling.Sampler") == field_types(Sampler)


@pytest.mark.parametrize("agent", AGENTS)
def test_a_yaml_says_only_what_differs(agent: str) -> None:
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "agent" / f"{agent}.yaml"))  # type: ignore[assignment]
    defaults = find_defaults(values.pop("_target_"))
    assert not [name for name, value in values.items() if value == defaults[name].value and name != "algorithm"]


def test_comments_tell_what_a_number_is() -> None:
    assert find_defaults("agents.algorithms.ppo.PPO")["batch_size"].comment == "episodes a batch"


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys; from agents.runs.defaults import find_defaults;"
        "print(len(find_defaults('agents.algorithms.nlpo.NLPO')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    number, torch = done.stdout.split()
    assert int(number) > 40
    assert torch == "False"


def test_an_agent_of_no_file_has_the_fields_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Config:
        lr: float = 0.5
        kwargs: dict[str, Any] = field(default_factory=dict)

    module = types.ModuleType("made_here")
    module.Agent = type("Agent", (), {"Config": Config})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_here", module)
    assert {name: x.value for name, x in find_defaults("made_here.Agent").items()} == {"lr": 0.5, "kwargs": {}}


@pytest.mark.parametrize("target", ["nowhere.Agent", "agents.algorithms.ppo.Nobody", "json.JSONDecoder", "Agent", ""])
def test_what_is_no_agent_has_no_fields(target: str) -> None:
    assert find_defaults(target) == {}


MINE = """
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal
from agents.algorithms.ppo import PPO, PPOConfig
KIND = "b"
Word = Literal["a", "b"]

@dataclass(frozen=True)
class MineConfig(PPOConfig):
    known: ClassVar[int] = 3
    lr: float = -1e-3  # below zero
    word: Word = KIND
    many: list = field(default_factory=list)
    computed: int = 2 * 3
    needed: int = field(default=4)

class Base(PPO):
    Config = MineConfig

class Mine(Base):
    pass
"""


def test_an_algorithm_outside_the_checkout_is_completed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_outside.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    found = find_defaults("mine_outside.Mine")
    mine = {name: found[name].value for name in ("lr", "word", "many", "needed", "gae_lambda")}
    assert mine == {"lr": -1e-3, "word": "b", "many": [], "needed": 4, "gae_lambda": 0.95}
    assert found["word"].choices == ("a", "b")
    assert found["lr"].comment == "below zero"
    assert not {"known", "computed"} & found.keys()  # a class variable, and what takes running to know
    (tmp_path / "conf" / "agent").mkdir(parents=True)
    (tmp_path / "conf" / "agent" / "mine.yaml").write_text("_target_: mine_outside.Mine\nepochs: 2\n")
    search = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        agent = hydra.compose("train", [search, "agent=mine", "agent.minibatches=1"]).agent
    assert (agent.epochs, agent.minibatches, agent.lr) == (2, 1, -1e-3)


def test_every_field_is_shown_by_cfg_job() -> None:
    command = [sys.executable, "-m", "agents.train", "agent=rloo", "agent.lr=7e-4", "--cfg", "job"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = OmegaConf.create(done.stdout).agent
    assert shown.keys() == find_defaults(target_of("rloo")).keys() | {"_target_"}
    assert shown.lr == 7e-4
