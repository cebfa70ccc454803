"""A stranger's run directory: it can be read, resumed and graded, and none of its code runs, nor is it asked for."""

from __future__ import annotations

import builtins
import json
import shutil
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

import agents.evaluate
import agents.runs.plan
import agents.runs.run
import agents.train
from agents.policies.actor_critic import ActorCritic
from agents.runs.trust import (
    config_text,
    import_installed,
    installed,
    needed_trust,
    read_config,
    trust_argument,
    trusted_modules,
)
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.files import RunFileError
from lmgym.models.sharing import load_causal_lm
from lmgym.rewards.base import import_function

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that Python imports from, as under `python -m`; what a test imports is forgotten again."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(str(directory))
    before = set(sys.modules)
    yield directory
    for name in set(sys.modules) - before:
        if not name.startswith(("lmgym", "agents", "torch", "transformers")):
            del sys.modules[name]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages are installed."""
    directory = tmp_path / "site-packages"
    directory.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(directory)])
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(directory)])
    return directory


def write(path: Path) -> Path:
    """A module that leaves a trace when it is executed, and has a reward in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(path) + '.ran'!r}, 'w').close()\nWHERE = __file__\ndef f(**columns): return [0.0]\n")
    return path


def ran(path: Path) -> list[str]:
    """Which files below a directory have been executed."""
    return sorted(file.name.removesuffix(".ran") for file in path.rglob("*.ran"))


def run_directory(path: Path, *overrides: str, **changes: Any) -> Path:
    """A run that was interrupted, as far as its config goes."""
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        values = agents.runs.plan.plain(hydra.compose("train", overrides=["device=cpu", *overrides]))
    (path / "checkpoint").mkdir(parents=True)
    (path / "config.yaml").write_text(config_text({**values, **changes}))
    return path


