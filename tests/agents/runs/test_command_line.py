"""The command line around Hydra: any path can be given as it is, and a command that is printed can be pasted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from agents.runs.arguments import check_choices, check_forms, options_first
from agents.runs.command_line import hydra_text, prepared, shell_command
from agents.runs.config import CONF
from lmgym.errors import InvalidArgumentError, UnknownNameError

PARSER = OverridesParser.create()
AWKWARD = [
    "\\",
    "${",
    "}",
    "'",
    '"',
    "$",
    "a",
    "\\'",
    "${a}",
    "\\${",
    "=",
    ",",
    " ",
    "\n",
    "[",
    "{",
    ":",
    "é",
    "😀",
    "?",
    "#",
    "~",
]
NAMES = [
    "plain",
    "a b",
    "lr=1,seed=2",
    "$HOME",
    "it's",
    'say "so"',
    "{a: b}",
    "[1,2]",
    "${seed}",
    "\\${x}",
    "ü😀",
    " x ",
    "a\nb",
]


def read(argument: str) -> str:
    """What a config holds in the end of `key=...`."""
    override = PARSER.parse_overrides([argument])[0]
    assert not override.is_sweep_override()
    return str(OmegaConf.create({"key": override.value()}).key)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join)))
def test_a_text_reaches_the_config_unchanged(text: str) -> None:
    assume(text != "???")  # which is OmegaConf's word for a value that is missing
    assert read(f"key={hydra_text(text)}") == text


@pytest.mark.parametrize("name", NAMES)
def test_a_run_directory_is_named_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    for key in ("run", "resume"):
        (argument,) = prepared([f"{key}={tmp_path / name}"])
        assert read(argument) == str(tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_quoted_for_hydra_is_still_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    written = f"run={hydra_text(str(tmp_path / name))}"
    assert prepared([written]) == [written]


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_that_is_not_there_is_named_as_it_was_given(name: str) -> None:
    (argument,) = prepared([f"resume=/nowhere/{name}"])
    assert read(argument) == f"/nowhere/{name}"


def test_a_file_is_named_as_it_is_and_other_values_are_hydras(tmp_path: Path) -> None:
    file = tmp_path / "my prompts, 1=2.txt"
    file.touch()
    (argument,) = prepared([f"env.prompts={file}"])
    assert read(argument) == str(file)
    same = [
        "resume=null",
        "resume=",
        "seed=0,1",
        "agent.lr=1e-3",
        "--help",
        "env.prompts=[a,'b c']",
        "~seed",
        "hydra.run.dir=runs/${now:%Y}",
    ]
    assert prepared(same) == same
    assert prepared(["-m", "resume=runs/a,runs/b"]) == ["-m", "resume=runs/a,runs/b"]  # a sweep


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("total_timesteps=2e4", "total_timesteps=20000"),
        ("agent.batch_size=1.28E+2", "agent.batch_size=128"),
        ("total_timesteps=1e4,2.5e3,7", "total_timesteps=10000,2500,7"),
        ("agent.lr=1e-3", "agent.lr=1e-3"),
        ("agent.lr=1.2345e2", "agent.lr=1.2345e2"),
        ("seed=1.0", "seed=1.0"),
        ("env.reward=a1e4", "env.reward=a1e4"),
        ("agent.lr=1e999", "agent.lr=1e999"),
    ],
)
def test_a_whole_number_may_have_an_exponent(given: str, expected: str) -> None:
    assert prepared([given]) == [expected]


def test_a_new_directory_may_hold_what_hydra_would_not_read() -> None:
    (argument,) = prepared(["hydra.run.dir=results, v2/lr=1"])
    assert read(argument) == "results, v2/lr=1"


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_command_can_be_pasted_into_a_shell(name: str) -> None:
    command = shell_command("agents.train", f"resume=/nowhere/{name}")
    assert shlex.split(command) == [sys.executable, "-m", "agents.train", f"resume=/nowhere/{name}"]
    arguments = command.partition("agents.train ")[2]
    done = subprocess.run(["sh", "-c", f"printf %s {arguments}"], capture_output=True, check=True)
    assert done.stdout.decode() == f"resume=/nowhere/{name}"


# -- other forms than KEY=VALUE ---------------------------------------------------------------------------------------

GROUPS = ("task", "agent", "sampler", "tracker", "experiment")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["keyword-8"], ["`keyword-8` must be KEY=VALUE: task=keyword-8"]),
        (["keyword", "ppo", "seed=1"], ["`keyword` .*: task=keyword", "`ppo` .*: agent=ppo"]),
        (["keywrd-8"], ["`keywrd-8` must be KEY=VALUE: task=keyword-8"]),
        (["greedy"], ["`greedy` .*: sampler=greedy"]),
        (["openrlhf"], ["`openrlhf` .*: experiment=openrlhf"]),
        (["nonsense"], ["`nonsense` must be KEY=VALUE, such as task=keyword-8 or seed=1."]),
        (["conf"], ["`conf` must be KEY=VALUE: resume=conf"]),  # a directory
        (["--seed", "3"], ["`--seed` must be KEY=VALUE without dashes: seed=3"]),
        (["--seed=3", "-m"], ["`--seed=3` .*: seed=3"]),
        (["--kl-coef", "task=echo-4"], [r"`--kl-coef` .*: kl_coef=\.\.\."]),
    ],
)
def test_other_forms_are_answered_with_what_to_type(
    arguments: list[str], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONF.parent)
    with pytest.raises(InvalidArgumentError) as error:
        check_forms(arguments, "resume", GROUPS)
    assert re.fullmatch("\n".join(lines), str(error.value)), str(error.value)


@pytest.mark.parametrize("path", ["/nowhere", "runs/x", "./a=b", "a, b"])
def test_a_bare_path_is_answered_with_its_key(path: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        check_forms([path], "run", ())
    assert str(error.value) == f"`{path}` must be KEY=VALUE: {shlex.quote(f'run={path}')}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["task=keyword-8", "-m", "seed=0,1", "~experiment", "hydra/launcher=joblib", "+agent.x=1", "run=/a=b"],
        ["--config-dir", "somewhere", "--cfg", "job", "--resolve", "--multi", "-cd", "here", "--info", "config"],
        ["--config-dir=somewhere", "-h"],
        [],
        ["experiment=fast"],  # `make train`
    ],
)
def test_what_hydra_takes_passes(arguments: list[str]) -> None:
    check_forms(arguments, "resume", GROUPS)


@pytest.mark.parametrize("argument", ["agent=null", "sampler=3", "experiment=null", "agent=ppo,null", "reward=true"])
def test_a_choice_of_no_name_is_answered_with_the_names(argument: str) -> None:
    group = argument.partition("=")[0]
    with pytest.raises(UnknownNameError, match=rf"`{group}` must be one of \['.*'\], got (None|3|True)\."):
        check_choices([argument], CONF)


def test_a_choice_of_a_name_passes() -> None:
    check_choices(
        ["agent=ppo,'rloo'", "agent=[ppo,rloo]", "seed=null", "task=null", "agent.lr=null", "a=,=", "-m"], CONF
    )


def test_overrides_come_behind_all_options() -> None:
    arguments = ["task=keyword-8", "-m", "seed=0,1", "--config-dir", "a=b", "agent=ppo"]
    assert options_first(arguments) == ["-m", "--config-dir", "a=b", "task=keyword-8", "seed=0,1", "agent=ppo"]
    assert get_args(options_first(arguments)).overrides == ["task=keyword-8", "seed=0,1", "agent=ppo"]
