"""Invariants of which tokens learn: the weight of every token's log-prob in the gradient of the loss.

The gradient of a loss at its first step is a sum over tokens of a weight times the gradient of that token's log-prob.
There are many more parameters than tokens, so least squares give the weights, whatever the loss looks like inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmgym.testing import probes
from lmgym.testing.adapter import Responses, TrainerAdapter
from lmgym.testing.invariants.base import Gaps, invariant

LEAST_SQUARES = "least squares on gradients in float32"
ADVANTAGES = (1.0, -0.5, 0.8)


@dataclass(frozen=True)
class TokenWeights:
    """Weights in the gradient of -loss, by advantage: of prompt tokens but the first, response tokens and padding.

    Attributes:
        prompt, response, padding: (n,), (B, T) and (m,). mask: (B, T) bool.
    """

    prompt: Tensor
    response: Tensor
    padding: Tensor
    mask: Tensor

    @property
    def size(self) -> float:
        """The mean absolute weight of a response token."""
        return self.response[self.mask].abs().mean().item()


def token_weights(trainer: TrainerAdapter) -> TokenWeights:
    """The weight of each token in a trainer's first step on three responses, by their advantages."""
    assert trainer.model_loss is not None
    responses = probes.some_responses()
    model = trainer.prepare(probes.rotary_model(), 1.0)
    advantages = torch.tensor(ADVANTAGES)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = _flat_gradient(trainer.model_loss(model, responses, advantages), parameters)
    # The loss first: an adapter may only know its model after it.
    per_token, positions = _gradients_of_tokens(model, responses, parameters)
    solution = torch.linalg.lstsq(per_token.T, -gradient.unsqueeze(1), driver="gels").solution.squeeze(1)
    solution = solution / advantages.double()[positions[:, 0]]
    first_response = responses.prompt_ids.shape[1]
    weights = torch.zeros(responses.response_ids.shape, dtype=torch.float64)
    in_prompt = positions[:, 1] < first_response
    mask = torch.cat([responses.prompt_mask, responses.response_mask], 1)[positions[:, 0], positions[:, 1]]
    chosen = ~in_prompt & mask
    weights[positions[chosen, 0], positions[chosen, 1] - first_response] = solution[chosen]
    return TokenWeights(solution[in_prompt & mask], weights, solution[~mask], responses.response_mask)


def _gradients_of_tokens(model: Any, responses: Responses, parameters: list[Any]) -> tuple[Tensor, Tensor]:
    """(n, D) gradients of the log-probs of tokens, and the row and column (n, 2) of each.

    The first token of a prompt has no log-prob. Padding after a response is among them.
    """
    gradients: list[Tensor] = []
    positions: list[tuple[int, int]] = []
    width = responses.prompt_ids.shape[1]
    was_training = model.training
    model.eval()
    for i, prompt, _ in probes.rows_of(responses):
        ids = torch.tensor([prompt + responses.response_ids[i].tolist()])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for j in range(1, ids.shape[1]):
            gradients.append(_flat_gradient(log_probs[j - 1, ids[0, j]], parameters, keep=True))
            positions.append((i, width - len(prompt) + j))
    model.train(was_training)
    return torch.stack(gradients), torch.tensor(positions)


def _flat_gradient(scalar: Tensor, parameters: list[Any], *, keep: bool = False) -> Tensor:
    found = torch.autograd.grad(scalar, parameters, retain_graph=keep, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in pairs])


@invariant("eos-gradient", "model_loss", tolerance=1e-2, reason=LEAST_SQUARES)
def eos_gradient(trainer: TrainerAdapter) -> Gaps:
    """The EOS learns as the token before it does: otherwise nothing teaches a policy to stop."""
    weights = token_weights(trainer)
    for row in range(2):  # which end with EOS
        last = int(weights.mask[row].sum()) - 1
        before = weights.response[row, last - 1].item()
        yield (
            f"weight of the EOS of response {row} by that of the token before, less 1",
            (abs(weights.response[row, last].item() / before - 1) if before else 1.0),
        )


@invariant("prompt-out-of-loss", "model_loss", tolerance=1e-2, reason=LEAST_SQUARES)
def prompt_out_of_loss(trainer: TrainerAdapter) -> Gaps:
    """No token of the prompt is learned."""
    weights = token_weights(trainer)
    yield "weight of a prompt token by that of a response token", _relative(weights.prompt, weights)


@invariant("padding-unlearned", "model_loss", tolerance=1e-2, reason=LEAST_SQUARES)
def padding_unlearned(trainer: TrainerAdapter) -> Gaps:
    """No padding after a response is learned, also where padding is EOS."""
    weights = token_weights(trainer)
    yield "weight of a pad token by that of a response token", _relative(weights.padding, weights)


@invariant("all-tokens-learn", "model_loss", tolerance=1e-2, reason=LEAST_SQUARES)
def all_tokens_learn(trainer: TrainerAdapter) -> Gaps:
    """Every token of a response learns alike, a better response is made likelier and a worse one less likely."""
    weights = token_weights(trainer)
    for row, mask in enumerate(weights.mask):
        own = weights.response[row][mask]
        spread = (own / own.mean() - 1).abs().max().item() if own.mean() > 0 else 1.0
        yield f"weights of response {row} by their mean, less 1 (1 where the sign is wrong)", spread


def _relative(some: Tensor, weights: TokenWeights) -> float:
    return some.abs().max().item() / weights.size if weights.size else float("nan")


INVARIANTS = (eos_gradient, prompt_out_of_loss, padding_unlearned, all_tokens_learn)
