"""Checks a composed Hydra config against the dataclass it is for, all of it at once, before anything is built.

And says in a line what Hydra says in a page: `short_errors`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import CompactHydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lmgym.errors import InvalidArgumentError, LmGymError, unknown_name
from lmgym.ranges import check_value, field_types, number_type

T = TypeVar("T")
CONF = Path(__file__).parents[2] / "conf"

# What other libraries call a key, by the last part of its name.
_OTHER_NAMES = {
    "task": "environment env_id env_name task_name setting",
    "agent": "algo algorithm method trainer",
    "total_timesteps": "steps timesteps total_steps num_steps max_steps total_tokens",
    "checkpoint_every": "save_every save_steps save_freq checkpoint_freq",
    "resume": "run resume_from resume_from_checkpoint load checkpoint",
    "hydra.run.dir": "out output output_dir out_dir run_dir log_dir save_dir",
    "device": "gpu cuda",
    "seeds": "n_seeds num_seeds",
    "seed": "random_seed",
    "env.model": "model model_name model_name_or_path reference ref_model sft_model_path",
    "env.reward": "reward reward_model reward_func reward_funcs reward_model_path",
    "env.prompts": "prompts dataset dataset_name train_dataset prompt_file",
    "env.kl_coef": "kl_coef kl_coeff beta init_kl_coef kl_beta kl_penalty",
    "env.gamma": "gamma discount",
    "env.max_new_tokens": "max_new_tokens max_tokens max_length response_length max_completion_length horizon",
    "env.missing_eos_penalty": "missing_eos_penalty eos_penalty",
    "agent.policy": "policy",
    "agent.lr": "lr learning_rate step_size",
    "agent.batch_size": "batch_size rollout_batch_size",
    "agent.minibatches": "minibatches num_minibatches num_mini_batches n_minibatches",
    "agent.micro_batch_size": "micro_batch_size per_device_train_batch_size",
    "agent.epochs": "epochs n_epochs num_epochs num_ppo_epochs ppo_epochs update_epochs",
    "agent.gae_lambda": "gae_lambda lam lambda_ gae",
    "agent.clip_range": "clip_range cliprange clip_eps clip_coef clip_epsilon epsilon",
    "agent.clip_range_value": "clip_range_value cliprange_value clip_range_vf",
    "agent.entropy_coef": "entropy_coef ent_coef entropy_coeff",
    "agent.vf_coef": "vf_coef value_coef value_loss_coef",
    "agent.max_grad_norm": "max_grad_norm grad_clip clip_grad_norm",
    "agent.lr_schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "agent.group_size": "group_size num_generations responses_per_prompt rloo_k",
    "evaluation.samples": "samples eval_samples num_eval_samples n_eval_episodes",
    "evaluation.prompts": "eval_prompts",
}
SYNONYMS = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}
# The same for `python -m agents.reward`, where it is not as above.
_OTHER_NAMES_OF_REWARDS = {
    "preferences": "dataset dataset_name train_dataset data feedback labels prefs",
    "model": "model_name model_name_or_path base_model policy sft_model_path",
    "reward.objective": "objective loss loss_type",
    "reward.lr": "lr learning_rate step_size",
    "reward.batch_size": "batch_size per_device_train_batch_size",
    "reward.micro_batch_size": "micro_batch_size",
    "reward.epochs": "epochs n_epochs num_epochs num_train_epochs",
    "reward.max_grad_norm": "max_grad_norm grad_clip",
    "reward.held_out": "held_out eval_split val_split test_size eval_dataset",
    "reward.lora_rank": "lora_rank lora_r lora use_peft",
    "reward.precision": "precision dtype fp16 bf16",
    "reward.ensemble": "ensemble ensemble_size num_models members",
    "reward.centre": "centre center normalize normalise center_rewards_coefficient",
    "reward.ties": "ties",
    "reward.margin": "margin",
    "reward.patience": "patience early_stopping_patience",
    "reward.eval_every": "eval_every eval_steps",
}
SYNONYMS_OF_REWARDS = {other: name for name, others in _OTHER_NAMES_OF_REWARDS.items() for other in others.split()}


def validated(kind: type[T], values: Mapping[str, Any], key: str) -> T:
    """Builds a dataclass from plain values.

    Args:
        kind: the dataclass. values: its fields by name. key: where they sit in the config, for the message.

    Raises:
        UnknownNameError: for a name that is no field.
        InvalidArgumentError: naming every value of a wrong type, what was expected and what came.
    """
    types = field_types(kind)
    check_values(types, values, key)
    for name in values:
        if name not in types:
            raise unknown_name(f"{key}.{name}", name, types)
    whole = {name: float(value) for name, value in values.items() if _is_whole_float(types[name], value)}
    return kind(**{**values, **whole})


def _is_whole_float(kind: Any, value: Any) -> bool:
    return number_type(kind) is float and type(value) is int


def check_values(types: Mapping[str, Any], values: Mapping[str, Any], key: str) -> None:
    """Checks those values whose types are known.

    Args:
        types: by name. values: by name. key: where they sit in the config, for the message.

    Raises:
        InvalidArgumentError: naming every value of a wrong type, what was expected and what came.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgumentError(f"`{key}` must be names with values, got {values!r}.")
    wrong = []
    for name in [name for name in values if name in types]:
        try:
            check_value(f"{key}.{name}", values[name], types[name])
        except LmGymError as error:
            wrong.append(str(error))
    if wrong:
        raise InvalidArgumentError("\n".join(wrong))


def explained(error: CompactHydraException) -> str:
    """What Hydra found wrong with an override, with the nearest name where it found none of that name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown_name(group, name, error.options))
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and isinstance(cause.parent_node, DictConfig):
        name = str(cause.full_key)
        if name.startswith("task."):
            return told_new_name(name)
        meant = _meant(name, cause.parent_node._get_root())
        if meant is not None and meant != name:
            return f"`{name}` is called `{meant}` here: {meant}=..."
        known = [str(key) for key in cause.parent_node if key not in ("hydra", "_target_")]
        if "agent" in known and "labels" not in known:  # of training, where a choice that stands at null has no key
            known.append("experiment")
        more = f" To add it, write +{name}=..." if name.count(".") > 1 else ""
        if known:
            return f"{unknown_name(name, str(cause.key), known)}{more}"
    return str(error) if cause is None else f"{error}\n{cause}"


def _meant(name: str, root: Any) -> str | None:
    """The key of a command that a name of other libraries stands for; None where there is none."""
    last = name.rpartition(".")[2].lower()
    own = {**SYNONYMS, **SYNONYMS_OF_REWARDS} if "preferences" in root else SYNONYMS
    meant = last if last in _OTHER_NAMES else own.get(last)
    return meant if meant is not None and meant.partition(".")[0] in root else None


def told_new_name(name: str) -> str:
    """What a key is called that once was a part of `task`.

    Args:
        name: such as "task.kl_coef".
    """
    key = name.removeprefix("task.")
    if key in ("task", "name", "setting"):
        return f"`{name}` is called `task` here, and its value is a whole name: task=keyword-32"
    now = key if key in _OTHER_NAMES else f"env.{key}"  # `device`, for one, is a key of its own
    return f"`{name}` is called `{now}` here: {now}=..."


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with a line for an override that Hydra refuses, unless HYDRA_FULL_ERROR asks for more."""
    if "HYDRA_FULL_ERROR" in os.environ:
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print
    try:
        yield
    except CompactHydraException as error:
        sys.exit(explained(error))
    except (LmGymError, OmegaConfBaseException) as error:  # ours: of a run of a multirun, whose other runs went on
        sys.exit(str(error))
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
