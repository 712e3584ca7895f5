"""AdamW, its learning rate over time, and a step that a non-finite gradient leaves undone without asking the host."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from engine.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: linear warm-up, then constant or half a cosine down to final_lr_ratio * lr."""
    if step < config.warmup_steps:
        start = config.warmup_start
        if start > 0:
            return config.lr * (start + (1 - start) * step / config.warmup_steps)
        return config.lr * (step + 1) / config.warmup_steps  # from 0 the first step would do nothing
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def clip_limit(config: OptimConfig, step: int) -> float:
    """Norm that the gradient of step `step` (from 0) is clipped to; 0: not clipped."""
    return config.clip_norm if step >= config.clip_start else 0.0


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig, *, sharded: bool) -> Optimizer:
    """Fused AdamW over the parameters as they are after wrapping."""
    # An optimiser over the parameters from before sharding would step tensors that nobody uses, without an error.
    assert all(isinstance(parameter, DTensor) == sharded for parameter in parameters), "the optimiser must be built after sharding"
    return AdamW(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Total 2-norm over all ranks of the gradients of one network, a scalar on the device, the same on every rank.

    All parameters are sharded or none is. A number that is not finite on one rank makes the norm so on all.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert gradients, "the loss reached no parameter of the network in turn"
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_apart(parts: Iterable[Sequence[nn.Parameter]], clip_norm: float, divisor: Tensor) -> None:
    """Scale the gradients of each part in place, so that they have the norm `clip_norm` at most once they are divided by `divisor`."""
    for part in parts:
        gradients = [parameter.grad for parameter in part if parameter.grad is not None]
        if gradients:
            excess = ((gradient_norm(part) / divisor + 1e-6) / clip_norm).clamp(min=1.0)
            torch._foreach_div_(local_parts(gradients), excess.float().to(gradients[0].device))


def guarded_step(optimizer: Optimizer, norm: Tensor, clip_norm: float, divisor: Tensor, finite: Tensor) -> None:
    """Step with gradients divided by `divisor` and then clipped to `clip_norm` (0: not), or leave everything as it is.

    `norm`: of the undivided gradients. `finite`: bool scalar on the device; false: weights, moments and step counters stay
    untouched. Both act inside the fused kernel: no pass over the gradients, no host synchronisation, but for parameters that
    lie in host memory, which wait for the two numbers.
    """
    scale = divisor
    if clip_norm > 0:
        scale = divisor * ((norm / divisor + 1e-6) / clip_norm).clamp(min=1.0)
    place = optimizer.param_groups[0]["params"][0].device
    optimizer.grad_scale = scale.float().to(place)  # type: ignore[attr-defined]
    optimizer.found_inf = (~finite).float().to(place)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]
