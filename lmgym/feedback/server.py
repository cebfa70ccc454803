"""The server of the labelling page.

It trusts nobody: a completion may hold anything (the page shows it as text), and so may a request. Every call is a POST
of JSON with the `Content-Type` that a form of another site cannot send, and a call that a browser makes for another
site is refused; so is one under a host name that is not ours, which a site could point to this machine. There are no
cookies. A token, where there is one, goes in a header.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.labelling.answers import MAX_CORRECTION, MAX_RESPONSES, Entered, Questions, read_answer, show_answer
from lmgym.feedback.labelling.assignment import Assignment
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.labelling.quality import report_quality
from lmgym.feedback.records import Text
from lmgym.feedback.store import AlreadyAnsweredError, Store

PAGE = Path(__file__).parent / "labelling" / "page"
FILES = {"": "index.html", "owner": "owner.html"} | {
    name: name for name in ("page.css", "page.js", "api.js", "cards.js", "drag.js", "ranking.js", "owner.js")
}
MAX_BODY = 4_000_000  # bytes of a request
TOO_LARGE = f"A request must have at most {MAX_BODY:,} bytes."
MAX_SECONDS = 7 * 24 * 3600.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Settings:
    """What a server is about.

    Attributes:
        store: where items and answers are.
        plan: who is asked what. questions: what is asked. guideline: how to judge, as text.
        token: what an annotator's calls must carry; None where nobody else can reach the server.
        owner_token: what the owner's calls must carry.
        hosts: names that the server answers to; "*" any.
        annotators: the names that may label; none for anybody.
    """

    store: Store
    owner_token: str
    plan: Plan = field(default_factory=Plan)
    questions: Questions = field(default_factory=Questions)
    guideline: str = ""
    token: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    annotators: tuple[str, ...] = ()


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NoBody(_Body):
    """Nothing."""


class Who(_Body):
    """The annotator that calls."""

    annotator: str = Field(min_length=1, max_length=64, pattern=r"^\S(.*\S)?$")


class Answer(Who):
    """An answer, in the order of the page."""

    assignment: int = Field(ge=1, lt=2**63)
    verdict: str = Field(pattern="^(judged|cannot_say|skip)$")
    seconds: float = Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)
    ranks: Annotated[list[int | None], Field(max_length=MAX_RESPONSES)] | None = None
    ratings: Annotated[list[int | None], Field(max_length=MAX_RESPONSES)] | None = None
    corrections: (
        Annotated[list[Annotated[str, Field(max_length=MAX_CORRECTION)] | None], Field(max_length=MAX_RESPONSES)] | None
    ) = None


def make_app(settings: Settings) -> FastAPI:
    """The labelling page of a store, as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_protection(app, settings)
    _add_files(app)
    _add_calls(app, settings)
    return app


# -- protection ---------------------------------------------------------------------------------------------


