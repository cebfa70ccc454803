"""What `python -m agents.study` does: measures a question, or reads its data, and writes its page."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.questions.page import write_page
from agents.questions.protocol import ROOT, list_questions, load_protocol
from lmgym.errors import InvalidArgumentError, check_bool, check_int

PAGES = ROOT / "docs" / "questions"


def answer_question(question: str | None, seeds: Any = None, output: str | None = None, *, redraw: bool = False) -> str:
    """Measures, judges and writes; returns the verdict in words.

    Args:
        question: its name. seeds: as `read_seeds` takes them; None is the protocol's.
        output: directory of the page; None is `docs/questions`. redraw: makes the page of the data that are there.
    """
    if question is None:
        raise InvalidArgumentError(f"`question` must be one of {list_questions()}, got none.")
    check_bool("redraw", redraw)
    protocol = load_protocol(question)
    directory = PAGES if output is None else Path(output)
    if redraw:
        path = directory / f"{question}.json"
        if not path.exists():
            raise InvalidArgumentError(f"`redraw` must be false where there are no data yet: {path} does not exist.")
        data = json.loads(path.read_text(encoding="utf-8"))
    else:
        data = measure_question(question, protocol.seeds if seeds is None else read_seeds(seeds))
    write_page(directory, question, data)
    claims = "\n".join(f"- {claim}" for claim in protocol.judge(data["found"]).claims).replace("\\*", "*")
    return f"{protocol.title}\n{claims}\n{directory / question}.md"


def measure_question(question: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The data of a question, JSON values: `question`, `seeds`, `seconds` of one core and what was `found`."""
    started = time.process_time()  # which others on the machine do not lengthen
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny, and more threads only wait for each other
    try:
        found = load_protocol(question).measure(seeds)
    finally:
        torch.set_num_threads(threads)
    return {"question": question, "seeds": list(seeds), "seconds": time.process_time() - started, "found": found}


def read_seeds(seeds: Any) -> list[int]:
    """The seeds of a list, of a number (0, 1, ... so many) or of a range as text: "10-19".

    Raises:
        InvalidArgumentError: for anything else, for fewer than two, and for one that comes twice.
    """
    found: list[int] = []
    if isinstance(seeds, int):
        found = list(range(seeds))
    elif isinstance(seeds, str) and re.fullmatch(r"\d+-\d+", seeds):
        first, last = (int(part) for part in seeds.split("-"))
        found = list(range(first, last + 1))
    elif isinstance(seeds, Sequence) and not isinstance(seeds, str):
        found = list(seeds)
    for seed in found:
        check_int("seeds", seed, 0)
    if len(set(found)) < max(2, len(found)):
        raise InvalidArgumentError(f"`seeds` must be two or more, as 20, 10-19 or [3, 4, 5], got {seeds!r}.")
    return found
