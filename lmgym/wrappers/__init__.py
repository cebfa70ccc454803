"""Wrappers, single and vector."""

from lmgym.wrappers.policy_kl import PolicyKL, VectorPolicyKL

__all__ = ["PolicyKL", "VectorPolicyKL"]