class LimitBody:
    """Refuses a request whose body is too large, before it is in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > self._max_bytes:
            await JSONResponse({"detail": TOO_LARGE}, 413, HEADERS)(scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:  # a body in chunks, which said nothing of its size
                raise HTTPException(413, TOO_LARGE)
            return message

        await self._app(scope, count, send)


def _add_protection(app: FastAPI, settings: Settings) -> None:
    @app.middleware("http")
    async def protect(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = _refuse_other_sites(request) if request.method == "POST" else None
        response = refused or await call_next(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    app.add_middleware(LimitBody, max_bytes=MAX_BODY)

    @app.exception_handler(RequestValidationError)
    async def explain(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "json_invalid":
            where = "body"
        return JSONResponse({"detail": f"`{where}` cannot be so: {first['msg']}."}, 422)

    @app.exception_handler(InvalidArgumentError)
    async def refuse(_: Request, error: InvalidArgumentError) -> Response:
        status = 409 if isinstance(error, AlreadyAnsweredError) else 422
        return JSONResponse({"detail": str(error)}, status)


def _refuse_other_sites(request: Request) -> Response | None:
    """An answer for a call that a browser makes for another site; None for all other calls."""
    origin = request.headers.get("origin")
    other = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if other or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return JSONResponse({"detail": "Another site must not call this server."}, 403)
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return JSONResponse({"detail": "`Content-Type` must be application/json."}, 415)
    return None


class NotAllowedError(Exception):
    """A call without the right token."""


def _check_token(request: Request, expected: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if expected is not None and not hmac.compare_digest(given.encode(), expected.encode()):
        raise NotAllowedError


# -- files and calls ---------------------------------------------------------------------------------------------


def _add_files(app: FastAPI) -> None:
    def serve(name: str) -> Callable[[], Awaitable[FileResponse]]:
        async def answer() -> FileResponse:
            return FileResponse(PAGE / name)

        return answer

    for path, name in FILES.items():
        app.add_api_route(f"/{path}", serve(name), methods=["GET"])


def _add_calls(app: FastAPI, settings: Settings) -> None:
    store = settings.store
    questions = settings.questions

    async def check_annotator(request: Request) -> None:
        _check_token(request, settings.token)

    async def check_owner(request: Request) -> None:
        _check_token(request, settings.owner_token)

    @app.exception_handler(NotAllowedError)
    async def refuse(_: Request, __: NotAllowedError) -> Response:
        detail = "This needs the link with the token that the server printed when it started."
        return JSONResponse({"detail": detail}, 401)

    def ask(annotator: str) -> dict[str, Any]:
        if settings.annotators and annotator not in settings.annotators:
            raise InvalidArgumentError(f"`annotator` must be one that may label here, got {annotator!r}.")
        assignment = store.next(annotator, settings.plan)
        item = None if assignment is None else describe_item(store, assignment)
        return {"item": item, "progress": vars(store.progress(annotator))}

    @app.post("/api/settings", dependencies=[Depends(check_annotator)])
    def get_settings(_: NoBody) -> dict[str, Any]:
        return {"guideline": settings.guideline, "ask": questions.ask, "scale": questions.scale}

    @app.post("/api/next", dependencies=[Depends(check_annotator)])
    def get_next(body: Who) -> dict[str, Any]:
        return ask(body.annotator)

    @app.post("/api/answer", dependencies=[Depends(check_annotator)])
    def take_answer(body: Answer) -> dict[str, Any]:
        assignment = store.get(body.annotator, body.assignment)
        entered = Entered(body.ranks, body.ratings, body.corrections)
        if body.verdict == "judged":
            judgements = read_answer(questions, assignment.item, assignment.shown, entered)
        else:
            judgements = ()
        store.answer(body.annotator, body.assignment, body.verdict, judgements, body.seconds)
        return ask(body.annotator)  # the answer is on the disk now

    @app.post("/api/undo", dependencies=[Depends(check_annotator)])
    def undo(body: Who) -> dict[str, Any]:
        return {"undone": store.undo(body.annotator), **ask(body.annotator)}

    @app.post("/api/report", dependencies=[Depends(check_owner)])
    def report(_: NoBody) -> dict[str, Any]:
        quality = report_quality(store.assignments(), store.gold())
        return {"labels": str(store.path), "answers": store.num_answers(), "to_label": store.num_items(), **quality}


def describe_item(store: Store, assignment: Assignment) -> dict[str, Any]:
    """An item as the page gets it: texts alone, in the order shown, without who wrote them or why it was chosen."""
    item = assignment.item
    judgements, seconds = store.withdrawn(assignment.id)
    previous = show_answer(item, assignment.shown, judgements)
    return {
        "assignment": assignment.id,
        "prompt": _show(item.prompt),
        "completions": [_show(item.completions[i].text) for i in assignment.shown],
        "previous": {**previous, "seconds": seconds} if previous else None,
    }


def _show(text: Text) -> str | list[dict[str, str]]:
    if isinstance(text, str):
        return text
    return [{"role": message.role, "content": message.content} for message in text]
