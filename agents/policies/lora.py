"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x becomes W x + alpha / r B A x, and W stays as it is.

A (r, in) is drawn at random and B (out, r) is 0 at first, so that the policy starts as the reference. W is the
reference's own tensor: there is one copy of it in memory, for the env and for the policy.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from agents.policies.actor_critic import ActorCritic, Critic
from lmgym.errors import InvalidArgumentError, check_int, check_number
from lmgym.models.activations import fuse_activations
from lmgym.models.causal import CausalLM

ALL_LINEAR = "all-linear"


def check_peft() -> None:
    """Refuses where the package peft is missing.

    Raises:
        InvalidArgumentError: saying how to install it.
    """
    if importlib.util.find_spec("peft") is None:
        raise InvalidArgumentError(
            "`policy` must be one that is installed, got 'lora': it needs the package peft (pip install peft)."
        )


def module_names(modules: str) -> str | list[str]:
    """What peft takes as `target_modules`, from "all-linear" or names separated by commas.

    Raises:
        InvalidArgumentError: for anything else.
    """
    names = [name.strip() for name in modules.split(",")] if isinstance(modules, str) else []
    if not names or not all(names) or (ALL_LINEAR in names and len(names) > 1):
        raise InvalidArgumentError(
            f"`lora_modules` must be {ALL_LINEAR!r} or names of modules separated by commas, got {modules!r}."
        )
    return modules if names == [ALL_LINEAR] else names


class LoRAPolicy(ActorCritic):
    """An actor-critic whose actor is the reference with an adapter in its layers.

    Only the adapter and the critic are parts of this module, so that parameters, optimiser and `state_dict` hold
    nothing of the reference. An adapter is in float32, whatever the reference is stored in.

    Args:
        reference: what the policy starts from; its weights are shared, not copied.
        rank: r. alpha: as above.
        modules: the layers that get an adapter: "all-linear" (but the LM head) or names separated by commas, each the
            end of a module's path.
        seed: of A.
        critic: where the value head sits; a trunk of its own is a full copy. reward_model: as for `ActorCritic`.

    Raises:
        InvalidArgumentError: for modules that the reference does not have or that peft cannot adapt, and as
            `ActorCritic`.
    """

    def __init__(
        self,
        reference: CausalLM,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        modules: str = ALL_LINEAR,
        seed: int = 0,
        critic: Critic = "shared",
        reward_model: nn.Module | None = None,
    ) -> None:
        check_peft()
        check_int("lora_rank", rank, 1)
        check_number("lora_alpha", alpha, 0, open_low=True)
        self._shape = {"r": rank, "lora_alpha": alpha}
        self._targets = module_names(modules)
        self._seed = seed
        super().__init__(reference, critic, reward_model)

    def models(self) -> list[nn.Module]:
        return [self, self.actor]

    def _start(self, model: Any) -> None:
        actor = _sharing(model)
        self._adapt(actor)
        self.__dict__["actor"] = actor  # not as a part of this module
        self.adapter = nn.ParameterList(p for p in actor.parameters() if p.requires_grad)
        for parameter in self.adapter:
            parameter.data = parameter.data.float()

    def _adapt(self, actor: Any) -> None:
        """Puts adapters into the layers.

        By peft itself: `add_adapter` of transformers 5.24 refuses every peft below 0.22.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self._check_modules(actor)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=self._targets,
            lora_dropout=0.0,
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in actor.modules()),
            **self._shape,  # type: ignore[arg-type]
        )
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            try:
                inject_adapter_in_model(config, actor)
            except ValueError as error:
                raise InvalidArgumentError(f"`lora_modules` must be layers that peft can adapt: {error}") from error
        actor.eval()
        source = actor.name_or_path or None
        config.base_model_name_or_path = os.path.abspath(source) if source and os.path.isdir(source) else source

    def _check_modules(self, actor: Any) -> None:
        """Refuses names that fit no module, which peft passes over if another one fits."""
        modules = dict(actor.named_modules())
        wanted = [] if isinstance(self._targets, str) else self._targets
        missing = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in modules)]
        if missing:
            linear = {path.split(".")[-1] for path, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))}
            raise InvalidArgumentError(
                f"`lora_modules` must be {ALL_LINEAR!r} or of the model's modules, such as {sorted(linear)}, got "
                f"{missing}."
            )

    def _adapter_state(self) -> dict[str, Tensor]:
        """The adapter's own tensors by the names that peft gives them on disk."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.actor, save_embedding_layers=False)
        return {f"base_model.model.{name}": x for name, x in state.items()}

    def _save_actor(self, directory: Path) -> None:
        """In peft's format; `AutoModelForCausalLM` puts it onto the reference that was loaded by name."""
        weights = {name: x.contiguous() for name, x in self._adapter_state().items()}
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        self.actor.peft_config["default"].save_pretrained(directory)

    def _load_actor(self, directory: Path) -> None:
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        saved = {name: config.get(name) for name in self._shape} if config else None
        if saved != self._shape:
            raise InvalidArgumentError(f"`directory` must hold an adapter with {self._shape}, got {saved}.")
        own = self._adapter_state()
        weights = load_file(directory / "adapter_model.safetensors", str(self.device))
        if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in weights.items()}:
            raise InvalidArgumentError(
                f"`directory` must hold an adapter of the same layers, got {config['target_modules']}."
            )
        with torch.no_grad():
            for name, x in own.items():
                x.copy_(weights[name])


def _sharing(model: Any) -> Any:
    """A model of its own, in eval mode, whose parameters and buffers are the other's tensors, frozen."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return fuse_activations(copy.deepcopy(model, memo)).eval()
