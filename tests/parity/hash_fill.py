"""Weights and inputs of cases that store none (config.fill "hash"): numbers from an integer hash, the same on any machine.

Element i (in C order, from 0) of tensor number k is u(i, k) in [-0.5, 0.5), scaled by what the tensor is; the rule is in the files' notes.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.parity.case import Case

_CHUNK = 1 << 22
_MASK = np.uint64(0xFFFFFFFF)


def hashed(shape: Sequence[int], k: int) -> np.ndarray:
    """u of all elements of tensor number k, float64."""
    count = math.prod(shape)
    out = np.empty(count)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        x = (np.arange(start + 1, stop + 1, dtype=np.uint64) + np.uint64(k * 2654435761 % 2**32)) & _MASK
        x ^= x >> np.uint64(16)
        x = (x * np.uint64(0x7FEB352D)) & _MASK
        x ^= x >> np.uint64(15)
        x = (x * np.uint64(0x846CA68B)) & _MASK
        x ^= x >> np.uint64(16)
        out[start:stop] = x / 2**32 - 0.5
    return out.reshape(shape)


def filled(shapes: Mapping[str, Sequence[int]], gain: float) -> dict[str, Tensor]:
    """Parameters and batch norms' running statistics by their official names and shapes -> their values, float32.

    Numbered in the order of their names; other buffers must not be among them.
    """
    return {name: _value(name, tuple(shapes[name]), k, gain) for k, name in enumerate(sorted(shapes))}


def fill_case(case: Case, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """`filled` as the case's config says it."""
    assert case.config("fill") == "hash" and case.config("n_filled") == len(shapes), f"the rule fills {len(shapes)} tensors"
    return filled(shapes, case.config("fill_gain"))


def hashed_input(shape: Sequence[int], k: int, scale: float) -> Tensor:
    """Input number k, float32."""
    return torch.from_numpy((scale * hashed(shape, k)).astype(np.float32))


def _value(name: str, shape: tuple[int, ...], k: int, gain: float) -> Tensor:
    u = hashed(shape, k)
    if len(shape) >= 2:
        u *= gain * 2 * math.sqrt(3) / math.sqrt(math.prod(shape[1:]))
    elif name.endswith(("bias", "running_mean")):
        u *= 0.2
    else:
        u = 1 + 0.2 * u
    return torch.from_numpy(u.astype(np.float32))
