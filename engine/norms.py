"""Batch norms whose statistics are those of a whole micro-batch over all ranks, so that training on any number of ranks is the same.

`torch.nn.SyncBatchNorm` refuses tensors on the CPU; this does the same with operations that every device and backend has.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def share_norms(module: nn.Module) -> None:
    """Make the batch norms inside a module share their statistics over all ranks from now on; their names and classes stay.

    In training each call is a collective forward and backward: every rank makes the same calls in the same order.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = functools.partial(_forward, norm)  # type: ignore[method-assign]


@torch.compiler.disable
def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What the norm's own forward pass gives in one process that holds the samples of all ranks; b c ... -> the same."""
    if not norm.training and norm.running_mean is not None:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    mean, variance, count = _moments(x)
    if norm.training and norm.running_mean is not None:
        _remember(norm, mean.detach(), (variance * count / (count - 1)).detach())
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = (variance + norm.eps).rsqrt().float()
    centred = x.float() - mean.float().view(shape)
    if not norm.affine:
        return (centred * scale.view(shape)).to(x.dtype)
    return torch.addcmul(norm.bias.view(shape), centred, (scale * norm.weight).view(shape)).to(x.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over the samples of all ranks, and how many numbers they are of: float64, one exchange.

    Each rank's variance is taken about its own mean, and only what the few means tell is added up in double precision: a variance
    that is small beside its mean keeps its digits.
    """
    axes = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x.float(), axes, correction=0)
    count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
    mean, variance = mean.double(), variance.double()
    sums: Tensor = _SumOverRanks.apply(torch.cat([count * mean, count * (variance + mean.square()), count]))
    (total, squares), count = sums[:-1].view(2, -1), sums[-1]
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0), count


def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as the norm's own forward pass does."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        # Without a momentum, the mean of all that came so far. The counter stays on the device.
        running.lerp_(value.to(running), norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.to(running))


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on it, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradients[0].contiguous())
