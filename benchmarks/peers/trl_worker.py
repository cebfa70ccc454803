"""A process that trains with TRL, in an environment of its own: `python -m benchmarks.peers.trl_worker SPEC`."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.peers.worker import KL_COEF, LR, Meter, Spec, count_until, even_share, report, spec_of


class Counts:
    """Tokens sampled, tokens that gradients were taken through, and seconds of `generate`, since the last iteration."""

    def __init__(self, spec: Spec, model: Any, end: int) -> None:
        self.reset()
        self._spec = spec
        self._end = end
        self._generate = model.generate
        model.generate = self.generate
        model.base_model.register_forward_pre_hook(self.read, with_kwargs=True)

    def reset(self) -> None:
        """Begins anew."""
        self.sampled = 0
        self.learned = 0
        self.seconds = 0.0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, timed and counted."""
        started = time.perf_counter()
        output = self._generate(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        ids = output if torch.is_tensor(output) else output.sequences
        prompts = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        responses = ids[:, prompts.shape[1] :]
        self.sampled += responses.numel() if self._spec.is_fixed else count_until(responses, self._end)
        return output

    def read(self, _: Any, args: Any, kwargs: Any) -> None:
        """Counts the tokens of a forward that a gradient will be taken through."""
        if torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            ids = args[0] if args else kwargs["input_ids"]
            self.learned += ids.numel() if mask is None else int(mask.count_nonzero())


class Laps(TrainerCallback):
    """Ends an iteration every so many calls of `on_step_end`, of which PPOTrainer makes one an iteration."""

    def __init__(self, meter: Meter, counts: Counts, calls: int) -> None:
        self.meter = meter
        self.counts = counts
        self.every = calls
        self.calls = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counts.reset()
        self.meter.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            counts = self.counts
            self.meter.lap(counts.sampled, counts.learned, generate=counts.seconds)
            counts.reset()


def common(spec: Spec, out: str) -> dict[str, Any]:
    """Arguments that every trainer gets: float32 on the CPU, nothing recomputed, saved, evaluated or reported."""
    return {
        "output_dir": out,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def ppo_trainer(spec: Spec, model: Any, tokenizer: Any, out: str) -> Any:
    """PPOTrainer; its minibatches are parts of a "device batch", so that this is the whole batch."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def load(path: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)

    reference = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in spec.read_prompts()]
    config = PPOConfig(
        per_device_train_batch_size=spec.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=spec.minibatches,
        num_ppo_epochs=spec.epochs,
        total_episodes=spec.batch * (spec.iterations + 1),
        local_rollout_forward_batch_size=spec.batch,
        num_sample_generations=0,
        response_length=spec.horizon,
        stop_token=None if spec.is_fixed else "eos",
        temperature=1.0,
        kl_coef=KL_COEF,
        **common(spec, out),
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model,
        ref_model=reference,
        reward_model=load(spec.reward),
        value_model=load(spec.model),
        train_dataset=Dataset.from_list(rows),
    )


def group_trainer(spec: Spec, model: Any, tokenizer: Any, out: str) -> Any:
    """RLOOTrainer or GRPOTrainer: a generation of `batch`, `minibatches` steps a pass over it, `epochs` passes."""
    import trl

    kinds = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}
    trainer, config = kinds[spec.algorithm]
    args = config(
        per_device_train_batch_size=spec.batch // spec.minibatches,
        steps_per_generation=spec.minibatches,
        num_iterations=spec.epochs,
        num_generations=spec.group,
        max_completion_length=spec.horizon,
        beta=KL_COEF,
        max_steps=spec.steps * (spec.iterations + 1),
        **common(spec, out),
    )
    rows = [{"prompt": prompt} for prompt in spec.read_prompts()]
    return trainer(
        model=model,
        reward_funcs=even_share,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def sft_trainer(spec: Spec, model: Any, tokenizer: Any, out: str) -> Any:
    """SFTTrainer on prompts and completions, which takes its loss from completions alone."""
    import trl

    args = trl.SFTConfig(
        per_device_train_batch_size=spec.batch // spec.minibatches,
        max_steps=spec.steps * (spec.iterations + 1),
        **common(spec, out),
    )
    rows = Dataset.from_list(spec.read_texts())
    return trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


TRAINERS = {"ppo": ppo_trainer, "rloo": group_trainer, "grpo": group_trainer, "sft": sft_trainer}


def run(spec: Spec) -> dict[str, Any]:
    """Trains and measures."""
    tokenizer = AutoTokenizer.from_pretrained(spec.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        trainer = TRAINERS[spec.algorithm](spec, model, tokenizer, out)
        meter = Meter(spec, list(model.parameters()))
        counts = Counts(spec, model, tokenizer.eos_token_id)
        calls = 1 if spec.algorithm == "ppo" else spec.steps
        trainer.add_callback(Laps(meter, counts, calls))
        trainer.train()
    return meter.result()


if __name__ == "__main__":
    report(run(spec_of(sys.argv[1])))
