"""The labelling page in a headless Chromium: it is used as people use it, and what they did is in the store."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lmgym.feedback.json_form import record_to_json
from lmgym.feedback.labelling.answers import Questions
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Correction, Message, Ranking, Ratings, Record, Skip
from lmgym.feedback.store import Store

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
sites = pytest.importorskip("sites", reason="needs the extra `feedback`", exc_type=ImportError)
serve = sites.serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

HOSTILE = [
    "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\"> &amp; {{1+1}}",
    " \u202emoc.live\u202c שלום עולם\r\nsecond line 👩‍👩‍👧‍👦 a\u200bb\ttab ",
    "word " * 4000,
    "x" * 20_000,
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests of the file."""
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def open_page(browser: Any, address: str, name: str = "anna", expected: str = "", **options: Any) -> Iterator[Any]:
    """A page with a session of its own, on which `name` has signed in; an unexpected complaint of it fails the test."""
    complaints: list[str] = []
    context = browser.new_context(**options)
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    if name:
        page.wait_for_selector("#sign-in:not([hidden])")
        page.keyboard.type(name)  # the field has the focus
        page.keyboard.press("Enter")
        page.wait_for_selector("#task:not([hidden]), #finished:not([hidden])")
    yield page
    context.close()
    assert not [complaint for complaint in complaints if not expected or expected not in complaint]


def films(count: int, *words: str) -> list[Record]:
    """Items of which the words say how good they are."""
    return [
        Record(f"film {i}", tuple(f" {word} {i}" for word in words or ("good", "bad")), id=f"{i}") for i in range(count)
    ]


def texts(page: Any) -> list[str]:
    return page.locator(".card .text").evaluate_all("boxes => boxes.map(box => box.textContent)")


def wait_for_item(page: Any, done: int) -> None:
    """Waits until the server has acknowledged so many answers, and the page takes the next."""
    page.wait_for_selector(f"#progress[value='{done}']", state="attached")
    page.wait_for_selector("#save:not([aria-disabled])", state="attached")


# --- ranking -----------------------------------------------------------------------------------------------------


def test_twenty_items_by_keyboard(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, films(20)) as site, open_page(browser, site.address) as page:
        for done in range(20):
            wait_for_item(page, done)
            page.keyboard.press("1" if texts(page)[0].startswith(" good") else "2")
            page.keyboard.press("Enter")
        page.wait_for_selector("#finished:not([hidden])")
        assert site.judgements() == [Ranking(((0,), (1,)))] * 20
        records = list(site.store.records())
        assert len({record.id for record in records}) == len({record.prompt for record in records}) == 20
        assert {record.order_shown for record in records} == {(0, 1), (1, 0)}
        assert all(record.seconds for record in records)


def test_twenty_items_by_mouse(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, films(20, "good", "fair", "bad")) as site, open_page(browser, site.address) as page:
        for done in range(20):
            wait_for_item(page, done)
            for i, text in enumerate(texts(page)):
                rank = ("good", "fair", "bad").index(text.split()[0]) + 1
                if rank < 3:  # the last follows
                    page.locator(f"input[name=rank-{i}][value='{rank}']").click()
            page.click("#save")
        page.wait_for_selector("#finished:not([hidden])")
        assert site.judgements() == [Ranking(((0,), (1,), (2,)))] * 20


def drag(page: Any, letter: str, rank: str) -> None:
    start = page.locator(f"#slots .chip:text-is('{letter}')").bounding_box()
    end = page.locator(f".slot[data-rank='{rank}']").bounding_box()
    page.mouse.move(start["x"] + 10, start["y"] + 10)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + 8, steps=3)
    page.mouse.up()


def touch_drag(page: Any, selector: str, rank: str) -> None:
    start = page.locator(selector).bounding_box()
    end = page.locator(f".slot[data-rank='{rank}']").bounding_box()
    session = page.context.new_cdp_session(page)

    def send(kind: str, step: float) -> None:
        point = {axis: start[axis] + 10 + step * (end[axis] - start[axis]) for axis in "xy"}
        points = [] if kind == "touchEnd" else [point]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(50)  # a flick would be taken for scrolling, and the next tap for its end

    send("touchStart", 0)
    for step in (0.3, 0.6, 1, 1):
        send("touchMove", step)
    send("touchEnd", 1)


