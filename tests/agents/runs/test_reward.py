"""`python -m agents.reward`: what it writes, what it refuses before anything loads, and how it goes on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from hydra import compose, initialize_config_dir
from reward_texts import make_gpt2, make_tokenizer, toy_records

from agents.reward import main  # noqa: F401 - importing it tells Hydra of the fields that a yaml leaves out
from agents.runs import reward_run
from agents.runs.config import CONF, SYNONYMS_OF_REWARDS
from agents.runs.help_page import reward_help_page
from agents.runs.reward_plan import check_reward
from agents.runs.reward_run import begin_reward, go_on_with_reward
from lmgym.errors import LmGymError
from lmgym.feedback.files import read_records, write_records
from lmgym.feedback.records import Record
from lmgym.feedback.scoring import score_records
from lmgym.feedback.simulation import Annotators
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.scorer import score_texts
from lmgym.rewards.classifier import load_reward_model
from lmgym.rewards.ensemble import load_ensemble
from lmgym.tasks import make_task

ROOT = Path(__file__).parents[3]
TWO_MEMBERS = ("reward.ensemble=2", "reward.held_out=0.25", "reward.patience=0")


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated people on completions of `reviews` that are no samples, but quick to make."""
    words = ["awful .", "wonderful .", "not bad .", "dull but clean .", "great and cheap .", "a mess ."]
    prompts = make_task("reviews").prompts["train"][:40]
    records = [
        Record(str(prompt), tuple(f" {words[(i + k) % 6]} <eos>" for k in range(3)), id=str(i))
        for i, prompt in enumerate(prompts)
    ]
    path = tmp_path_factory.mktemp("feedback") / "prefs.jsonl"
    write_records(path, Annotators(temperature=0.2).judge(score_records(records, "reviews")))
    return path


