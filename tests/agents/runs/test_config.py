"""Configs: what is checked before anything loads, that every yaml is complete, and how a bad override is answered."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import hydra
import pytest
from hydra.errors import CompactHydraException, ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

import agents.runs.plan
import agents.train
from agents.algorithms.ppo import PPOConfig
from agents.runs.config import SYNONYMS, explained, validated
from agents.runs.directory import check_is_run
from agents.runs.help_page import anatomy_help_page, evaluate_help_page, help_page
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.models.sampling import Sampler
from lmgym.tasks import registered_tasks

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"


def choices(group: str) -> list[str]:
    """The files of a config group: one more file is one more test."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def config_dir() -> Iterator[None]:
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to read a model from a disk or a hub fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    for target in ("lmgym.models.sharing.AutoModelForCausalLM", "lmgym.models.loading.AutoTokenizer"):
        monkeypatch.setattr(f"{target}.from_pretrained", refuse)
    monkeypatch.setattr("lmgym.rewards.classifier.AutoModelForSequenceClassification.from_pretrained", refuse)


@functools.cache
def composed_once(*overrides: str) -> DictConfig:
    return hydra.compose("train", overrides=list(overrides))


def composed(*overrides: str) -> DictConfig:
    """A config of one's own: to copy one takes a tenth of the time of composing it."""
    return copy.deepcopy(composed_once(*overrides))


# -- a dataclass from plain values -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    count: int = 1
    rate: float = 0.5
    limit: float | None = None
    name: str = "x"
    flag: bool = False
    kind: Literal["slow", "fast"] = "slow"
    choice: Literal["a", "b"] | None = None


def test_values_become_the_dataclass() -> None:
    values = {"count": 3, "rate": 0.25, "limit": 2.5, "name": "y", "flag": True, "kind": "fast", "choice": "b"}
    assert validated(Numbers, values, "agent") == Numbers(3, 0.25, 2.5, "y", True, "fast", "b")
    assert validated(Numbers, {}, "agent") == Numbers()


def test_an_int_is_a_number_and_null_is_a_missing_one() -> None:
    made = validated(Numbers, {"rate": 1, "limit": 2, "choice": None}, "agent")
    assert (made.rate, made.limit, made.choice) == (1.0, 2.0, None)
    assert type(made.rate) is float
    assert type(made.limit) is float
    assert validated(Numbers, {"limit": None}, "agent").limit is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 1.0, "an int"),
        ("count", True, "an int"),  # Python's bool is an int; here it is not
        ("count", "1", "an int"),
        ("count", None, "an int"),
        ("rate", "abc", "a number"),
        ("rate", True, "a number"),
        ("rate", None, "a number"),
        ("rate", [1.0], "a number"),
        ("limit", "abc", "a number"),
        ("limit", False, "a number"),
        ("name", 1, "a text"),
        ("flag", 1, "True or False"),
        ("flag", "true", "True or False"),
        ("kind", "medium", "one of ['fast', 'slow']"),
        ("kind", None, "one of ['fast', 'slow']"),
        ("choice", "c", "one of ['a', 'b']"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_what_was_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        validated(Numbers, {name: value}, "agent")
    assert str(error.value) == f"`agent.{name}` must be {expected}, got {value!r}."


def test_every_error_is_told_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as error:
        validated(Numbers, {"count": "x", "rate": 0.1, "flag": 3, "kind": "medium"}, "agent")
    lines = str(error.value).splitlines()
    assert [line.split("`")[1] for line in lines] == ["agent.count", "agent.flag", "agent.kind"]


def test_an_unknown_name_is_answered_with_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'count'") as error:
        validated(Numbers, {"cuont": 1}, "agent")
    assert "`agent.cuont`" in str(error.value)
    assert all(f.name in str(error.value) for f in fields(Numbers))
    with pytest.raises(UnknownNameError) as error:
        validated(Numbers, {"zzzzzz": 1}, "agent")
    assert "Did you mean" not in str(error.value)


# -- the yaml files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group in ("agent", "sampler", "tracker") for name in choices(group)]
)
@pytest.mark.usefixtures("nothing_loads")
def test_every_file_makes_a_valid_plan(choice: str) -> None:
    plan = agents.runs.plan.check(composed(choice))
    assert isinstance(plan.agent_config, plan.agent_class.Config)
    assert isinstance(plan.sampler, Sampler)
    assert (plan.seed, plan.settings["device"]) == (0, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("experiment"))
