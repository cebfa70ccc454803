"""Seeds that are added until every pair is decided: who gets more, when it ends, and what is said then."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from finished_runs import write_run

from agents.comparison.plan import Cell, make_cells, settings_of
from agents.comparison.protocol import Protocol, read_request
from agents.comparison.record import write_protocol
from agents.comparison.sequential import look, plan_of, rule_of, run_until_decided, sentences_of, standing
from agents.comparison.study import study_of
from agents.comparison.table import read_runs
from agents.comparison.verdict import find_verdict
from agents.runs.defaults import complete_agents
from agents.runs.trust import config_text
from lmgym.errors import InvalidArgumentError
from lmgym.optimum import find_known
from lmgym.scores import ScoreMatrix, sequential_test
from lmgym.tasks import make_task

complete_agents()
THREE = ["agents=ppo,rloo,sft", "tasks=keyword-8", "seeds=5", "max_seeds=15", "margin=0.05"]
MEANS = {"ppo": 0.9, "rloo": 0.9, "sft": 0.3}
SPREAD = 0.02


def drawn(agent: str, seed: int) -> float:
    return MEANS[agent] + SPREAD * float(np.random.default_rng([seed, *agent.encode()]).normal())


def write(cells: Sequence[Cell], given: list[str]) -> int:
    for cell in cells:
        if not cell.directory.is_dir():
            given.append(cell.directory.name)
            returned = drawn(cell.setting.agent, cell.seed)
            write_run(cell.directory, agent=cell.setting.agent, seed=cell.seed, returned=returned)
            (cell.directory / "config.yaml").write_text(config_text(cell.values))
    return 0


def cells_of(protocol: Protocol, out: Path) -> list[Cell]:
    assert protocol.max_seeds is not None
    return make_cells(protocol, settings_of(protocol), range(protocol.max_seeds), out)


def test_only_labels_of_open_pairs_get_more_seeds_until_all_are_decided(tmp_path: Path) -> None:
    protocol = read_request([*THREE, f"out={tmp_path}"]).protocol
    given: list[str] = []
    ended = run_until_decided(protocol, cells_of(protocol, tmp_path), lambda cells: write(cells, given))
    assert ended.code == 0
    assert ended.found is not None
    assert ended.found.finished
    counts = {agent: sum(cell.setting.agent == agent for cell in ended.cells) for agent in MEANS}
    assert counts["sft"] < counts["ppo"] == counts["rloo"]
    verdicts = {pair: verdict.verdict for pair, verdict in ended.found.verdicts.items()}
    assert verdicts == {("ppo", "rloo"): "same", ("ppo", "sft"): "better", ("rloo", "sft"): "better"}

    seeds = {agent: range(count) for agent, count in counts.items()}  # the same as the test of all scores at once
    rows = [(agent, seed) for agent in MEANS for seed in seeds[agent]]
    known = find_known(make_task("keyword-8"), "test")
    assert known is not None
    shares = [(drawn(agent, seed) - known.reference) / (known.value - known.reference) for agent, seed in rows]
    matrix = ScoreMatrix.from_columns(
        label=[row[0] for row in rows], task=["keyword-8"] * len(rows), seed=[row[1] for row in rows], score=shares
    )
    whole = sequential_test(matrix, plan_of(protocol))
    assert {pair: verdict.seeds for pair, verdict in whole.verdicts.items()} == {
        pair: verdict.seeds for pair, verdict in ended.found.verdicts.items()
    }

    again: list[str] = []  # the same command: nothing is run, and the same is found
    repeated = run_until_decided(protocol, cells_of(protocol, tmp_path), lambda cells: write(cells, again))
    assert not again
    assert repeated.found == ended.found

    rule = rule_of(ended.found, protocol)
    findings = find_verdict(study_of(read_runs([tmp_path])), rule)
    assert findings.sentences == rule.sentences
    assert "5 at a time, up to 15" in findings.rests_on[-1]
    assert not any("Holm" in sentence for sentence in findings.rests_on)


def test_a_stop_ends_it_and_a_failed_run_counts_as_the_reference(tmp_path: Path) -> None:
    protocol = read_request([*THREE, f"out={tmp_path}"]).protocol
    stopped = run_until_decided(protocol, cells_of(protocol, tmp_path), lambda cells: 130)
    assert (stopped.code, stopped.found) == (130, None)
    given: list[str] = []

    def fail_one(cells: Sequence[Cell]) -> int:
        write(cells, given)
        broken = tmp_path / "ppo-keyword-8-3"
        if (broken / "summary.json").is_file():
            shutil.rmtree(broken)
            write_run(broken, seed=3, finished=False)
            (cell,) = [cell for cell in cells if cell.directory == broken]
            (broken / "config.yaml").write_text(config_text(cell.values))
            (broken / "error.txt").write_text("NotFiniteError: the loss is nan\n")
        return 1

    ended = run_until_decided(protocol, cells_of(protocol, tmp_path), fail_one)
    assert ended.code == 1
    assert ended.found is not None
    assert ended.found.verdicts["ppo", "rloo"].gap.mean < -0.05


def test_what_is_said_names_the_better_label_first(tmp_path: Path) -> None:
    protocol = read_request(["agents=sft,ppo", "tasks=keyword-8", "seeds=4", "max_seeds=8", f"out={tmp_path}"]).protocol
    ended = run_until_decided(protocol, cells_of(protocol, tmp_path), lambda cells: write(cells, []))
    assert ended.found is not None
    (sentence,) = sentences_of(ended.found, None)
    assert sentence.startswith("ppo is better than sft by 1.0")
    assert ended.found.verdicts["sft", "ppo"].verdict == "worse"
    low, high = (float(x) for x in sentence.partition("[")[2].partition("]")[0].split(", "))
    assert 0 < low < high


def test_open_and_undecided_pairs_are_named(tmp_path: Path) -> None:
    protocol = read_request(
        ["agents=ppo,rloo", "tasks=keyword-8", "seeds=3", "max_seeds=6", f"out={tmp_path}"]
    ).protocol
    ended = run_until_decided(protocol, cells_of(protocol, tmp_path), lambda cells: write(cells, []))
    assert ended.found is not None
    assert "undecided after 6 seeds" in sentences_of(ended.found, None)[0]
    first = look([cell for cell in ended.cells if cell.seed < 3], plan_of(protocol))
    assert standing(first) == "0 of 1 pairs are decided. Open: ppo and rloo. Seeds go up: ppo to 6, rloo to 6."


def test_a_rule_is_not_changed_after_a_look(tmp_path: Path) -> None:
    write_protocol(read_request([*THREE, f"out={tmp_path}"]), "command")
    write_protocol(read_request([*THREE, f"out={tmp_path}"]), "command")
    with pytest.raises(InvalidArgumentError, match="`max_seeds`, `margin` and `seeds` must be as they were"):
        write_protocol(read_request([*THREE[:3], "max_seeds=30", f"out={tmp_path}"]), "command")
    outs = [read_request([*THREE[:2], *more]).out for more in (THREE[2:], THREE[2:4], ["seeds=5"])]
    assert len(set(outs)) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["seeds=5", "max_seeds=12"], "`max_seeds` must be a multiple of `seeds`=5 and above it, got 12"),
        (["seeds=5", "max_seeds=5"], "and above it, got 5"),
        (["seeds=1", "max_seeds=5"], "`seeds` must be a number of at least 2"),
        (["seeds=3,4", "max_seeds=4"], "`seeds` must be a number of at least 2"),
        (["margin=0.1"], "`margin` must come with `max_seeds`"),
        (["max_seeds=10", "margin=-1"], "`margin` must be a share of the gain above 0, .* got '-1'"),
        (["max_seeds=10", "margin=x"], "`margin` must be"),
        (["max_seeds=10", "runs=runs/x"], "`runs` must not be given with `max_seeds`"),
        (["max_seeds=10", "tune=agent.lr:uniform(0,1)"], "`tune` must not be given with `max_seeds`"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_request(["agents=ppo,rloo", "tasks=echo-2", *more])


def test_one_label_alone_is_not_compared(tmp_path: Path) -> None:
    protocol = read_request(["agents=ppo", "tasks=echo-2", "env.kl_coef=0.1,0.2", "max_seeds=10"]).protocol
    with pytest.raises(InvalidArgumentError, match="`agents` must be two at least"):
        run_until_decided(protocol, cells_of(protocol, tmp_path), lambda cells: 0)
