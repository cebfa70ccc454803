"""The labelling page of a store, served by this process; needs the extra `feedback`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Record
from lmgym.feedback.server import Settings, make_app
from lmgym.feedback.store import Store


class Site:
    """A server of a store, in this process."""

    def __init__(self, store: Store, address: str) -> None:
        self.store = store
        self.address = address

    def judgements(self, annotator: str | None = None) -> list[Any]:
        return [r.judgement for r in self.store.records() if annotator in (None, r.annotator)]


@contextlib.contextmanager
def serve(path: Path, records: list[Record], plan: Plan | None = None, **settings: Any) -> Iterator[Site]:
    plan = plan or Plan()
    with Store(path / "labels.db", create=True) as store:
        store.add_items(records, plan)
        app = make_app(Settings(store, "owner", plan, **settings))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield Site(store, f"http://127.0.0.1:{port}/")
        finally:
            server.should_exit = True
            thread.join()
