"""Takes the pictures of the labelling page in the documentation: `python -m builders.screenshots`.

Needs the extra `test` and a Chromium of the system.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from lmgym.feedback.judgements import Ranking
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Completion, Record
from lmgym.feedback.server import Settings, make_app
from lmgym.feedback.store import Store

IMAGES = Path(__file__).parents[1] / "docs" / "images"
GUIDELINE = (
    "Which review helps you more to decide whether to see the film?\nIt should say what the film is like, and why."
)
RESPONSES = (
    " A quiet film about two sisters who inherit a lighthouse. It is slow, but the end is worth it.",
    " It was good. I liked it. The actors were good, the music was good.",
    " שני הכוכבים נהדרים <b>5/5</b>",
)
VIEWS = {
    "laptop_light": {"viewport": {"width": 1100, "height": 760}, "color_scheme": "light"},
    "laptop_dark": {"viewport": {"width": 1100, "height": 760}, "color_scheme": "dark"},
    "phone_light": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "phone_dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
COLOURS = 64


def main() -> None:
    """Serves a few items and takes a picture of each view."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as directory, Store(Path(directory) / "labels.db", create=True) as store:
        plan = Plan(overlap=3)
        completions = tuple(Completion(text) for text in RESPONSES)
        store.add_items([Record(f"Write a short review of film {i}.", completions) for i in range(1, 13)], plan)
        label(store, plan)
        app = make_app(Settings(store, "owner", plan, guideline=GUIDELINE))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
            for name, view in VIEWS.items():
                take_task(browser, address, name, view)
            take_report(browser, address)
            browser.close()
        server.should_exit = True
        thread.join()


def label(store: Store, plan: Plan) -> None:
    """Two annotators who agree on most items."""
    for annotator, worse in (("anna", 1), ("ben", 4)):
        for i in range(8):
            assignment = store.next(annotator, plan)
            assert assignment is not None
            tiers = ((0,), (1,), (2,)) if i % worse == 0 else ((0,), (2,), (1,))
            store.answer(annotator, assignment.id, "judged", [Ranking(tiers)], 9.0 + i)


def take_task(browser: Browser, address: str, name: str, view: dict[str, Any]) -> None:
    """An item of which two responses are ranked."""
    page = browser.new_page(**view)
    page.goto(address)
    page.wait_for_selector("#sign-in:not([hidden])")
    page.keyboard.type("cleo")
    page.keyboard.press("Enter")
    page.wait_for_selector("#task:not([hidden])")
    page.keyboard.press("2")
    page.keyboard.press("1")
    page.evaluate("window.scrollTo(0, 0)")
    save(page, f"labelling_{name}.png")
    page.close()


def take_report(browser: Browser, address: str) -> None:
    """The owner's page."""
    page = browser.new_page(viewport={"width": 1100, "height": 420})
    page.goto(f"{address}owner#token=owner")
    page.wait_for_selector("#annotators tr")
    page.evaluate(
        "document.getElementById('summary').textContent = summary.textContent.replace(/in .*?labels/, 'in labels')"
    )
    save(page, "labelling_owner.png")
    page.close()


def save(page: Page, name: str) -> None:
    """A picture of few colours, which is a small file."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
