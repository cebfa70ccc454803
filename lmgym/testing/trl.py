"""TRL's group trainers as `check_trainer` takes trainers, by their own methods; where the package trl is installed.

Models that are no models give the methods the log-probs that an invariant asks for. Nothing of TRL is copied here.

Shapes: B responses, P prompt columns, T response columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from lmgym.testing.adapter import GroupInputs, LossInputs, Responses, TrainerAdapter
from lmgym.testing.probes import rotary_model, rows_of, word_tokenizer

Kind = Literal["grpo", "rloo"]
TOKEN = 3  # of prompts and responses whose ids do not matter


def adapt_trl(kind: Kind, *, by_design: dict[str, str] | None = None, **config: Any) -> TrainerAdapter:
    """TRL's `GRPOTrainer` or `RLOOTrainer` (1.16).

    Args:
        kind: which of the two.
        by_design: as in `TrainerAdapter`.
        config: arguments of `GRPOConfig` or `RLOOConfig` other than the defaults.
    """
    import trl

    parts = _Parts(kind, config)
    numbers = ", ".join(f"{name}={value!r}" for name, value in config.items())
    return TrainerAdapter(
        name=f"trl {trl.__version__} {parts.kind.__name__}({numbers})",
        prepare=parts.prepare,
        response_mask=parts.response_mask,
        log_probs=parts.log_probs,
        lora_log_probs=parts.lora_log_probs,
        model_loss=parts.model_loss,
        loss=parts.loss,
        group_advantages=parts.group_advantages,
        by_design=by_design or {},
    )


class _Numbers(nn.Module):
    """Stands for a model: it gives the log-probs (B, T) of responses whatever it reads."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(log_probs=self.log_probs, entropy=torch.zeros_like(self.log_probs))


