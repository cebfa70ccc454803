"""What `python -m agents.train --help` prints: every key in a line, and the agents and tasks there are."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.runs.arguments import find_configs
from agents.runs.config import CONF
from agents.runs.defaults import REWARD_CONFIG, Default, find_defaults, find_fields
from agents.runs.plan import ENV_KEYS
from agents.runs.sources import find_class
from agents.runs.trust import read_config
from lmgym.envs.settings import Settings
from lmgym.tasks import registered_tasks

_WIDTH = 118


def help_page(arguments: Sequence[str]) -> str:
    """The whole page.

    Args:
        arguments: of the command; the keys of the agent that they name are listed, and what `--config-dir` adds.
    """
    configs = {group: find_configs(group, arguments) for group in ("agent", "sampler", "tracker", "experiment")}
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("agent=")]
    agent = named[-1] if named and named[-1] in configs["agent"] else "ppo"
    run_keys = (CONF / "train.yaml").read_text(encoding="utf-8").partition("\nseed:")[2].partition("\nhydra:")[0]
    before_env, _, rest = run_keys.partition("\nenv:")  # whose keys are listed further down, with their meanings
    run_keys = f"{before_env}\nevaluation:" + rest.partition("\nevaluation:")[2]
    samplers = {name: _comment(path) for name, path in configs["sampler"].items()}
    trackers = {name: _comment(path) for name, path in configs["tracker"].items()}
    presets = {name: _comment(path) for name, path in configs["experiment"].items()}
    agents = {name: _blurb(path) for name, path in configs["agent"].items()}
    keys = _indented(_agent_keys(configs["agent"][agent]))
    parts = [
        "python -m agents.train [task=NAME] [agent=NAME] [env.KEY=value] [key=value ...]     (-m key=a,b runs several)",
        f"The run:\n{_indented(f'seed:{run_keys}')}",
        f"task=NAME, or NAME-SETTING:\n{_listed(_tasks())}",
        f"agent=NAME:\n{_listed(agents)}",
        f"sampler=NAME, the distribution that tokens are drawn from:\n{_listed(samplers)}",
        f"tracker=NAME, where metrics go besides metrics.jsonl (its keys: conf/tracker):\n{_listed(trackers)}",
        f"experiment=NAME, a preset for PPO: numbers of well-known code, and `fast`:\n{_listed(presets)}",
        f"Keys env.KEY (null keeps the task's own):\n{_listed(_env_keys())}",
        f"Keys agent.KEY of agent={agent} (of another: agent=NAME --help):\n{keys}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)


def _tasks() -> dict[str, str]:
    tasks = {}
    for family, group in itertools.groupby(registered_tasks().values(), lambda task: task.name.partition("-")[0]):
        settings = list(group)
        names = ", ".join(task.name.partition("-")[2] for task in settings if "-" in task.name)
        first = settings[0].description.partition("\n")[0]
        tasks[family] = f"({names}) {first}" if names else first
    return tasks


def _env_keys() -> dict[str, str]:
    found = re.findall(r"^    (\w+): (.+)$", inspect.getdoc(Settings) or "", re.MULTILINE)
    return {name: text for name, text in found if name in ENV_KEYS}


def _blurb(path: Path) -> str:
    """The first line on the class that a config names, read without importing it; "" where that is not found."""
    module, _, name = str(read_config(path).get("_target_", "")).rpartition(".")
    found = find_class(module, name)
    return "" if found is None else (ast.get_docstring(found[1]) or "").partition("\n")[0]


def _docstring(path: Path) -> str:
    """The first line on a module, read without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _comment(path: Path) -> str:
    """The comment that a config begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = [line.lstrip("# ") for line in lines]
    return next((line for line in text if not line.startswith("@package")), "")


def _keys_of(config: Path) -> str:
    """What a command's config holds from `task` on, without Hydra's part."""
    return "task:" + config.read_text(encoding="utf-8").partition("\ntask:")[2].partition("\nhydra:")[0]


def _of_each(directory: Path, tell: Callable[[Path], str]) -> dict[str, str]:
    """What is told of each config of a group, by name."""
    return {path.stem: tell(path) for path in sorted(directory.glob("*.yaml"))}


def _agent_keys(path: Path) -> str:
    """The keys of an agent's config with their values and meanings, those that it shares with others first."""
    values = read_config(path)
    return _lines_of(find_defaults(str(values.get("_target_", ""))), values)


def _lines_of(defaults: Mapping[str, Default], values: Mapping[str, Any]) -> str:
    """Keys with their values and meanings; `values` are those that are not the default."""
    lines = []
    for name, default in defaults.items():
        value = values.get(name, default.value)
        line = f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
        meaning = "; ".join(filter(None, [" | ".join(default.choices), default.comment]))
        lines.append(f"{line} # {meaning}" if meaning else line)
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(_cut(f"  {line}") for line in text.splitlines())


def _listed(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(_cut(f"  {name:{width}}  {text}") for name, text in rows.items())


def _cut(line: str) -> str:
    line = line.rstrip()
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3].rstrip()}..."


def evaluate_help_page() -> str:
    """What `python -m agents.evaluate --help` prints: every key in a line."""
    return _page_of_a_run(
        "evaluate",
        "Grades a run again from its newest checkpoint, prints the table, and writes evaluation.json beside it.",
    )


def compare_help_page() -> str:
    """What `python -m agents.compare --help` prints: every key in a line."""
    keys = (CONF / "compare.yaml").read_text(encoding="utf-8").partition("\n")[2]
    agents = _of_each(CONF / "agent", _blurb)
    parts = [
        "python -m agents.compare agents=NAME,NAME tasks=NAME,NAME [seeds=N] [key=value ...] [key=value,value ...]",
        "Runs every agent on every task with every seed, and reports; what is there already is not run again.",
        f"Keys:\n{_indented(keys)}",
        "Keys of training (python -m agents.train --help) hold for every run; one with several values is varied.",
        f"agents=NAME,NAME:\n{_listed(agents)}",
        "--config-dir DIRECTORY: where agents of your own are (DIRECTORY/agent/NAME.yaml)",
    ]
    return "\n\n".join(parts)


