"""The one key by which anything kept is found again."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["weights_fingerprint"]


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Tells models apart by some of every weight: fine-tuning may leave any of them alone. The same in every dtype."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        some = weight.detach().flatten()
        some = some[:: max(len(some) // 64, 1)].to("cpu", torch.bfloat16)
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