def test_ranking_by_drag_with_ties_and_gaps(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, films(1, "good", "fair", "bad")) as site, open_page(browser, site.address) as page:
        letters = {text.split()[0]: "ABC"[i] for i, text in enumerate(texts(page))}
        drag(page, letters["bad"], "3")
        drag(page, letters["good"], "1")
        drag(page, letters["fair"], "1")
        assert page.locator(".slot[data-rank='1'] .chip").count() == 2
        drag(page, letters["fair"], "")
        assert page.get_attribute(".slot[data-rank='']", "aria-label") == f"Not ranked: {letters['fair']}"
        page.keyboard.press("Enter")
        page.wait_for_selector("#finished:not([hidden])")
        assert site.judgements() == [Ranking(((0,), (2,)))]


def test_ranking_on_a_phone_by_finger(browser: Any, tmp_path: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 700}, "has_touch": True, "is_mobile": True}
    with serve(tmp_path, films(2)) as site, open_page(browser, site.address, **phone) as page:
        letter = "A" if texts(page)[0].startswith(" good") else "B"
        touch_drag(page, f"#slots .chip:text-is('{letter}')", "1")
        page.tap("#save")
        wait_for_item(page, 1)
        good = int(not texts(page)[0].startswith(" good"))
        page.tap(f"input[name=rank-{good}][value='1']")
        page.tap("#save")
        page.wait_for_selector("#finished:not([hidden])")
        assert site.judgements() == [Ranking(((0,), (1,)))] * 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_tie_and_what_follows_from_the_last_choice(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, films(3)) as site, open_page(browser, site.address) as page:
        page.keyboard.press("Enter")
        assert "Rank at least two" in page.inner_text("#alert")
        page.click("input[name=rank-0][value='1']")
        assert page.is_checked("input[name=rank-1][value='2']")
        page.click("input[name=rank-0][value='2']")  # the other one follows, and does not become a tie
        assert page.is_checked("input[name=rank-1][value='1']")
        page.click("input[name=rank-1][value='2']")
        page.keyboard.press("Enter")
        wait_for_item(page, 1)
        page.keyboard.press("1")
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        wait_for_item(page, 2)
        page.keyboard.press("1")
        page.keyboard.press("0")  # leaves one alone ranked
        page.keyboard.press("Enter")
        assert "Rank at least two" in page.inner_text("#alert")
        page.keyboard.press("c")
        page.wait_for_selector("#finished:not([hidden])")
        assert site.judgements() == [Ranking(((0, 1),)), Ranking(((0, 1),)), Skip("cannot say")]


# --- rating and correcting ---------------------------------------------------------------------------------------


def test_ratings_and_corrections(browser: Any, tmp_path: Path) -> None:
    items = [Record("p", (" one\r\ntwo", " three"), id="x")]
    questions = Questions(("rate", "edit"), (0, 4))
    with serve(tmp_path, items, questions=questions) as site, open_page(browser, site.address) as page:
        first = int(texts(page)[0] != " one\r\ntwo")
        page.keyboard.press("4")
        page.keyboard.press("5")  # is no rating
        page.keyboard.press("Enter")
        assert "Rate every response" in page.inner_text("#alert")
        page.keyboard.press("0")
        page.locator(".card").nth(first).get_by_role("button", name="Correct the text").click()
        assert page.locator(f"#text-{first}").input_value() == " one\ntwo"
        page.keyboard.press("End")
        page.keyboard.type("12!")  # writes, and neither rates nor saves
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        page.wait_for_selector("#finished:not([hidden])")
        ratings, correction = site.judgements()
        assert ratings == Ratings((4, 0) if first == 0 else (0, 4), 0, 4)
        assert isinstance(correction, Correction)
        assert correction.index == 0
        assert correction.text.replace("12!\r\n", "") in (" one\r\ntwo", " onetwo")


def test_a_conversation(browser: Any, tmp_path: Path) -> None:
    item = Record([Message("user", "hi")], ([Message("assistant", "yo")], [Message("assistant", "<b>no</b>")]))
    with serve(tmp_path, [item]) as site, open_page(browser, site.address) as page:
        assert page.inner_text("#prompt").split() == ["user", "hi"]
        assert sorted(texts(page)) == ["assistant<b>no</b>", "assistantyo"]
        page.keyboard.press("1")
        page.keyboard.press("e")
        page.keyboard.press("Control+A")
        page.keyboard.type("hello")
        page.click("#save")
        page.wait_for_selector("#finished:not([hidden])")
        assert [type(judgement) for judgement in site.judgements()] == [Ranking, Correction]
        assert site.judgements()[1].text == (Message("assistant", "hello"),)


