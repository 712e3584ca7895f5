"""Weights and inputs of cases that store none (config.fill "hash"): numbers from an integer hash, the same on any machine.

Element i (in C order, from 0) of tensor number k is u(i, k) in [-0.5, 0.5), scaled by what the tensor is; the rule is in the files' notes.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.parity.case import Case

_CHUNK = 1 << 16
"""Elements at a time, for the processor's cache."""


def hashed(shape: Sequence[int], k: int) -> np.ndarray:
    """u of all elements of tensor number k, float64."""
    count = math.prod(shape)
    out = np.empty(count)
    numbers = np.arange(1, min(count, _CHUNK) + 1, dtype=np.uint32)
    x, shifted = np.empty_like(numbers), np.empty_like(numbers)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        x, shifted = x[: len(part)], shifted[: len(part)]
        np.add(numbers[: len(part)], np.uint32((start + k * 2654435761) % 2**32), out=x)  # uint32 wraps, as the rule wants it
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            np.right_shift(x, np.uint32(shift), out=shifted)
            np.bitwise_xor(x, shifted, out=x)
            np.multiply(x, np.uint32(factor), out=x)
        np.multiply(x, 2.0**-32, out=part)
        part -= 0.5
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
