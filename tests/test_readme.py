"""What the documents say holds: snippets run, tables agree with the code, and links, files and commands exist.

A Python block runs in a namespace of its own; one below the line `<!-- continues -->` goes on in that of the last one.
A block whose first line is a comment with a path (`# agents/vpg.py`) is that file: from there on it can be imported, or
composed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import socket
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium as gym
import hydra
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pages import CONTINUES, ROOT, Block, blocks, chains, execute, prose, table
from shipped import AGENTS as NAMES
from shipped import FIXED, ON_POLICY, SB3, SUPERVISED

import agents.train  # noqa: F401  has Hydra read conf as the commands do
import lmgym
from agents.algorithms.best_of_n import BestOfN, BestOfNConfig
from agents.algorithms.dpo import DPO, DPOConfig
from agents.algorithms.ipo import IPO
from agents.algorithms.ppo import PPOConfig
from agents.algorithms.sft import SFT, SFTConfig
from agents.comparison.plan import make_cells, settings_of
from agents.comparison.protocol import read_request
from agents.on_policy_config import OnPolicyConfig
from agents.runs.command_line import prepared
from agents.runs.plan import check
from agents.runs.run import train
from agents.runs.worth_plan import with_lists
from builders import cards
from builders.pages import add_agent_rows, missing_agents
from lmgym.envs.options import RESET_OPTIONS
from lmgym.envs.settings import Settings
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.feedback.files import write_records
from lmgym.feedback.records import Choice, Record
from lmgym.tasks import registry

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ENVIRONMENTS = ROOT / "docs" / "environments.md"
AGENTS = ROOT / "docs" / "agents"
# Those on the template have a page that adds to the common one; those below, a page with all there is.
WHOLE = [*SUPERVISED, *(name for name, kind in FIXED.items() if dataclasses.fields(kind.Config))]
# Those that extend another one, and have its metrics.
LEARNERS = ON_POLICY | SUPERVISED
VARIANTS = {a: b for a, kind in LEARNERS.items() for b, other in LEARNERS.items() if other in kind.__mro__[1:]}
BARE = sorted(FIXED.keys() - {*WHOLE})  # on one page, without fields and metrics
TAKEN_FOR_GRANTED = {  # files that commands name
    "prompts.txt": "the film was\n",
    "mine/model/config.json": "{}",
    "mine/sft/checkpoint/config.json": "{}",
    "mine/reward/reward/config.json": "{}",
    "mine/prompts.jsonl": '{"prompt": "1+1=", "answer": "2"}\n',
    "mine/demonstrations.jsonl": '{"prompt": "1+1=", "completion": "2"}\n',
}


def as_written(value: object) -> str:
    """A default as the tables write it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