def anatomy_help_page() -> str:
    """What `python -m agents.anatomy --help` prints: every key in a line."""
    return _page_of_a_run(
        "anatomy",
        "Says where V* - J of a run's newest checkpoint comes from, and writes anatomy.json and anatomy.png beside it.",
    )


def _page_of_a_run(command: str, purpose: str) -> str:
    """The page of a command that looks at a run directory, and changes nothing of the run."""
    keys = (CONF / f"{command}.yaml").read_text(encoding="utf-8").partition("\nrun:")[2].partition("\nhydra:")[0]
    parts = [
        f"python -m agents.{command} run=DIRECTORY [evaluation.KEY=value ...]",
        purpose,
        f"Keys:\n{_indented(f'run:{keys}')}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)


def sample_help_page(conf: Path) -> str:
    """What `python -m agents.sample --help` prints: every key in a line.

    Args:
        conf: the directory of configs.
    """
    return _policies_page(
        conf,
        "sample",
        "python -m agents.sample [task=NAME] [policies=NAME or DIRECTORY] [key=value ...]",
        "Writes completions of a task's prompts, for people to judge: python -m lmgym.feedback --help.",
        _of_each(conf / "agent", _blurb),
    )


def dataset_help_page(conf: Path) -> str:
    """What `python -m agents.dataset --help` prints: every key in a line.

    Args:
        conf: the directory of configs.
    """
    agents = _of_each(conf / "agent", _blurb)
    agents.pop("best_of_n")  # which does not know its log-probs
    return _policies_page(
        conf,
        "dataset",
        "python -m agents.dataset [task=NAME] [policies=NAME,NAME,DIRECTORY,mixed] [key=value ...]",
        "Writes what policies answer as Minari data sets, for offline RL: docs/offline.md.",
        agents,
    )


def _policies_page(conf: Path, name: str, usage: str, purpose: str, agents: dict[str, str]) -> str:
    """The page of a command that has policies answer prompts; `name` is that of its config."""
    samplers = _of_each(conf / "sampler", _comment)
    parts = [
        usage,
        purpose,
        f"Keys:\n{_indented(_keys_of(conf / f'{name}.yaml'))}",
        f"Policies besides run directories, each as it is before it learns:\n{_listed(agents)}",
        f"sampler=NAME, the distribution that tokens are drawn from (a run keeps its own):\n{_listed(samplers)}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)


def study_help_page(conf: Path) -> str:
    """What `python -m agents.study --help` prints: every key in a line, and the questions there are.

    Args:
        conf: the directory of configs.
    """
    keys = (conf / "study.yaml").read_text(encoding="utf-8").partition("\nquestion:")[2].partition("\nhydra:")[0]
    files = [path for path in sorted((conf.parent / "studies").glob("*.py")) if path.stem != "__init__"]
    questions = {path.stem.replace("_", "-"): _docstring(path) for path in files}
    parts = [
        "python -m agents.study question=NAME [key=value ...]",
        "Measures a question of RLHF where the optimum is known, and writes its page: docs/questions/README.md.",
        f"Keys:\n{_indented(f'question:{keys}')}",
        f"question=NAME:\n{_listed(questions)}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)


def merge_help_page(conf: Path) -> str:
    """What `python -m agents.merge --help` prints: every key in a line.

    Args:
        conf: the directory of configs.
    """
    keys = (conf / "merge.yaml").read_text(encoding="utf-8").partition("\nmodel:")[2].partition("\nhydra:")[0]
    parts = [
        "python -m agents.merge model=DIRECTORY out=DIRECTORY [dtype=bfloat16]",
        "Writes an adapter as a whole model, which loads without peft.",
        f"Keys:\n{_indented(f'model:{keys}')}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)


def reward_help_page(conf: Path) -> str:
    """What `python -m agents.reward --help` prints: every key in a line.

    Args:
        conf: the directory of configs.
    """
    keys = _keys_of(conf / "reward.yaml")
    choices = _of_each(conf / "reward", _comment)
    parts = [
        "python -m agents.reward preferences=FILE [task=NAME] [model=DIRECTORY] [reward=NAME] [reward.KEY=value ...]",
        "Trains a reward model on feedback; env.reward=DIRECTORY/reward then pays its score.",
        f"The run:\n{_indented(keys)}",
        f"reward=NAME, what is fitted:\n{_listed(choices)}",
        f"Keys reward.KEY:\n{_indented(_lines_of(find_fields(REWARD_CONFIG), {}))}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)


def worth_help_page(conf: Path) -> str:
    """What `python -m agents.worth --help` prints: every key in a line.

    Args:
        conf: the directory of configs.
    """
    keys = _keys_of(conf / "worth.yaml")
    agents = _of_each(conf / "agent", _blurb)
    choices = _of_each(conf / "reward", _comment)
    parts = [
        "python -m agents.worth [task=NAME] [labels=0,50,200] [agent=NAME] [reward=NAME] [key=value ...]",
        "Measures what labels are worth: for each number of them, simulated annotators, a reward model and a policy.",
        f"The run:\n{_indented(keys)}",
        f"agent=NAME, what is trained (its keys: python -m agents.train agent=NAME --help):\n{_listed(agents)}",
        f"reward=NAME, what the reward model fits (its keys: python -m agents.reward --help):\n{_listed(choices)}",
        "Hydra's own options: --hydra-help",
    ]
    return "\n\n".join(parts)