# --- going back, coming back -------------------------------------------------------------------------------------


def test_undo_reload_and_skip(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, films(3)) as site, open_page(browser, site.address) as page:
        first = page.inner_text("#prompt")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        wait_for_item(page, 1)
        before = texts(page)
        page.keyboard.press("1")
        page.reload()
        page.wait_for_selector("#task:not([hidden])")
        assert texts(page) == before  # the same item in the same order, with what was chosen
        assert page.is_checked("input[name=rank-0][value='1']")
        page.keyboard.press("u")
        wait_for_item(page, 0)
        assert page.inner_text("#prompt") == first
        assert page.is_checked("input[name=rank-0][value='2']")
        assert site.judgements() == []
        page.click("input[name=rank-0][value='1']")
        page.click("input[name=rank-1][value='1']")
        page.keyboard.press("Enter")
        wait_for_item(page, 1)
        assert texts(page) == before
        assert not page.is_checked("input[name=rank-0][value='1']")
        page.click("#skip")
        wait_for_item(page, 2)
        page.click("#cannot-say")
        page.wait_for_selector("#finished:not([hidden])")
        assert site.judgements() == [Ranking(((0, 1),)), Skip("skipped"), Skip("cannot say")]
        page.click("#undo-last")
        wait_for_item(page, 2)


def test_what_was_not_saved_stays_on_the_page(browser: Any, tmp_path: Path) -> None:
    lost = "Failed to load resource"
    with serve(tmp_path, films(2)) as site, open_page(browser, site.address, expected=lost) as page:
        page.route("**/api/answer", lambda route: route.abort())
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_selector("#alert:not([hidden])")
        assert "nothing was saved" in page.inner_text("#alert")
        assert site.store.num_answers() == 0
        page.unroute("**/api/answer")
        page.route("**/api/answer", lambda route: (route.fetch(), route.abort()))  # saved, and nobody hears of it
        page.keyboard.press("Enter")
        page.wait_for_selector("#save:not([aria-disabled])")
        page.unroute("**/api/answer")
        page.keyboard.press("Enter")
        wait_for_item(page, 1)
        assert site.store.num_answers() == 1


def test_two_annotators_at_once(browser: Any, tmp_path: Path) -> None:
    with (
        serve(tmp_path, films(12), Plan(overlap=2, shared=0.5)) as site,
        open_page(browser, site.address, "anna") as anna,
        open_page(browser, site.address, "ben") as ben,
    ):
        left = {anna: 0, ben: 0}
        while left:
            for page in list(left):
                if page.is_visible("#finished"):
                    del left[page]
                    continue
                wait_for_item(page, left[page])
                page.keyboard.press("1" if texts(page)[0].startswith(" good") else "2")
                page.keyboard.press("Enter")
                left[page] += 1
                wait_for_item(page, left[page])
        counts: dict[str, set[str]] = {}
        for record in site.store.records():
            counts.setdefault(str(record.prompt), set()).add(str(record.annotator))
        plan = Plan(overlap=2, shared=0.5)
        assert {key: len(names) for key, names in counts.items()} == {
            f"film {i}": plan.target(f"{i}") for i in range(12)
        }
        anna.goto(f"{site.address}owner#token=owner")
        anna.wait_for_selector("#annotators tr")
        assert "Alpha of rankings: 1.000" in anna.inner_text("#summary")
        assert [row.split("\t")[0] for row in anna.inner_text("#annotators").splitlines()] == ["anna", "ben"]


# --- hostile texts, accessibility --------------------------------------------------------------------------------


def test_hostile_texts_are_text(browser: Any, tmp_path: Path) -> None:
    item = Record("<b onclick=alert(1)>prompt</b>", tuple(HOSTILE))
    guideline = "<script>document.title = 'hacked'</script>"
    name = "<img src=x onerror=alert(1)>"
    with (
        serve(tmp_path, [item], guideline=guideline) as site,
        open_page(browser, site.address, name, "TrustedHTML") as page,
    ):
        assert sorted(texts(page)) == sorted(HOSTILE)
        assert page.locator("#prompt").text_content() == item.prompt
        assert page.locator("#guideline-text").text_content() == guideline
        assert page.locator(".text script, .text img, .text b").count() == 0
        assert page.title() == "Labelling - lmgym"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert max(box["height"] for box in (card.bounding_box() for card in page.locator(".card").all())) < 700
        blocked = page.evaluate("() => { try { document.body.innerHTML = '<p>' } catch { return true } }")
        assert blocked  # trusted types: not even the page's own script can make markup of a text
        for rank in "1234":
            page.keyboard.press(rank)
        page.keyboard.press("Enter")
        page.wait_for_selector("#finished:not([hidden])")
        (record,) = site.store.records()
        assert [completion.text for completion in record.completions] == HOSTILE
        page.goto(f"{site.address}owner#token=owner")
        page.wait_for_selector("#annotators tr")
        assert page.inner_text("#annotators th") == name


