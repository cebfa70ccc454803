"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x becomes W x + alpha / r B A x, and W stays as it is.

A (r, in) is drawn at random and B (out, r) is 0 at first, so that the policy starts as the reference. W is the
reference's own tensor: there is one copy of it in memory, for the env and for the policy.

Where the reference was loaded as an adapter A_0, B_0 on a base, W is the base's weight plus alpha / r B_0 A_0. A policy
that goes on with this adapter starts from A = A_0 and B = B_0, and computes W x + alpha / r (B A x - B_0 A_0 x), which
is the base with A and B: no weight of the base alone is kept.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from agents.policies.actor_critic import ActorCritic, Critic
from agents.policies.lora_start import read_start
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number
from lmgym.models.activations import fuse_activations
from lmgym.models.causal import CausalLM

ALL_LINEAR = "all-linear"
Start = Literal["new", "reference"]
_OWN = "default"  # the name of the adapter that learns
_TAKEN_OFF = "start"  # of the one that it has started from


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
        start: "new"; or "reference", the adapter that the reference was loaded with, whose rank, alpha and modules it
            has then.
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
        start: Start = "new",
        critic: Critic = "shared",
        reward_model: nn.Module | None = None,
    ) -> None:
        check_peft()
        check_choice("lora_start", start, get_args(Start))
        check_int("lora_rank", rank, 1)
        check_number("lora_alpha", alpha, 0, open_low=True)
        self._shape = {"r": rank, "lora_alpha": alpha}
        self._targets = module_names(modules)
        self._seed = seed
        self._start_from = start
        super().__init__(reference, critic, reward_model)

    def models(self) -> list[nn.Module]:
        return [self, self.actor]

    def _start(self, model: Any) -> None:
        actor = _sharing(model)
        if self._start_from == "new":
            self._adapt(actor, self._new_config(actor), _OWN)
        else:
            self._go_on(actor, model)
        actor.eval()
        self.__dict__["actor"] = actor  # not as a part of this module
        self.adapter = nn.ParameterList(p for p in actor.parameters() if p.requires_grad)
        for parameter in self.adapter:
            parameter.data = parameter.data.float()

    def _new_config(self, actor: Any) -> Any:
        """Of an adapter on the reference."""
        from peft import LoraConfig

        self._check_modules(actor)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=self._targets,
            lora_dropout=0.0,
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in actor.modules()),
            **self._shape,  # type: ignore[arg-type]
        )
        source = actor.name_or_path or None
        config.base_model_name_or_path = os.path.abspath(source) if source and os.path.isdir(source) else source
        return config

    def _adapt(self, actor: Any, config: Any, name: str) -> None:
        """Puts adapters into the layers.

        By peft itself: `add_adapter` of transformers 5.24 refuses every peft below 0.22.
        """
        from peft import inject_adapter_in_model

        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there may be two adapters
            torch.manual_seed(self._seed)
            try:
                inject_adapter_in_model(config, actor, name)
            except ValueError as error:
                raise InvalidArgumentError(f"`lora_modules` must be layers that peft can adapt: {error}") from error

    def _go_on(self, actor: Any, model: Any) -> None:
        """Puts the reference's own adapter into the layers twice: to learn, and to be taken off the merged weights."""
        from peft.tuners.lora import LoraLayer

        config, weights = read_start(model)
        self._shape = {"r": config.r, "lora_alpha": config.lora_alpha}
        for name in (_OWN, _TAKEN_OFF):
            self._adapt(actor, copy.deepcopy(config), name)
            for parameter in _parameters_of(actor, name):
                parameter.data = parameter.data.float()
            for tensor_name, x in _adapter_state(actor, name).items():
                x.data.copy_(weights[tensor_name])
        for module in actor.modules():
            if isinstance(module, LoraLayer):
                module.scaling[_TAKEN_OFF] = -module.scaling[_TAKEN_OFF]
                module.set_adapter([_OWN, _TAKEN_OFF])
        for parameter in _parameters_of(actor, _TAKEN_OFF):
            parameter.requires_grad_(False)

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

    def _save_actor(self, directory: Path) -> None:
        """In peft's format; `AutoModelForCausalLM` puts it onto the reference that was loaded by name."""
        weights = {name: x.contiguous() for name, x in _adapter_state(self.actor, _OWN).items()}
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        self.actor.peft_config[_OWN].save_pretrained(directory)

    def _load_actor(self, directory: Path) -> None:
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        saved = {name: config.get(name) for name in self._shape} if config else None
        if saved != self._shape:
            raise InvalidArgumentError(f"`directory` must hold an adapter with {self._shape}, got {saved}.")
        own = _adapter_state(self.actor, _OWN)
        weights = load_file(directory / "adapter_model.safetensors", str(self.device))
        if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in weights.items()}:
            raise InvalidArgumentError(
                f"`directory` must hold an adapter of the same layers, got {config['target_modules']}."
            )
        with torch.no_grad():
            for name, x in own.items():
                x.copy_(weights[name])


def _parameters_of(actor: Any, adapter: str) -> list[nn.Parameter]:
    """The factors of an adapter in all layers."""
    return [p for path, p in actor.named_parameters() if ".lora_" in path and adapter in path.split(".")]


def _adapter_state(actor: Any, adapter: str) -> dict[str, Tensor]:
    """An adapter's own tensors by the names that peft gives them on disk."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(actor, adapter_name=adapter, save_embedding_layers=False)
    return {f"base_model.model.{name}": x for name, x in state.items()}


def _sharing(model: Any) -> Any:
    """A model of its own, in eval mode, whose parameters and buffers are the other's tensors, frozen."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return fuse_activations(copy.deepcopy(model, memo)).eval()
