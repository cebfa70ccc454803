"""Builds the artefacts of a built-in task: `python -m builders.build task=reviews`.

- `reviews`, in four steps, as in InstructGPT: supervised training on a corpus, completions sampled and ranked, a reward
  model learned from the rankings, and a card with what was measured.
- `arithmetic`: supervised training on all sums, stopped early, for each size of numbers.
- `proxy`: reward models learned from few rankings of completions of the reference of `reviews`.

The settings are those of `conf/build_task/build.yaml` and of `conf/build_task/task/<task>.yaml`.
A build replaces the directory of artefacts as a whole. Optima stored there go with the models they were derived from:
`python -m builders.optima --write <task>` derives them again.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf

from agents.runs.command_line import run_command
from lmgym.errors import InvalidArgumentError, LmGymError, check_bool, check_choice, check_int, check_number
from lmgym.tasks import arithmetic, reviews, stored

if TYPE_CHECKING:
    from lmgym.feedback.preferences import Rankings

# torch and transformers are imported where they are used, so that a wrong setting is reported at once.

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ARTEFACTS = Path(stored.ARTEFACTS)
CARDS = Path(__file__).parents[1] / "conf" / "build_task" / "card"

LISTS = {"arithmetic": ("digits", "epochs", "batch_size"), "proxy": ("prompts",)}  # settings with a value a model
# Models with their tokenizers by directory, and what was measured.
Built = tuple[dict[str, tuple[Any, Any]], dict[str, Any]]


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
    check_choice("task", settings["task"], BUILDERS)
    check_int("seed", settings["seed"], 0)
    check_int("threads", settings["threads"], 1)
    check_bool("progress", settings["progress"])
    output = output_directory(settings)
    if output.exists() and not is_build(output, settings["task"]):  # it will be replaced as a whole
        raise InvalidArgumentError(
            f"`output` must be a new directory or one that was built before, got {str(output)!r}."
        )
    for section in ("reference", "reward"):
        if section in settings:
            check_section(section, settings[section], LISTS.get(settings["task"], ()))
    if settings["task"] == "reviews":
        least = reviews.MAX_PROMPT_TOKENS + reviews.MAX_NEW_TOKENS
        check_int("reference.positions", settings["reference"]["positions"], least)
    if settings["task"] == "arithmetic":
        shape = settings["reference"]
        for digits in shape["digits"]:
            if digits not in arithmetic.SETTINGS:
                raise InvalidArgumentError(
                    f"`reference.digits` must be of {list(arithmetic.SETTINGS)}, got {shape['digits']}."
                )
            least = arithmetic.max_prompt_tokens(digits) + arithmetic.max_new_tokens(digits)
            check_int("reference.positions", shape["positions"], least)
        for name in ("epochs", "batch_size"):
            if len(shape[name]) != len(shape["digits"]):
                raise InvalidArgumentError(
                    f"`reference.{name}` must have one value for each of `reference.digits` ({shape['digits']}), "
                    f"got {shape[name]}."
                )


def check_section(section: str, values: dict[str, Any], lists: Sequence[str]) -> None:
    """Checks the numbers of a model, or of several models where a name is one of `lists`."""
    for name, given in values.items():
        if name in lists and (not isinstance(given, list) or not given):
            raise InvalidArgumentError(f"`{section}.{name}` must be a list with one value a model, got {given!r}.")
        for value in given if name in lists else [given]:
            if name in ("learning_rate", "temperature"):
                check_number(f"{section}.{name}", value, 0, open_low=True)
            else:
                check_int(f"{section}.{name}", value, 2 if section == "reward" and name in ("ranked", "samples") else 1)
    if "heads" in values and values["width"] % values["heads"]:
        raise InvalidArgumentError(
            f"`reference.heads` must divide `reference.width` ({values['width']}), got {values['heads']}."
        )


def build(settings: dict[str, Any]) -> Path:
    """Builds the artefacts of a task and returns the directory they are in."""
    started = time.monotonic()
    output = output_directory(settings)
    models, facts = BUILDERS[settings["task"]](settings)
    facts["seconds"] = time.monotonic() - started

    unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(unfinished / name)
        tokenizer.save_pretrained(unfinished / name)
    for file in unfinished.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    facts["megabytes"] = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file()) / 1e6
    (unfinished / "README.md").write_text(card(settings, facts), encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    unfinished.rename(output)
    return output


def output_directory(settings: dict[str, Any]) -> Path:
    """Where the artefacts go."""
    return Path(settings["output"] or ARTEFACTS / settings["task"]).absolute()


def is_build(directory: Path, task: str) -> bool:
    """Whether the directory holds artefacts of the task, by its card."""
    readme = directory / "README.md"
    return readme.is_file() and readme.read_text(encoding="utf-8").startswith(f"# Artefacts of the task `{task}`\n")


def streams(seed: int, part: str) -> tuple[int, int, int]:
    """Three independent seeds for a part of the build."""
    state = np.random.SeedSequence([seed, *part.encode()]).generate_state(3)
    return int(state[0]), int(state[1]), int(state[2])


def card(settings: dict[str, Any], facts: dict[str, Any]) -> str:
    """The model card: what was done and what was measured."""
    shown = {"task": settings["task"]} | {n: value for n, value in settings.items() if n not in ("output", "progress")}
    sections = {**settings.get("reference", {}), **settings.get("reward", {})}
    return (
        (CARDS / f"{settings['task']}.md")
        .read_text(encoding="utf-8")
        .format(
            **{**sections, **facts},
            task=settings["task"],
            threads=settings["threads"],
            settings=OmegaConf.to_yaml(OmegaConf.create(shown)).strip(),
        )
    )


def side_by_side(names: Sequence[str], measured: Sequence[dict[str, float]]) -> dict[str, str]:
    """The facts of several models as cells of one table: each figure, the `names` above it and the `rule` between."""

    def text(value: float) -> str:
        return str(value) if isinstance(value, int) else f"{value:.4f}"

    cells = {name: " | ".join(text(facts[name]) for facts in measured) for name in measured[0]}
    return {**cells, "names": " | ".join(f"`{name}`" for name in names), "rule": "|".join("---" for _ in names)}


# --- reviews ----------------------------------------------------------------------------------------------------------


def build_reviews(settings: dict[str, Any]) -> Built:
    """A language model that writes reviews, and a reward model that learned from rankings of what it writes."""
    import torch

    tokenizer = word_tokenizer(reviews.words(), settings["reference"]["positions"])
    reference, language = build_reference(settings, tokenizer)
    chosen = settings["reward"]
    prompt_seed, annotator_seed, torch_seed = streams(settings["seed"], "reward")
    generator = torch.Generator().manual_seed(torch_seed)
    rankings, agreement = collect_rankings(
        reference, tokenizer, chosen["prompts"], chosen, prompt_seed, annotator_seed, generator
    )
    model, accuracy = learn_reward_model(
        reference, tokenizer, rankings, chosen, generator, "reward", settings["progress"]
    )
    start, test = list(reviews.prompts("train")), list(reviews.prompts("test"))
    samples = sample_completions(reference, tokenizer, start, chosen["samples"], generator)
    centre(model, tokenizer, joined(start, samples))
    measured = measure(
        model, tokenizer, test, sample_completions(reference, tokenizer, test, chosen["samples"], generator)
    )
    return {"reference": (reference, tokenizer), "reward": (model, tokenizer)}, {
        **language,
        "ratio": language["perplexity"] / language["grammar_perplexity"],
        "reward_parameters": model.num_parameters(),
        "training_accuracy": accuracy,
        "annotator_accuracy": agreement,
        **measured,
    }


def untrained_gpt2(shape: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """A GPT-2 with random weights, without dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

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
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


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

    from agents.algorithms.sft import perplexity, train_sft

    shape = settings["reference"]
    corpus_seed, held_out_seed, torch_seed = streams(settings["seed"], "reference")
    model = untrained_gpt2(shape, tokenizer, torch_seed)
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


