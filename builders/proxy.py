"""The artefacts of `proxy`: reward models from few rankings of what the reference of `reviews` writes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders.completions import join_texts, sample_completions
from builders.model_card import join_columns
from builders.models import Built
from builders.reward_models import collect_rankings, learn_reward_model, measure_reward_model, standardise
from builders.seeds import derive_seeds
from builders.settings import ARTEFACTS
from lmgym.models.causal import CausalLM
from lmgym.tasks import reviews


def build_proxy(settings: dict[str, Any]) -> Built:
    """Reward models that learned from the first few of the same rankings, for the shipped reference of `reviews`."""
    shipped = ARTEFACTS / "reviews" / "reference"
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(shipped, trust_remote_code=False)
    reference = CausalLM(model, tokenizer)
    chosen = settings["reward"]
    prompt_seed, annotator_seed, torch_seed = derive_seeds(settings["seed"], "proxy")
    generator = torch.Generator().manual_seed(torch_seed)
    rankings, agreement = collect_rankings(
        reference, max(chosen["prompts"]), chosen, prompt_seed, annotator_seed, generator
    )
    train = list(reviews.prompts("train"))
    seen = join_texts(train, sample_completions(reference, train, chosen["samples"], generator))
    test = list(reviews.prompts("test"))
    unseen = sample_completions(reference, test, chosen["samples"], generator)
    models = {}
    measured = []
    for size in chosen["prompts"]:
        name = f"reward-{size}"
        generator.manual_seed(torch_seed)
        reward, accuracy = learn_reward_model(reference, rankings[:size], chosen, generator, name, settings["progress"])
        standardise(reward, tokenizer, seen)
        reward.half().float()  # what is measured is what float16 keeps
        facts = {"parameters": reward.num_parameters(), "training_accuracy": accuracy}
        measured.append(facts | measure_reward_model(reward, tokenizer, test, unseen))
        models[name] = (reward.half(), tokenizer)
    return models, {**join_columns(list(models), measured), "annotator_accuracy": agreement}
