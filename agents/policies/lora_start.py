"""An adapter that a policy goes on with: the one that its reference was loaded with, such as that of an SFT run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.models.adapters import base_of, is_adapter


def read_start(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The adapter that a model was loaded with, which has been merged into its weights.

    Args:
        model: the reference's; `name_or_path` is where it was loaded from.

    Returns:
        Its peft config, as one to train, with the directory or hub name of its base; and its weights by their names on
        disk.

    Raises:
        InvalidArgumentError: for a model that is no adapter on another, and for an adapter that adds more to the base
            than products of A and B.
    """
    name = model.name_or_path
    if not name or not is_adapter(name):
        raise InvalidArgumentError(
            "`lora_start` must be 'new' where the reference is no adapter on another model, got 'reference': name the "
            "directory of an adapter in `model`, or leave `lora_start` out."
        )
    base = base_of("model", name)
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    config = PeftConfig.from_pretrained(name, trust_remote_code=False)
    weights = load_peft_weights(name, "cpu")
    more = sorted(weight for weight in weights if ".lora_" not in weight)
    if getattr(config, "use_dora", False):
        more = ["DoRA"]
    if config.peft_type != "LORA":
        more = [str(config.peft_type)]
    if more:
        raise InvalidArgumentError(
            f"`lora_start` must be 'new' where the reference's adapter is not LoRA alone, got one with {more[0]}: "
            "'new' trains an adapter on top of the reference."
        )
    config.inference_mode = False
    config.lora_dropout = 0.0
    config.base_model_name_or_path = base
    return config, weights
