"""What the documentation site shows and docs/ does not hold: mkdocs runs this file as a hook (mkdocs.yml).

Four kinds of pages are made here, so that nobody has to keep a list of them:

- one for every agent in `conf/agent` that the table of docs/agents/README.md does not name, and its row in that table;
- one for every package of `lmgym`, and for `agents`: the API reference, which mkdocstrings fills from the docstrings;
- one for every program in `examples`;
- the files outside docs/ that the site shows too, such as CHANGELOG.md and the cards of the shipped models.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from builders import cards

ROOT = Path(__file__).parent.parent
MIRRORED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
AGENTS_PAGE = "agents/README.md"
TASKS_PAGE = "tasks.md"
AGENT_COLUMNS = 6
AGENT_HEADER = "| `agent=` |"


# --- the pages ---------------------------------------------------------------------------------------------------


def generate_pages(root: Path) -> dict[str, str]:
    """The Markdown of every page that docs/ does not hold, by its path on the site."""
    pages = {}
    for source, target in mirrors(root).items():
        pages[target] = relink((root / source).read_text("utf-8"), source, root)
    for example in sorted((root / "examples").glob("*.py")):
        pages[f"examples/{example.stem}.md"] = example_page(example)
    for name in missing_agents(root):
        pages[f"agents/{name}.md"] = agent_page(name, root)
    return pages | reference_pages(root)


def mirrors(root: Path) -> dict[str, str]:
    """Markdown outside docs/ that is shown as it is: path in the repository to path on the site."""
    cards = sorted((root / "lmgym" / "tasks" / "artefacts").glob("*/README.md"))
    shown = {card.relative_to(root).as_posix(): f"tasks/models/{card.parent.name}.md" for card in cards}
    return MIRRORED | shown


def example_page(example: Path) -> str:
    """The page of an example: its docstring, then the whole program."""
    source = example.read_text("utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return f"# {example.name}\n\n{text}\n\n```python\n{source}```\n"


def reference_pages(root: Path) -> dict[str, str]:
    """The pages of the API reference."""
    own = sorted(file for file in (root / "lmgym").glob("*.py") if file.stem != "__init__")
    pages = {"api/lmgym.md": _reference("lmgym", ["lmgym", *(f"lmgym.{file.stem}" for file in own)])}
    for package in sorted(path.parent for path in (root / "lmgym").glob("*/__init__.py")):
        name = f"lmgym.{package.name}"
        modules = [_dotted(file, root) for file in sorted(package.rglob("*.py")) if file.stem != "__init__"]
        pages[f"api/{name}.md"] = _reference(name, [name, *modules])
    rooms = [_dotted(file, root) for file in sorted((root / "agents").glob("*.py")) if file.stem != "__init__"]
    pages["api/agents.md"] = _reference("agents", ["agents", *rooms])
    return pages


def _dotted(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts)


def _reference(title: str, modules: Iterable[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n"


# --- agents ------------------------------------------------------------------------------------------------------


def missing_agents(root: Path) -> list[str]:
    """The agents that can be chosen on the command line and that no row of the table names."""
    named = set(re.findall(r"`(\w+)`", " ".join(_agent_cells((root / "docs" / AGENTS_PAGE).read_text("utf-8")))))
    return sorted(path.stem for path in (root / "conf" / "agent").glob("*.yaml") if path.stem not in named)


def _agent_cells(markdown: str) -> list[str]:
    """The first cells of the table of agents."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(AGENT_HEADER)) + 2
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append(line.split("|")[1])
    return cells


