"""`python -m builders.build`: a small build of each task, end to end."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import builders.build
from agents.runs.command_line import run_command
from builders.build import build
from builders.completions import gold_scores, join_texts, sample_completions, sample_tokens
from builders.language_model import perplexity
from builders.reward_models import draw_training_prompts
from builders.settings import ARTEFACTS, check_settings
from lmgym.errors import LmGymError
from lmgym.feedback.annotators import true_ranking
from lmgym.models.causal import CausalLM
from lmgym.reward_models.scorer import score_texts
from lmgym.rewards.ranking import ranking_accuracy
from lmgym.tasks import reviews

ROOT = Path(__file__).parents[2]
SHIPPED = {
    "reference": "55e5a0ea3799dc5ac85006008a3c784e97859f781845cdbbc5da49018610f6f2",
    "reward": "8116b99c5f8f55e5db151cae12497700fb8b063837e2d8189f523d066e527b13",
}
SMALL = {
    "progress": False,
    "threads": 1,
    "reference": {"reviews": 3000, "held_out": 200, "width": 32, "epochs": 2, "batch_size": 32, "learning_rate": 1e-2},
    "reward": {
        "prompts": 300,
        "ranked": 4,
        "temperature": 0.2,
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 4e-3,
        "samples": 4,
    },
}


def settings(changes: Any = None, task: str = "reviews", **more: Any) -> dict[str, Any]:
    files = [OmegaConf.load(ROOT / "conf/build_task" / name) for name in ("build.yaml", f"task/{task}.yaml")]
    config = OmegaConf.merge(*files, changes or {}, more)
    for name in ("defaults", "hydra"):
        del config[name]
    return OmegaConf.to_container(config)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = torch.get_rng_state()
    output = build(settings(SMALL, output=str(tmp_path_factory.mktemp("build") / "reviews")))
    assert torch.equal(torch.get_rng_state(), state)
    return output


def figures(artefacts: Path) -> dict[str, float]:
    """The numbers of the card's table by the words beside them."""
    rows = re.findall(
        r"^\| ([^|]+?) \| (-?[\d.]+)", (artefacts / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: float(value) for name, value in rows}


# --- the artefacts


@pytest.mark.slow
def test_the_artefacts_are_complete_hugging_face_directories(artefacts: Path) -> None:
    assert sorted(entry.name for entry in artefacts.iterdir()) == ["README.md", "reference", "reward"]
    assert [entry.name for entry in artefacts.parent.iterdir()] == ["reviews"]  # nothing unfinished is left
    for name in ("reference", "reward"):
        files = {file.name for file in (artefacts / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
        assert not any(file.suffix in (".bin", ".pt", ".pkl", ".py") for file in (artefacts / name).iterdir())


@pytest.mark.slow
def test_the_tokenizer_has_one_token_a_word_and_round_trips(artefacts: Path) -> None:
    for name in ("reference", "reward"):
        tokenizer = AutoTokenizer.from_pretrained(artefacts / name)
        assert len(tokenizer) == len(reviews.words()) + 3
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        for text in [
            *reviews.corpus(0, 200),
            *reviews.prompts("train"),
            *reviews.prompts("test"),
            "the soup , . <eos>",
        ]:
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        assert tokenizer("zzz")["input_ids"] == [2]
        assert tokenizer.decode([1, 0, 2], skip_special_tokens=True) == ""


@pytest.mark.slow
def test_the_reference_learned_the_grammar(artefacts: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artefacts / "reference")
    tokenizer = AutoTokenizer.from_pretrained(artefacts / "reference")
    assert model.config.n_positions >= reviews.MAX_PROMPT_TOKENS + reviews.MAX_NEW_TOKENS
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 1)
    assert {model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop} == {0.0}
    sequences = tokenizer([f"{text} <eos>" for text in reviews.corpus(99, 300)])["input_ids"]
    found = perplexity(model, sequences)
    assert found < 15 < len(tokenizer)
    figure = figures(artefacts)
    assert figure["perplexity on held-out reviews"] == pytest.approx(found, rel=0.1)
    assert figure["perplexity before training"] > 100
    assert 2 < figure["perplexity of the grammar itself"] < figure["perplexity on held-out reviews"]


@pytest.mark.slow
def test_the_reward_model_ranks_better_than_chance_and_is_normalised(artefacts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artefacts / "reward")
    reference = AutoModelForCausalLM.from_pretrained(artefacts / "reference")
    model = AutoModelForSequenceClassification.from_pretrained(artefacts / "reward")
    prompts = list(reviews.prompts("test"))
    completions = sample_completions(CausalLM(reference, tokenizer), prompts, 4, torch.Generator().manual_seed(3))
    scores = score_texts(model, tokenizer, join_texts(prompts, completions))
    truth = torch.from_numpy(true_ranking(gold_scores(prompts, completions)))
    accuracy = ranking_accuracy(scores.view(256, 4), truth)
    assert accuracy > 0.56  # 1536 pairs: chance is 0.5 with a standard error of about 0.02
    assert figures(artefacts)["ranking accuracy on test prompts"] == pytest.approx(accuracy, abs=0.08)
    assert scores.mean().item() == pytest.approx(0, abs=0.2)
    assert scores.std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_the_card_says_what_was_built_and_how(artefacts: Path) -> None:
    text = (artefacts / "README.md").read_text(encoding="utf-8")
    assert "python -m builders.build task=reviews" in text
    assert "seed: 1" in text
    assert {
        "parameters of the reference",
        "correlation with gold",
        "score mean",
        "score standard deviation",
        "gold mean",
    } <= set(figures(artefacts))
    assert not re.search(r"\bnan\b|\binf\b|np\.float|\{|\}", text)


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured on all prompts takes longer than a tiny build, and is not what a test of its files is about."""
    few = {split: reviews.prompts(split)[:48] for split in ("train", "test")}
    monkeypatch.setattr(reviews, "prompts", few.__getitem__)


@pytest.mark.slow
@pytest.mark.usefixtures("few_prompts")
def test_an_equal_build_gives_equal_weights_and_replaces_an_older_one(tmp_path: Path) -> None:
    tiny = {"reference": {"reviews": 64, "epochs": 1}, "reward": {"prompts": 16, "epochs": 1, "samples": 2}}
    weights = []
    for name, seed in (("a", 1), ("b", 2), ("b", 1)):
        output = build(settings(OmegaConf.merge(SMALL, tiny), output=str(tmp_path / name), seed=seed))
        weights.append([(output / part / "model.safetensors").read_bytes() for part in ("reference", "reward")])
        assert {path.name for path in output.iterdir()} == {"README.md", "reference", "reward"}
        (output / "stale.txt").write_text("gone when this is built again")
    first, other, again = weights
    assert first == again
    assert not set(first) & set(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
def test_a_directory_that_is_not_a_build_of_the_task_is_left_alone(artefacts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    check_settings(settings(output=str(artefacts)))
    for task, output in (("reviews", tmp_path), ("arithmetic", artefacts), ("proxy", artefacts)):
        with pytest.raises(LmGymError, match="`output` must be a new directory or one that was built before, got"):
            check_settings(settings(task=task, output=str(output)))


def test_the_shipped_artefacts_are_those_of_the_grammar() -> None:
    shipped = ARTEFACTS / "reviews"
    for name, digest in SHIPPED.items():  # version 0 of the task, for good
        assert hashlib.sha256((shipped / name / "model.safetensors").read_bytes()).hexdigest() == digest
    for name in ("reference", "reward"):
        vocabulary = AutoTokenizer.from_pretrained(shipped / name).get_vocab()
        assert sorted(vocabulary, key=vocabulary.__getitem__)[3:] == reviews.words()
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 6_000_000
    figure = figures(shipped)
    assert figure["ranking accuracy on test prompts"] > 0.8
    assert figure["correlation with gold"] > 0.85
    ratio = figure["perplexity on held-out reviews"] / figure["perplexity of the grammar itself"]
    assert 0.99 < ratio < 1.05


# --- arithmetic and proxies: the shipped ones are tested with their tasks

FEW_SUMS = {"reference": {"digits": [1], "epochs": [3], "batch_size": [20], "width": 16, "samples": 8}}
FEW_RANKINGS: dict[str, Any] = {"reward": {"prompts": [8, 16], "epochs": 1, "samples": 2}}


REVERSED = {"reward": {**FEW_RANKINGS["reward"], "prompts": [16, 8]}}


@pytest.mark.slow
@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize(
    ("task", "builds", "models"),
    [
        ("arithmetic", [("a", 1, FEW_SUMS), ("b", 2, FEW_SUMS), ("b", 1, FEW_SUMS)], ["reference-1"]),
        ("proxy", [("a", 1, FEW_RANKINGS), ("b", 1, REVERSED)], ["reward-16", "reward-8"]),
    ],
)
def test_equal_builds_of_a_task_give_equal_weights(
    task: str, builds: list[tuple[str, int, dict[str, Any]]], models: list[str], tmp_path: Path
) -> None:
    """A proxy does not even depend on those built before it."""
    state = torch.get_rng_state()
    weights = []
    for name, seed, values in builds:
        output = build(settings(values, task=task, output=str(tmp_path / name), seed=seed, progress=False))
        weights.append([(output / model / "model.safetensors").read_bytes() for model in models])
        assert sorted(path.name for path in output.iterdir()) == ["README.md", *models]
    assert torch.equal(torch.get_rng_state(), state)
    assert weights[0] == weights[-1]
    assert len({file for each in weights for file in each}) == len({seed for _, seed, _ in builds}) * len(models)
    text = (output / "README.md").read_text(encoding="utf-8")
    assert f"python -m builders.build task={task}" in text
    assert all(f"`{model}`" in text for model in models)
    assert not re.search(r"\bnan\b|\binf\b|np\.float|\{|\}", text)


@pytest.mark.parametrize(
    ("task", "section", "changes", "message"),
    [
        ("arithmetic", "reference", {"digits": [1, 3]}, "`reference.digits` must be of [1, 2], got [1, 3]."),
        ("arithmetic", "reference", {"digits": 1}, "`reference.digits` must be a list with one value a model, got 1."),
        ("arithmetic", "reference", {"epochs": [5]}, "`reference.epochs` must have one value for each of"),
        ("arithmetic", "reference", {"heads": 5}, "`reference.heads` must divide `reference.width` (48), got 5."),
        ("arithmetic", "reference", {"positions": 9}, "`reference.positions` must be an int >= 10, got 9."),
        ("arithmetic", "reference", {"batch_size": [8, 0]}, "`reference.batch_size` must be an int >= 1, got 0."),
        ("proxy", "reward", {"prompts": []}, "`reward.prompts` must be a list with one value a model, got []."),
        ("proxy", "reward", {"prompts": [25, 0]}, "`reward.prompts` must be an int >= 1, got 0."),
        ("proxy", "reward", {"ranked": 1}, "`reward.ranked` must be an int >= 2, got 1."),
        ("proxy", "reward", {"temperature": 0}, "`reward.temperature` must be a finite number > 0, got 0."),
    ],
)
def test_a_wrong_setting_of_any_task_is_named(
    task: str, section: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    check_settings(settings(task=task, output=str(tmp_path / "x")))
    with pytest.raises(LmGymError, match=re.escape(message)):
        check_settings(settings({section: changes}, task=task, output=str(tmp_path / "x")))


# --- the command


def command(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builders.build", *overrides], cwd=ROOT, capture_output=True, text=True
    )


def refuse_here(*overrides: str) -> str:
    """What the command ends with in this process, where Python and Hydra are not loaded anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["builders.build", *overrides])
        patched.setenv("HYDRA_MAIN_MODULE", "__main__")  # so that it looks for the configs as from `python -m`
        try:
            with pytest.raises(SystemExit) as error:
                run_command(builders.build.main, configs=ROOT / "conf" / "build_task")
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
    return str(error.value.code)


def test_a_wrong_setting_ends_the_process_in_a_line(tmp_path: Path) -> None:
    result = command("task=revews", f"output={tmp_path / 'x'}")
    assert result.returncode != 0
    assert "got 'revews'. Did you mean 'reviews'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.ranked=1", "`reward.ranked` must be an int >= 2, got 1."),
        ("reference.learning_rate=abc", "`reference.learning_rate` must be a finite number > 0, got 'abc'."),
        ("reference.positions=16", "`reference.positions` must be an int >= 32, got 16."),
        ("reference.heads=5", "`reference.heads` must divide `reference.width` (96), got 5."),
        ("reward.temprature=1", "Did you mean 'temperature'?"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_built(override: str, message: str, tmp_path: Path) -> None:
    assert message in refuse_here(override, f"output={tmp_path / 'x'}")
    assert not list(tmp_path.iterdir())


def test_a_wrong_task_lists_the_choices_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from builders.settings import check_settings\n"
        "try: check_settings({'task': 'revews', 'seed': 1})\n"
        "except ValueError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "`task` must be one of ['arithmetic', 'proxy', 'reviews'], got 'revews'. Did you mean 'reviews'?",
        "[]",
    ]


