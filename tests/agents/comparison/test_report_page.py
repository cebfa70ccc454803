"""The report: its numbers are those of `lmgym.scores`, what runs say is shown and not obeyed, and it reads anywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import batch, grading, write_run

from agents.comparison.exports import to_csv, to_latex, to_marl_eval, to_rliable
from agents.comparison.figures import inline_svg, looks_of
from agents.comparison.figures_scores import draw_profiles
from agents.comparison.report import draw_figures, write_report
from agents.comparison.sections import results_table, verdict_section
from agents.comparison.study import SEED, comparable_part, matrix_of, study_of
from agents.comparison.table import read_runs
from agents.comparison.verdict import find_verdict
from lmgym.scores import ScoreMatrix, aggregate, compare_pairs, student_interval
from lmgym.tasks import make_task

pytest.importorskip("pyarrow", reason="needs pyarrow")
pytest.importorskip("matplotlib", reason="needs matplotlib")

HOSTILE = "</code><script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\"> & \u202emoc"
SEEDS = (0, 1, 2)
COMMAND = "python -m agents.compare runs='<b>runs</b>/**'"


def write_runs(directory: Path) -> None:
    """Two agents on two tasks, one of them with a gold score, and a run that failed."""
    samples = [{"prompt": HOSTILE, "before": "a " * 2000, "before_score": 0.1, "after": HOSTILE, "after_score": None}]
    for task in ("keyword-8", "rare-2"):
        for agent, reached in (("ppo", 0.5), ("rloo", 0.4)):
            for seed in SEEDS:
                returned = reached + 0.01 * seed
                rows = [batch(step, returned * step / 1000) for step in (250, 500, 750, 1000)]
                if task == "rare-2":
                    rows += [grading(step, returned * step / 800, step / 100) for step in (250, 500, 750)]
                gold = 0.3 if task == "keyword-8" else None
                run = directory / f"{agent}-{task}-{seed}"
                more = {"rows": rows, "gold": gold, "samples": samples}
                write_run(run, agent=agent, task=task, seed=seed, returned=returned, **more)
    taken_apart = {
        "step": 1000,
        "gap": {"by_step": [{"mean": 0.125}, {"mean": 0.25}]},
        "examples": [
            {"prompt": HOSTILE, "tokens": [{"token": HOSTILE, "share": 0.3, "probability": 0.5, "optimal": 0.1}]}
        ],
    }
    (directory / "ppo-keyword-8-0" / "anatomy.json").write_text(json.dumps(taken_apart), encoding="utf-8")
    (directory / "rloo-keyword-8-0" / "anatomy.json").write_text("{", encoding="utf-8")  # is as if it were not there
    long = {"commit": "0123456789" * 8, "command": "python", "machine": {"cores": 2}}
    (directory / "ppo-keyword-8-1" / "origin.json").write_text(json.dumps(long), encoding="utf-8")
    failed = write_run(directory / "ppo-keyword-8-3", seed=3, finished=False)
    (failed / "error.txt").write_text(f"ValueError: {HOSTILE}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the report of these runs."""
    directory = tmp_path_factory.mktemp("report")
    write_runs(directory / "runs")
    write_report([directory / "runs"], directory, COMMAND)
    return directory


def row_of(page: str, label: str, title: str = "Share of the gain") -> list[str]:
    """The cells of a label's row in the table of that title, as text."""
    table = page[page.index(f"<caption>{title}") :].partition("</table>")[0]
    row = table[table.index(f'<th scope="row">{label}</th>') :].partition("</tr>")[0]
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def shown(interval: Any) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