COMMANDS = {
    "resume": (agents.train.main, "resume"),
    "evaluate": (agents.evaluate.main, "run"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("names", ["env.reward='runs.x.evil:f'", "agent._target_=runs.x.evil.X"])
def test_code_of_a_run_directory_does_not_run(command: str, names: str, work: Path) -> None:
    write(work / "runs" / "x" / "evil.py")
    for package in ("runs", "runs/x"):
        write(work / package / "__init__.py")
    run = run_directory(work / "runs" / "x", names)
    main, key = COMMANDS[command]
    with pytest.raises(SystemExit, match=r"of a run directory .* Where you trust that code, say so: trust=runs"):
        main(OmegaConf.create({key: str(run), "evaluation": {}}))
    assert ran(work) == []


def values_with(reward: Any) -> dict[str, Any]:
    return {"agent": {"_target_": "agents.algorithms.ppo.PPO"}, "env": {"reward": reward}}


# What a stranger may write as the import path, and the files that it hopes for in the working directory.
STRANGE = {
    "a module": ("evil:f", ["evil.py"]),
    "a package": ("evil:f", ["evil/__init__.py"]),
    "a part of a package": ("evil.part:f", ["evil/__init__.py", "evil/part.py"]),
    "a part of a namespace": ("evil.part:f", ["evil/part.py"]),
    "a part of an installed namespace": ("shared.evil:f", ["shared/evil.py"]),
    "a part of an installed package": ("good.evil:f", ["good/evil.py"]),
    "in a list": ({"lmgym.tasks.reviews:gold": 1.0, "evil:f": 0.5}, ["evil.py"]),
    "no name": ("../evil:f", ["evil.py"]),
}


@pytest.mark.parametrize("case", STRANGE)
def test_only_installed_code_is_imported(case: str, work: Path, packages: Path) -> None:
    write(packages / "good" / "__init__.py")
    write(packages / "shared" / "good.py")
    reward, files = STRANGE[case]
    for name in files:
        write(work / name)
    with pytest.raises(InvalidArgumentError, match=r"`env.reward`"):
        import_installed(values_with(reward), work / "runs" / "x")
    assert ran(work) == ran(packages) == []


@pytest.mark.parametrize("path", ["good:f", "good.part:f", "shared.part:f"])
def test_an_installed_module_is_imported_from_where_it_is_installed(path: str, work: Path, packages: Path) -> None:
    name = path.partition(":")[0].replace(".", "/")
    write(packages / "good" / "__init__.py")
    write(packages / "good" / "part.py")
    write(packages / "shared" / "part.py")  # a namespace package
    write(work / f"{name}.py")  # the working directory comes first on Python's path
    if name == "good/part":
        write(work / "good" / "__init__.py")
    import_installed(values_with(path), work / "runs" / "x")
    function: Any = import_function(path)
    assert function.__globals__["WHERE"].startswith(str(packages))
    assert ran(work) == []


def test_a_name_that_is_taken_by_a_module_from_elsewhere_is_refused(work: Path, packages: Path) -> None:
    write(work / "taken.py")
    __import__("taken")
    write(packages / "taken.py")
    assert installed("taken") is None
    assert ran(packages) == []


def test_nothing_below_the_run_is_imported_wherever_it_lies(work: Path, packages: Path) -> None:
    write(packages / "inside.py")
    with pytest.raises(InvalidArgumentError, match="must be code of lmgym"):
        import_installed(values_with("inside:f"), packages)
    link = work / "link"
    link.symlink_to(packages)
    with pytest.raises(InvalidArgumentError, match="must be code of lmgym"):
        import_installed(values_with("inside:f"), link)
    assert ran(packages) == []


def test_what_a_path_file_adds_is_not_installed(work: Path, packages: Path) -> None:
    write(work / "evil.py")
    (packages / "checkout.pth").write_text(str(work))
    site.addsitedir(str(packages))
    assert installed("evil") is None


@pytest.mark.parametrize("module", ["lmgym.tasks.reviews", "agents.algorithms.ppo", "numpy.random", "agents"])
def test_the_projects_own_code_and_installed_packages_are_known(module: str) -> None:
    specs = installed(module)
    assert specs is not None
    assert specs[-1].name == module


@pytest.mark.parametrize("module", ["os", "antigravity", "builtins", "agents.nothing", "lmgym..tasks", ""])
def test_the_standard_library_is_no_place_for_rewards(module: str) -> None:
    assert installed(module) is None


def test_code_is_looked_up_before_any_of_it_is_executed(work: Path, packages: Path) -> None:
    write(packages / "good.py")
    with pytest.raises(InvalidArgumentError, match="evil"):
        import_installed(values_with(["good:f", "evil:f"]), work)
    assert ran(packages) == []


def test_a_name_that_is_not_there_is_said(work: Path, packages: Path) -> None:
    write(packages / "good.py")
    with pytest.raises(InvalidArgumentError, match=r"good has no 'g'"):
        import_installed(values_with("good:g"), work)
    (packages / "broken.py").write_text("1 / 0")
    with pytest.raises(InvalidArgumentError, match=r"'broken:f' could not be imported: division by zero"):
        import_installed(values_with("broken:f"), work)
    assert "broken" not in sys.modules


def test_the_user_may_trust_a_module(work: Path) -> None:
    write(work / "mine" / "rewards.py")
    values = values_with("mine.rewards:f")
    assert needed_trust(values) == ("mine.rewards",)
    for trusted in ("mine", "mine.rewards", ["other", "mine"], "mine.rewards:f"):
        import_installed(values, work, trusted_modules(trusted))
    with pytest.raises(InvalidArgumentError, match="trust=mine.rewards"):
        import_installed(values, work, trusted_modules("min"))
    with pytest.raises(InvalidArgumentError, match="`trust` must be the name of a module, or a list of them, got 3"):
        trusted_modules(3)


def test_the_command_to_go_on_names_what_must_be_trusted() -> None:
    assert trust_argument(()) == ""
    assert trust_argument(("a.b",)) == " trust=a.b"
    assert trust_argument(("a", "b")) == " 'trust=[a,b]'"


def test_a_class_that_is_no_agent_is_refused(tmp_path: Path) -> None:
    values = read_config(run_directory(tmp_path / "run", "agent._target_=agents.batch.Minibatch") / "config.yaml")
    with pytest.raises(InvalidArgumentError, match=r"`agent._target_` must be an agent"):
        agents.runs.plan.check(values)


# -- a config is read as text ----------------------------------------------------------------------------------------

TEXTS = [
    "${oc.env:HOME}",
    "${",
    "$}",
    "1e-3",
    "1E5",
    ".5",
    "1_0",
    "yes",
    "null",
    "2024-01-01",
    "a: b",
    "*x",
    "é\n\t",
    "",
]


def test_a_config_reads_back_as_it_was_written(tmp_path: Path) -> None:
    values = {
        "env": {"prompts": TEXTS},
        "numbers": [1e-3, 1e300, 1e-5, 5, -0.0, 1.0, True, None],
        "twice": [TEXTS, TEXTS],
    }
    (tmp_path / "config.yaml").write_text(config_text(values), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == values


def test_a_config_means_what_hydra_wrote(tmp_path: Path) -> None:
    values = {"lr": 1e-3, "eps": 1e-05, "text": "1e-3", "day": "2024-01-01", "flag": "on", "n": None, "big": 10**20}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    assert read_config(tmp_path / "config.yaml") == values


def test_nothing_of_the_environment_gets_into_a_config(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    run = run_directory(work / "run", total_timesteps=100)
    path = run / "config.yaml"
    path.write_text(path.read_text() + "note: ${oc.env:SECRET}\n")
    values = agents.runs.run.with_overrides(agents.runs.plan.saved_config(run), ["total_timesteps=200"])
    assert (values["note"], values["total_timesteps"]) == ("${oc.env:SECRET}", 200)
    assert "hush" not in config_text(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a\n", r"config.yaml` must be a config in YAML, and is not: an alias .* in line 2"),
        ("a: !!python/object/apply:os.system [true]", "must be a config in YAML"),
        ("[" * 10_000, "must be a config in YAML"),
        ("- 1", "must hold names with values, got list"),
        ("", "must hold names with values, got NoneType"),
    ],
)
def test_a_config_that_cannot_be_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunFileError, match=message):
        read_config(tmp_path / "config.yaml")


# -- a checkpoint with code in it ------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path: Path, model_dir: str) -> Path:
    """A model directory of an unknown type that comes with its code."""
    directory = tmp_path / "poisoned"
    shutil.copytree(model_dir, directory)
    write(directory / "evil.py")
    unknown = {"model_type": "evil", "architectures": ["Evil"], "tokenizer_class": "Evil"}
    code = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}
    for name, classes in code.items():
        values = json.loads((directory / name).read_text())
        values |= {"auto_map": dict.fromkeys(classes, "evil.Evil"), **unknown}
        (directory / name).write_text(json.dumps(values))
    return directory


def test_a_checkpoint_with_code_neither_runs_it_nor_asks(
    poisoned: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", questions.append)
    with pytest.raises(LmGymError, match=r"could not be loaded with AutoModelForCausalLM"):
        load_causal_lm(str(poisoned))
    with pytest.raises(ValueError, match="custom code"):
        ActorCritic(load_causal_lm(model_dir)).load(poisoned)
    assert ran(poisoned) == questions == []
