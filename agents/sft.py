"""`agents.algorithms.sft`, under the name that it had before."""

from agents.algorithms.sft import SFT, SFTConfig
from agents.algorithms.sft import episodes_of as read_demonstrations

__all__ = ["SFT", "SFTConfig", "read_demonstrations"]