@pytest.mark.slow
def test_the_numbers_are_those_of_the_scores(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    runs = read_runs([out / "runs"]).runs
    shares = [run.graded("normalised") for run in runs]
    matrix = ScoreMatrix.from_columns(
        label=[run.label for run in runs],
        task=[run.task for run in runs],
        seed=[run.seed or 0 for run in runs],
        score=[0.0 if share is None else share.mean for share in shares],  # the failed one counts as the reference
    )
    for label in ("ppo", "rloo"):
        cells = row_of(page, label)
        for i, statistic in enumerate(("mean", "iqm")):
            found = aggregate(matrix, statistic, rng=np.random.default_rng(SEED))
            assert shown(found[label]) == cells[i]
        finished = [score for score in matrix.cell(label, "rare-2").values() if score]
        assert shown(student_interval(finished)) in cells
    pair = compare_pairs(matrix, "mean", rng=np.random.default_rng(SEED))["ppo", "rloo"]
    assert row_of(page, "ppo, rloo", "Pairs of agents")[:2] == [shown(pair.gap), shown(pair.improvement)]


@pytest.mark.slow
def test_the_gap_is_shown_where_a_run_was_taken_apart(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    known = make_task("keyword-8").optima["test"]
    gain = known.value - known.reference
    assert f"in all: ppo {0.375 / gain:.3f}." in page
    assert f'<span class="gap-4" title="{0.3 / gain:.3f} of the gain; probability 0.500, under pi* 0.100">' in page


@pytest.mark.slow
def test_curves_say_what_they_are_of_and_when_a_task_was_solved(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "rare-2, gradings on held-out prompts" in page
    assert "keyword-8, training batches" in page
    known = make_task("rare-2").optima["test"]
    runs = [run for run in read_runs([out / "runs"]).finished if (run.label, run.task) == ("ppo", "rare-2")]
    wanted = known.reference + 0.9 * (known.value - known.reference)
    reached = sum(bool((run.series["eval/return"].value >= wanted).any()) for run in runs)
    assert row_of(page, "ppo", "Seconds of training")[0].endswith(f"{reached} of 3")


@pytest.mark.slow
def test_what_runs_say_is_shown_as_text(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;document.title = &#x27;hacked&#x27;" in page
    assert "&lt;b&gt;runs&lt;/b&gt;" in page
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page


@pytest.mark.slow
def test_every_figure_is_a_file_with_the_command_in_it(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    figures = sorted(path.stem for path in (out / "figures").glob("*.svg"))
    assert figures == sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert len(figures) == page.count("<figure")
    assert {"curves-1-keyword-8-seconds", "frontier-1-keyword-8", "improvement", "profiles"} <= set(figures)
    for name in figures:
        assert "&lt;b&gt;runs" in (out / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert COMMAND.encode() in (out / "figures" / f"{name}.png").read_bytes()
        assert f"figures/{name}.svg" in page
    for label in re.findall(r'role="img" aria-label="([^"]*)"', page):
        assert len(label) > 20  # says what is to be seen


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    study = study_of(read_runs([out / "runs"]))
    drawn_again = inline_svg(draw_profiles(study, looks_of(study.labels)))
    is_same = drawn_again in page and results_table(study) in page and verdict_section(find_verdict(study)) in page
    assert is_same


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Neither a formula nor markup, whatever is in the name of a task or of a setting."""
    write_run(tmp_path / "a", env={"reward": "$\\frac$<b>"}, settings={"lr": "$x"})
    write_run(tmp_path / "b", env={"reward": "$\\frac$<b>"}, settings={"lr": "&y"}, seed=1)
    study = study_of(read_runs([tmp_path]))
    panels = draw_figures(study, looks_of(study.labels))["tasks"]
    svg = inline_svg(panels[0])
    assert "$\\frac$&lt;b&gt;" in svg
    assert "ppo lr=$x" in svg
    assert "ppo lr=&amp;y" in svg


def test_only_what_every_agent_has_run_is_compared(tmp_path: Path) -> None:
    tasks_of = {"ppo": ("keyword-8", "rare-2", "rare-3"), "rloo": ("keyword-8", "rare-2"), "sft": ("rare-3",)}
    for agent, tasks in tasks_of.items():
        for task in tasks:
            write_run(tmp_path / f"{agent}-{task}", agent=agent, task=task)
    whole = matrix_of(read_runs([tmp_path]))
    assert whole is not None
    part = comparable_part(whole)
    assert set(part.labels) == {"ppo", "rloo"}
    assert set(part.tasks) == {"keyword-8", "rare-2"}


def test_results_in_the_shapes_of_other_tools(tmp_path: Path) -> None:
    for agent in ("ppo", "rloo"):
        for task in ("keyword-8", "rare-2"):
            for seed in SEEDS[: 3 if task == "rare-2" else 2]:
                name = f"{agent}-{task}-{seed}"
                write_run(tmp_path / name, agent=agent, task=task, seed=seed, returned=0.1 * seed)
    write_run(tmp_path / "=cmd", agent="sft", finished=False)
    study = study_of(read_runs([tmp_path]))
    scores = to_rliable(study)
    assert study.matrix is not None
    assert {label: matrix.shape for label, matrix in scores.items()} == {"ppo": (2, 2), "rloo": (2, 2)}
    column = study.matrix.tasks.index("rare-2")
    assert scores["ppo"][:, column].tolist() == list(study.matrix.cell("ppo", "rare-2").values())[:2]
    run = to_marl_eval(study.table)["lmgym"]["rare-2"]["ppo"]["seed_1"]
    assert [run[f"step_{i}"]["step_count"] for i in (0, 1)] == [0, 1000]
    assert run["step_1"]["return"] == run["absolute_metrics"]["return"] == [0.1]
    assert r"\toprule" in to_latex(study)
    lines = to_csv(study.table).splitlines()
    assert len(lines) == 1 + len(study.table.runs)
    assert any(line.startswith("'=cmd,sft") for line in lines)  # no spreadsheet computes it
    json.dumps(to_marl_eval(study.table), allow_nan=False)


# --- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests of the file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def open_report(browser: Any, out: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """The page, what the console says of it, and what it asks for; all of it is being collected."""
    page = browser.new_context(**options).new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((out / "report.html").as_uri())
    return page, complaints, requests


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_needs_nothing_else_and_fits_a_telephone(browser: Any, out: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    options = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
    page, complaints, requests = open_report(browser, out, **options)
    page.locator("details").evaluate_all("all => all.forEach(x => { x.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.title() == "2 agents on 2 tasks"
    assert requests == [(out / "report.html").as_uri()]
    assert complaints == []
    page.locator(".panel svg, .dim").first.wait_for()
    found = axe.Axe().run(page).response["violations"]
    assert [f"{x['id']}: {x['nodes'][0]['html'][:200]}" for x in found] == []
    page.context.close()


@needs_chromium
@pytest.mark.slow
def test_a_press_in_the_legend_shows_an_agent_alone_and_the_page_prints(browser: Any, out: Path) -> None:
    page, complaints, _ = open_report(browser, out)
    button = page.get_by_role("button", name="rloo")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    number = button.get_attribute("data-label")
    assert page.locator(f".{number}.dim").count() == 0
    assert page.locator(".dim").count() > 0
    button.click()
    assert page.locator(".dim").count() == 0
    assert page.pdf(format="A4").startswith(b"%PDF")
    assert complaints == []
    page.context.close()
