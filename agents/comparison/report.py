"""The report of a comparison: one HTML file that needs nothing else, the figures as files, and the tables.

`write_report` reads run directories, whoever made them. The page works without a network, in light and dark, on paper
and on a telephone (docs/report.md).
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from agents.comparison.anatomy import coloured_examples, draw_anatomy
from agents.comparison.exports import write_exports
from agents.comparison.figures import Look, Panel, inline_svg, legend_marker, looks_of, plain_texts, write_panel
from agents.comparison.figures_course import draw_curves
from agents.comparison.figures_frontier import draw_frontiers, draw_gold, known_scales
from agents.comparison.figures_scores import draw_aggregates, draw_improvement, draw_profiles, draw_tasks
from agents.comparison.markup import escape, paragraphs, section
from agents.comparison.sections import (
    cost_section,
    examples_section,
    pairs_table,
    results_table,
    runs_section,
    solve_table,
    tuning_tables,
    verdict_section,
)
from agents.comparison.sensitivity import draw_sensitivity
from agents.comparison.study import Study, study_of
from agents.comparison.table import read_runs
from agents.comparison.verdict import Rule, find_verdict
from agents.runs.surroundings import prepare_process
from lmgym.files import replace_directory, write_atomically

REPORT = "report.html"
FIGURES = "figures"
_HERE = Path(__file__).parent
_MORE = {
    key: f"<!-- {key} -->" for key in ("improvement", "tuning", "curves", "anatomy")
}  # what comes after the figures


def write_report(
    directories: Sequence[str | os.PathLike[str]], out: Path, command: str, rule: Rule | None = None
) -> None:
    """Writes `report.html`, `figures/`, `results.parquet`, `runs.parquet` and `exports/`.

    A reader of any of these sees the old one or the new one, never half.

    Args:
        directories: of runs, finished or not; folders of runs, or globs (`agents.comparison.directories.find_runs`).
        out: the directory that they go into; made if it does not exist.
        command: that made the report, as it is to be shown beside the figures.
        rule: by which seeds were added until the verdict was known, with what it found.

    Raises:
        InvalidArgumentError: where one of `directories` holds no run.
    """
    prepare_process()
    write_study(study_of(read_runs(directories)), out, command, rule)


def write_study(study: Study, out: Path, command: str, rule: Rule | None = None) -> None:
    """Writes what `write_report` writes, of runs that have been read; `out`, `command` and `rule` as there."""
    out.mkdir(parents=True, exist_ok=True)
    study.table.write(out)
    write_exports(study, out / "exports")
    looks = looks_of(study.labels)
    groups = draw_figures(study, looks)
    write_atomically(out / REPORT, page_of(study, groups, looks, command, rule))
    with replace_directory(out / FIGURES) as scratch:
        for panel in (panel for panels in groups.values() for panel in panels):
            write_panel(panel, scratch, command)


def draw_figures(study: Study, looks: Mapping[str, Look]) -> dict[str, list[Panel]]:
    """The figures of each section of the page, by its name."""
    with plain_texts():
        groups = _draw(study, looks)
    return {name: panels for name, panels in groups.items() if panels}


def _draw(study: Study, looks: Mapping[str, Look]) -> dict[str, list[Panel]]:
    groups: dict[str, list[Panel]] = {"tasks": draw_tasks(study, looks), "curves": draw_curves(study, looks)}
    if study.matrix is not None:
        groups["aggregates"] = draw_aggregates(study, looks)
        groups["profiles"] = [draw_profiles(study, looks)]
        if len(study.matrix.labels) > 1:
            groups["improvement"] = [draw_improvement(study)]
    if study.tuning:
        groups["tuning"] = [draw_sensitivity(study.tuning)]
    groups["frontier"] = draw_frontiers(study, looks)
    groups["gold"] = draw_gold(study, looks)
    groups["anatomy"] = draw_anatomy(study, looks)
    return groups


def page_of(
    study: Study,
    groups: Mapping[str, Sequence[Panel]],
    looks: Mapping[str, Look],
    command: str,
    rule: Rule | None = None,
) -> str:
    """The whole page."""
    labels = len(study.labels)
    tasks = len(study.tasks)
    title = f"{labels} {_plural('agent', labels)} on {tasks} {_plural('task', tasks)}"
    sections = [
        ("Verdict", verdict_section(find_verdict(study, rule))),
        ("Results", section("results", "Results", results_table(study))),
        *((name, _figures(key, name, text, groups.get(key, ()), command)) for key, name, text in _texts(study)),
        ("Responses", examples_section(study)),
        ("Cost", cost_section(study)),
        ("Runs", runs_section(study, command)),
    ]
    there = [(name, part) for name, part in sections if part]
    parts = [part for _, part in there]
    parts.insert(2, _legend(looks))
    added = {"improvement": pairs_table, "tuning": tuning_tables, "curves": solve_table, "anatomy": coloured_examples}
    for key, make in added.items():
        parts = [part.replace(_MORE[key], make(study)) if _MORE[key] in part else part for part in parts]
    anchors = [part.split('"')[1] for _, part in there]
    links = "".join(f'<li><a href="#{x}">{escape(name)}</a></li>' for x, (name, _) in zip(anchors, there, strict=True))
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header class="top">
<h1>{escape(title)}</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{"".join(parts)}</main>
<footer class="soft"><p>Made by lmgym from the files of the runs alone.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def _texts(study: Study) -> list[tuple[str, str, str]]:
    """The sections of figures in their order: name, title, and what to see in them."""
    scales = "; ".join(f"{task}: {known_scales(study, task)}" for task in study.tasks)
    return [
        (
            "tasks",
            "By task",
            "The easiest task first. Marks are means over seeds, bars their 95 % intervals, ticks the runs. The dashed "
            "line is the optimum, the dotted one the reference; what is below the frame is a triangle at its edge.",
        ),
        (
            "aggregates",
            "Over all tasks",
            "Four ways to make one number of all runs, each with its 95 % interval over seeds. The interquartile mean "
            "leaves out the best and the worst quarter of the runs.",
        ),
        (
            "tuning",
            "Tuning",
            "Marks are means over seeds that tuning has not seen, bars their 95 % intervals. Sensitivity is the "
            "distance from one setting that has to do for all tasks to a setting for each task; an agent with little "
            "of it needs no tuning anew. The settings were chosen on other seeds, so these numbers are not flattered.",
        ),
        (
            "curves",
            "Learning curves",
            "Lines are interquartile means over seeds, bands their 95 % intervals; marks are the final gradings on "
            "held-out prompts. Each title says what its lines are of: training batches (a running mean), or gradings "
            "on held-out prompts. A dotted line is an agent without a curve.",
        ),
        (
            "profiles",
            "Performance profiles",
            "How many runs, over all tasks, have at least a share of the gain. A line above another everywhere is "
            "better everywhere; lines that cross say where it is not.",
        ),
        (
            "improvement",
            "Probability of improvement",
            "How likely a run of the row's agent is better than one of the column's, on a task drawn at random. Bold "
            "where the 95 % interval leaves out 1/2.",
        ),
        (
            "frontier",
            "Reward and KL",
            "What a policy scores, and how far it went from the reference (the cross) for it. No policy can be above "
            "the solid line, which is the score of pi* at every price of a nat. A dashed line is a bound that no "
            f"policy passes. What is farther away is an arrow at the edge. {scales}.",
        ),
        (
            "gold",
            "Gold score and score",
            "The score that was trained on, and the gold score that nobody trained on. Lines are training batches on "
            "their way, marks final gradings; the cross is the reference. Where gold lags, the score was gamed.",
        ),
        (
            "anatomy",
            "Where the gap comes from",
            "What is missing to the optimum, by step of the response, as a share of the gain: the numbers of a line "
            "add up to it. Of runs that python -m agents.anatomy has taken apart, as a mean over them.",
        ),
    ]


def _figures(key: str, title: str, text: str, panels: Sequence[Panel], command: str) -> str:
    if not panels:
        return ""
    figures = "".join(map(_figure, panels))
    files = ", ".join(f"{FIGURES}/{panel.name}.svg" for panel in panels)
    made = (
        f'<details class="made"><summary>How these figures were made</summary><pre>{escape(command)}</pre>'
        f"<p>Files, each as .png too: {escape(files)}</p></details>\n"
    )
    two = " two" if key == "curves" or (len(panels) % 2 == 0 and len(panels) % 3) else ""
    more = _MORE.get(key, "")
    return section(key, title, paragraphs([text]), f'<div class="panels{two}">\n{figures}</div>\n', more, made)


def _figure(panel: Panel) -> str:
    """A panel in its frame; that of a matrix scrolls where the page is narrower."""
    kind = "panel wide" if panel.wide else "panel"
    scrolls = ""
    if panel.name == "improvement":
        kind = "panel wide matrix"
        least = f"{7.5 * panel.figure.get_figwidth():.0f}em"
        scrolls = (
            f' style="--least: {least}" role="region" tabindex="0" aria-label="Probability of improvement, figure"'
        )
    return f'<figure class="{kind}"{scrolls}>{inline_svg(panel)}</figure>\n'


def _legend(looks: Mapping[str, Look]) -> str:
    buttons = "".join(
        f'<button type="button" aria-pressed="false" data-label="{look.gid}">'
        f"{legend_marker(look)}{escape(label)}</button>"
        for label, look in looks.items()
    )
    return f'<div class="legend" role="group" aria-label="Agents: press one to see it alone">{buttons}</div>\n'


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
