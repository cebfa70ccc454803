"""Training that diverges ends with an error that names what was not finite first; the checkpoint before it stays.

What is checked is read anyway or costs one pass over the weights a batch: the losses and the norm of the gradient
before every optimiser step, the weights after a batch, everything before it is written. Log-probs are checked where
they are drawn (`lmgym.models.sampling.check_finite_log_probs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmgym.errors import NotFiniteError

GRAD_NORM = "train/grad_norm"
LARGE_SCORE = 1e3  # scores beyond it are worth a word where a loss overflows


def check_step(metrics: Mapping[str, float], policy: nn.Module, config: Any, inputs: Mapping[str, Tensor]) -> None:
    """Raises `NotFiniteError` before an optimiser step that a loss or a gradient would make NaN of the weights.

    Args:
        metrics: of the step. Its losses (`..._loss`) and the gradient's norm are looked at, in their order.
        policy: what is about to change.
        config: the agent's, for what to try.
        inputs: what the loss was computed from, in the order that it was. Looked at only where a loss is not finite.
    """
    wrong = [name for name in metrics if name.endswith("loss") or name == GRAD_NORM]
    wrong = [name for name in wrong if not math.isfinite(metrics[name])]
    if not wrong:
        return
    causes = [*_not_finite(_weights(policy)), *_not_finite(inputs.items())]
    if math.isnan(metrics.get("train/ratio_error", 0.0)):
        causes.append("the log-probs that the policy gives are nan, for its logits overflow")
    causes.append(f"`{wrong[0]}` is {metrics[wrong[0]]}")
    tips = []
    if wrong[0] == "train/kl_loss" and getattr(config, "kl_estimator", "") == "k3":
        tips.append("`agent.kl_estimator=exact` (k3 is exp of a log-ratio, beyond float32 at 88 nats)")
    tips += _advice_on_dtype(policy)
    if "scores" in inputs and bool((inputs["scores"].abs() > LARGE_SCORE).any()):
        tips.append("a reward of smaller numbers")
    diverged(causes[0], config, tips)


def check_weights(policy: nn.Module, config: Any) -> None:
    """Raises `NotFiniteError` where a step has left a weight that is not finite."""
    weights = [weight for _, weight in _weights(policy) if weight.requires_grad]
    if not all_finite(weights):
        diverged(next(_not_finite(_weights(policy))), config, _advice_on_dtype(policy))


def check_saving(policy: nn.Module, optimizer: torch.optim.Optimizer, config: Any) -> None:
    """Raises `NotFiniteError` for weights or an optimiser's state that would replace a good checkpoint."""
    check_weights(policy, config)
    state = optimizer.state_dict()["state"]
    moments = [(f"{i}.{name}", x) for i, row in state.items() for name, x in row.items() if torch.is_tensor(x)]
    wrong = next(_not_finite(moments), None)
    if wrong is not None:
        diverged(f"the optimiser's state {wrong}", config)


def diverged(found: str, config: Any, tips: Sequence[str] = ()) -> NoReturn:
    """Raises `NotFiniteError`.

    Args:
        found: what was not finite, as a clause. config: the agent's numbers. tips: what to try, before its numbers.
    """
    raise NotFiniteError(f"Training has diverged: {found}. Try {', or '.join([*tips, *_advice(config)])}.")


def _advice(config: Any) -> Iterator[str]:
    """What to try, given an agent's numbers."""
    if getattr(config, "adam_eps", 1) == 0:
        yield "`agent.adam_eps=1e-5` (it is 0, and 0 / 0 is no number)"
    if getattr(config, "max_grad_norm", 1) == 0:
        yield "`agent.max_grad_norm=1` (gradients are not clipped)"
    name = "lr" if hasattr(config, "lr") else "learning_rate"  # the latter of Stable-Baselines3
    yield f"a lower `agent.{name}` (it is {getattr(config, name):g})"


def _advice_on_dtype(policy: nn.Module) -> list[str]:
    """What to try where weights are in float16."""
    if any(weight.dtype == torch.float16 for _, weight in _weights(policy)):
        return ["`env.dtype=bfloat16` (the largest number of float16 is 65,504)"]
    return []


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number in some tensors is finite: one pass, and one look where they lie on a GPU."""
    some = [x.detach() for x in tensors if x.is_floating_point() and x.numel()]
    if not some:
        return True
    largest = torch._foreach_norm(some, ord=math.inf)
    return bool(torch.stack(list(largest)).isfinite().all())


def _weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in policy.named_parameters():
        yield f"weight {name}", weight


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """A clause for each tensor with a number that is not finite."""
    for name, x in tensors:
        wrong = x.detach()[~x.detach().isfinite()]
        if len(wrong):
            yield f"`{name}` has {len(wrong):,} of {x.numel():,} numbers that are not finite ({wrong[0].item()})"
