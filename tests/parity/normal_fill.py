"""Weights of cases that store none (metadata `weights`: "rule:W1:<seed>"): normal numbers, seeded by the names of the parameters.

A file of several networks has a seed for each: "rule:W1:autoencoder=100,unet=230".
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.parity.case import Case

_RULE = "rule:W1:"


def case_weights(case: Case, shapes: Mapping[str, Sequence[int]], network: str = "") -> dict[str, Tensor]:
    """Trainable parameters by their official names and shapes -> their values: those that the case stores, or those of its rule.

    Stored ones have what the release saves beside them, too.
    """
    if not case.weights.startswith(_RULE):
        return case.state()
    parts = (part.rpartition("=") for part in case.weights.removeprefix(_RULE).split(","))
    seeds = {name: int(seed) for name, _, seed in parts}
    return normals(shapes, seeds[network])


def normals(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Name -> float32 values: tokens and positions 0.5 z, scales 1 + 0.1 z, other vectors 0.1 z, the rest z / sqrt(fan in)."""
    return {name: _value(name, tuple(shape), seed) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    state = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = state.standard_normal(int(np.prod(shape))).astype(np.float32)
    if name.endswith(("_token", "_pos_embedding")):
        z = np.float32(0.5) * z
    elif len(shape) <= 1:
        z = np.float32(0.1) * z + np.float32(name.endswith("weight"))
    else:
        z = z / np.float32(np.sqrt(z.size / shape[0]))
    return torch.from_numpy(z.reshape(shape))
