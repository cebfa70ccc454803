"""The artefacts of `reviews`, in four steps, as in InstructGPT (Ouyang et al. 2022).

Supervised training on a corpus; completions, sampled and ranked; a reward model that learns from the rankings; and what
is measured of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from builders.completions import join_texts, sample_completions
from builders.language_model import perplexity, train_sft
from builders.models import EOS, Built, make_gpt2, make_word_tokenizer
from builders.reward_models import collect_rankings, learn_reward_model, measure_reward_model, standardise
from builders.seeds import derive_seeds
from lmgym.models.causal import CausalLM
from lmgym.tasks import reviews


def build_reviews(settings: dict[str, Any]) -> Built:
    """A language model that writes reviews, and a reward model that learned from rankings of what it writes."""
    tokenizer = make_word_tokenizer(reviews.words(), settings["reference"]["positions"])
    model, language = build_reference(settings, tokenizer)
    reference = CausalLM(model, tokenizer)
    chosen = settings["reward"]
    prompt_seed, annotator_seed, torch_seed = derive_seeds(settings["seed"], "reward")
    generator = torch.Generator().manual_seed(torch_seed)
    rankings, agreement = collect_rankings(reference, chosen["prompts"], chosen, prompt_seed, annotator_seed, generator)
    reward, accuracy = learn_reward_model(reference, rankings, chosen, generator, "reward", settings["progress"])
    train = list(reviews.prompts("train"))
    standardise(
        reward, tokenizer, join_texts(train, sample_completions(reference, train, chosen["samples"], generator))
    )
    test = list(reviews.prompts("test"))
    unseen = sample_completions(reference, test, chosen["samples"], generator)
    facts = {
        **language,
        "ratio": language["perplexity"] / language["grammar_perplexity"],
        "reward_parameters": reward.num_parameters(),
        "training_accuracy": accuracy,
        "annotator_accuracy": agreement,
        **measure_reward_model(reward, tokenizer, test, unseen),
    }
    return {"reference": (model, tokenizer), "reward": (reward, tokenizer)}, facts


def build_reference(settings: dict[str, Any], tokenizer: Any) -> tuple[Any, dict[str, float]]:
    """Trains a small GPT-2 on reviews; returns it with what was measured, by name."""
    shape = settings["reference"]
    corpus_seed, held_out_seed, torch_seed = derive_seeds(settings["seed"], "reference")
    model = make_gpt2(shape, tokenizer, torch_seed)
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
    """Perplexity of held-out reviews under the grammar itself: no model can have a lower one.

    The first word of a review is not counted, since no model is asked for it; its surprise is estimated on the corpus.

    Args:
        texts: the corpus.
        held_out: the words of each review, and its surprise in nats.
    """
    first_words = [text.split(" ", 1)[0] for text in texts]
    surprise = {word: -math.log(first_words.count(word) / len(first_words)) for word in set(first_words)}
    nats = sum(nats - surprise.get(words[0], 0.0) for words, nats in held_out)
    return math.exp(nats / sum(len(words) for words, _ in held_out))  # the EOS is counted, the first word not
