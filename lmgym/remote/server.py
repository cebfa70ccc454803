"""A small engine: a model that answers the calls of `lmgym.remote.protocol`, over HTTP.

It stands in for vLLM where there is none, in tests and in studies of what a wrong engine costs. It answers one call
after the other, and it listens to this machine alone unless told otherwise: whoever reaches it may have it read models
from directories.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lmgym.errors import InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.remote.protocol import OWNER
from lmgym.remote.served import ServedModel

MAX_BODY = 1 << 28  # bytes of a request: 256 MiB


class Server(ThreadingHTTPServer):
    """Serves a model until `shutdown`.

    Args:
        served: the model. host: to listen on. port: to listen on; 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, served: ServedModel, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.served = served
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    """Reads and answers one call."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answers a GET."""
        call = _GETS.get(self.path.partition("?")[0])
        self._answer(None if call is None else partial(call, self.server.served))

    def do_POST(self) -> None:
        """Answers a POST of JSON."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            self._send(413, _error(413, f"A request must have a length, of at most {MAX_BODY:,} bytes."))
            return
        try:
            body = json.loads(self.rfile.read(int(length)) or b"{}")
            if not isinstance(body, dict):
                raise ValueError("no object")
        except ValueError as error:
            self._send(400, _error(400, f"A request must be a JSON object: {error}."))
            return
        call = _POSTS.get(self.path.partition("?")[0])
        self._answer(None if call is None else partial(call, self.server.served, body))

    def _answer(self, call: Callable[[], Any] | None) -> None:
        if call is None:
            self._send(404, {"detail": "Not Found"})
            return
        try:
            with self.server.lock:
                found = call()
        except (InvalidArgumentError, UnknownNameError) as error:
            self._send(400, _error(400, str(error)))
        except Exception as error:  # it goes on serving
            reason = str(error) if isinstance(error, LmGymError) else f"{type(error).__name__}: {error}"
            self._send(500, _error(500, reason))
        else:
            self._send(200, found)

    def _send(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:  # who has asked is gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def _models(served: ServedModel) -> Any:
    model = {"id": served.name, "root": served.name, "owned_by": OWNER, "max_model_len": served.max_tokens}
    return {"object": "list", "data": [{"object": "model", **model}]}


def _info(served: ServedModel) -> Any:
    return {"vllm_config": {"model_config": {"model": served.name, "logprobs_mode": "processed_logprobs"}}}


def _call_method(served: ServedModel, body: dict[str, Any]) -> Any:
    method = body.get("method")
    if method != "reload_weights":
        raise InvalidArgumentError(f"`method` must be 'reload_weights', got {method!r}.")
    path = body.get("kwargs", {}).get("weights_path")
    if not isinstance(path, str):
        raise InvalidArgumentError(f"`weights_path` must be a directory, got {path!r}.")
    served.load_weights(Path(path))
    return {"results": [None]}


def _complete(served: ServedModel, body: dict[str, Any]) -> Any:
    if body.get("model", served.name) != served.name:
        raise InvalidArgumentError(f"`model` must be {served.name!r}, got {body['model']!r}.")
    return {"object": "text_completion", "model": served.name, "choices": served.complete(body)}


def _error(code: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "Error", "param": None, "code": code}}


_GETS: dict[str, Callable[[ServedModel], Any]] = {
    "/health": lambda served: None,
    "/v1/models": _models,
    "/server_info": _info,
}
_POSTS: dict[str, Callable[[ServedModel, dict[str, Any]], Any]] = {
    "/collective_rpc": _call_method,
    "/reset_prefix_cache": lambda served, body: {"success": True},  # there is none
    "/v1/completions": _complete,
}
