"""Adversarial losses on patch logits and feature matching (spec, cmd.md section 4; lsgan: latte.md section 4.3).

All give one value per sample, (B,).
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Kind = Literal["hinge", "vanilla", "lsgan"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: Kind = "hinge") -> Tensor:
    """Logits (B, ...) -> (B,). hinge: 0.5 (relu(1 - real) + relu(1 + fake)); vanilla: 0.5 (softplus(-real) + softplus(fake));
    lsgan: 0.5 ((real - 1)^2 + fake^2), each the mean over a sample's patches.
    """
    if kind == "hinge":
        return 0.5 * (_mean(F.relu(1 - real)) + _mean(F.relu(1 + fake)))
    if kind == "vanilla":
        return 0.5 * (_mean(F.softplus(-real)) + _mean(F.softplus(fake)))
    if kind == "lsgan":
        return 0.5 * (_mean((real - 1).square()) + _mean(fake.square()))
    raise ValueError(f"unknown discriminator loss {kind!r}: hinge, vanilla or lsgan")


def generator_loss(fake: Tensor, kind: Kind = "hinge") -> Tensor:
    """Logits (B, ...) of generated samples -> (B,): their negative mean; lsgan: the mean of (fake - 1)^2."""
    return _mean((fake - 1).square()) if kind == "lsgan" else -_mean(fake)


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Stage outputs of one discriminator -> (B,): mean absolute difference, summed over all stages but the last (the logits).

    No gradient flows into the real side.
    """
    terms = [_mean((f - r.detach()).abs()) for r, f in zip(real[:-1], fake[:-1], strict=True)]
    return sum(terms[1:], terms[0])


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
