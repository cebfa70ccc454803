"""Builds the artefacts of a built-in task: `python -m agents.build task=reviews`.

Four steps, as in InstructGPT: supervised training on a corpus, completions sampled and ranked, a reward model learned
from the rankings, and a card with what was measured. The settings are those of `conf/build_task/build.yaml`.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf

from lmgym.errors import InvalidArgumentError, LmGymError, check_bool, check_choice, check_int, check_number
from lmgym.tasks import reviews

# torch and transformers are imported where they are used, so that a wrong setting is reported at once.

TASKS = ("reviews",)
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ARTEFACTS = Path(reviews.__file__).parent / "artefacts"
CARD = Path(__file__).parents[1] / "conf" / "build_task" / "card.md"
_POSITIVE_INTS = {
    "": ("threads",),
    "reference": ("reviews", "held_out", "width", "layers", "heads", "epochs", "batch_size"),
    "reward": ("prompts", "epochs", "batch_size"),
}


@hydra.main(version_base="1.3", config_path="../conf/build_task", config_name="build")
def main(config: DictConfig) -> None:
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    try:
        check_settings(settings)
    except LmGymError as error:
        raise SystemExit(str(error)) from None
    import torch

    torch.set_num_threads(settings["threads"])
    output = build(settings)
    print((output / "README.md").read_text(encoding="utf-8"))
    print(f"Written to {output}")


def check_settings(settings: dict[str, Any]) -> None:
    """Raises `LmGymError` at the first setting that cannot work, before anything heavy is imported."""
    check_choice("task", settings["task"], TASKS)
    check_int("seed", settings["seed"], 0)
    check_bool("progress", settings["progress"])
    output = output_directory(settings)
    if output.exists() and not (output / "reward" / "config.json").is_file():  # it will be replaced as a whole
        raise InvalidArgumentError(
            f"`output` must be a new directory or one that was built before, got {str(output)!r}."
        )
    for section, names in _POSITIVE_INTS.items():
        values = settings[section] if section else settings
        for name in names:
            check_int(f"{section}.{name}".lstrip("."), values[name], 1)
    reference, reward = settings["reference"], settings["reward"]
    check_int("reference.positions", reference["positions"], reviews.MAX_PROMPT_TOKENS + reviews.MAX_NEW_TOKENS)
    if reference["width"] % reference["heads"]:
        raise InvalidArgumentError(
            f"`reference.heads` must divide `reference.width` ({reference['width']}), got {reference['heads']}."
        )
    check_int("reward.ranked", reward["ranked"], 2)
    check_int("reward.samples", reward["samples"], 2)
    check_number("reward.temperature", reward["temperature"], 0, open_low=True)
    for section in ("reference", "reward"):
        check_number(f"{section}.learning_rate", settings[section]["learning_rate"], 0, open_low=True)


def build(settings: dict[str, Any]) -> Path:
    """Builds the artefacts of a task and returns the directory they are in."""
    started = time.monotonic()
    output = output_directory(settings)
    tokenizer = word_tokenizer(reviews.words(), settings["reference"]["positions"])
    reference, language = build_reference(settings, tokenizer)
    reward_model, preference = build_reward_model(settings, tokenizer, reference)
    facts = {**language, **preference, "seconds": time.monotonic() - started}

    unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    for name, model in (("reference", reference), ("reward", reward_model)):
        model.save_pretrained(unfinished / name)
        tokenizer.save_pretrained(unfinished / name)
    for file in unfinished.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    megabytes = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file()) / 1e6
    (unfinished / "README.md").write_text(card(settings, {**facts, "megabytes": megabytes}), encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    unfinished.rename(output)
    return output


def output_directory(settings: dict[str, Any]) -> Path:
    """Where the artefacts go."""
    return Path(settings["output"] or ARTEFACTS / settings["task"]).absolute()


def word_tokenizer(words: Sequence[str], max_length: int) -> Any:
    """A tokenizer with one token a word: text is split at white space and joined by single spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: token for token, word in enumerate([PAD, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def build_reference(settings: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, float]]:
    """Trains a small GPT-2 on reviews; returns it with what was measured."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from agents.sft import perplexity, train_sft

    shape = settings["reference"]
    corpus_seed, held_out_seed, torch_seed = streams(settings["seed"], "reference")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=shape["width"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_positions=shape["positions"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        model = GPT2LMHeadModel(config)
    texts = reviews.corpus(corpus_seed, shape["reviews"])
    rng = np.random.default_rng(held_out_seed)
    held_out = [reviews.derive(rng) for _ in range(shape["held_out"])]
    sequences = tokenizer([f"{text} {EOS}" for text in texts])["input_ids"]
    unseen = tokenizer([" ".join([*words, EOS]) for words, _ in held_out])["input_ids"]
    untrained = perplexity(model, unseen)
    train_sft(
        model,
        sequences,
        epochs=shape["epochs"],
        learning_rate=shape["learning_rate"],
        batch_size=shape["batch_size"],
        generator=torch.Generator().manual_seed(torch_seed),
        progress=settings["progress"],
    )
    return model, {
        "reference_parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "untrained_perplexity": untrained,
        "perplexity": perplexity(model, unseen),
        "grammar_perplexity": grammar_perplexity(texts, held_out),
    }


def grammar_perplexity(texts: Sequence[str], held_out: Sequence[tuple[list[str], float]]) -> float:
    """Perplexity of held-out reviews under the grammar itself: the least that any model can reach.

    The first word of a review is not counted, as no model is asked for it; its surprise is read off the corpus.
    """
    first_words = [text.split(" ", 1)[0] for text in texts]
    surprise = {word: -math.log(first_words.count(word) / len(first_words)) for word in set(first_words)}
    nats = sum(nats - surprise.get(words[0], 0.0) for words, nats in held_out)
    return math.exp(nats / sum(len(words) for words, _ in held_out))  # EOS takes the place of the first word


def build_reward_model(settings: dict[str, Any], tokenizer: Any, reference: Any) -> tuple[Any, dict[str, float]]:
    """Learns a reward model from rankings of the reference's completions; returns it with what was measured."""
    import torch
    from tqdm import tqdm

    from lmgym.feedback.annotators import plackett_luce_ranking
    from lmgym.feedback.preferences import Rankings
    from lmgym.rewards.ranking import (
        normalise,
        ranking_accuracy,
        reward_model_from,
        score_texts,
        train_reward_model,
    )

    chosen = settings["reward"]
    prompt_seed, annotator_seed, torch_seed = streams(settings["seed"], "reward")
    generator = torch.Generator().manual_seed(torch_seed)
    prompts = training_prompts(np.random.default_rng(prompt_seed), chosen["prompts"])
    completions = sample_completions(reference, tokenizer, prompts, chosen["ranked"], generator)
    gold = gold_scores(prompts, completions)
    ranking = plackett_luce_ranking(gold, chosen["temperature"], np.random.default_rng(annotator_seed))
    rankings = Rankings(prompts, completions, ranking.tolist())
    model = reward_model_from(reference, generator)
    updates = chosen["epochs"] * math.ceil(chosen["prompts"] / chosen["batch_size"])
    hidden = None if settings["progress"] else True  # None: hidden unless on a terminal
    with tqdm(total=updates, unit="update", desc="reward", disable=hidden) as bar:

        def progress(metrics: dict[str, float]) -> None:
            bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()}, refresh=False)
            bar.update()

        trained = train_reward_model(
            model,
            tokenizer,
            rankings,
            epochs=chosen["epochs"],
            learning_rate=chosen["learning_rate"],
            batch_size=chosen["batch_size"],
            generator=generator,
            progress=progress,
        )
    start = list(reviews.prompts("train"))
    samples = sample_completions(reference, tokenizer, start, chosen["samples"], generator)
    scores = score_texts(model, tokenizer, joined(start, samples)).double()
    normalise(model, float(scores.mean()), float(scores.std()))
    measured = measure(model, tokenizer, reference, chosen["samples"], generator)
    return model, {
        "reward_parameters": model.num_parameters(),
        "training_accuracy": trained["accuracy"],
        "annotator_accuracy": ranking_accuracy(torch.from_numpy(gold), torch.from_numpy(ranking)),
        **measured,
    }


