"""One shard through an autoencoder that takes frames one by one: a clip of any length becomes one sample, a row for each frame.

<key>.safetensors       `moments` (t, 2C, h, w), mean and then standard deviation of each frame's posterior, or `sample` (t, C, h, w), a
                        draw from it; as the frames of a raw clip, each row has its checksum in the offset index

Frames go through the autoencoder in batches of `batch_size`, whatever clips they are of; not more than LOAD_BYTES of pixels are read
at a time, so that a clip may be longer than the memory is large.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from datasets.prepare.carry import carried
from datasets.prepare.clip_latents import check_finite, read_ahead, rounded
from datasets.prepare.latent_job import LatentJob
from datasets.prepare.moments import Moments
from datasets.prepare.writer import Sample, sums_text
from datasets.reader import ClipReader
from datasets.tables import MAX_FRAMES
from utils.errors import UserError
from utils.rng import SampleRng

LOAD_BYTES = 1 << 26
"""Pixels that a thread reads at a time, or one batch where that is more."""


@dataclass(frozen=True)
class _Piece:
    """Frames [first, first + count) of clip `row`; `last`: with the last one of the clip."""

    row: int
    first: int
    count: int
    last: bool


@dataclass(frozen=True)
class _Load:
    """Pieces, read."""

    pieces: list[_Piece]
    frames: list[np.ndarray]
    """Of each piece, uint8 t h w 3."""
    members: dict[int, dict[str, bytes]]
    """Clip -> what is carried over with it, for those that end here."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Clip that is left out -> why."""


def encode_frames(job: LatentJob, number: int, add: Callable[[Sample], None], progress: Callable[[int], None]) -> dict[str, Any]:
    """Encodes shard `number` clip by clip into `add`. Returns what the offset index keeps: sums, and what was left out."""
    moments, posterior, damaged = Moments(), Moments(), dict[int, str]()
    parts: list[np.ndarray] = []
    for load in read_ahead(_cut(job, number), lambda pieces: _read(job, pieces), job.workers):
        progress(len(load.damaged.keys() - damaged.keys()))
        damaged |= load.damaged
        for piece, latents in zip(load.pieces, _encode(job, load), strict=True):
            parts = parts if piece.first else []
            if piece.row in damaged:
                continue
            check_finite(job, piece.row, latents)
            parts.append(latents)
            if piece.last:
                values = np.concatenate(parts)
                add(_sample(job, piece.row, values, load.members[piece.row]))
                _count(values, moments, posterior, job.rules.store)
                progress(1)
    told = [f"{job.name(row, 0)}: {why}" for row, why in sorted(damaged.items())]
    return {"moments": moments.to_dict(), "posterior": posterior.to_dict(), "short": 0, "damaged": told}


def _cut(job: LatentJob, number: int) -> list[list[_Piece]]:
    """The frames of a shard in order, so many at a time as are read together: full batches, but for the end."""
    height, width = job.pixels.size
    room = job.batch_size * max(1, LOAD_BYTES // (height * width * 3 * job.batch_size))
    loads: list[list[_Piece]] = []
    free = 0
    for row in job.rows(number):
        first, total = 0, int(job.pixels.frames[row])
        while first < total:
            if not free:
                loads.append([])
                free = room
            count = min(free, total - first)
            loads[-1].append(_Piece(row, first, count, first + count == total))
            first, free = first + count, free - count
    return loads


def _read(job: LatentJob, pieces: list[_Piece]) -> _Load:
    try:
        return _Load(pieces, _frames(job, pieces), {piece.row: carried(job.pixels, piece.row) for piece in pieces if piece.last})
    except UserError:
        if job.rules.on_bad == "fail":
            raise
    good, damaged = _Load([], [], {}), dict[int, str]()
    for piece in pieces:
        try:
            good.frames.extend(_frames(job, [piece]))
            if piece.last:
                good.members[piece.row] = carried(job.pixels, piece.row)
            good.pieces.append(piece)
        except UserError as error:
            damaged[piece.row] = str(error)
            del good.frames[len(good.pieces) :]
    return _Load(good.pieces, good.frames, good.members, damaged)


def _frames(job: LatentJob, pieces: list[_Piece]) -> list[np.ndarray]:
    """The frames of each piece; those of equal length are read together."""
    found: dict[int, np.ndarray] = {}
    for count in {piece.count for piece in pieces}:
        places = [place for place, piece in enumerate(pieces) if piece.count == count]
        rows, firsts = (np.array([getattr(pieces[place], name) for place in places]) for name in ("row", "first"))
        found |= dict(zip(places, ClipReader(job.pixels, count).read(rows, firsts), strict=True))
    return [found[place] for place in range(len(pieces))]


def _encode(job: LatentJob, load: _Load) -> list[np.ndarray]:
    """What is stored of each piece of a load, (t, channels, h, w) in the stored type."""
    if not load.pieces:
        return []
    frames, stored = np.concatenate(load.frames), []
    numbers = np.concatenate([piece.row * MAX_FRAMES + np.arange(piece.first, piece.first + piece.count) for piece in load.pieces])
    for first in range(0, len(frames), job.batch_size):
        moments = job.encode(frames[None, first : first + job.batch_size])["moments"][0].transpose(1, 0, 2, 3)
        if job.rules.store == "sample":
            moments = _drawn(moments, numbers[first : first + job.batch_size], job.rules.seed)
        stored.append(rounded(moments, job.rules.dtype))
    ends = np.cumsum([piece.count for piece in load.pieces])
    return np.split(np.concatenate(stored), ends[:-1])


def _drawn(moments: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
    """One draw from each posterior: the noise of a frame is a function of the seed, the clip's number in the set and the frame's."""
    mean, std = np.split(moments, 2, axis=1)
    noise = SampleRng(seed, torch.from_numpy(numbers)).normal("latents", mean.shape[1:]).numpy()
    return np.asarray(mean + std * noise)


def _sample(job: LatentJob, row: int, values: np.ndarray, members: dict[str, bytes]) -> Sample:
    values = np.ascontiguousarray(values)  # convolutions may leave their channels last
    sums = sums_text(values.view(np.uint8))
    return Sample(
        job.name(row, 0), {"safetensors": save({job.rules.store: values})} | members, len(values), int(job.pixels.label[row]), sums
    )


def _count(values: np.ndarray, moments: Moments, posterior: Moments, store: str) -> None:
    """Counts each frame of a clip alone: sums do not depend on how clips are cut."""
    for frame in values:
        moments.add({store: frame})
        if store == "moments":
            mean, std = np.split(frame, 2)
            posterior.add({"mean": mean, "std": std})
        else:
            posterior.add({"sample": frame})
