"""The two commands end to end on the built-in task: what a run leaves, and that a break in it leaves no trace."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import hydra
import numpy as np
import pytest
import torch
from commands import run_command_here
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import agents.evaluate
import agents.runs.grading
import agents.runs.plan
import agents.runs.run
import agents.runs.signals
import agents.train
from agents.algorithms.reference import Reference
from agents.runs.command_line import run_command
from agents.runs.recorder import Recorder, read_rows
from agents.runs.report import table
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.evaluation import Evaluation
from lmgym.intervals import Interval
from lmgym.optimum import best_response, solve
from lmgym.tasks import make_task

pytestmark = pytest.mark.slow

_COIN = np.random.default_rng(0)


def coin(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A judge that contradicts itself."""
    return _COIN.standard_normal(len(prompts)).tolist()


ROOT = Path(__file__).parents[3]
SMALL = ["agent.batch_size=16", "evaluation.samples=16", "evaluation.prompts=8", "device=cpu", "seed=3"]
COST = ("/train_seconds", "/peak_memory_bytes")  # of a run, which another one need not have
QUICK = [*SMALL, "agent.epochs=1", "agent.minibatches=2", "agent.kl_controller=adaptive", "agent.kl_horizon=100"]


def plan_of(directory: Path, *overrides: str) -> agents.runs.plan.Plan:
    """A plan, its config left in the run directory as the command leaves it."""
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", overrides=list(overrides))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return agents.runs.plan.check(cfg)


def run(directory: Path, *overrides: str) -> int:
    """A new run, in this process."""
    return agents.runs.run.train(plan_of(directory, *overrides), directory, resume=False)


def resume(directory: Path) -> None:
    """`python -m agents.train resume=<directory>`, in this process."""
    agents.train.main(OmegaConf.create({"resume": str(directory)}))


def started(module: str, *overrides: str) -> subprocess.Popen[str]:
    """The real command, with as many threads as this process has: only then can numbers agree to the last bit."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", module, *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def curve(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run, those that a clock makes left out."""
    rows = read_rows(directory / "metrics.jsonl")
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]


