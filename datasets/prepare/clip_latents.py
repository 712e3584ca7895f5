"""One shard through an autoencoder that takes clips of a fixed number of frames."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save

from datasets.prepare.carry import carried, with_window
from datasets.prepare.latent_job import LatentJob, Tensors
from datasets.prepare.moments import Moments
from datasets.prepare.writer import Sample
from datasets.reader import ClipReader
from datasets.shards import frame_sums
from utils.errors import UserError

Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass(frozen=True)
class _Batch:
    """Windows of clips, read."""

    windows: list[tuple[int, int]]
    frames: np.ndarray
    """uint8 b t h w 3."""
    members: list[dict[str, bytes]]
    """What is carried over with each."""
    damaged: list[str] = field(default_factory=list)
    """What is wrong with the windows that were left out."""


def encode_clips(job: LatentJob, number: int, add: Callable[[Sample], None], progress: Callable[[int], None]) -> dict[str, Any]:
    """Encodes shard `number` sample by sample into `add`. Returns what the offset index keeps: sums, and what was left out."""
    moments, damaged = Moments(), list[str]()
    windows, reader = job.windows(number), ClipReader(job.pixels, job.rules.frames)
    batches = [windows[first : first + job.batch_size] for first in range(0, len(windows), job.batch_size)]
    for batch in read_ahead(batches, lambda batch: _read(job, reader, batch), job.workers):
        encoded = job.encode(batch.frames) if batch.windows else {}
        tensors = {name: rounded(values, job.rules.dtype) for name, values in sorted(encoded.items())}
        for place, (window, members) in enumerate(zip(batch.windows, batch.members, strict=True)):
            own = {name: np.ascontiguousarray(values[place]) for name, values in tensors.items()}
            add(_sample(job, window, own, members))
            moments.add(own)
        damaged += batch.damaged
        progress(len(batch.windows) + len(batch.damaged))
    return {"moments": moments.to_dict(), "short": job.short(number), "damaged": damaged}


def read_ahead(items: list[Item], read: Callable[[Item], Read], workers: int) -> Iterator[Read]:
    """What `read` makes of each item, in order; `workers` threads are a little ahead."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="clips") as pool:
        waiting: deque[Future[Read]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Latents in the type in which they are stored; infinities are named with their sample, by `check_finite`."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def check_finite(job: LatentJob, row: int, values: np.ndarray) -> None:
    """UserError for latents that are not numbers."""
    if not np.isfinite(values).all():
        raise UserError(f"latents of {job.pixels.describe(row)} are not finite in {job.rules.dtype}: use --dtype float32")


def _read(job: LatentJob, reader: ClipReader, windows: list[tuple[int, int]]) -> _Batch:
    try:
        return _load(job, reader, windows)
    except UserError:
        if job.rules.on_bad == "fail":
            raise
    good, damaged = [], []
    for window in windows:
        try:
            _load(job, reader, [window])
            good.append(window)
        except UserError as error:
            damaged.append(f"{job.name(*window)}: {error}")
    return replace(_load(job, reader, good), damaged=damaged)


def _load(job: LatentJob, reader: ClipReader, windows: list[tuple[int, int]]) -> _Batch:
    rows, starts = np.array(windows, dtype=np.int64).reshape(-1, 2).T
    members = []
    for row, start in windows:
        found = carried(job.pixels, row)
        if job.windowed and "json" in found:
            found["json"] = with_window(found["json"], start, job.rules.frames, job.pixels.describe(row))
        members.append(found)
    return _Batch(windows, reader.read(rows, starts), members)


def _sample(job: LatentJob, window: tuple[int, int], tensors: Tensors, members: dict[str, bytes]) -> Sample:
    row = window[0]
    for value in tensors.values():
        check_finite(job, row, value)
    payload = save(tensors)
    size = sum(value.nbytes for value in tensors.values())
    # A copy, because the tensors begin wherever the header ends and sums are taken of aligned words.
    block = np.frombuffer(payload, dtype=np.uint8)[len(payload) - size :].copy()
    sums = frame_sums(block.reshape(1, -1)).astype(">u8").tobytes().hex()
    return Sample(job.name(*window), {"safetensors": payload} | members, 1, int(job.pixels.label[row]), sums)
