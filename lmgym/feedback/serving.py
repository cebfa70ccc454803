"""Runs the server of the labelling page until it is interrupted: `python -m lmgym.feedback serve`."""

from __future__ import annotations

import ipaddress
import os
import secrets
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmgym.errors import InvalidArgumentError, LmGymError, check_int
from lmgym.feedback.files import read_records
from lmgym.feedback.labelling.answers import Questions
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.store import COLUMN, Store
from lmgym.files import read_text

if TYPE_CHECKING:
    import uvicorn

TOKEN = "LMGYM_FEEDBACK_TOKEN"
OWNER_TOKEN = "LMGYM_FEEDBACK_OWNER_TOKEN"
MAX_GUIDELINE = 200_000  # bytes
MAX_CONNECTIONS = 200
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class MissingExtraError(LmGymError, ImportError):
    """A package of the extra `feedback` is not installed."""


@dataclass(frozen=True)
class ServeOptions:
    """What `serve` takes on the command line, as `name=value`.

    Attributes:
        labels: the file that answers go to, made where there is none.
        host: the address to listen on. Any but this machine's own needs a token, which is made and printed.
        port: to listen on; 0 takes a free one.
        ask: what is asked of "rank", "rate" and "edit", with commas between them.
        scale: of ratings, "lowest-highest".
        guideline: a text file that says how to judge.
        order: "random", or "disagreement": the most disputed items first, beside the control group.
        column: of the records, the number that the order "disagreement" goes by.
        control: the share of items that are drawn at random under the order "disagreement".
        overlap: how many annotators judge an item that is shared.
        shared: the share of items that are shared.
        gold: a file of records with known answers, asked now and then.
        gold_share: how often, as a share of questions.
        repeats: the share of questions that repeat an earlier one.
        annotators: who may label, with commas between the names; anybody where it is empty.
        seed: of every random order.
    """

    labels: str = "labels.db"
    host: str = "127.0.0.1"
    port: int = 8000
    ask: str = "rank,edit"
    scale: str = "1-7"
    guideline: str = ""
    order: str = "random"
    column: str = COLUMN
    control: float = 0.5
    overlap: int = 1
    shared: float = 1.0
    gold: str = ""
    gold_share: float = 0.1
    repeats: float = 0.0
    annotators: str = ""
    seed: int = 0

    def plan(self) -> Plan:
        """Who is asked what."""
        return Plan(self.order, self.control, self.overlap, self.shared, self.gold_share, self.repeats, self.seed)

    def questions(self) -> Questions:
        """What is asked."""
        low, _, high = self.scale.partition("-")
        if not (low.isdecimal() and high.isdecimal()):
            raise InvalidArgumentError(f"`scale` must be two numbers such as '1-7', got {self.scale!r}.")
        return Questions(tuple(_names(self.ask)), (int(low), int(high)))


def serve(to_label: object, options: ServeOptions) -> None:
    """Serves the labelling page until Ctrl-C or SIGTERM, then says how many answers are in which file.

    Args:
        to_label: records that shall be labelled, as `lmgym.feedback.files.read_records` takes them.
        options: the rest.

    Raises:
        MissingExtraError: without FastAPI and uvicorn.
        LmGymError: for options that cannot be so, records that cannot be labelled, and a port in use.
    """
    try:
        import uvicorn

        from lmgym.feedback.server import Settings, make_app
    except ImportError as error:
        raise MissingExtraError(f"The labelling page needs {error.name}: pip install 'lmgym[feedback]'") from error
    plan = options.plan()
    questions = options.questions()
    guideline = read_text(Path(options.guideline), MAX_GUIDELINE) if options.guideline else ""
    is_local = _is_local(options.host)
    token = None if is_local else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    owner_token = os.environ.get(OWNER_TOKEN) or secrets.token_urlsafe(24)
    with _listen(options.host, options.port) as listener, Store(options.labels, create=True) as store:
        store.add_items(read_records(to_label, "to_label"), plan, column=options.column)
        if options.gold:
            store.add_items(read_records(options.gold, "gold"), plan, gold=True)
        hosts = (*LOCAL_HOSTS, options.host) if is_local else ("*",)
        names = tuple(_names(options.annotators))
        settings = Settings(store, owner_token, plan, questions, guideline, token, hosts, names)
        config = uvicorn.Config(
            make_app(settings),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        _print_links(options.host, listener.getsockname()[1], token, owner_token)
        _print_items(store)
        try:
            _run(uvicorn.Server(config), listener)
        finally:
            print(f"{store.num_answers():,} answers are in {store.path}.", flush=True)


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Runs until Ctrl-C or SIGTERM, which the server first ends its work on and then raises again."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print()
    finally:
        signal.signal(signal.SIGTERM, before)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    check_int("port", port, 0, 65535)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        hint = " Another program uses the port: try port=0, which takes a free one." if port else ""
        reason = error.strerror or str(error)
        raise InvalidArgumentError(f"`host` and `port` must be free, got {host}:{port}: {reason}.{hint}") from error


def _print_links(host: str, port: int, token: str | None, owner_token: str) -> None:
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    print(f"The labelling page: {address}{'' if token is None else f'#token={token}'}")
    print(f"For the owner:      {address}owner#token={owner_token}")
    if token is not None:
        print("Others can reach this address, and nothing between you is encrypted: put a proxy with TLS before it.")


def _print_items(store: Store) -> None:
    print(f"{store.num_items():,} items to label, {store.num_answers():,} answers so far, in {store.path}.")
    print("Ctrl-C ends it.", flush=True)
