"""One stored sample against what the set says of it: does it decode, to the right sizes, and do card, label and caption agree?"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from datasets.conditions import MEMBER, CondFormat
from datasets.npy import npy_header
from datasets.shards import frame_sums
from datasets.sources.base import hash16
from datasets.stored_video import decode_window

_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class BadSample(Exception):
    """What is wrong with a sample."""


@dataclass(frozen=True)
class SetFacts:
    """What index.json says of every sample."""

    codec: str
    clip_length: int
    size: tuple[int, int]
    classes: tuple[str, ...]
    by_frame: bool = True
    """Keys end in the clip's first frame, as its card says it; else in a frame at the target rate."""
    dtype: str = ""
    tensors: Mapping[str, tuple[int, ...]] | None = None
    """Of a latent set: its type, and the name and shape of each tensor."""
    framewise: bool = False
    """Of a latent set: tensors have a row of that shape for each frame."""
    cond: CondFormat | None = None
    """What the condition vectors are, where there are any."""

    @classmethod
    def of(cls, index: dict[str, Any]) -> "SetFacts":
        """Takes it out of an index that `check_meta` has passed."""
        codec, (height, width) = index["codec"], index["size"]
        tensors = {name: tuple(shape) for name, shape in index["tensors"].items()} if codec["name"] == "latent" else None
        by_frame = not index.get("transform", {}).get("fps")
        length, classes = int(index["clip_length"]), tuple(index["classes"])
        framewise = codec.get("framewise") is True
        return cls(
            codec["name"], length, (height, width), classes, by_frame, codec.get("dtype", ""), tensors, framewise, CondFormat.of(index)
        )


def decode_clip(payload: bytes, codec: str, frames: int) -> np.ndarray:
    """A stored clip, npy or mp4, as uint8 (t, h, w, 3). ValueError when it is not one of that many frames."""
    if codec == "mp4":
        return decode_window(payload, 0, frames)
    buffer = io.BytesIO(payload)
    shape, is_fortran, dtype = npy_header(buffer)
    if dtype != np.uint8 or is_fortran or len(shape) != 4 or shape[0] != frames or shape[3] != 3:
        raise ValueError(f"{dtype} of shape {shape}, not uint8 of {frames} frames")
    if min(shape) < 1 or math.prod(shape) != len(payload) - buffer.tell():
        raise ValueError(f"{len(payload) - buffer.tell()} bytes for shape {shape}")
    return np.frombuffer(payload, np.uint8, offset=buffer.tell()).reshape(shape)


def check_sample(key: str, members: list[tuple[str, bytes]], facts: SetFacts, frames: int, label: int, sums: np.ndarray) -> None:
    """Checks the members, (extension, bytes) in order, of one sample against its row of the offset index; `sums`: uint64, one a frame.

    Raises BadSample.
    """
    (extension, payload), rest = members[0], dict(members[1:])
    wanted = "safetensors" if facts.codec == "latent" else facts.codec
    needed = {"json", MEMBER} if facts.cond else {"json"}
    if extension != wanted or len(rest) != len(members) - 1 or not needed <= rest.keys() <= needed | {"cls", "txt"}:
        raise BadSample(f"its members are {' '.join(name for name, _ in members)}, not {wanted} {' '.join(sorted(needed))} (cls txt)")
    try:
        words = _latents(payload, facts, frames) if facts.codec == "latent" else _clip(payload, facts, frames)
    except (ValueError, SafetensorError) as error:
        raise BadSample(f"it does not decode: {str(error).splitlines()[0][:200]}") from None
    if facts.codec != "mp4" and not np.array_equal(frame_sums(words), sums):
        raise BadSample("its checksums are not those of the offset index")
    if facts.cond:
        _check_vector(rest[MEMBER], facts.cond)
    _check_card(key, rest, facts, frames, label)


def _check_vector(payload: bytes, cond: CondFormat) -> None:
    try:
        if cond.member(payload) != payload:
            raise ValueError("its bytes are not in the order in which vectors are stored")
    except ValueError as error:
        raise BadSample(f"its condition vector is damaged: {error}") from None


def _clip(payload: bytes, facts: SetFacts, frames: int) -> np.ndarray:
    """The frames' bytes, uint8 (t, bytes)."""
    if frames != facts.clip_length and facts.clip_length:
        raise ValueError(f"{frames} frames, not {facts.clip_length}")
    clip = decode_clip(payload, facts.codec, frames)
    even = facts.codec == "mp4"  # H.264 has even sizes: an odd last row or column is stored twice
    size = tuple(side + side % 2 if even else side for side in facts.size)
    if clip.shape[1:3] != size:
        raise ValueError(f"{clip.shape[2]}x{clip.shape[1]} pixels, not {size[1]}x{size[0]}")
    return np.ascontiguousarray(clip).reshape(frames, -1)


def _latents(payload: bytes, facts: SetFacts, frames: int) -> np.ndarray:
    """The bytes of all tensors, uint8 (1, bytes); (t, bytes) where frames have latents of their own."""
    tensors = load(payload)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if facts.framewise:
        if any(shape[:1] != (frames,) for shape in shapes.values()) or frames != (facts.clip_length or frames):
            raise ValueError(f"tensors {shapes}, not {facts.clip_length or frames} frames")
        shapes = {name: shape[1:] for name, shape in shapes.items()}
    if shapes != facts.tensors or {tensor.dtype for tensor in tensors.values()} != {_TYPES.get(facts.dtype)}:
        raise ValueError(f"tensors {shapes}, not {dict(facts.tensors or {})} in {facts.dtype}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
    size = sum(tensor.nbytes for tensor in tensors.values())
    # A copy: the tensors begin wherever the header ends, sums are taken of whole words.
    return np.frombuffer(payload, np.uint8)[len(payload) - size :].reshape(frames if facts.framewise else 1, -1).copy()


def _check_card(key: str, rest: dict[str, bytes], facts: SetFacts, frames: int, label: int) -> None:
    try:
        card = json.loads(rest["json"])
        source, name, caption = card["source"], card["class"], card["caption"]
        padded, (first, last) = card.get("padded_frames", 0), card["span"]
        stored = int(rest["cls"]) if "cls" in rest else None
        text = rest["txt"].decode() if "txt" in rest else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadSample(f"its card, cls or txt is damaged: {error!r}") from None
    begin = f"{first:06d}" if facts.by_frame else ""
    if not isinstance(source, str) or not key.startswith(f"{hash16(source)}_{begin}"):
        raise BadSample(f"its card is of another clip: {source!r} from frame {first}")
    expected = facts.classes[label] if label < len(facts.classes) else None
    if name != expected or stored != (label if facts.classes else None) or label >= max(1, len(facts.classes)):
        raise BadSample(f"its card says class {name!r}, its cls {stored}, the offset index label {label} ({expected!r})")
    if (caption or "") != (text or ""):
        raise BadSample("the captions of its card and its txt differ")
    if facts.codec != "latent" and not (0 <= padded < frames and first < last):
        raise BadSample(f"its card says {padded} of {frames} frames are padding, span {first} to {last}")