def config(feedback: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("reward", ["task=reviews", "reference_samples=16", "reward.batch_size=8", *overrides])
    cfg.preferences = str(feedback)
    return cfg


@pytest.fixture(scope="module")
def run(feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert begin_reward(config(feedback, "reward.held_out=0.25"), directory) == 0
    return directory


# --- what it writes


def test_a_run_holds_a_reward_model_and_what_is_known_of_it(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "versions.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoint",
        "reward",
        "summary.json",
        "predictions.jsonl",
        "reward.png",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["feedback"]["prompts"] == 40
    assert summary["feedback"]["held_out_prompts"] == 10
    accuracy = summary["held_out"]["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
    assert 0.5 < summary["gold"]["of_people"]["mean"] <= 1
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_predictions_are_the_scores_that_the_model_pays(run: Path) -> None:
    reward = load_reward_model(str(run / "reward"), "cpu")
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    gold = make_task("reviews").gold
    assert gold is not None
    for row in rows:
        texts = [row["prompt"]] * 3
        assert row["scores"] == pytest.approx(reward(texts, row["completions"]), abs=1e-4)
        assert row["gold"] == pytest.approx(list(gold(texts, row["completions"])), abs=1e-5)


def test_an_environment_pays_its_score(run: Path) -> None:
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, task="reviews", reward=str(run / "reward"))
    assert envs.unwrapped.engine.reward.reads_ids
    envs.close()


def test_the_card_says_what_it_is_and_how_good(run: Path) -> None:
    text = (run / "reward" / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    assert f"{100 * summary['held_out']['accuracy']['mean']:.1f} % [" in text
    assert "env.reward=DIRECTORY" in text
    header = text.split("---")[1]
    settings = text.split("```yaml")[1].split("```")[0]
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert yaml.safe_load(settings) == summary["reward"]


def test_a_model_of_ones_own_needs_no_task(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    own = tmp_path / "own.jsonl"
    write_records(own, toy_records(30))
    directory = tmp_path / "run"
    assert begin_reward(config(own, "task=null", f"model={tmp_path / 'sft'}", "reward.lr=0.01"), directory) == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["gold"] is None
    model = load_reward_model(str(directory / "reward"), "cpu")
    texts = [f"{record.prompt}{completion.text}" for record in read_records(own) for completion in record.completions]
    scores = score_texts(model.model, model.tokenizer, texts)
    assert scores.mean().item() == pytest.approx(0, abs=0.3)  # exactly 0 on those that were learned from


# --- going on


def stop_after(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """As if somebody had pressed Ctrl-C during an update."""
    stops: list[Any] = []

    class Stopping(reward_run.Interrupt):
        def __enter__(self) -> Any:
            stops.append(self)
            return super().__enter__()

    record = reward_run.Recorder.record

    def recorded(self: Any, step: int, metrics: Any) -> None:
        record(self, step, metrics)
        if step == update:
            stops[-1].asked = True

    monkeypatch.setattr(reward_run, "Interrupt", Stopping)
    monkeypatch.setattr(reward_run.Recorder, "record", recorded)


@pytest.fixture(scope="module")
def ensemble(feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "ensemble"
    assert begin_reward(config(feedback, *TWO_MEMBERS), directory) == 0
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("update", [4, 6])  # between the two members, and of the second
def test_a_run_that_is_stopped_goes_on_to_the_same_model(
    feedback: Path, ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, update)
        assert begin_reward(config(feedback, *TWO_MEMBERS), run) == 130
    assert not (run / "reward").exists()
    assert go_on_with_reward(run, [f"resume={run}"]) == 0
    texts = ["the soup was"] * 2, [" awful . <eos>", " wonderful ."]
    assert load_ensemble(run / "reward", "cpu")(*texts) == load_ensemble(ensemble / "reward", "cpu")(*texts)
    assert (run / "metrics.jsonl").read_text() == (ensemble / "metrics.jsonl").read_text()
    assert not (run / "members").exists()


def test_what_was_trained_is_kept_where_its_measuring_is_stopped(
    feedback: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tmp_path / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("agents.runs.reward_report.write_reward", stop)
        begin_reward(config(feedback, "reward.held_out=0.25"), stopped)
    with monkeypatch.context() as patch:
        patch.setattr("lmgym.reward_models.training.train_member", stop)
        assert go_on_with_reward(stopped, [f"resume={stopped}"]) == 0
    texts = ["the soup was"] * 2, [" awful . <eos>", " wonderful ."]
    found = load_reward_model(str(stopped / "reward"), "cpu")(*texts)
    assert found == load_reward_model(str(run / "reward"), "cpu")(*texts)


def test_a_run_that_has_ended_or_changed_does_not_go_on(run: Path, feedback: Path, tmp_path: Path) -> None:
    with pytest.raises(LmGymError, match="`resume` must be a run that has not ended, and"):
        go_on_with_reward(run, [f"resume={run}"])
    with pytest.raises(LmGymError, match="`reward.lr=3` must be left out with `resume`"):
        go_on_with_reward(run, [f"resume={run}", "reward.lr=3"])
    with pytest.raises(LmGymError, match="must be a directory without a run"):
        begin_reward(config(feedback), run)


def test_feedback_that_has_changed_is_noticed(feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "prefs.jsonl"
    shutil.copy(feedback, own)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert begin_reward(config(own), tmp_path / "run") == 130
    records = [replace(record, id=f"{record.id}x") for record in read_records(own)]
    own.unlink()
    write_records(own, records)
    with pytest.raises(LmGymError, match="`preferences`: the content of"):
        go_on_with_reward(tmp_path / "run", [f"resume={tmp_path / 'run'}"])


# --- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "`task` or `model` must be given"),
        ({"task": "revews"}, "Did you mean 'reviews'"),
        ({"preferences": None}, "`preferences` must be a file of feedback, and none is given"),
        ({"preferences": "none.jsonl"}, "there is none at 'none.jsonl'"),
        ({"model": "no/such/model"}, "`model` must be a local directory or a hub name"),
        ({"reward": {"epochs": 0}}, "`reward.epochs` must be an int >= 1"),
        ({"reward": {"epoch": 2}}, "Did you mean 'epochs'"),
        ({"reward": {"objective": "regression"}}, "kinds ratings, votes .* got 40 ranking"),
        ({"seed": -1}, "`seed`"),
        ({"reference_samples": 1.5}, "`reference_samples`"),
        ({"checkpoint_every": 0}, "`checkpoint_every`"),
        ({"device": 3}, "`device`"),
    ],
)
def test_what_cannot_be_is_refused(feedback: Path, changes: dict[str, Any], message: str) -> None:
    values = {
        "task": "reviews",
        "preferences": str(feedback),
        "model": None,
        "seed": 0,
        "reference_samples": 16,
        "checkpoint_every": None,
        "device": "cpu",
        "reward": {},
    }
    with pytest.raises(LmGymError, match=message):
        check_reward({**values, **changes})


def test_a_refusal_leaves_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from agents.reward import main; from agents.runs.command_line import run_command\n"
        "try: run_command(main, path_key='resume', groups=('task', 'reward'))\n"
        "finally: print('torch' in sys.modules)"
    )
    arguments = ["task=reviews", "preferences=none.jsonl", f"hydra.run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is none at 'none.jsonl'" in done.stderr
    assert done.stdout.strip() == "False"
    assert not (tmp_path / "run").exists()


# --- help


def test_the_help_page_has_every_key_and_every_choice() -> None:
    page = reward_help_page(CONF)
    for field in fields(RewardConfig):
        assert re.search(rf"^  {field.name}: ", page, re.MULTILINE), field.name
    for key in ("task", "preferences", "model", "seed", "device", "resume", "reference_samples", "checkpoint_every"):
        assert re.search(rf"^  {key}: ", page, re.MULTILINE), key
    for path in (CONF / "reward").glob("*.yaml"):
        assert re.search(rf"^  {path.stem}  +\w+", page, re.MULTILINE), path.stem


@pytest.mark.parametrize("path", sorted((CONF / "reward").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_is_a_config(path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("reward", [f"reward={path.stem}"])
    assert set(cfg.reward) == {field.name for field in fields(RewardConfig)}
    RewardConfig(**cfg.reward)


def test_names_of_other_libraries_lead_to_keys_that_there_are() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("reward")
    keys = {*map(str, cfg), *(f"reward.{key}" for key in cfg.reward)}
    assert set(SYNONYMS_OF_REWARDS.values()) <= keys
