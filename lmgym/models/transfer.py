"""Copies from the host to a device that neither waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device.

    A GPU copies from pinned memory in its own time. From other memory the host waits until all work before the copy
    is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