def collect_rankings(
    reference: Any,
    tokenizer: Any,
    size: int,
    chosen: dict[str, Any],
    prompt_seed: int,
    annotator_seed: int,
    generator: Any,
) -> tuple[Rankings, float]:
    """Has simulated annotators rank completions of fresh prompts; also returns their own accuracy."""
    import torch

    from lmgym.feedback.annotators import plackett_luce_ranking
    from lmgym.feedback.preferences import Rankings
    from lmgym.rewards.ranking import ranking_accuracy

    prompts = training_prompts(np.random.default_rng(prompt_seed), size)
    completions = sample_completions(reference, tokenizer, prompts, chosen["ranked"], generator)
    gold = gold_scores(prompts, completions)
    ranking = plackett_luce_ranking(gold, chosen["temperature"], np.random.default_rng(annotator_seed))
    agreement = ranking_accuracy(torch.from_numpy(gold), torch.from_numpy(ranking))
    return Rankings(prompts, completions, ranking.tolist()), agreement


def learn_reward_model(
    reference: Any,
    tokenizer: Any,
    rankings: Rankings,
    chosen: dict[str, Any],
    generator: Any,
    name: str,
    visible: bool,
) -> tuple[Any, float]:
    """A reward model learned from rankings, and its accuracy on them in the last epoch."""
    from tqdm import tqdm

    from lmgym.rewards.ranking import reward_model_from, train_reward_model

    model = reward_model_from(reference, generator)
    updates = chosen["epochs"] * math.ceil(len(rankings) / chosen["batch_size"])
    hidden = None if visible else True  # None: hidden unless on a terminal
    with tqdm(total=updates, unit="update", desc=name, disable=hidden) as bar:

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
    return model, trained["accuracy"]


