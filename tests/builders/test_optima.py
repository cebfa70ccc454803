"""The command that derives the optima of the suite again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import optima
from lmgym.tasks import stored


def test_one_command_derives_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    optima.main(["stop", "keyword-8"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 7
    assert printed[0].startswith("stop-4 ")


def test_a_stale_optimum_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    optima_of_stop = json.loads(Path(stored.ARTEFACTS, "stop", "optima.json").read_text())
    optima_of_stop["stop-4"]["splits"]["test"]["value"] += 0.01
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop" / "optima.json").write_text(json.dumps(optima_of_stop))
    for module in (stored, optima):
        monkeypatch.setattr(module, "ARTEFACTS", str(tmp_path))
    stored._stored.cache_clear()
    try:
        with pytest.raises(SystemExit, match="Not as stored: stop-4"):
            optima.main(["stop"])
        optima.main(["stop-4", "--write"])
        stored._stored.cache_clear()
        optima.main(["stop"])
    finally:
        stored._stored.cache_clear()
    with pytest.raises(SystemExit, match="Did you mean 'keyword-8'"):
        optima.main(["keyword-9"])
