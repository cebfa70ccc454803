"""What the documentation site shows beyond docs/: pages made from files, rows for new agents, links, the menu."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.pages import (
    add_agent_rows,
    expand_menu,
    find_remote_files,
    generate_pages,
    missing_agents,
    relink,
    site_path,
)

ROOT = Path(__file__).parents[2]
LINKS = "[tasks](docs/tasks.md#a) [this](#a) [far](https://x.org) [log](CHANGELOG.md)"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout in which the agent `mine` is in conf/agent alone."""
    files = {
        "CHANGELOG.md": "# Changelog\n",
        "CONTRIBUTING.md": LINKS,
        "docs/agents/README.md": "| `agent=` | what | paper | data | critic | optimises |\n|---|---|---|---|---|---|\n"
        "| [`ppo`](ppo.md) | a | b | c | d | e |\n\nMore.\n",
        "conf/agent/ppo.yaml": "_target_: agents.algorithms.ppo.PPO\n",
        "conf/agent/mine.yaml": "_target_: agents.algorithms.mine.Mine\nlr: 1\n",
        "agents/__init__.py": "",
        "agents/algorithms/mine.py": '"""An algorithm of mine.\n\nIt does nothing.\n"""\n',
        "lmgym/__init__.py": "",
        "lmgym/kl.py": "",
        "lmgym/envs/__init__.py": "",
        "lmgym/envs/engine.py": "",
        "lmgym/tasks/artefacts/reviews/README.md": "# Card\n",
        "examples/short.py": '"""Short."""\n\nprint(1)\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_new_agent_has_a_page_and_a_row(checkout: Path) -> None:
    assert missing_agents(checkout) == ["mine"]
    page = generate_pages(checkout)["agents/mine.md"]
    assert "agent=mine" in page
    assert "::: agents.algorithms.mine" in page
    lines = add_agent_rows((checkout / "docs/agents/README.md").read_text(), checkout).splitlines()
    assert lines[2:4] == [
        "| [`ppo`](ppo.md) | a | b | c | d | e |",
        "| [`mine`](mine.md) | An algorithm of mine | | | | |",
    ]
    assert lines[4:] == ["", "More."]


def test_other_files_are_pages_too(checkout: Path) -> None:
    pages = generate_pages(checkout)
    assert set(pages) == {
        "agents/mine.md",
        "api/agents.md",
        "api/lmgym.envs.md",
        "api/lmgym.md",
        "changelog.md",
        "contributing.md",
        "examples/short.md",
        "tasks/models/reviews.md",
    }
    assert "::: lmgym.envs.engine" in pages["api/lmgym.envs.md"]
    assert "::: lmgym.kl" in pages["api/lmgym.md"]
    assert "print(1)" in pages["examples/short.md"]
    assert "[tasks](tasks.md#a) [this](#a) [far](https://x.org) [log](changelog.md)" in pages["contributing.md"]


def test_links_out_of_docs_lead_to_pages(checkout: Path) -> None:
    links = {
        "../../CONTRIBUTING.md#a": "../contributing.md#a",
        "../../examples/short.py": "../examples/short.md",
        "../../lmgym/tasks/artefacts/reviews/README.md": "../tasks/models/reviews.md",
        "ppo.md": "ppo.md",
        "../../LICENSE": "../../LICENSE",  # no page: mkdocs says so
    }
    for link, expected in links.items():
        assert relink(f"[a]({link})", "docs/agents/README.md", checkout) == f"[a]({expected})"
    assert site_path("lmgym/kl.py", checkout) is None


def test_a_pattern_in_the_menu_takes_what_nobody_names() -> None:
    menu = ["index.md", {"Agents": ["agents/README.md", "agents/*.md"]}, {"More": [{"Programs": ["x/*.md"]}]}]
    pages = ["x/b.md", "agents/ppo.md", "agents/README.md", "index.md", "x/a.md"]
    assert expand_menu(menu, pages) == [
        "index.md",
        {"Agents": ["agents/README.md", "agents/ppo.md"]},
        {"More": [{"Programs": ["x/a.md", "x/b.md"]}]},
    ]


def test_the_checkout_has_its_pages() -> None:
    pages = generate_pages(ROOT)
    assert {"changelog.md", "contributing.md", "api/lmgym.md", "tasks/models/reviews.md"} <= pages.keys()
    assert {f"examples/{file.stem}.md" for file in (ROOT / "examples").glob("*.py")} <= pages.keys()


def test_what_a_page_loads_from_the_network_is_seen() -> None:
    html = '<a href="https://a.org">a</a><script src="a.js"></script><script defer src="https://b.org/b.js"></script>'
    assert find_remote_files(html) == ["https://b.org/b.js"]