def add_agent_rows(markdown: str, root: Path) -> str:
    """The page of all agents, with a row for each that its table does not name yet."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(AGENT_HEADER)) + 2
    end = start + len(_agent_cells(markdown))
    rows = []
    for name in missing_agents(root):
        summary = _docstring(name, root).partition("\n")[0].rstrip(".")
        rows.append(f"| [`{name}`]({name}.md) | {summary} |" + " |" * (AGENT_COLUMNS - 2))
    return "\n".join([*lines[:end], *rows, *lines[end:]]) + "\n"


def agent_page(name: str, root: Path) -> str:
    """A page for an agent that has none: its command, then what its file says, its config and its class."""
    command = f"```bash\npython -m agents.train agent={name}\n```"
    shared = "What all agents have in common is on [one page](README.md)."
    return f"# {name}\n\n{command}\n\n{shared}\n\n::: {_module(name, root)}\n"


def _module(name: str, root: Path) -> str:
    """The module that defines an agent, by the `_target_` of its yaml file."""
    found = re.search(r"^_target_: ([\w.]+)\.\w+$", (root / "conf" / "agent" / f"{name}.yaml").read_text("utf-8"), re.M)
    assert found is not None, f"conf/agent/{name}.yaml has no `_target_`"
    return found[1]


def _docstring(name: str, root: Path) -> str:
    file = root / (_module(name, root).replace(".", "/") + ".py")
    return ast.get_docstring(ast.parse(file.read_text("utf-8"))) or name


# --- links and the menu ------------------------------------------------------------------------------------------


def relink(markdown: str, source: str, root: Path) -> str:
    """Turns links between files of the repository into links between pages of the site.

    Args:
        markdown: the text of a page.
        source: its path in the repository, such as "docs/tasks.md".
        root: the repository.
    """
    page = site_path(source, root) or source

    def replaced(match: re.Match[str]) -> str:
        path, hash_sign, anchor = match[1].partition("#")
        if not path or re.match(r"\w+:", path):
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), root)
        if target is None:  # mkdocs then says that the link leads nowhere
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{hash_sign}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", replaced, markdown)


def site_path(path: str, root: Path) -> str | None:
    """Where the site shows a file of the repository; None where it does not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/"):
        return f"{path.removesuffix('.py')}.md"
    return mirrors(root).get(path)


def expand_menu(items: list[Any], pages: Iterable[str]) -> list[Any]:
    """The menu with every pattern, such as "agents/*.md", replaced by the pages that it matches and nobody names."""
    named = set(_named(items))
    return _expanded(items, sorted(set(pages) - named))


def _named(items: list[Any]) -> Iterable[str]:
    for item in items:
        for value in item.values() if isinstance(item, dict) else [item]:
            yield from _named(value) if isinstance(value, list) else [value]


def _expanded(items: list[Any], pages: list[str]) -> list[Any]:
    expanded: list[Any] = []
    for item in items:
        if isinstance(item, str) and "*" in item:
            expanded += [page for page in pages if PurePosixPath(page).match(item)]
        elif isinstance(item, dict):
            expanded.append({name: _expanded(v, pages) if isinstance(v, list) else v for name, v in item.items()})
        else:
            expanded.append(item)
    return expanded


# --- what mkdocs calls -------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Fills in the patterns of the menu."""
    written = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    config.nav = expand_menu(config.nav, [*written, *generate_pages(ROOT)])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here."""
    from mkdocs.structure.files import File

    for path, markdown in generate_pages(ROOT).items():
        files.append(File.generated(config, path, content=markdown))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Completes the table of agents and the page of tasks, and makes links to files outside docs/ links to pages."""
    path = page.file.src_uri
    if path == AGENTS_PAGE:
        markdown = add_agent_rows(markdown, ROOT)
    if path == TASKS_PAGE:
        markdown = cards.page()
    return markdown if page.file.generated_by else relink(markdown, f"docs/{path}", ROOT)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warns, which ends a strict build, where a page would load something from the network."""
    for url in find_remote_files(output):
        logging.getLogger("mkdocs.hooks").warning("%s loads %s from the network", page.file.src_uri, url)
    return output


def find_remote_files(html: str) -> list[str]:
    """The URLs of scripts, styles and pictures that a page loads from elsewhere; what a reader may click is none."""
    return re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?:[^"]*)"', html)
