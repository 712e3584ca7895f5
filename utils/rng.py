"""Addressed randomness: every draw is a pure function of (seed, stream name, sample index), never of what was drawn before.

So results do not depend on the number of ranks, the batch size or a restart, and there is no generator state to save.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def derive_seed(seed: int, stream: str) -> int:
    """64-bit seed of a named stream of `seed`."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(keys: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> uint64, every input bit reaching every output bit."""
    with np.errstate(over="ignore"):
        z = (keys + np.uint64(0x9E3779B97F4A7C15)) & _MASK
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_indices(seed: int, stream: str, index: np.ndarray) -> np.ndarray:
    """uint64 (n,): one independent 64-bit number for each index of a stream."""
    base = np.uint64(derive_seed(seed, stream))
    return _mix(_mix(index.astype(np.uint64)) ^ base)


class SampleRng:
    """Draws for a batch of samples. `index` (b, int64, CPU) addresses them; results land on `device`."""

    def __init__(self, seed: int, index: Tensor, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.index = index
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.index)

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, (b, *shape) float32."""
        out = torch.empty((len(self), *shape), device=self.device)
        if self.device.type == "meta":
            return out
        generator = torch.Generator(self.device)
        for row, key in zip(out, self._hash(stream), strict=True):
            generator.manual_seed(int(key >> np.uint64(1)))
            row.normal_(generator=generator)
        return out

    def uniform(self, stream: str) -> Tensor:
        """One number in [0, 1) per sample, (b,) float32; the same on every device."""
        return self._place(torch.from_numpy((self._hash(stream) >> np.uint64(40)).astype(np.float32)) * 2.0**-24)

    def integers(self, stream: str, high: int | Tensor) -> Tensor:
        """One integer in [0, high) per sample, (b,) int64; `high` may differ per sample (CPU tensor)."""
        bound = np.asarray(high, dtype=np.uint64)
        # The 64-bit modulus is biased by less than high / 2**64.
        return self._place(torch.from_numpy((self._hash(stream) % bound).astype(np.int64)))

    def _hash(self, stream: str) -> np.ndarray:
        return hash_indices(self.seed, stream, self.index.numpy())

    def _place(self, value: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)
