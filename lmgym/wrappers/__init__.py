"""Wrappers, single and vector."""

from lmgym.wrappers.action_mask import ActionMask, VectorActionMask
from lmgym.wrappers.embedding_observation import EmbeddingObservation, VectorEmbeddingObservation
from lmgym.wrappers.one_hot_observation import OneHotObservation, VectorOneHotObservation
from lmgym.wrappers.policy_kl import PolicyKL, VectorPolicyKL
from lmgym.wrappers.text_actions import TextActions
from lmgym.wrappers.text_observation import TextObservation, VectorTextObservation
from lmgym.wrappers.top_k_actions import TopKActions, VectorTopKActions

__all__ = [
    "ActionMask",
    "EmbeddingObservation",
    "OneHotObservation",
    "PolicyKL",
    "TextActions",
    "TextObservation",
    "TopKActions",
    "VectorActionMask",
    "VectorEmbeddingObservation",
    "VectorOneHotObservation",
    "VectorPolicyKL",
    "VectorTextObservation",
    "VectorTopKActions",
]
