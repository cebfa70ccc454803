"""Marks of tests that need an optional dependency."""

from __future__ import annotations

import importlib.util

import pytest

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")
needs_contrib = pytest.mark.skipif(not importlib.util.find_spec("sb3_contrib"), reason="needs sb3-contrib")
