"""Supervised fine-tuning: behaviour cloning of demonstrated responses, as an agent, and training on whole texts.

Shapes: B sequences a batch, L columns, V vocabulary, n response tokens of a batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from agents.algorithms.best_of_n import BestOfN, BestOfNConfig
from agents.algorithms.optimal import Optimal
from agents.finite import GRAD_NORM
from agents.supervised import SupervisedAgent, SupervisedConfig, named_row, response_ids, unscored
from agents.update import Loss, sum_gradients
from lmgym.data.rows import read_rows
from lmgym.envs.engine import Engine
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_choice, check_finite, check_int, check_number
from lmgym.feedback.pairs import read_demonstration
from lmgym.kl import discounted_return, episode_kl, token_rewards
from lmgym.models.padding import pad_right
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.rewards.ranking import bucketed_batches, warm_up_cosine
from lmgym.rollout import collect

IGNORED = -100  # the target of a padding column

Demonstrations = Literal["best_of_n", "optimal", "file"]


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Behaviour cloning's own numbers. An example is a demonstration."""

    batch_size: int = 16
    epochs: int = 4
    lr: float = 1e-3
    demonstrations: Demonstrations = "best_of_n"  # the best of n responses of the reference, pi*'s, or those of a file
    n: int = 16  # best_of_n: candidates a demonstration
    path: str | None = None  # file: rows with "prompt" and "completion", or "messages"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("demonstrations", self.demonstrations, get_args(Demonstrations))
        check_int("n", self.n, 1)
        if (self.path is None) != (self.demonstrations != "file"):
            expected = "a file where" if self.demonstrations == "file" else "null unless"
            raise InvalidArgumentError(f"`path` must be {expected} `demonstrations` is 'file', got {self.path!r}.")
        if self.path is not None and not os.path.isfile(self.path):
            raise InvalidArgumentError(f"`path` must be a file, and there is none at {self.path!r}.")


class SFT(SupervisedAgent[Episodes]):
    """Clones demonstrated responses (Pomerleau 1991; Ouyang et al. 2022, section 3.5): maximum likelihood, no returns.

    `num_timesteps` counts candidates that are not cloned too; of a file no env step is taken, and the reward is never
    asked. `sampler` is of the reference's candidates, and of `predict`; pi* is drawn from as it is.

    Raises:
        InvalidArgumentError: for a file that does not fit the task, and where pi* is asked for and no solver knows it.
    """

    Config = SFTConfig
    config: SFTConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: SFTConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._expert: Policy | None = Optimal(envs).policy if self.config.demonstrations == "optimal" else None
        self._file = None if self.config.path is None else read_demonstrations(self.config.path, envs.engine)
        if self._file is not None:
            self.tokens.read(self._file)  # by the reference

    @property
    def file_size(self) -> int | None:
        """Demonstrations of the file."""
        return None if self._file is None else len(self._file)

    def sample(self) -> tuple[Episodes, int]:
        """A response to each of the next `batch_size` prompts, and how many tokens were sampled for them."""
        prompts = self.envs.next_prompts(self.config.batch_size)
        if self._expert is None:
            chooser = BestOfN(self.envs, BestOfNConfig(self.config.n), sampler=self.sampler)
            chooser.generator, chooser.tokens = self.generator, self.tokens
            return chooser.respond(prompts), chooser.num_timesteps
        episodes = collect(self.envs, self._expert, prompts, generator=self.generator)
        self.tokens.read(episodes)
        return episodes, episodes.num_tokens

    def select(self, rows: Tensor) -> tuple[Episodes, int]:
        """Demonstrations of the file."""
        assert self._file is not None
        return self._file[rows], self._file[rows].num_tokens

    def loss(self, examples: Episodes) -> Loss:
        """The mean of -log pi over response tokens; the prompt is read and not learned."""
        self.tokens.read(examples, backward=1)
        return -self.log_probs(examples).mean(), {}

    def describe(self, examples: Episodes) -> dict[str, float]:
        """What is known of demonstrations, whoever they are of."""
        task, metrics = self.envs.task, {"train/demonstration_length": examples.lengths.float().mean().item()}
        if self._file is not None or task.kl_coef > 0:
            metrics["train/reference_loss"] = -examples.ref_log_probs[examples.response_mask].mean().item()
        if self._file is not None:
            return metrics
        metrics["train/demonstration_score"] = examples.scores.mean().item()
        if examples.gold_scores is not None:
            metrics["train/demonstration_gold_score"] = examples.gold_scores.mean().item()
        if self._expert is not None:  # the law of a best of n is not known, nor its KL
            returns = discounted_return(token_rewards(examples, task.kl_coef, dense=task.dense_kl), task.gamma)
            metrics["train/demonstration_return"] = returns.mean().item()
            metrics["train/demonstration_kl"] = episode_kl(examples).mean().item()
        return metrics


