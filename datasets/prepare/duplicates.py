"""Clips that show the same: a hash of what is seen, and a search that finds all hashes within a distance.

The hash survives another size, rate of compression or brightness; it does not survive crops, mirrors or another start in time.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

MOMENTS = 4
"""Frames of a clip that are hashed, spread from the first to the last; 64 bits each."""
SIDE = 32
FLAT = 2.0
"""A frame whose brightness varies less, in levels of 255, shows nothing to tell it by."""
BANDS, BAND_BITS = 16, 16
TAIL = 8192
"""Hashes that are compared one by one before they are sorted in."""


@cache
def _cosines() -> np.ndarray:
    """(8, SIDE): the lowest cosines of a type-II transform."""
    k, n = np.mgrid[:8, :SIDE]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


def fingerprint(frames: np.ndarray) -> str:
    """64 hexadecimal digits for what uint8 (t, h, w, 3) shows; empty when most of the frames looked at are flat.

    A frame's 64 bits say which of its lowest spatial frequencies are stronger than the middle one.
    """
    picked = frames[np.linspace(0, len(frames) - 1, MOMENTS).round().astype(int)]
    x = torch.from_numpy(np.ascontiguousarray(picked)).permute(0, 3, 1, 2)
    small = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    grey = small.permute(0, 2, 3, 1).numpy() @ np.array([0.299, 0.587, 0.114])
    flat = grey.std(axis=(1, 2)) < FLAT
    if flat.sum() > MOMENTS // 2:
        return ""
    waves = (_cosines() @ grey @ _cosines().T).reshape(MOMENTS, 64)
    waves[:, 0] = 0  # overall brightness
    bits = (waves > np.median(waves, axis=1, keepdims=True)) & ~flat[:, None]
    return np.packbits(bits).tobytes().hex()


class Duplicates:
    """The fingerprints seen so far. Finds every one within a Hamming distance, exactly.

    Two hashes of 256 bits that differ in at most `distance` bits differ in at most distance // 16 of them in one of 16 bands of 16
    bits: only hashes that agree so far in a band are compared.
    """

    def __init__(self, distance: int) -> None:
        assert 0 <= distance < BANDS * BAND_BITS
        self.distance = distance
        self.names: list[str] = []
        self._bits = np.empty((BANDS, 1024), np.uint16)
        self._sorted = 0
        self._order = np.empty((BANDS, 0), np.int32)
        self._starts = np.zeros((BANDS, (1 << BAND_BITS) + 1), np.int32)
        near = [mask for mask in range(1 << BAND_BITS) if mask.bit_count() <= distance // BANDS]
        self._near = np.array(near, np.uint16)
        """What a band may differ by."""

    def add(self, fingerprint: str, name: str) -> None:
        """Notes a clip. Empty fingerprints match nothing and are not kept."""
        if not fingerprint:
            return
        if len(self.names) == self._bits.shape[1]:
            self._bits = np.concatenate([self._bits, np.empty_like(self._bits)], axis=1)
        self._bits[:, len(self.names)] = _bands(fingerprint)
        self.names.append(name)
        if len(self.names) - self._sorted > TAIL:
            self._sort()

    def find(self, fingerprint: str) -> str | None:
        """Name of the first clip noted within the distance, or None."""
        if not fingerprint:
            return None
        bands = _bands(fingerprint)
        rows = np.concatenate([self._candidates(bands), np.arange(self._sorted, len(self.names))])
        off = np.bitwise_count(self._bits[:, rows] ^ bands[:, None]).sum(axis=0, dtype=np.int32)
        near = rows[off <= self.distance]
        return self.names[int(near.min())] if len(near) else None

    def _candidates(self, bands: np.ndarray) -> np.ndarray:
        """Sorted-in rows that may be near enough."""
        found: list[np.ndarray] = [np.empty(0, np.int64)]
        for band, value in enumerate(bands):
            starts = self._starts[band]
            for at in (value ^ self._near).tolist():
                if starts[at] != starts[at + 1]:
                    found.append(self._order[band, starts[at] : starts[at + 1]])
        return np.concatenate(found)

    def _sort(self) -> None:
        """Puts all rows into the table of each band: the rows that have value v are order[starts[v]:starts[v + 1]]."""
        self._sorted = len(self.names)
        bits = self._bits[:, : self._sorted]
        self._order = np.argsort(bits, axis=1, kind="stable").astype(np.int32)
        for band in range(BANDS):
            self._starts[band, 1:] = np.cumsum(np.bincount(bits[band], minlength=1 << BAND_BITS))


def _bands(fingerprint: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(fingerprint), np.uint16)