# --- snippets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An empty working directory, no network, and a registry of tasks that forgets what a snippet registered."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise OSError(f"a snippet asked for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def run_chain(chain: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("snippet")
    for block in chain:
        if block.path is not None:
            module = types.ModuleType(block.path.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        execute(block, module)


@pytest.mark.parametrize(
    "chain", [pytest.param(chain, id=f"{d.name}:{chain[0].line}") for d in DOCUMENTS for chain in chains(d)]
)
def test_snippets_run(chain: list[Block], alone: pytest.MonkeyPatch) -> None:
    if any("stable_baselines3" in block.code for block in chain):
        pytest.importorskip("stable_baselines3")
    run_chain(chain_with_files(chain), alone)


def chain_with_files(chain: list[Block]) -> list[Block]:
    """The files that a document defines before a chain, then the chain, which can import them."""
    files = [b for b in blocks(chain[0].document) if b.language == "python" and b.path and b.line < chain[0].line]
    return [*files, *chain]


def install_files(document: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Makes modules of the Python files that a document defines, and writes its yaml files below `root`."""
    (root / "conf").mkdir()
    for block in blocks(document):
        if block.path is not None and block.language == "yaml":
            (root / block.path).parent.mkdir(parents=True, exist_ok=True)
            (root / block.path).write_text(block.code)
        elif block.path is not None:
            run_chain([block], monkeypatch)


def test_a_broken_snippet_is_seen(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nx = 1\n```\n\n{CONTINUES}\n```python\nassert x == 1\n```\n\n```python\nx\n```\n")
    good, broken = chains(page)
    run_chain(good, alone)
    with pytest.raises(NameError):
        run_chain(broken, alone)


def test_a_snippet_has_no_network(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="a snippet asked for the network"):
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.slow
def test_the_worked_examples_train(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The task, the agent and the configs of CONTRIBUTING train from the command line."""
    install_files(CONTRIBUTING, alone, tmp_path)
    overrides = ["total_timesteps=40", "agent.batch_size=32", "evaluation.samples=32", "device=cpu"]
    cfg = composed("train", ["task=brief", "agent=vpg", *overrides], searchpath=tmp_path / "conf")
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    assert train(check(cfg), run_directory, resume=False) == 0
    assert (run_directory / "summary.json").is_file()


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_keyword_arguments_are_those_of_the_settings() -> None:
    written = {name: cells[0] for name, cells in table(ENVIRONMENTS, "keyword").items()}
    settings = {field.name: as_written(field.default) for field in dataclasses.fields(Settings)}
    assert written == settings | {"top_k": as_written(None)}  # which `lmgym.wrappers.inside` takes


def test_the_keyword_arguments_of_the_vector_env_are_those_of_its_signature() -> None:
    written = {name: cells[0] for name, cells in table(ENVIRONMENTS, "keyword of make_vec").items()}
    parameters = inspect.signature(RLHFVectorEnv).parameters.values()
    assert written == {p.name: as_written(p.default) for p in parameters if p.kind != p.VAR_KEYWORD}


def test_the_ids_are_those_registered() -> None:
    pages = cards.page() + (ROOT / "docs/hub.md").read_text()
    tasks = re.findall(r"`(lmgym/[\w.-]+-v\d+)`", pages)
    listed = {*table(ENVIRONMENTS, "id"), *tasks}
    assert listed == {name for name in gym.registry if name.startswith("lmgym/")}


def test_the_info_keys_are_those_of_an_episode() -> None:
    env = gym.make("lmgym/RLHF-v0", max_new_tokens=2)
    env.reset(seed=0)
    keys = set(env.step(4)[4]) | set(env.step(4)[4])
    assert set(table(ENVIRONMENTS, "info key")) == keys


def test_the_reset_options_are_those_the_envs_take() -> None:
    assert set(table(ENVIRONMENTS, "reset option")) == {*RESET_OPTIONS, "reset_mask"}


def shipped(agent: str) -> tuple[Any, dict[str, Any]]:
    """An agent's class and its numbers, by its file in conf/agent."""
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose("train", overrides=[f"agent={agent}"]).agent)
    return hydra.utils.get_class(values.pop("_target_")), values


def defaults(config: Any) -> dict[str, str]:
    """The fields of a config, as the tables write them."""
    return {name: str(value) for name, value in vars(config()).items()}


COMMON_FIELDS = defaults(OnPolicyConfig)


def test_the_agents_listed_are_those_that_can_be_chosen(tmp_path: Path) -> None:
    """On the site, which adds a row for each agent that the page in the checkout does not name."""
    page = tmp_path / "README.md"
    page.write_text(add_agent_rows((AGENTS / "README.md").read_text(encoding="utf-8"), ROOT), encoding="utf-8")
    cells = (re.sub(r"\(.*?\)", "", cell) for cell in table(page, "`agent=`"))
    listed = {name for cell in cells for name in re.findall(r"\w+", cell)}
    assert listed == {*NAMES}


def test_every_agent_has_a_page() -> None:
    """One of its own, one that it shares, or one that the site makes of its docstring."""
    pages = {page.stem for page in AGENTS.glob("*.md")} - {"README"}
    assert pages <= {*ON_POLICY, *WHOLE, "reference", "sb3"}
    assert {*NAMES} == {*pages, *missing_agents(ROOT), *FIXED, *SB3} - {"sb3"}


def test_the_fields_that_agents_have_in_common() -> None:
    assert {name: cells[0] for name, cells in table(AGENTS / "README.md", "field").items()} == COMMON_FIELDS


@pytest.mark.parametrize("agent", [agent for agent in (*ON_POLICY, *WHOLE) if (AGENTS / f"{agent}.md").exists()])
def test_the_fields_of_an_agent_are_those_of_its_config_and_its_yaml(agent: str) -> None:
    """On the template its own, and those with another default than is common (for a variant: than in its base)."""
    kind, values = shipped(agent)
    fields = defaults(kind.Config)
    elsewhere = COMMON_FIELDS if agent in ON_POLICY else {}
    if agent in VARIANTS:
        elsewhere = defaults(shipped(VARIANTS[agent])[0].Config)
    written = {name: set(cells[:-1]) for name, cells in table(AGENTS / f"{agent}.md", "field").items()}
    assert written == {name: {default} for name, default in fields.items() if elsewhere.get(name) != default}
    assert {name: str(value) for name, value in values.items()} == fields


@pytest.mark.slow
def test_the_fields_of_sb3_are_those_of_its_config_and_its_yamls() -> None:
    pytest.importorskip("stable_baselines3")
    fields = defaults(shipped("sb3_ppo")[0].Config)
    assert {name: cells[0] for name, cells in table(AGENTS / "sb3.md", "field").items()} == fields
    for agent in SB3:
        assert set(shipped(agent)[1]) == set(fields)


def logged(kind: Any, config: Any, total: int = 1, **settings: Any) -> set[str]:
    """The metrics that an agent logs, on short responses of `reviews` (which has a gold score) by default."""
    settings = {"device": "cpu", "max_new_tokens": 2, "group_size": getattr(config, "responses", 1), **settings}
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=config.num_envs, autoreset_mode="SameStep", **settings)
    names: set[str] = set()
    kind(envs, config).learn(total, callback=lambda _, metrics: names.update(metrics) is None)
    return names