def measure(model: Any, tokenizer: Any, reference: Any, samples: int, generator: Any) -> dict[str, float]:
    """Compares the reward model with the gold score on completions of the test prompts."""
    import torch

    from lmgym.feedback.annotators import true_ranking
    from lmgym.rewards.ranking import ranking_accuracy, score_texts

    prompts = list(reviews.prompts("test"))
    completions = sample_completions(reference, tokenizer, prompts, samples, generator)
    gold = gold_scores(prompts, completions)
    scores = score_texts(model, tokenizer, joined(prompts, completions)).view(len(prompts), samples)
    learned = scores.double().numpy()
    lengths = [len(text.split()) for texts in completions for text in texts]
    ended = [text.endswith(EOS) for texts in completions for text in texts]
    best = learned.argmax(1)[:, None]
    return {
        "accuracy": ranking_accuracy(scores, torch.from_numpy(true_ranking(gold))),
        "correlation": float(np.corrcoef(learned.ravel(), gold.ravel())[0, 1]),
        "score_mean": learned.mean(),
        "score_std": learned.std(),
        "gold_mean": gold.mean(),
        "gold_std": gold.std(),
        "gold_std_of_a_prompt": gold.std(axis=1).mean(),
        "best_gold": np.take_along_axis(gold, best, axis=1).mean(),
        "length": float(np.mean(lengths)),
        "ended": float(np.mean(ended)),
    }