def test_every_preset_is_of_ppo_and_takes_a_step(name: str) -> None:
    """Its numbers are those of the file, its first batch is that of the distribution it samples."""
    cfg = composed(f"experiment={name}", "env.max_new_tokens=4", "agent.batch_size=40", "device=cpu")
    preset = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    assert cfg.env == OmegaConf.merge(composed().env, preset.get("env", {}), {"max_new_tokens": 4})
    written = preset.agent
    assert cfg.agent == OmegaConf.merge(composed("agent=ppo").agent, written, {"batch_size": 40})
    agent = agents.runs.plan.build(agents.runs.plan.check(cfg))
    logged: dict[str, float] = {}
    agent.learn(1, callback=lambda step, metrics: logged.update(metrics) is None)
    assert logged["train/updates"] == cfg.agent.epochs * cfg.agent.minibatches
    assert logged["rollout/kl"] == pytest.approx(0, abs=1e-4)


def names(kind: Any) -> set[str]:
    return {f.name for f in fields(kind)}


@pytest.mark.parametrize("agent", choices("agent"))
def test_an_agents_yaml_has_every_field_of_its_config_and_no_other(agent: str) -> None:
    values = dict(composed(f"agent={agent}").agent)
    kind = hydra.utils.get_class(values.pop("_target_")).Config  # type: ignore[attr-defined]
    assert values.keys() == names(kind)


@pytest.mark.parametrize("sampler", choices("sampler"))
def test_a_samplers_yaml_has_every_field_and_no_other(sampler: str) -> None:
    assert OmegaConf.load(CONF / "sampler" / f"{sampler}.yaml").keys() == names(Sampler)


def test_env_has_every_argument_of_the_env_that_training_leaves_open() -> None:
    env = composed().env
    given = {"task", "device", "obs_format", "render_mode", "text_info"}  # the first two by keys of their own
    assert env.keys() == names(Settings) - given
    defaults = Settings()
    assert {name: getattr(defaults, name) for name in env} == env


def test_the_training_yaml_has_every_field_of_the_evaluation() -> None:
    assert composed().evaluation.keys() == names(agents.runs.plan.EvaluationConfig)


def test_the_ppo_yaml_is_what_ppo_does_by_default() -> None:
    values = OmegaConf.to_container(composed().agent)
    del values["_target_"]  # type: ignore[union-attr, arg-type]
    assert validated(PPOConfig, values, "agent") == PPOConfig()  # type: ignore[arg-type]


def test_a_config_that_was_written_reads_back_to_the_same_plan(tmp_path: Path) -> None:
    cfg = composed("agent.lr=3e-4", "env.kl_coef=0.1", "evaluation.prompts=8")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    assert agents.runs.plan.check(agents.runs.plan.saved_config(tmp_path)) == agents.runs.plan.check(cfg)