def metrics_on(page: str) -> set[str]:
    return set(table(AGENTS / f"{page}.md", "metric"))


@pytest.mark.parametrize("agent", [agent for agent in ON_POLICY if (AGENTS / f"{agent}.md").exists()])
def test_the_metrics_of_an_agent_are_those_it_logs(agent: str, tmp_path: Path) -> None:
    kind, _ = shipped(agent)
    (tmp_path / "texts.txt").write_text("the film was good\n")
    ptx = {"ptx_coef": 1.0, "ptx_texts": str(tmp_path / "texts.txt")} if issubclass(kind.Config, PPOConfig) else {}
    config = kind.Config(batch_size=2 * kind.Config().responses * kind.Config().minibatches, **ptx)
    own = metrics_on(VARIANTS.get(agent, agent))
    if "| metric |" in (AGENTS / f"{agent}.md").read_text():  # a variant may have some beside those of its base
        own |= metrics_on(agent)
    common = metrics_on("README")
    assert logged(kind, config) == own | common
    assert not own & common


def test_the_metrics_of_dpo_are_those_it_logs(tmp_path: Path) -> None:
    assert logged(IPO, IPO.Config(batch_size=2)) == metrics_on("dpo")  # to which its page refers
    path = tmp_path / "preferences.jsonl"
    write_records(path, [Record("the film", (" was", " is"), Choice(0, 1))])
    assert logged(DPO, DPOConfig(batch_size=2)) == metrics_on("dpo")
    rollout = {name for name in metrics_on("dpo") if name.startswith("rollout/")}
    offline = logged(DPO, DPOConfig(mode="offline", preferences=str(path)), prompts=["the film"])
    assert offline == metrics_on("dpo") - rollout


