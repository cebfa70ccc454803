"""What `check_trainer` finds in TRL's trainers, where TRL is installed; docs/check_trainer.md says why."""

from __future__ import annotations

from typing import Any

import pytest

from lmgym.testing import check_trainer

pytest.importorskip("trl")
pytest.importorskip("peft")

NOT_THERE = ["score-at-last-token", "kl-in-reward", "gae", "gae-not-through-padding", "truncation", "whitening"]
FINDINGS: list[tuple[Any, dict[str, Any], list[str]]] = [
    ("grpo", {}, ["positions", "dropout-off", "kl-gradient-response"]),
    ("grpo", {"disable_dropout": True, "loss_type": "grpo"}, ["positions", "policy-gradient", "kl-gradient-response"]),
    ("rloo", {}, ["positions", "dropout-off"]),
    ("rloo", {"disable_dropout": True}, ["positions"]),
]


@pytest.mark.parametrize(("kind", "config", "findings"), FINDINGS)
def test_findings_in_trl(kind: Any, config: dict[str, Any], findings: list[str]) -> None:
    from lmgym.testing.trl import adapt_trl

    report = check_trainer(adapt_trl(kind, **config), raises=False)
    assert report.named("FAILS") == findings
    assert not report.named("error")
    assert report.named("not checked") == [*NOT_THERE, "stale-detected"]
