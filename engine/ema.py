"""Exponential moving average of a network's weights: a module under the same sharding plan, updated by one foreach call."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.config import EmaConfig


class Ema:
    """`module` holds the average of `source`: trainable weights averaged in fp32, buffers copied. Frozen weights never differ."""

    def __init__(self, module: nn.Module, source: nn.Module, config: EmaConfig) -> None:
        """Both modules sharded alike and equal in value; their tensors must stay where they are in memory (loads are in place)."""
        self.module = module
        self._config = config
        pairs = list(zip(module.parameters(), source.parameters(), strict=True))
        # Lists of local shards, made once: walking modules and DTensor dispatch would cost host time at every update.
        self._averages = _local(average for average, weight in pairs if weight.requires_grad)
        self._weights = _local(weight for _, weight in pairs if weight.requires_grad)
        self._buffers = list(module.buffers()), list(source.buffers())

    def decay(self, step: int) -> float:
        """Decay of the update after step `step` (from 0)."""
        return min(self._config.decay, (1 + step) / (10 + step)) if self._config.warmup else self._config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- decay * average + (1 - decay) * weight."""
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self.decay(step))
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)


@torch.no_grad()
def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]
