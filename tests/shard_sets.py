"""Small shard sets written straight away, without videos: every frame says which sample and which frame it is."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from datasets.conditions import CondFormat
from datasets.npy import npy_file
from datasets.prepare.writer import Sample, ShardWriter, npy_bytes, shard_entry, shard_name, sums_text
from datasets.shards import FORMAT, SCHEMA, ShardSet, frame_sums
from utils.media import encode_mp4

SIZE = (2, 4)


def frames_of(number: int, count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 (t, h, w, 3) of sample `number`: its number in the first two channels, the frame in the third; the left edge is bright."""
    clip = np.empty((count, *size, 3), dtype=np.uint8)
    clip[..., 0], clip[..., 1], clip[..., 2] = number // 200, number % 200, np.arange(count)[:, None, None]
    clip[:, :, 0] += 50
    return clip


def latents_of(number: int, count: int) -> torch.Tensor:
    """(t, 4, 1, 2) of sample `number`: its number in the first channel, the frame in the second, halves in the rest."""
    latents = torch.full((count, 4, 1, 2), 0.5)
    latents[:, 0], latents[:, 1] = number, torch.arange(count)[:, None, None]
    return latents


def vector_of(number: int, cond: CondFormat) -> np.ndarray:
    """The condition vector of sample `number`: eighths from the number on."""
    return (number + np.arange(cond.values) / 8).reshape(cond.shape).astype(cond.dtype)


def frames_in(latents: torch.Tensor) -> list[tuple[int, list[int]]]:
    """(sample, its frames) of each clip b c t h w of `latents_of`; an error where a clip is of several samples."""
    found = [
        (set(numbers), frames) for numbers, frames in zip(latents[:, 0, :, 0, 0].tolist(), latents[:, 1, :, 0, 1].tolist(), strict=True)
    ]
    return [(int(number), list(map(int, frames))) for (number,), frames in found]


def sample_of(video: torch.Tensor) -> list[tuple[int, list[int]]]:
    """(sample, its frames) of each clip b c t h w of `frames_of`, mirrored or not."""
    plain = video[:, :, :, 0, 1].tolist()
    return [(200 * high[0] + low[0], frames) for high, low, frames in plain]


def write_set(
    folder: Path,
    sizes: Sequence[int],
    *,
    codec: str = "npy",
    lengths: Sequence[int] = (3,),
    size: tuple[int, int] = SIZE,
    classes: Sequence[str] = ("even", "odd"),
    first: int = 0,
    keys: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float16,
    tensor: str = "moments",
    cond: CondFormat | None = None,
    captions: Sequence[str] = (),
) -> Path:
    """A shard set with `sizes` samples in its shards, numbered from `first`; sample k has lengths[k % len(lengths)] frames.

    codec: npy, mp4, latent: tensors `a` (2, 3) and `b` (4,) of type `dtype`, full of the sample's number; or framewise: one named
    `tensor` of `latents_of`. `cond`: condition vectors, those of `vector_of`. `captions`: one a
    sample, empty for none.
    """
    folder.mkdir(parents=True)
    entries, number = [], first
    for shard, count in enumerate(sizes):
        writer = ShardWriter(folder, shard_name(shard))
        for _ in range(count):
            key = keys[number - first] if keys else f"clip_{number:05d}"
            sample = _sample(key, number, lengths[number % len(lengths)], codec, size, len(classes), dtype, tensor)
            if cond is not None:
                sample.members["emb.npy"] = cond.member(npy_file(vector_of(number, cond)))
            if captions and captions[number - first]:
                sample.members["txt"] = captions[number - first].encode()
            writer.add(sample)
            number += 1
        entries.append(shard_entry(folder, writer.name, writer.close({})))
    meta = {
        "format": FORMAT,
        "schema": SCHEMA,
        "name": folder.name,
        "clip_length": lengths[0] if len(lengths) == 1 else 0,
        "fps": 8.0,
        "size": list(size),
        "classes": list(classes),
        "codec": {"name": codec},
        "shards": entries,
        **(cond.to_meta() if cond else {}),
    }
    if codec == "latent":
        meta |= {"codec": {"name": codec, "dtype": str(dtype).removeprefix("torch.")}, "tensors": {"a": [2, 3], "b": [4]}}
        meta |= {"clip_length": 1, "autoencoder": {"sha256": "0" * 64}, "scale": {"a": 1.0, "b": 1.0}}
    if codec == "framewise":
        meta |= {"codec": {"name": "latent", "dtype": str(dtype).removeprefix("torch."), "framewise": True}, "tensors": {tensor: [4, 1, 2]}}
        meta |= {"autoencoder": {"sha256": "0" * 64}, "latent": {"mean": 0.5, "std": 2.0, "scale": 0.5, "shift": 0.5}}
    (folder / "index.json").write_text(json.dumps(meta))
    return folder


def _sample(key: str, number: int, count: int, codec: str, size: tuple[int, int], classes: int, dtype: torch.dtype, tensor: str) -> Sample:
    label, card = number % max(1, classes), json.dumps({"number": number}).encode()
    frames = frames_of(number, count, size)
    if codec == "latent":
        payload = save({"a": torch.full((2, 3), float(number), dtype=dtype), "b": torch.full((4,), float(number), dtype=dtype)})
        block = np.frombuffer(payload, np.uint8)[-10 * dtype.itemsize :]
        return Sample(key, {"safetensors": payload, "json": card}, 1, label, frame_sums(block[None]).astype(">u8").tobytes().hex())
    if codec == "framewise":
        latents = latents_of(number, count).to(dtype)
        rows = latents.view(torch.uint8).numpy().reshape(count, -1)
        return Sample(key, {"safetensors": save({tensor: latents}), "json": card}, count, label, sums_text(rows))
    if codec == "mp4":
        return Sample(key, {"mp4": encode_mp4(frames, 8.0, gop=count), "json": card}, count, label, "")
    return Sample(key, {"npy": npy_bytes(frames), "json": card}, count, label, sums_text(frames))


def spoil(folder: Path, *samples: int) -> None:
    """Flips a byte of the clips of these samples (rows of the set)."""
    shards = ShardSet.open(folder)
    for sample in samples:
        path = folder / shards.meta["shards"][int(shards.shard[sample])]["name"]
        data = bytearray(path.read_bytes())
        data[int(shards.offset[sample] + shards.nbytes[sample]) - 2] ^= 0x10
        path.write_bytes(data)


def crc(batch: dict[str, torch.Tensor]) -> int:
    """One number for all of a batch."""
    return zlib.crc32(b"".join(value.contiguous().view(torch.uint8).numpy().tobytes() for _, value in sorted(batch.items())))