# -- bad overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "error", "parts"),
    [
        ("agent.lr=abc", LmGymError, ["`agent.lr`", "a finite number >= 0", "'abc'"]),
        ("agent.lr=-1", LmGymError, ["`agent.lr`", ">= 0", "-1"]),
        ("agent.batch_size=1.5", LmGymError, ["`agent.batch_size`", "an int", "1.5"]),
        ("agent.batch_size=0", LmGymError, ["`agent.batch_size`", ">= 1", "0"]),
        ("agent.minibatches=100000", LmGymError, ["`minibatches`", "100000"]),
        ("agent.gae_lambda=1.1", LmGymError, ["`agent.gae_lambda`", "<= 1", "1.1"]),
        ("agent.clip_range_value=0", LmGymError, ["`agent.clip_range_value`", "> 0", "0"]),
        ("agent.critic=actor", LmGymError, ["`agent.critic`", "'shared'", "'reference'", "'reward_model'", "'actor'"]),
        ("agent.lr_schedule=line", LmGymError, ["`agent.lr_schedule`", "'constant'", "'linear'", "'cosine'"]),
        ("agent.foo=1", ConfigCompositionException, ["agent.foo"]),
        ("+agent.foo=1", LmGymError, ["`agent.foo`", "'lr'", "'batch_size'"]),
        ("+agent.learning_rate=1", LmGymError, ["`agent.learning_rate`", "'lr'"]),
        ("agent=pop", MissingConfigException, ["agent/pop", "ppo"]),
        ("task=revews", LmGymError, ["`task`", "'reviews'", "Did you mean 'reviews'"]),
        ("task=null", LmGymError, ["`task` must be one of", "None"]),
        ("env=keyword-8", LmGymError, ["`env` must be names with values", "task=NAME"]),
        ("+task.kl_coef=1", LmGymError, ["`task.kl_coef` is called `env.kl_coef` here: env.kl_coef=..."]),
        ("+env.device=cpu", LmGymError, ["`env.device`"]),
        ("env.kl_coef=-1", LmGymError, ["`kl_coef`", ">= 0", "-1"]),
        ("env.kl_coef=abc", LmGymError, ["`kl_coef`", "'abc'"]),
        ("env.gamma=1.5", LmGymError, ["`gamma`", "<= 1", "1.5"]),
        ("env.max_new_tokens=0", LmGymError, ["`max_new_tokens`", ">= 1", "0"]),
        ("env.split=tain", LmGymError, ["`split`", "'train'", "Did you mean 'train'"]),
        ("env.dtype=float31", LmGymError, ["`dtype`", "'float32'"]),
        ("env.prompt_order=random", LmGymError, ["`prompt_order`", "'shuffle'", "'sequential'"]),
        ("env.model=./nowhere/at/all", LmGymError, ["`model`", "nowhere"]),
        ("+env.kl_coeff=1", LmGymError, ["`env.kl_coeff`", "Did you mean 'kl_coef'"]),
        ("evaluation=3", LmGymError, ["`evaluation`", "3"]),
        ("agent._target_=agents.nothing.X", LmGymError, ["`agent._target_`", "agents.nothing"]),
        ("seed=-1", LmGymError, ["`seed`", ">= 0", "-1"]),
        ("seed=one", LmGymError, ["`seed`", "'one'"]),
        ("total_timesteps=0", LmGymError, ["`total_timesteps`", ">= 1", "0"]),
        ("checkpoint_every=true", LmGymError, ["`checkpoint_every`", "True"]),
        ("device=gpu", LmGymError, ["`device`", "'auto'", "'gpu'"]),
        ("sampler.top_p=2", LmGymError, ["`sampler.top_p`", "<= 1", "got 2."]),
        ("sampler.temperature=-1", LmGymError, ["`sampler.temperature`", ">= 0", "-1"]),
        ("sampler.top_k=0.5", LmGymError, ["`sampler.top_k`", "an int", "0.5"]),
        ("sampler=gredy", MissingConfigException, ["sampler/gredy", "greedy", "policy"]),
        ("evaluation.samples=0", LmGymError, ["`evaluation.samples`", ">= 1", "0"]),
        ("evaluation.prompts=0", LmGymError, ["`evaluation.prompts`", ">= 1", "0"]),
        ("evaluation.split=tset", LmGymError, ["`split`", "'test'", "Did you mean 'test'"]),
        ("+evaluation.sample=3", LmGymError, ["`evaluation.sample`", "Did you mean 'samples'"]),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_a_bad_override_fails_before_anything_loads(override: str, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        agents.runs.plan.check(composed(override))
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []


def test_several_bad_values_of_an_agent_are_told_together() -> None:
    with pytest.raises(InvalidArgumentError) as error:
        agents.runs.plan.check(composed("agent.lr=abc", "agent.epochs=many", "agent.critic=actor"))
    assert re.findall(r"`(agent\.\w+)`", str(error.value)) == ["agent.epochs", "agent.lr", "agent.critic"]


def test_the_help_has_a_line_for_every_key_agent_and_task() -> None:
    page = help_page(["agent=rloo", "--help"])
    lines = page.splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    described = {name.rstrip(":"): text for name, *text in rows}
    cfg = composed("agent=rloo")
    kinds = {name for name in cfg if name not in ("task", "env", "agent", "sampler", "tracker", "experiment")}
    families = {name.partition("-")[0] for name in registered_tasks()}
    expected = {
        *kinds,
        *cfg.env,
        *cfg.agent,
        *choices("agent"),
        *families,
        *choices("sampler"),
        *choices("tracker"),
    } - {"_target_"}
    assert {name for name in expected if not described.get(name)} <= {"evaluation"}
    assert "group_size: 4 # responses to each prompt" in page


def test_the_help_lists_what_a_directory_of_configs_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_helped.py").write_text(
        'from agents.algorithms.ppo import PPO\nclass Mine(PPO):\n    """PPO of my own."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "mine.yaml").write_text("_target_: mine_helped.Mine\nepochs: 7\n")
    (tmp_path / "agent" / "lost.yaml").write_text("_target_: nowhere_at_all.Mine\n")
    for option in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        page = help_page(["agent=mine", *option, "--help"])
        assert re.search(r"^  mine +PPO of my own\.$", page, re.MULTILINE)
        assert re.search(r"^  lost$", page, re.MULTILINE)
        assert "epochs: 7 # passes over a batch" in page
    assert "mine" not in help_page(["agent=mine"])


@pytest.mark.parametrize(("command", "help_page"), [("evaluate", evaluate_help_page), ("anatomy", anatomy_help_page)])
def test_the_help_of_a_command_for_runs_has_a_line_for_every_key(command: str, help_page: Callable[[], str]) -> None:
    page = help_page()
    config = OmegaConf.load(CONF / f"{command}.yaml")
    for name in {*config, *config.evaluation} - {"defaults", "hydra"}:
        assert re.search(rf"^ +{name}: .*# \w", page, re.MULTILINE), name


def test_every_synonym_leads_to_a_key() -> None:
    keys = set()
    for agent in ("ppo", "rloo", "sb3_ppo"):
        for name, part in composed(f"agent={agent}").items():
            keys |= {name} | ({f"{name}.{inner}" for inner in part} if isinstance(part, DictConfig) else set())
    assert set(SYNONYMS.values()) - keys == {"hydra.run.dir"}


REFUSED_AT_ONCE = [
    *("seed=-1", "total_timesteps=0", "env.kl_coef=-1", "evaluation.samples=0", "env.split=tain", "agent.lr=fast"),
    *("agent=sb3_dqn +agent.kwargs.bufer_size=5", "agent=sb3_trpo +agent.kwargs.gamma=1"),
    *("agent.epochs=0", "agent.critic=shard", "agent.policy=lor", "sampler.top_p=2", "sampler.greedy_tokens=-1"),
]


def test_a_config_is_refused_before_torch_is_imported() -> None:
    program = (
        "import sys, hydra, agents.train, agents.runs.plan\n"
        "from lmgym.errors import LmGymError\n"
        f"with hydra.initialize_config_dir({str(CONF)!r}, version_base='1.3'):\n"
        f"    for bad in {REFUSED_AT_ONCE}:\n"
        "        try: agents.runs.plan.check(hydra.compose('train', bad.split()))\n"
        "        except LmGymError: print(bad, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{bad} False" for bad in REFUSED_AT_ONCE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "override", "parts"),
    [
        ("agents.train", "agent.lr=abc", ["`agent.lr`", "a finite number", "'abc'"]),
        ("agents.train", "task=revews", ["`task` must be one of", "Did you mean 'reviews'?"]),
    ],
)
def test_a_bad_override_on_the_command_line(tmp_path: Path, module: str, override: str, parts: list[str]) -> None:
    command = [sys.executable, "-m", module, override, f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert [part for part in parts if part not in done.stderr] == []
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not list(tmp_path.glob("run/*"))  # nothing was begun


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sampler=gredy"], r"`sampler` must be one of \['greedy', .*\], got 'gredy'. Did you mean 'greedy'\?"),
        (["agent.clip_rang=1"], r"`agent.clip_rang` must be .*, got 'clip_rang'. Did you mean 'clip_range'\?"),
        (["sed=1"], r"`sed` must be one of \['agent', .*\], got 'sed'. Did you mean 'seed'\?"),
        (
            ["agent=sb3_ppo", "agent.kwargs.ent_coeff=1"],
            r"`agent.kwargs.ent_coeff` must .* Did you mean 'ent_coef'\? To add it, write \+agent.kwargs.ent_coeff=...",
        ),
        (["agent.learning_rate=1"], r"`agent.learning_rate` is called `agent.lr` here: agent.lr=\.\.\."),
        (["lr=1"], r"`lr` is called `agent.lr` here: .*"),
        (["env_id=keyword-8"], r"`env_id` is called `task` here: .*"),
        (["task.kl_coef=1"], r"`task.kl_coef` is called `env.kl_coef` here: env.kl_coef=\.\.\."),
        (["task.task=echo-2"], r"`task.task` is called `task` here, and its value is a whole name: task=keyword-32"),
        (["task.setting=8"], r"`task.setting` is called `task` here, .*"),
        (["task.device=cpu"], r"`task.device` is called `device` here: device=\.\.\."),
        (["env.device=cpu"], r"`env.device` is called `device` here: device=\.\.\."),
        (["setting=8"], r"`setting` is called `task` here: .*"),
        (["samples=8"], r"`samples` is called `evaluation.samples` here: .*"),
        (["agent.seed=1"], r"`agent.seed` is called `seed` here: seed=\.\.\."),
        (["env.kl_cof=1"], r"`env.kl_cof` must be .*, got 'kl_cof'. Did you mean 'kl_coef'\?"),
        (["experimnt=trl"], r"`experimnt` must be .* Did you mean 'experiment'\?"),
        (["beta=0.1"], r"`beta` is called `env.kl_coef` here: .*"),
        (["agent@x=ppo"], r"Could not override 'agent@x'(.|\n)*"),
        (["seed.x=1"], r"Could not override 'seed.x'(.|\n)*"),
        (["hydra.job.chdir=abc"], r"Error merging override hydra.job.chdir=abc\nValue 'abc' .*(.|\n)*"),
    ],
)
def test_an_override_that_names_nothing_is_answered_in_a_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(CompactHydraException) as caught:
        composed(*overrides)
    assert re.fullmatch(expected, explained(caught.value)), explained(caught.value)