def test_no_fault_of_accessibility(browser: Any, tmp_path: Path) -> None:
    """By axe-core: labels, roles, contrast, sizes, order of headings; in light and dark, wide and narrow."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    faults: list[str] = []

    def check(page: Any, state: str) -> None:
        found = axe.run(page).response["violations"]
        faults.extend(f"{state}: {v['impact']} {v['id']} {[node['html'] for node in v['nodes']]}" for v in found)

    questions = Questions(("rank", "rate", "edit"))
    settings = {"questions": questions, "guideline": "Be fair."}
    with serve(tmp_path, films(1, "good", "fair", "bad"), Plan(overlap=2), **settings) as site:
        for scheme, width in (("light", 1280), ("dark", 390)):
            view = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
            with open_page(browser, site.address, "", **view) as page:
                if scheme == "light":
                    check(page, "sign-in")
                page.fill("#name", scheme)
                page.keyboard.press("Enter")
                page.wait_for_selector("#task:not([hidden])")
                page.keyboard.press("Enter")  # an alert
                page.keyboard.press("1")
                page.locator("#help summary").click()
                page.locator(".card button").first.click()
                check(page, f"{scheme}: task")
                page.click("#cannot-say")
                page.wait_for_selector("#finished:not([hidden])")
                if scheme == "dark":
                    check(page, "finished")
                    page.goto(f"{site.address}owner#token=owner")
                    page.wait_for_selector("#annotators tr")
                    check(page, "owner")
    assert not faults, "\n".join(faults)


def test_the_tab_key_goes_through_an_item_in_order(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, films(1)) as site, open_page(browser, site.address) as page:
        assert page.evaluate("document.activeElement.id") == "prompt-title"  # where a screen reader begins
        visited = []
        for _ in range(12):
            page.keyboard.press("Tab")
            visited.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText"))
        assert visited[:7] == [
            "Text of the prompt",
            "Text of response A",
            "Rank 1 for response A",
            "Correct the text",
            "Text of response B",
            "Rank 1 for response B",
            "Correct the text",
        ]
        assert [name.split()[0] for name in visited[7:11]] == ["Save", "Cannot", "Skip", "Undo"]
        assert page.get_attribute("html", "lang") == "en"
        page.click("#help summary")
        page.uncheck("#shortcuts")
        page.keyboard.press("1")
        assert not page.is_checked("input[name=rank-0][value='1']")


# --- the command -------------------------------------------------------------------------------------------------


def test_an_acknowledged_answer_survives_a_kill_and_ctrl_c_counts(browser: Any, tmp_path: Path) -> None:
    """The second time the server listens to everybody, and so with a token."""
    lines = [json.dumps(record_to_json(record)) for record in films(3)]
    (tmp_path / "to_label.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "lmgym.feedback", "serve", str(tmp_path / "to_label.jsonl")]
    command += [f"labels={tmp_path / 'labels.db'}", "port=0"]
    for number, (host, end) in enumerate((("127.0.0.1", signal.SIGKILL), ("0.0.0.0", signal.SIGINT)), start=1):
        process = subprocess.Popen([*command, f"host={host}"], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        link = urlsplit(process.stdout.readline().split()[-1])
        assert link.fragment.startswith("token=") == (host == "0.0.0.0")
        address = f"http://127.0.0.1:{link.port}/"
        if link.fragment:
            with open_page(browser, address, "", expected="401") as page:
                page.wait_for_selector("#alert:not([hidden])")
                assert "needs the link with the token" in page.inner_text("#alert")
        with open_page(browser, f"{address}#{link.fragment}") as page:
            page.keyboard.press("1")
            page.keyboard.press("Enter")
            wait_for_item(page, number)
            assert "token" not in page.url
            process.send_signal(end)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest.splitlines()[-1] == f"2 answers are in {tmp_path / 'labels.db'}."
    with Store(tmp_path / "labels.db") as store:
        assert store.num_answers() == 2