class _Parts:
    """A trainer and what an invariant asks of it."""

    def __init__(self, kind: Kind, config: dict[str, Any]) -> None:
        import trl

        self.is_grpo = kind == "grpo"
        self.kind: Any = trl.GRPOTrainer if self.is_grpo else trl.RLOOTrainer
        self.config: Any = trl.GRPOConfig if self.is_grpo else trl.RLOOConfig
        self.numbers = config
        self.scores: list[float] = []  # that the reward function gives
        self.trainer = self.make(rotary_model())

    def make(self, model: Any, temperature: float = 1.0, beta: float = 0.0) -> Any:
        """A trainer of a model, in float32 on the CPU; two responses a prompt are the fewest that it takes."""
        from datasets import Dataset

        with tempfile.TemporaryDirectory() as directory:
            numbers = {"per_device_train_batch_size": 2, "num_generations": 2, "temperature": temperature, "beta": beta}
            machine = {"output_dir": directory, "use_cpu": True, "bf16": False, "report_to": "none"}
            return self.kind(
                model=model,
                reward_funcs=lambda completions, **_: self.scores or [0.0] * len(completions),
                args=self.config(**machine | numbers | self.numbers),
                train_dataset=Dataset.from_list([{"prompt": "a"}]),
                processing_class=word_tokenizer(),
            )

    def prepare(self, model: Any, temperature: float) -> Any:
        """The model as a trainer has it when it trains."""
        self.trainer = self.make(model, temperature)
        return self.trainer.model.train()

    def response_mask(self, ids: Tensor, eos: int, pad: int) -> Tensor:
        """(B, T) of what the trainer takes from `generate`."""
        prompts = [[TOKEN]] * len(ids)
        with self.generating(ids):
            taken = self.trainer._generate_single_turn(prompts, None, {}, *([2] if self.is_grpo else []))
        rows = taken[0] if self.is_grpo else taken
        lengths = torch.tensor([len(row) for row in rows])
        return torch.arange(ids.shape[1]) < lengths.unsqueeze(1)

    def log_probs(self, model: Any, responses: Responses, temperature: float) -> Tensor:
        """(B, T) as the trainer reads them."""
        columns = responses.response_ids.shape[1]
        found: Tensor = self.read(model, responses.input_ids, responses.attention_mask, columns)[0]
        return found

    def read(self, *arguments: Any) -> Any:
        """Log-probs, entropies and the auxiliary loss."""
        return self.trainer._get_per_token_logps_and_entropies(*arguments)

    def lora_log_probs(self, model: Any, responses: Responses, disturb: Callable[[Any], None]) -> tuple[Tensor, Tensor]:
        """(B, T) of a policy of peft's, and of the reference that the trainer makes of it."""
        from peft import LoraConfig, get_peft_model

        layers = ["q_proj", "v_proj", "down_proj"]
        policy = get_peft_model(model, LoraConfig(target_modules=layers, task_type="CAUSAL_LM"))
        self.trainer = self.make(policy, beta=0.1)
        disturb(policy)
        read = self.trainer._get_per_token_logps_and_entropies
        found: list[Tensor] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            answer = read(*args, **kwargs)
            found.append(answer[0])
            return answer

        with mock.patch.object(self.trainer, "_get_per_token_logps_and_entropies", note):
            self.collect(responses)
        return self.log_probs(policy, responses, 1.0), found[-1]  # the reference is read last

    def model_loss(self, model: Any, responses: Responses, advantages: Tensor) -> Tensor:
        """The loss of a training step on responses that `generate` has given."""
        self.trainer.beta = 0.0
        inputs = self.collect(responses)
        inputs["advantages"] = advantages
        return self.step(model, inputs)

    def loss(self, inputs: LossInputs) -> Tensor:
        """The loss of a training step, of a model with these log-probs."""
        mask = inputs.mask.long()
        ids = torch.full_like(mask, TOKEN)
        one = torch.ones_like(mask[:, :1])
        trainer = self.trainer
        trainer.beta = inputs.kl_coef
        trainer.args.steps_per_generation = inputs.parts
        trainer.args.gradient_accumulation_steps = inputs.parts
        trainer.current_gradient_accumulation_steps = inputs.parts
        batch = {
            "prompt_ids": TOKEN * one,
            "prompt_mask": one,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": inputs.advantages[:, 0],
            "num_items_in_batch": torch.tensor(inputs.step_tokens),
            "ref_per_token_logps": inputs.ref_log_probs,
            "old_per_token_logps": inputs.old_log_probs,
            "old_logps": (inputs.old_log_probs * mask).sum(1),
        }
        processes = mock.PropertyMock(return_value=inputs.ranks)
        with mock.patch.object(type(trainer.accelerator), "num_processes", processes):
            return self.step(_Numbers(inputs.log_probs), batch)

    def group_advantages(self, inputs: GroupInputs) -> Tensor:
        """(B,) of the trainer's own scoring, of responses with these log-probs."""
        trainer = self.trainer
        count, columns = inputs.mask.shape
        ids = torch.full((count, columns), TOKEN)
        ids[:, 0] = torch.arange(count) % 2 + TOKEN
        prompts = torch.full((count, 1), TOKEN)
        responses = Responses(prompts, torch.ones_like(prompts, dtype=torch.bool), ids, inputs.mask, 1, 1)
        width = int(inputs.mask.sum(1).max())
        trainer.beta = inputs.kl_coef
        self.scores = inputs.scores.tolist()
        policy = mock.patch.object(trainer, "model", _Numbers(inputs.log_probs[:, :width]))
        reference = mock.patch.object(trainer, "ref_model", _Numbers(inputs.ref_log_probs[:, :width]))
        with policy, reference:
            found: Tensor = self.collect(responses, inputs.group_size)["advantages"]
        self.scores = []
        return found

    def collect(self, responses: Responses, group_size: int | None = None) -> dict[str, Any]:
        """What the trainer makes of responses: ids, masks, log-probs, advantages; None is one group of all."""
        trainer = self.trainer
        trainer.num_generations = group_size or len(responses.prompt_ids)
        prompts = [prompt for _, prompt, _ in rows_of(responses)]
        trainer.args.per_device_train_batch_size = len(prompts)
        trainer.args.steps_per_generation = 1
        trainer.args.gradient_accumulation_steps = 1
        trainer.current_gradient_accumulation_steps = 1
        tokenized = mock.patch.object(trainer, "_tokenize_prompts", return_value=(prompts, None, {}))
        with self.generating(responses.response_ids), tokenized:
            collected: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": "a"}] * len(prompts))
        return collected

    @contextmanager
    def generating(self, ids: Tensor) -> Iterator[None]:
        """Has `generate` answer with responses (B, T)."""
        model = self.trainer.model_wrapped

        def generate(input_ids: Tensor, **_: Any) -> Tensor:
            return torch.cat([input_ids, ids], dim=1)

        with mock.patch.object(model, "generate", generate):
            yield

    def step(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss that a training step takes the gradient of."""
        trainer = self.trainer
        losses: list[Tensor] = []
        given = mock.patch.object(trainer, "_prepare_inputs", return_value=inputs)
        backward = mock.patch.object(trainer.accelerator, "backward", side_effect=lambda loss, **_: losses.append(loss))
        with given, backward:
            trainer.training_step(model, inputs, None)
        return losses[0]