@pytest.mark.parametrize(("command", "override"), [("sample", "run=runs/x"), ("sample", "lr=1"), ("evaluate", "lr=1")])
def test_a_command_answers_with_keys_of_its_own(command: str, override: str) -> None:
    with pytest.raises(CompactHydraException) as caught:
        hydra.compose(command, overrides=[override])
    answer = explained(caught.value)
    assert " is called " not in answer
    assert "'experiment'" not in answer


def test_what_is_near_a_run_is_answered_with_the_run(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "sweep" / f"ppo-{number}" / "checkpoint").mkdir(parents=True)
        (tmp_path / "sweep" / f"ppo-{number}" / "config.yaml").touch()
    run = tmp_path / "sweep" / "ppo-0"
    check_is_run(run)
    nearby = {
        tmp_path / "sweep": f"holds 6 runs: choose {run}, .*ppo-1, .*ppo-2, .*ppo-3, \\.\\.\\.",
        run / "checkpoint": f"is a part of one: give {run}",
        run / "config.yaml": f"is a part of one: give {run}",
        tmp_path: "has no config.yaml",
        tmp_path / "nowhere": "there is none",
    }
    for path, expected in nearby.items():
        with pytest.raises(InvalidArgumentError, match=f"^`{path}` must be a run directory, and {expected}.$"):
            check_is_run(path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [([], "must be a run directory, and has no config.yaml"), (["config.yaml"], "must hold a checkpoint")],
)
@pytest.mark.usefixtures("nothing_loads")
def test_resuming_what_is_no_run_says_so(tmp_path: Path, files: list[str], expected: str) -> None:
    for name in files:
        (tmp_path / name).write_text(OmegaConf.to_yaml(composed(), resolve=True))
    with pytest.raises(SystemExit) as exit_:
        agents.train.main(OmegaConf.create({"resume": str(tmp_path)}))
    assert expected in str(exit_.value)
    assert str(tmp_path) in str(exit_.value)
