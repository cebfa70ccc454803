"""The server of the labelling page: what it answers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pages import ROOT

from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.feedback.judgements import Ranking
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Record
from lmgym.feedback.serving import MissingExtraError, ServeOptions
from lmgym.feedback.serving import serve as serve_forever

sites = pytest.importorskip("sites", reason="needs the extra `feedback`", exc_type=ImportError)

ITEMS = [Record(f"p{i}", (" a", " b"), id=f"{i}") for i in range(3)]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with sites.serve(tmp_path_factory.mktemp("site"), ITEMS, Plan(overlap=20)) as started:
        yield started


def request(
    site: Any, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(site.address).netloc, timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(content) if is_json else content, dict(answer.headers)


def call(site: Any, path: str, body: object, token: str = "") -> tuple[int, Any]:
    headers = JSON | ({"Authorization": f"Bearer {token}"} if token else {})
    status, answer, _ = request(site, "POST", f"/api/{path}", json.dumps(body).encode(), **headers)
    return status, answer


def start(site: Any, annotator: str) -> dict[str, Any]:
    status, answer = call(site, "next", {"annotator": annotator})
    assert status == 200
    return {"annotator": annotator, "assignment": answer["item"]["assignment"], "verdict": "judged", "seconds": 1}


# --- answers -----------------------------------------------------------------------------------------------------


def test_an_answer_is_in_the_store_when_the_server_says_so(site: Any) -> None:
    body = start(site, "anna") | {"ranks": [1, 2]}
    status, answer = call(site, "answer", body)
    assert status == 200
    assert answer["progress"] == {"done": 1, "left": 2, "answers": 1, "wanted": 60}
    (record,) = [record for record in site.store.records() if record.annotator == "anna"]
    assert record.judgement == Ranking(((record.order_shown[0],), (record.order_shown[1],)))
    assert call(site, "answer", body)[0] == 200  # again, since the reply may have been lost
    assert call(site, "answer", body | {"ranks": [2, 1]})[0] == 409
    status, answer = call(site, "undo", {"annotator": "anna"})
    assert (status, answer["undone"], answer["item"]["previous"]["ranks"]) == (200, True, [1, 2])


def test_the_page_does_not_learn_who_wrote_a_response_or_why_it_is_asked(site: Any) -> None:
    _, answer = call(site, "next", {"annotator": "curious"})
    assert answer["item"].keys() == {"assignment", "prompt", "completions", "previous"}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"ranks": [1, 3]}, 422),
        ({"ranks": [1]}, 422),
        ({"ranks": None}, 422),
        ({"ranks": [1.5, 2]}, 422),
        ({"ranks": ["1", 2]}, 422),
        ({"ranks": [True, 2]}, 422),
        ({"ranks": [1] * 1000}, 422),
        ({"ratings": [1, 2]}, 422),
        ({"corrections": ["x" * 200_001, None]}, 422),
        ({"corrections": ["\ud800", None]}, 422),
        ({"seconds": -1}, 422),
        ({"seconds": 1e300}, 422),
        ({"verdict": "best"}, 422),
        ({"assignment": 10**30}, 422),
        ({"assignment": 4000}, 422),
        ({"annotator": "somebody else"}, 422),
        ({"annotator": ""}, 422),
        ({"annotator": " "}, 422),
        ({"annotator": "\ud800"}, 422),
        ({"annotator": "x" * 65}, 422),
        ({"annotator": "a\nb"}, 422),
        ({"more": 1}, 422),
    ],
)
def test_a_bad_answer_is_refused(site: Any, change: dict[str, Any], status: int) -> None:
    body = start(site, "ben") | {"ranks": [1, 2]} | change
    before = site.store.num_answers()
    got, answer = call(site, "answer", body)
    assert (got, type(answer["detail"])) == (status, str)
    assert site.store.num_answers() == before


# --- strangers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON | {"Origin": "http://evil.example"}, 403),
        (JSON | {"Origin": "null"}, 403),
        (JSON | {"Sec_Fetch_Site": "cross-site"}, 403),
        (JSON | {"Sec_Fetch_Site": "same-site"}, 403),
        (JSON | {"Host": "evil.example"}, 400),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
        (JSON | {"Content_Length": str(10**8)}, 413),
        (JSON | {"Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_another_site_cannot_call(site: Any, headers: dict[str, str], status: int) -> None:
    got, _, answered = request(site, "POST", "/api/next", b'{"annotator": "eve"}', **headers)
    assert got == status
    assert status != 200 or "Access-Control-Allow-Origin" not in answered


def test_the_origin_may_be_ours(site: Any) -> None:
    status, _, _ = request(site, "POST", "/api/next", b'{"annotator": "a"}', **JSON, Origin=site.address.rstrip("/"))
    assert status == 200


def test_no_call_is_a_get(site: Any) -> None:
    for path in ("next", "answer", "undo", "report", "settings"):
        assert request(site, "GET", f"/api/{path}")[0] == 405
    for path in ("docs", "redoc", "openapi.json", "page/../server.py", "%2e%2e/server.py", "index.html"):
        assert request(site, "GET", f"/{path}")[0] == 404


def test_a_body_in_chunks_is_limited_too(site: Any) -> None:
    connection = http.client.HTTPConnection(urlsplit(site.address).netloc, timeout=10)
    chunks = (b" " * 100_000 for _ in range(50))
    connection.request("POST", "/api/next", chunks, JSON, encode_chunked=True)
    assert connection.getresponse().status in (400, 413)
    connection.close()


def test_what_is_no_json_is_refused(site: Any) -> None:
    for body in (b"", b"{", b"[]", b'{"annotator": NaN}', b"\xff", b"[" * 100_000):
        status, _, _ = request(site, "POST", "/api/next", body, **JSON)
        assert 400 <= status < 500, body[:20]


def test_every_file_comes_with_the_policy(site: Any) -> None:
    for path in ("", "owner", "page.css", "page.js", "api.js", "cards.js", "drag.js", "ranking.js", "owner.js"):
        status, content, headers = request(site, "GET", f"/{path}")
        assert status == 200
        assert "http://" not in content
        assert "https://" not in content
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_the_report_is_the_owners(site: Any) -> None:
    assert call(site, "report", {})[0] == 401
    assert call(site, "report", {}, "guess")[0] == 401
    status, answer = call(site, "report", {}, "owner")
    assert (status, answer["to_label"]) == (200, 3)


def test_a_token_and_a_list_of_names(tmp_path: Path) -> None:
    with sites.serve(tmp_path, ITEMS, token="secret", annotators=("anna",), hosts=("*",)) as site:
        assert call(site, "next", {"annotator": "anna"})[0] == 401
        assert call(site, "settings", {}, "owner")[0] == 401
        assert call(site, "next", {"annotator": "anna"}, "secret")[0] == 200
        status, answer = call(site, "next", {"annotator": "eve"}, "secret")
        assert status == 422
        assert "may label here" in answer["detail"]


# --- starting ----------------------------------------------------------------------------------------------------


def test_the_server_loads_no_torch() -> None:
    code = "import sys, lmgym.feedback.server, lmgym.feedback.store; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ask": "sing"}, "`ask` must be one of"),
        ({"ask": ""}, "`ask` must be some of"),
        ({"scale": "7"}, "`scale` must be two numbers"),
        ({"scale": "7-1"}, r"`scale\[1\]` must be an int"),
        ({"scale": "0-99"}, r"`scale\[1\]` must be an int"),
        ({"order": "best"}, "`order` must be one of"),
        ({"overlap": 0}, "`overlap` must be an int"),
        ({"shared": 2.0}, "`shared` must be a finite number"),
        ({"port": 70_000}, "`port` must be an int"),
        ({"host": "no such host.invalid"}, "`host` and `port` must be free"),
    ],
)
def test_options_that_cannot_be_so(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        serve_forever(ITEMS, ServeOptions(labels=str(tmp_path / "labels.db"), **options))
    assert not list(tmp_path.iterdir())


def test_the_documentation_names_every_option() -> None:
    page = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
    assert not [name for name, value in vars(ServeOptions()).items() if f"`{name}={value}`" not in page]


def test_a_port_in_use_is_named(site: Any, tmp_path: Path) -> None:
    port = urlsplit(site.address).port
    with pytest.raises(InvalidArgumentError, match=f"127.0.0.1:{port}.*try port=0"):
        serve_forever(ITEMS, ServeOptions(labels=str(tmp_path / "labels.db"), port=port or 0))


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"needs uvicorn: pip install 'lmgym\[feedback\]'"):
        serve_forever(ITEMS, ServeOptions(labels=str(tmp_path / "labels.db")))