def numbers(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping, by path."""
    if isinstance(tree, Mapping):
        return {p: x for name, part in tree.items() for p, x in numbers(part, f"{path}/{name}").items()}
    return {path: tree}


def summary_of(directory: Path, name: str = "summary.json") -> dict[str, Any]:
    return json.loads((directory / name).read_text())  # type: ignore[no-any-return]


class Finished(NamedTuple):
    directory: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A small run of the command."""
    directory = tmp_path_factory.mktemp("runs") / "small"
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        run_command_here("agents.train", *SMALL, "total_timesteps=1500", f"hydra.run.dir={directory}")
    return Finished(directory, stdout.getvalue(), stderr.getvalue())


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_its_config_and_versions(finished: Finished) -> None:
    cfg = OmegaConf.load(finished.directory / "config.yaml")
    assert (cfg.seed, cfg.total_timesteps, cfg.agent.batch_size, cfg.device) == (3, 1500, 16, "cpu")
    assert "${" not in (finished.directory / "config.yaml").read_text()
    versions = summary_of(finished.directory, "versions.json")
    assert versions["torch"] == torch.__version__
    assert versions.keys() == {"python", "lmgym", *agents.runs.run.PACKAGES}


def test_a_run_leaves_its_curves(finished: Finished) -> None:
    rows = read_rows(finished.directory / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-2] < 1500 <= steps[-1]  # the batch that reaches the budget is the last
    for name in ("rollout/return", "rollout/score", "rollout/gold_score", "rollout/kl", "rollout/exact_kl"):
        assert all(isinstance(row[name], float) for row in rows), name
    assert abs(rows[0]["rollout/kl"]) < 1e-4  # the first batch is of the reference
    assert rows[-1]["rollout/exact_kl"] > 0
    assert list((finished.directory / "tensorboard").glob("events.*"))
    assert (finished.directory / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_runs_checkpoint_is_a_hugging_face_model(finished: Finished) -> None:
    checkpoint = finished.directory / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plan = agents.runs.plan.check(agents.runs.plan.saved_config(finished.directory))
    agent = agents.runs.plan.build(plan)
    reference = {name: x.clone() for name, x in agent.policy.actor.state_dict().items()}
    agent.load(checkpoint)
    assert tokenizer.get_vocab() == agent.envs.tokenizer.get_vocab()
    loaded = agent.policy.actor.state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())
    assert any(not torch.equal(x, loaded[name]) for name, x in reference.items())
    assert agent.num_timesteps == summary_of(finished.directory)["total_timesteps"]
    text = tokenizer("the film was", return_tensors="pt")
    text.pop("token_type_ids", None)
    out = model.generate(**text, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(out[0]).startswith("the film was")


def test_a_run_leaves_its_result_and_prints_it(finished: Finished) -> None:
    summary = summary_of(finished.directory)
    for when in ("before", "after"):
        row = summary[when]
        assert row.keys() == {"return", "score", "gold_score", "kl", "length", "normalised"}
        for name in row:
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"], name
        paid = row["score"]["mean"] - 0.2 * row["kl"]["mean"]
        assert row["return"]["mean"] == pytest.approx(paid, abs=1e-5)
    assert abs(summary["before"]["kl"]["mean"]) < 1e-4
    assert summary["before"]["normalised"]["mean"] == 0
    scale = {name: summary["optimum"][name] for name in ("reference", "value", "unknown")}
    assert scale["unknown"] is None
    assert scale["reference"] == summary["before"]["return"]  # nothing is stored of eight prompts alone
    gain = scale["value"] - scale["reference"]["mean"]
    earned = summary["after"]["return"]["mean"] - scale["reference"]["mean"]
    assert summary["after"]["normalised"]["mean"] == pytest.approx(earned / gain)
    assert summary["optimum"]["lower"]["mean"] >= summary["after"]["return"]["mean"] - 1e-5
    assert (summary["agent"], summary["task"], summary["seed"]) == ("PPO", "reviews", 3)
    assert summary["total_timesteps"] == curve(finished.directory)[-1]["step"]
    assert summary["train_seconds"] > 0
    assert summary["peak_memory_bytes"] > 100 * 2**20  # Python and torch alone
    assert table(summary) in finished.stdout
    assert "Traceback" not in finished.stderr
    assert "Warning" not in finished.stderr


class Sampled(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.prompt_ids)


EOS = 1


def score_of(envs: Any, prompt_ids: list[int], completion_ids: list[int]) -> float:
    """What the task's reward says of token ids."""
    return envs.engine.reward([""], [""], prompt_ids=[prompt_ids], completion_ids=[completion_ids])[0]


def test_a_run_leaves_responses_before_and_after(finished: Finished) -> None:
    rows = summary_of(finished.directory, "samples.json")
    assert len(rows) == 8  # ten, or as many as there were prompts
    assert len({row["prompt"] for row in rows}) == 8
    for row in rows:
        assert row.keys() == {"prompt", "before", "before_score", "after", "after_score"}
        assert row["prompt"] in finished.stdout
    envs = gym.make_vec("lmgym/RLHF-v0", split="test")
    words = envs.engine.lm.encode
    for row in rows:  # the score is of the text beside it, with the EOS that the text does not show or without
        for when in ("before", "after"):
            scores = [score_of(envs, words(row["prompt"]), words(row[when]) + end) for end in ([], [EOS])]
            assert any(row[f"{when}_score"] == pytest.approx(x, abs=1e-4) for x in scores)


def test_responses_that_training_changed_are_shown_first() -> None:
    def graded(responses: list[int]) -> Any:
        ids = torch.tensor([[1], [2], [3], [4]])
        mask = torch.ones(4, 1, dtype=torch.bool)
        parts = {"prompt_index": torch.arange(4), "prompt_ids": ids, "prompt_mask": mask, "response_mask": mask}
        response_ids = torch.tensor(responses)[:, None]
        return SimpleNamespace(episodes=Sampled(**parts, response_ids=response_ids, scores=torch.zeros(4)))

    lm = SimpleNamespace(decode_prompt=lambda ids: f"p{ids[0]}", completions=lambda p, r: [f"r{r[0][0]}"])
    rows = agents.runs.grading.samples(lm, graded([1, 2, 3, 4]), graded([1, 2, 9, 4]), count=2)
    assert [(row["prompt"], row["before"], row["after"]) for row in rows] == [("p1", "r1", "r1"), ("p3", "r3", "r9")]


def test_evaluate_finds_the_same_numbers_again(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    agents.evaluate.main(OmegaConf.create({"run": str(finished.directory), "evaluation": {"samples": None}}))
    recorded, again = (numbers(summary_of(finished.directory, f"{n}.json")) for n in ("summary", "evaluation"))
    assert recorded.keys() == again.keys()
    for path, x in recorded.items():
        assert again[path] == (pytest.approx(x, abs=1e-6) if isinstance(x, float) else x), path
    assert table(summary_of(finished.directory)) in capsys.readouterr().out


def test_a_run_is_graded_whatever_its_directory_is_called(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "a=1, b $x 'y' \"z\" {c} ${d} ü"
    shutil.copytree(finished.directory, directory)
    monkeypatch.setattr(sys, "argv", ["agents.evaluate", f"run={directory}", "evaluation.samples=2"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    run_command(agents.evaluate.main)
    assert "recorded when it was trained" in capsys.readouterr().out
    assert (directory / "evaluation.json").is_file()


def test_a_finished_run_that_is_resumed_only_grades_itself_again(finished: Finished) -> None:
    recorded = numbers(summary_of(finished.directory))
    rows = curve(finished.directory)
    resume(finished.directory)
    again = numbers(summary_of(finished.directory))
    for cost in COST:
        assert again.pop(cost) >= recorded.pop(cost)
    assert again == pytest.approx(recorded, abs=1e-6)
    assert curve(finished.directory) == rows


# -- breaks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert run(directory, *QUICK, "total_timesteps=4000") == 0
    return directory


def assert_same_run(directory: Path, whole: Path) -> None:
    assert curve(directory) == curve(whole)  # to the last bit
    mine = numbers(summary_of(directory))
    theirs = numbers(summary_of(whole))
    assert {n: x for n, x in mine.items() if n not in COST} == {n: x for n, x in theirs.items() if n not in COST}


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_run_goes_on(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = started("agents.train", *QUICK, "total_timesteps=4000", f"hydra.run.dir={directory}")
    metrics = directory / "metrics.jsonl"
    try:
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"resume={directory}" in stdout
    assert not (directory / "summary.json").exists()
    begun = curve(directory)
    assert 2 <= len(begun) < len(curve(whole))
    assert begun == curve(whole)[: len(begun)]
    AutoModelForCausalLM.from_pretrained(directory / "checkpoint")
    state = summary_of(directory / "checkpoint", "state.json")
    assert state["num_timesteps"] == begun[-1]["step"]  # of the batch that was in hand, whole
    resume(directory)
    assert_same_run(directory, whole)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Recorder.record
    calls = 0

    def power_cut(self: Recorder, step: int, metrics: Mapping[str, float]) -> None:
        nonlocal calls
        record(self, step, metrics)
        calls += 1
        if calls == 6:
            raise OSError("the power went")

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "record", power_cut)
        with pytest.raises(OSError, match="the power went"):
            run(tmp_path, *QUICK, "total_timesteps=4000", "checkpoint_every=600")
    after = len(curve(tmp_path))
    assert summary_of(tmp_path / "checkpoint", "state.json")["num_timesteps"] < curve(tmp_path)[-1]["step"]
    resume(tmp_path)
    assert after == 6
    assert_same_run(tmp_path, whole)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which a shell takes away from what it runs in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_stops_at_once() -> None:
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), agents.runs.signals.Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is previous


# -- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["agent.collect=steps", "agent.batch_size=8"],
        ["env.kl_coef=0"],
        ["env.gamma=0.9", "sampler.temperature=0.7", "agent.critic=reward_model"],
    ],
    ids=" ".join,
)
def test_variants_train_and_report(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *SMALL, "agent.epochs=1", "evaluation.prompts=4", "total_timesteps=250", *overrides) == 0
    summary = summary_of(tmp_path)
    text = capsys.readouterr().out
    plain = "env.kl_coef=0" not in overrides and "env.gamma=0.9" not in overrides
    assert (summary["optimum"]["lower"] is not None) == plain  # no bound where there is no KL, or a discount
    assert ("kl" in summary["after"]) == ("env.kl_coef=0" not in overrides)
    assert bool(re.search(r"V\* >= ", text)) == plain
    assert len(summary_of(tmp_path, "samples.json")) == 4


# -- the command -----------------------------------------------------------------------------------------------------


def composed(*overrides: str) -> Any:
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def test_a_config_that_cannot_be_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()  # by Hydra
    with pytest.raises(LmGymError, match="`temperature` must be"):
        agents.runs.run.begin(composed("env.temperature=0"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_takes_a_new_total_and_no_other_numbers() -> None:
    values = agents.runs.plan.plain(composed("agent.lr=1e-4"))
    overrides = ["resume=run", "total_timesteps=300000", "evaluation.samples=2"]
    changed = agents.runs.run.with_overrides(values, overrides)
    agents.runs.plan.check(changed)
    assert (changed["total_timesteps"], changed["evaluation"]["samples"]) == (300000, 2)
    assert changed["agent"] == values["agent"]
    assert (values["total_timesteps"], values["evaluation"]["samples"]) == (150000, None)
    with pytest.raises(InvalidArgumentError, match="`agent.lr` must be as it was when the run began"):
        agents.runs.run.with_overrides(values, ["agent.lr=1e-3"])


def test_the_optimum_is_of_the_prompts_graded() -> None:
    task = ["task=keyword-8", "env.kl_coef=0.2"]
    plan = agents.runs.plan.check(composed(*task, "evaluation.prompts=3"))
    values = solve("keyword-8", kl_coef=0.2).values
    scale = agents.runs.grading.find_scale(plan, None, None)
    assert scale.lower is not None
    assert scale.lower == scale.upper
    assert scale.lower.mean == pytest.approx(values[:3].mean().item(), abs=1e-6)
    assert abs(scale.lower.mean - values.mean().item()) > 1e-3
    assert scale.optimum is not None
    assert scale.optimum.exact


def test_runs_of_other_seeds_are_graded_from_other_streams() -> None:
    plans = [
        agents.runs.plan.check(composed("task=stop", f"seed={seed}", "evaluation.samples=8")) for seed in (0, 0, 1)
    ]
    agent = Reference(gym.make_vec("lmgym/RLHF-v0", **plans[0].settings))  # type: ignore[arg-type]
    first, again, other = (agents.runs.grading.grade(plan, agent).episodes.response_ids for plan in plans)
    assert torch.equal(first, again)  # before and after of one run share their numbers
    assert not torch.equal(first, other)


def test_j_ref_is_the_stored_one_wherever_there_is_one() -> None:
    """A draw of it would be the error of every agent's share at once."""
    metric = {"return": Interval(0.5, 0.4, 0.6)}
    graded = Evaluation(metric, Interval(0.9, 0.8, 1.0), episodes=None)  # type: ignore[arg-type]
    for name in ("noise-1", "reviews", "anchor-0.1"):
        plan = agents.runs.plan.check(composed(f"task={name}"))
        stored = make_task(name).optima["test"]
        reference = agents.runs.grading.find_scale(plan, graded, graded).reference
        assert reference.mean == stored.reference
        assert reference.high - reference.mean == pytest.approx(stored.reference_half_width)
    plan = agents.runs.plan.check(composed("task=reviews", "evaluation.prompts=3"))  # of these nothing is stored
    scale = agents.runs.grading.find_scale(plan, graded, graded)
    assert scale.reference == metric["return"]
    assert scale.optimum is not None
    assert scale.optimum.reference_half_width == pytest.approx(0.1)


def test_a_run_whose_reward_is_noise_claims_no_optimum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As written by a user: no `expected`, and the noise of a generator of its own."""
    small = [*SMALL, "agent.epochs=1", "evaluation.prompts=4", "total_timesteps=250"]
    assert run(tmp_path, *small, f"env.reward={__name__}:coin") == 0
    summary = summary_of(tmp_path)
    text = capsys.readouterr().out
    assert summary["optimum"]["lower"] is None
    assert summary["after"]["normalised"] is None
    assert "two scores" in summary["optimum"]["unknown"]
    assert f"V* is not known: {summary['optimum']['unknown']}" in text


def test_a_deterministic_policy_is_told_what_it_can_earn() -> None:
    task = ["task=keyword-8", "evaluation.prompts=3"]
    greedy, sampled = (agents.runs.plan.check(composed(*task, f"sampler={name}")) for name in ("greedy", "policy"))
    learns = SimpleNamespace(deterministic=False)
    certain = SimpleNamespace(deterministic=True)
    best = best_response("keyword-8")[:3].mean().item()
    assert agents.runs.grading.find_best_response(sampled, learns) is None
    others = (agents.runs.plan.check(composed(*task, x)) for x in ("sampler.top_k=1", "sampler.greedy_tokens=8"))
    for plan, agent in ((greedy, learns), (sampled, certain), *((plan, learns) for plan in others)):
        assert agents.runs.grading.find_best_response(plan, agent) == pytest.approx(best, abs=1e-9)
    reviews = agents.runs.plan.check(composed("sampler=greedy"))
    assert agents.runs.grading.find_best_response(reviews, learns) is None