# --- sampling


@pytest.mark.slow
def test_sampling_follows_the_model(artefacts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artefacts / "reference")
    model = AutoModelForCausalLM.from_pretrained(artefacts / "reference").eval()
    prompt = tokenizer("the film was")["input_ids"]
    size = 20_000
    generator = torch.Generator().manual_seed(0)
    responses = sample_tokens(CausalLM(model, tokenizer), [prompt] * size, 2, generator)
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        first = int(probabilities.argmax())
        next_probabilities = model(torch.tensor([[*prompt, first]])).logits[0, -1].softmax(-1)
    for expected, drawn in (
        (probabilities, [response[0] for response in responses]),
        (next_probabilities, [response[1] for response in responses if response[0] == first]),
    ):
        counts = np.bincount(drawn, minlength=len(tokenizer))
        probable = expected.numpy() * len(drawn) > 20
        error = np.sqrt(expected.numpy() / len(drawn))
        assert (np.abs(counts / len(drawn) - expected.numpy()) < 4.5 * error)[probable].all()


@pytest.mark.slow
def test_completions_end_with_eos_or_at_the_limit_and_belong_to_their_prompt(artefacts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artefacts / "reference")
    model = AutoModelForCausalLM.from_pretrained(artefacts / "reference")
    prompts = ["the film was", "in short , the soup was", "the bed was", "we"]
    generator = torch.Generator().manual_seed(0)
    completions = sample_completions(CausalLM(model, tokenizer), prompts, 50, generator, batch_size=16)
    assert [len(texts) for texts in completions] == [50] * 4
    for texts in completions:
        for text in texts:
            assert text.startswith(" ")
            words = text.split()
            assert "<eos>" not in words[:-1]
            assert words[-1] == "<eos>" or len(words) == reviews.MAX_NEW_TOKENS


def test_the_reward_model_learns_from_no_test_prompt() -> None:
    prompts = draw_training_prompts(np.random.default_rng(0), 3000)
    assert len(prompts) == 3000
    assert not set(prompts) & set(reviews.prompts("test"))
