"""The page of a question, made of its data: no number on it is typed by hand."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.questions.protocol import STUDIES, Protocol, list_questions, load_protocol, template_of
from lmgym.errors import InvalidArgumentError
from lmgym.files import write_atomically

INDEX = "README.md"
_NAME = re.compile(r"\{\{ *(\w+) *\}\}")


def write_page(directory: Path, question: str, data: Mapping[str, Any]) -> None:
    """Writes a question's data, figures and page, and the page of all questions anew.

    Args:
        directory: of the pages. question: its name. data: of `measure_question`.
    """
    protocol = load_protocol(question)
    directory.mkdir(parents=True, exist_ok=True)
    text = render_page(question, protocol, data)
    for name, figure in protocol.draw(data["found"]).items():
        picture = io.BytesIO()
        figure.savefig(picture)
        write_atomically(directory / f"{question}-{name}.png", picture.getvalue())
    write_atomically(directory / f"{question}.json", (json.dumps(data, indent=1) + "\n").encode())
    write_atomically(directory / f"{question}.md", text.encode())
    write_atomically(directory / INDEX, render_index(directory).encode())


def render_page(question: str, protocol: Protocol, data: Mapping[str, Any]) -> str:
    """The page's text: the template, filled in."""
    verdict = protocol.judge(data["found"])
    seeds = list(data["seeds"])
    texts = {
        "title": protocol.title,
        "command": f"python -m agents.study question={question}",
        "minutes": _in_minutes(data["seconds"]),
        "seeds": str(len(seeds)),
        "other_seeds": f"seeds={seeds[-1] + 1}-{seeds[-1] + len(seeds)}",
        "verdict": "\n".join(f"- {claim}" for claim in verdict.claims),
        **protocol.texts(data["found"]),
    }
    return fill_template(template_of(question), texts)


def fill_template(template: str, texts: Mapping[str, str]) -> str:
    """A template with a text for each `{{ name }}`.

    Raises:
        InvalidArgumentError: for a name without a text, and a text without its name.
    """
    names = set(_NAME.findall(template))
    if names != texts.keys():
        raise InvalidArgumentError(
            f"`template` must have the names {sorted(texts)}, got {sorted(names)}: "
            f"{sorted(names ^ texts.keys())} are in one of them only."
        )
    return _NAME.sub(lambda found: texts[found[1]], template)


def render_index(directory: Path) -> str:
    """The page of all questions that have data, with the verdict of each."""
    rows = ["| question | verdict | minutes |", "|---|---|---|"]
    for question in list_questions():
        path = directory / f"{question}.json"
        if not path.exists():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        protocol = load_protocol(question)
        short = protocol.judge(data["found"]).short
        rows.append(f"| [{protocol.title}]({question}.md) | {short} | {_in_minutes(data['seconds'])} |")
    return fill_template((STUDIES / "index.md").read_text(encoding="utf-8"), {"questions": "\n".join(rows)})


def _in_minutes(seconds: float) -> str:
    """For a sentence and for a table."""
    return f"{seconds / 60:.1f}" if seconds >= 6 else "less than 0.1"


def make_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
