"""Condition vectors: one array of numbers beside each clip, such as the embedding of a text, as the member `<key>.emb.npy` of its shard.

All of a set have one shape and type. index.json says them: `cond_shape`, `cond_dtype`, `cond_dim` (numbers in one), `cond_nbytes` (bytes
of a member: a npy file, its numbers at the end in C order, little-endian). The offset index has, for each sample, `cond_offset`, where the
member's bytes begin in the tar, and `cond_crc32` of all of them.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.npy import MAX_HEADER_BYTES, npy_array, npy_file, npy_header

MEMBER = "emb.npy"
"""Its name after the sample's key; `<name of the video without ending>.emb.npy` beside a source video."""
TYPES = {"float16": "<f2", "float32": "<f4"}
MAX_VECTOR_BYTES = 1 << 26


@dataclass(frozen=True)
class CondFormat:
    """What every condition vector of a set is."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {'x'.join(map(str, self.shape))}"

    @property
    def values(self) -> int:
        """Numbers in one."""
        return math.prod(self.shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the numbers: the end of the member."""
        return self.values * np.dtype(TYPES[self.dtype]).itemsize

    def check(self) -> None:
        """ValueError for a type or shape that no set may have."""
        if self.dtype not in TYPES:
            raise ValueError(f"{self.dtype} numbers; save them as float16 or float32")
        if not self.shape or min(self.shape) < 1 or self.data_bytes > MAX_VECTOR_BYTES:
            raise ValueError(f"shape {self.shape}: at least one number, at most {MAX_VECTOR_BYTES >> 20} MiB of them")

    def to_meta(self) -> dict[str, Any]:
        """The entries of index.json."""
        nbytes = len(npy_file(np.zeros(self.shape, TYPES[self.dtype])))
        return {"cond_shape": list(self.shape), "cond_dtype": self.dtype, "cond_dim": self.values, "cond_nbytes": nbytes}

    @classmethod
    def of(cls, meta: dict[str, Any]) -> "CondFormat | None":
        """Of an index.json; None where there are no vectors. ValueError, KeyError or TypeError when it says what cannot be."""
        if "cond_shape" not in meta:
            return None
        shape, nbytes = meta["cond_shape"], meta["cond_nbytes"]
        if not isinstance(shape, list) or not all(type(side) is int for side in [*shape, nbytes, meta["cond_dim"]]):
            raise ValueError("cond_shape is not a list of whole numbers")
        found = cls(tuple(shape), str(meta["cond_dtype"]))
        found.check()
        if meta["cond_dim"] != found.values or not 0 < nbytes - found.data_bytes <= MAX_HEADER_BYTES:
            raise ValueError(f"cond_dim {meta['cond_dim']}, cond_nbytes {nbytes} for {found}")
        return found

    def read(self, payload: bytes) -> np.ndarray:
        """The vector of a member, of `shape`. ValueError when it is another, or not all of it is finite."""
        array = npy_array(payload)
        if (array.shape, array.dtype.name) != (self.shape, self.dtype):
            raise ValueError(f"{array.dtype} {'x'.join(map(str, array.shape))}, not {self}")
        if not np.isfinite(array).all():
            raise ValueError("not all numbers are finite")
        return array

    def member(self, payload: bytes) -> bytes:
        """What is stored of a npy file, whatever its byte order. ValueError as of `read`."""
        return npy_file(self.read(payload).astype(TYPES[self.dtype]))


def look(path: Path) -> CondFormat:
    """What a npy file holds, by its header. ValueError when no set may have it, OSError when it cannot be read."""
    with path.open("rb") as file:
        shape, _, dtype = npy_header(io.BytesIO(file.read(MAX_HEADER_BYTES)))
    found = CondFormat(shape, dtype.name)
    found.check()
    return found