def centre(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Shifts and scales a reward model, inside its weights, to mean 0 and standard deviation 1 on the texts."""
    from lmgym.rewards.ranking import normalise, score_texts

    scores = score_texts(model, tokenizer, texts).double()
    normalise(model, float(scores.mean()), float(scores.std()))


def measure(
    model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Compares a reward model with the gold score on completions of the reference, as many for each prompt."""
    import torch

    from lmgym.feedback.annotators import true_ranking
    from lmgym.rewards.ranking import ranking_accuracy, score_texts

    gold = gold_scores(prompts, completions)
    scores = score_texts(model, tokenizer, joined(prompts, completions)).view(gold.shape)
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
        "best_score": learned.max(axis=1).mean(),
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
    responses = sample_responses(model, ids, num, reviews.MAX_NEW_TOKENS, generator, batch_size)
    return [[f" {text}" for text in tokenizer.batch_decode(several)] for several in responses]


def sample_responses(
    model: Any, prompts: Sequence[list[int]], num: int, max_new_tokens: int, generator: Any, batch_size: int = 512
) -> list[list[list[int]]]:
    """Samples `num` responses a prompt, token ids in and out: (B, num) responses, EOS included where chosen."""
    rows = [row for row in range(len(prompts)) for _ in range(num)]
    responses: list[list[list[int]]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):  # prompts of one length need no padding
        alike = [row for row in rows if len(prompts[row]) == length]
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            drawn = sample_tokens(model, [prompts[row] for row in batch], max_new_tokens, generator)
            for row, response in zip(batch, drawn, strict=True):
                responses[row].append(response)
    return responses


def sample_tokens(model: Any, prompts: list[list[int]], max_new_tokens: int, generator: Any) -> list[list[int]]:
    """Samples one response for each of B prompts of equal length; a response ends with EOS or at `max_new_tokens`."""
    import torch
    from transformers import DynamicCache

    from lmgym.models.caches import cache_keyword

    eos = model.config.eos_token_id
    cached = {cache_keyword(model): DynamicCache()}
    inputs = torch.tensor(prompts)
    chosen = []
    seen = torch.ones_like(inputs)  # no padding: every token before is seen
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            out = model(input_ids=inputs, attention_mask=seen, use_cache=True, **cached)
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


# --- proxy ------------------------------------------------------------------------------------------------------------


def build_proxy(settings: dict[str, Any]) -> Built:
    """Reward models that learned from the first few of the same rankings, for the shipped reference of `reviews`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmgym.feedback.preferences import Rankings

    shipped = ARTEFACTS / "reviews" / "reference"
    reference = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(shipped, trust_remote_code=False)
    chosen = settings["reward"]
    prompt_seed, annotator_seed, torch_seed = streams(settings["seed"], "proxy")
    generator = torch.Generator().manual_seed(torch_seed)
    rankings, agreement = collect_rankings(
        reference, tokenizer, max(chosen["prompts"]), chosen, prompt_seed, annotator_seed, generator
    )
    start, test = list(reviews.prompts("train")), list(reviews.prompts("test"))
    samples = joined(start, sample_completions(reference, tokenizer, start, chosen["samples"], generator))
    unseen = sample_completions(reference, tokenizer, test, chosen["samples"], generator)
    models, measured = {}, []
    for size in chosen["prompts"]:
        generator.manual_seed(torch_seed)
        first = Rankings(rankings.prompts[:size], rankings.completions[:size], rankings.ranking[:size])
        model, accuracy = learn_reward_model(
            reference, tokenizer, first, chosen, generator, f"reward-{size}", settings["progress"]
        )
        centre(model, tokenizer, samples)
        model.half().float()  # what is measured is what float16 keeps
        measured.append(
            {
                "parameters": model.num_parameters(),
                "training_accuracy": accuracy,
                **measure(model, tokenizer, test, unseen),
            }
        )
        models[f"reward-{size}"] = (model.half(), tokenizer)
    return models, {**side_by_side(list(models), measured), "annotator_accuracy": agreement}


# --- arithmetic -------------------------------------------------------------------------------------------------------


def build_arithmetic(settings: dict[str, Any]) -> Built:
    """For each size of numbers, a language model that has begun to learn all of their sums."""
    import torch

    from agents.algorithms.sft import train_sft
    from lmgym.models.markov import symbol_tokenizer

    shape = settings["reference"]
    tokenizer = symbol_tokenizer(arithmetic.SYMBOLS, chars=True)
    models, measured = {}, []
    for digits, epochs, batch_size in zip(shape["digits"], shape["epochs"], shape["batch_size"], strict=True):
        torch_seed, order_seed, sample_seed = streams(settings["seed"], f"arithmetic-{digits}")
        model = untrained_gpt2(shape, tokenizer, torch_seed)
        trained = train_sft(
            model,
            [sum_sequence(prompt) for prompt in arithmetic.all_prompts(digits)],
            epochs=epochs,
            learning_rate=shape["learning_rate"],
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(order_seed),
            progress=settings["progress"],
        )
        models[f"reference-{digits}"] = (model, tokenizer)
        measured.append(
            {
                "sums": len(arithmetic.all_prompts(digits)),
                "parameters": model.num_parameters(),
                "perplexity": trained["perplexity"],
                **measure_sums(model, digits, shape["samples"], torch.Generator().manual_seed(sample_seed)),
            }
        )
    return models, side_by_side(list(models), measured)


def sum_sequence(prompt: str) -> list[int]:
    """Token ids of a prompt, its sum and the EOS."""
    return [*arithmetic.token_ids(prompt + arithmetic.answer(prompt)), arithmetic.EOS_TOKEN_ID]


def accepted_probability(model: Any, prompt: str) -> float:
    """Probability that the model answers a sum rightly, read off by teacher forcing."""
    import torch

    from agents.algorithms.sft import negative_log_likelihood

    with torch.no_grad():
        whole, _ = negative_log_likelihood(model, [sum_sequence(prompt)])
        before, _ = negative_log_likelihood(model, [arithmetic.token_ids(prompt)])
    return math.exp(float(before - whole))


def measure_sums(model: Any, digits: int, samples: int, generator: Any) -> dict[str, float]:
    """The accuracy of a reference, exactly and by sampling, on the test prompts of a task."""
    prompts = list(arithmetic.prompts(digits, "test"))
    ids = [list(arithmetic.token_ids(prompt)) for prompt in prompts]
    responses = sample_responses(model, ids, samples, arithmetic.max_new_tokens(digits), generator)
    reward = arithmetic.SumReward()
    scores = [
        reward([prompt] * samples, [""] * samples, completion_ids=several)
        for prompt, several in zip(prompts, responses, strict=True)
    ]
    exact = np.array([accepted_probability(model, prompt) for prompt in prompts])
    train = [accepted_probability(model, prompt) for prompt in arithmetic.prompts(digits, "train")]
    return {
        "sampled": float(np.mean(scores)),
        "exact": exact.mean(),
        "least": exact.min(),
        "greatest": exact.max(),
        "train": float(np.mean(train)),
        "length": float(np.mean([len(response) for several in responses for response in several])),
    }


BUILDERS: dict[str, Callable[[dict[str, Any]], Built]] = {
    "reviews": build_reviews,
    "arithmetic": build_arithmetic,
    "proxy": build_proxy,
}

if __name__ == "__main__":
    run_command(main)