def training_prompts(rng: np.random.Generator, size: int) -> list[str]:
    """Fresh prompts of the grammar, none of them a test prompt."""
    held_out = set(reviews.prompts("test"))
    prompts: list[str] = []
    while len(prompts) < size:
        prompt = reviews.sample_prompt(rng)
        if prompt not in held_out:
            prompts.append(prompt)
    return prompts


def sample_completions(
    model: Any, tokenizer: Any, prompts: Sequence[str], num: int, generator: Any, batch_size: int = 512
) -> list[list[str]]:
    """Samples `num` completions a prompt at temperature 1, from the whole vocabulary.

    Returns:
        (B, num) texts with a leading space, EOS included where the model chose it.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    rows = [row for row in range(len(prompts)) for _ in range(num)]
    completions: list[list[str]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in ids}):  # prompts of one length need no padding
        alike = [row for row in rows if len(ids[row]) == length]
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            responses = sample_tokens(model, [ids[row] for row in batch], reviews.MAX_NEW_TOKENS, generator)
            for row, text in zip(batch, tokenizer.batch_decode(responses), strict=True):
                completions[row].append(f" {text}")
    return completions


def sample_tokens(model: Any, prompts: list[list[int]], max_new_tokens: int, generator: Any) -> list[list[int]]:
    """Samples one response for each of B prompts of equal length; a response ends with EOS or at `max_new_tokens`."""
    import torch

    eos = model.config.eos_token_id
    cache, inputs, chosen = None, torch.tensor(prompts), []
    seen = torch.ones_like(inputs)  # no padding: every token before is seen
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            out = model(input_ids=inputs, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cumulative = out.logits[:, -1].double().softmax(-1).cumsum(-1)  # (B, V)
            uniform = torch.rand((len(prompts), 1), generator=generator, dtype=torch.float64) * cumulative[:, -1:]
            inputs = torch.searchsorted(cumulative, uniform, right=True).clamp(max=cumulative.shape[1] - 1)
            chosen.append(inputs)
            seen = torch.cat([seen, torch.ones_like(inputs)], dim=1)
    responses: list[list[int]] = torch.cat(chosen, dim=1).tolist()
    return [response[: response.index(eos) + 1] if eos in response else response for response in responses]


def gold_scores(prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> np.ndarray:
    """(B, K) gold scores of the completions."""
    return np.array(
        [reviews.gold([prompt] * len(texts), list(texts)) for prompt, texts in zip(prompts, completions, strict=True)]
    )


def joined(prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[str]:
    """All B * K texts, prompt by prompt."""
    return [prompt + text for prompt, texts in zip(prompts, completions, strict=True) for text in texts]


def streams(seed: int, part: str) -> tuple[int, int, int]:
    """Three independent seeds for a part of the build."""
    state = np.random.SeedSequence([seed, *part.encode()]).generate_state(3)
    return int(state[0]), int(state[1]), int(state[2])


def card(settings: dict[str, Any], facts: dict[str, float]) -> str:
    """The model card: what was done and what was measured."""
    shown = {name: value for name, value in settings.items() if name not in ("output", "progress")}
    return CARD.read_text(encoding="utf-8").format(
        **{**settings["reference"], **settings["reward"], **facts},
        task=settings["task"],
        threads=settings["threads"],
        ratio=facts["perplexity"] / facts["grammar_perplexity"],
        settings=OmegaConf.to_yaml(OmegaConf.create(shown)).strip(),
    )


if __name__ == "__main__":
    main()