def test_the_metrics_of_sft_are_those_it_logs(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text('{"prompt": "the film", "completion": " was"}\n')
    best = logged(SFT, SFTConfig(n=2, batch_size=2))
    optimal = logged(SFT, SFTConfig(demonstrations="optimal", batch_size=2), task="anchor-0.1")
    file = logged(SFT, SFTConfig(demonstrations="file", path=str(path)), prompts=["the film"])
    written = table(AGENTS / "sft.md", "metric")
    assert best | optimal | file == set(written)
    assert optimal - best == {name for name, cells in written.items() if "`optimal` alone" in cells[-1]}
    assert (best | optimal) - file == {name for name in written if name.startswith("train/demonstration_")} - file


def test_the_metrics_of_the_best_of_n_are_those_of_its_evaluation() -> None:
    envs: Any = gym.make_vec("lmgym/RLHF-v0", device="cpu", max_new_tokens=2)
    assert set(BestOfN(envs, BestOfNConfig(n=2)).evaluate(envs, samples=1, prompts=2).metrics) == metrics_on(
        "best_of_n"
    )
    assert not logged(BestOfN, BestOfNConfig(n=2))


@pytest.mark.parametrize("agent", BARE)
def test_agents_that_do_not_learn_have_no_fields_and_no_metrics(agent: str) -> None:
    kind, values = shipped(agent)
    assert not values
    assert not defaults(kind.Config)
    assert not logged(kind, kind.Config(), task="anchor-0.1")


@pytest.mark.parametrize("agent", SB3)
def test_the_metrics_of_an_algorithm_of_sb3_are_those_it_logs(agent: str) -> None:
    pytest.importorskip("stable_baselines3")
    kind, values = shipped(agent)
    name = values["algorithm"]
    if name not in ("PPO", "A2C", "DQN"):
        pytest.importorskip("sb3_contrib")
    small: dict[str, Any] = {"n_envs": 4, "n_steps": 4, "policy": "mlp", "width": 8, "layers": 1}
    if name in ("DQN", "QRDQN"):
        values["kwargs"] |= {"buffer_size": 64, "learning_starts": 4}
    elif name == "TRPO":
        values["kwargs"] |= {"cg_max_steps": 1}
    if values["batch_size"] is not None:
        small["batch_size"] = 8
    if values["stretch"] is not None:
        small["stretch"] = 2
    written = table(AGENTS / "sb3.md", "metric")
    of = {metric for metric, cells in written.items() if cells[1] == "all" or name in cells[1].split(", ")}
    assert logged(kind, kind.Config(**{**values, **small}), 16) == of


# --- links, files, commands ---------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)}


def broken_links(document: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_and_images_exist(document: Path) -> None:
    assert not broken_links(document)


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[fine](#a-b) [web](https://x.org) [lost](lost.md) ![lost](lost.png) [no such](#c)\n")
    assert broken_links(page) == ["lost.md", "lost.png", "#c"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_files_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:lmgym|agents|conf|tests|docs)/[\w./-]*)`", prose(document))
    missing = {name for name in named if not re.search(r"-v\d$", name) and not (ROOT / name).exists()}
    assert not missing - {block.path for block in blocks(document)}


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    module, _, rest = name.partition(".")
    found: Any = importlib.import_module(module)
    for part in rest.split("."):
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_names_in_the_prose_exist(document: Path) -> None:
    named = re.findall(r"`((?:lmgym|agents)(?:\.\w+)+)[(`]", prose(document))
    assert not [name for name in dict.fromkeys(named) if not exists(name)]


def test_a_name_that_does_not_exist_is_seen() -> None:
    assert exists("lmgym.kl.token_rewards")
    assert not exists("lmgym.kl.no_such")
    assert not exists("lmgym.no_such.token_rewards")


def joined(code: str) -> list[str]:
    """The lines of a shell's code, those that end with a backslash together with the next."""
    return code.replace("\\\n", " ").splitlines()


def commands(document: Path, pattern: str) -> list[str]:
    """What follows a command's name, in shell blocks and in `code`, up to the end of the command."""
    code = [line.split(" #")[0] for b in blocks(document) if b.language == "bash" for line in joined(b.code)]
    code += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(document))]
    return [found[1].strip() for piece in code if (found := re.match(rf"(?:\.venv/bin/)?{pattern}(.*)", piece.strip()))]


def test_commands_are_found() -> None:
    assert len(commands(ROOT / "docs" / "training.md", r"python -m agents\.")) >= 8
    assert {"train", "test"} <= {arguments.split()[0] for arguments in commands(README, "make ")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets, variables = (
        set(re.findall(form, makefile, flags=re.MULTILINE)) for form in (r"^([\w-]+):", r"^(\w+) \?=")
    )
    for arguments in commands(document, "make "):
        target, *settings = shlex.split(arguments)
        assert target in targets
        assert {setting.partition("=")[0] for setting in settings} <= variables


def composed(config: str, overrides: list[str], searchpath: Path, directory: Path = ROOT / "conf") -> DictConfig:
    """The config of a command with its overrides."""
    search = f"hydra.searchpath=[file://{searchpath}]"
    with initialize_config_dir(str(directory), version_base="1.3"):
        return compose(config, [*overrides, search])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_compose(document: Path, alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Modules exist and can be run, and every override is one that their config has, with a value that it takes."""
    for name, content in TAKEN_FOR_GRANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    install_files(document, alone, tmp_path)
    for command in commands(document, r"python -m benchmarks\."):
        assert (ROOT / "benchmarks" / f"{command.split()[0]}.py").is_file()
    for command in commands(document, r"python -m agents\."):
        module, *arguments = command.split()
        spec = importlib.util.find_spec(f"agents.{module}")
        assert spec is not None, f"agents.{module}"
        assert '__name__ == "__main__"' in Path(str(spec.origin)).read_text(encoding="utf-8")
        importlib.import_module(f"agents.{module}")  # which may tell Hydra of more than conf/ holds
        if any("<" in argument or argument == "--help" for argument in arguments):
            continue  # a form to fill in, or nothing to compose
        sweep = "-m" in arguments
        overrides = [a.split(",")[0] if sweep else a for a in prepared(arguments) if a != "-m"]
        if module == "compare":
            protocol = read_request(shlex.split(command)[1:]).protocol
            make_cells(protocol, settings_of(protocol), protocol.seeds, tmp_path / "compared")
        elif module == "build":
            composed("build", overrides, tmp_path / "conf", ROOT / "conf" / "build_task")
        elif not (ROOT / "conf" / f"{module}.yaml").is_file():  # its arguments are names and flags
            assert not [argument for argument in arguments if "=" in argument]
        else:
            cfg = composed(module, with_lists(overrides), tmp_path / "conf")
            if module == "train":
                check(cfg)


def test_the_readme_shows_what_the_agents_reach() -> None:
    """Its table is the one that the benchmark has written to the agents' page."""
    assert table(README, "agent") == table(AGENTS / "README.md", "agent")


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_public_names_are_listed() -> None:
    names = table(ROOT / "docs" / "stable.md", "name")
    assert {name.removeprefix("lmgym.") for name in names} == set(lmgym.__all__)


def test_the_version_is_the_one_to_cite() -> None:
    citation: Any = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation.version == lmgym.__version__