def read_demonstrations(path: str | os.PathLike[str], engine: Engine) -> Episodes:
    """Demonstrations of a file, as token ids, with the reference's log-probs; nobody has scored them.

    A row has "prompt" and "completion", texts or conversations, or "messages" of which the last is the answer. Of texts
    `prompt + completion` is what is learned, as in `lmgym.feedback.preferences.Rankings`: a completion carries its own
    leading space, and the EOS token as text where the response ends by itself.

    Args:
        path: the file (`lmgym.data.files`).
        engine: of the task.

    Raises:
        InvalidArgumentError: naming the first row that is no demonstration, and for a prompt or a completion that is
            none of the task's.
    """
    prompts, responses = [], []
    for row in read_rows("path", path, "prompt"):
        text, completion = read_demonstration("path", row, engine.lm.tokenizer)
        with named_row(row.location[:1].upper() + row.location[1:]):
            prompts.append(engine.prompts.of_text(text))
            responses.append(response_ids(engine, text, prompts[-1], completion))
    return unscored(engine, prompts, responses)


# -- whole texts -----------------------------------------------------------------------------------------------------


def train_sft(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    warm_up: float = 0.05,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    progress: bool = True,
) -> dict[str, float]:
    """Trains a causal LM to predict each token of the sequences from those before it.

    Args:
        model: A Hugging Face causal LM; changed in place. Dropout is off.
        sequences: Token ids, EOS last; at least two tokens each.
        epochs: Passes over the sequences.
        learning_rate: Peak learning rate of AdamW: linear warm-up, then cosine to zero.
        batch_size: Sequences an update.
        generator: CPU generator that shuffles the sequences.
        warm_up: Share of the updates over which the learning rate rises.
        weight_decay: Decay of AdamW.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 does not scale.
        progress: Whether to show a bar (on a terminal).

    Returns:
        `loss` in nats a token and `perplexity`, means over the last epoch.
    """
    check_int("epochs", epochs, 1)
    check_int("batch_size", batch_size, 1)
    check_number("learning_rate", learning_rate, 0, open_low=True)
    lengths = _checked_lengths(sequences)
    updates = epochs * math.ceil(len(sequences) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_cosine(step, updates, warm_up))
    model.eval()

    nats, tokens = 0.0, 0
    hidden = None if progress else True  # None: hidden unless on a terminal
    with tqdm(total=epochs * sum(lengths), unit="tok", unit_scale=True, desc="sft", disable=hidden) as bar:
        for _ in range(epochs):
            nats, tokens = 0.0, 0
            for batch in bucketed_batches(lengths, batch_size, generator):
                # 1. one forward over the batch; the loss is the mean over its tokens
                total, count = negative_log_likelihood(model, [sequences[i] for i in batch])
                loss = total / count

                # 2. one step of AdamW
                sums = sum_gradients([(loss, {})], model.parameters(), max_grad_norm)
                check_finite("loss", loss.item())
                check_finite("norm of the gradient", sums[GRAD_NORM].item())
                optimizer.step()
                schedule.step()

                # 3. report
                nats, tokens = nats + total.item(), tokens + count
                bar.set_postfix(loss=f"{loss.item():.3f}", perplexity=f"{math.exp(loss.item()):.2f}", refresh=False)
                bar.update(sum(lengths[i] for i in batch))
    return {"loss": nats / tokens, "perplexity": math.exp(nats / tokens)}


@torch.no_grad()
def perplexity(model: Any, sequences: Sequence[Sequence[int]], batch_size: int = 256) -> float:
    """exp of the mean surprise, in nats, of every token but the first of each sequence.

    Args:
        model: A Hugging Face causal LM.
        sequences: Token ids, at least two each.
        batch_size: Sequences a forward.

    Returns:
        A number >= 1; V for a model that knows nothing.
    """
    _checked_lengths(sequences)
    model.eval()
    ordered = sorted(sequences, key=len)
    parts = [
        negative_log_likelihood(model, ordered[start : start + batch_size])
        for start in range(0, len(ordered), batch_size)
    ]
    return math.exp(sum(total.item() for total, _ in parts) / sum(count for _, count in parts))


def negative_log_likelihood(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """Summed -log p of every token given those before it, over a batch.

    Causal attention makes right padding invisible to the tokens before it, so the attention mask is all ones (the model
    then runs its fastest kernel); padding columns are left out of the sum.

    Returns:
        A scalar in nats, differentiable, and the number of tokens predicted.
    """
    ids, mask = pad_right(sequences, pad_token_id=0)
    targets = ids.masked_fill(~mask, IGNORED)[:, 1:].to(model.device)
    ids = ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]  # (B, L-1, V)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int(mask[:, 1:].sum())


def _checked_lengths(sequences: Sequence[Sequence[int]]) -> list[int]:
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) < 2:
        raise InvalidArgumentError(
            f"`sequences` must hold at least one sequence and two tokens in each, got lengths {lengths[:8]}."
        )
    return lengths
