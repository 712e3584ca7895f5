"""Pixel shard set -> latent shard set: shard number k of the one is encoded into shard number k of the other, whoever encodes it.

shard-00000.tar         <key>.safetensors (tensors in the order of their names, one dtype), and the .json, .cls and .txt of the clip
shard-00000.index.json  as of a pixel set, with one checksum a sample: that of its tensors' bytes, the end of the member
index.json              what the pixel set says, and: tensors (name -> shape), autoencoder, mean, std and scale = 1 / std of each tensor

A shard of latents depends on its pixel shard, the autoencoder, the rules and the batch size only: processes share the shards out
among them, meet nowhere, and may be killed at any moment. Whoever finds all shards finished writes index.json.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from datasets.prepare.carry import carried, with_window
from datasets.prepare.moments import Moments, statistics
from datasets.prepare.parts import WORK, finishing, held
from datasets.prepare.writer import Sample, ShardWriter, dump_json, finished_shard, remove_unfinished, shard_entry, shard_name
from datasets.reader import ClipReader
from datasets.shards import INDEX, SCHEMA, ShardSet, frame_sums, sidecar_name
from utils.errors import UserError
from utils.files import atomic_write_bytes

Tensors = dict[str, np.ndarray]
Encode = Callable[[np.ndarray], Tensors]
"""uint8 frames b t h w 3 -> name -> latents b ..., float32."""


@dataclass(frozen=True)
class LatentRules:
    """What decides the values, beside the pixels and the autoencoder."""

    frames: int
    """Frames that a sample is encoded from: as many as the autoencoder takes."""
    stride: int
    """Frames between the beginnings of two windows of a clip that is longer."""
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["fp32", "bf16"] = "fp32"
    on_bad: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class Share:
    """Which of several processes this is; the shards go round robin."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class LatentJob:
    """All that the encoding of a set needs."""

    pixels: ShardSet
    out: Path
    rules: LatentRules
    autoencoder: Mapping[str, Any]
    """Plain values for index.json; `sha256` and `vae` name the weights."""
    encode: Encode
    batch_size: int = 32
    workers: int = 2
    """Threads that read and decode ahead."""

    @property
    def plan(self) -> str:
        """Hash of all that decides the values, to rounding."""
        names = {key: self.autoencoder.get(key) for key in ("system", "sha256", "vae")}
        return hashlib.sha256(dump_json([SCHEMA, self.pixels.digest, names, asdict(self.rules)])).hexdigest()

    @property
    def windowed(self) -> bool:
        """Whether clips may be longer than what a sample is encoded from."""
        return self.pixels.meta["clip_length"] != self.rules.frames

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(len(self.pixels.meta["shards"]))

    def windows(self, shard: int) -> list[tuple[int, int]]:
        """(sample of the pixel set, first frame) of each sample of a shard, in order."""
        rows = np.flatnonzero(self.pixels.shard == shard).tolist()
        last = (self.pixels.frames - self.rules.frames).tolist()
        return [(row, start) for row in rows for start in range(0, last[row] + 1, self.rules.stride)]

    def short(self, shard: int) -> int:
        """Clips of a shard that have too few frames for one window."""
        return int((self.pixels.frames[self.pixels.shard == shard] < self.rules.frames).sum())

    def name(self, row: int, start: int) -> str:
        """Key of a sample: that of the clip, and the window's first frame where clips are longer than a window."""
        key = self.pixels.keys[row]
        return f"{key}_w{start:06d}" if self.windowed else key


def encode_set(job: LatentJob, share: Share, progress: Callable[[int], None]) -> dict[str, Any] | None:
    """Encodes this process's shards, passing over finished ones; `progress` hears how many samples more are done.

    Returns the set's index when all shards are finished, None while other processes still have some to do. UserError when `out`
    holds another set, cannot be written, or a clip is damaged and `on_bad` says fail.
    """
    try:
        if (job.out / INDEX).exists():
            return _complete(job)
        (job.out / WORK).mkdir(parents=True, exist_ok=True)
        for number in job.shards[share.index :: share.count]:
            if _finished(job, number):
                progress(len(job.windows(number)))
                continue
            with held(job.out / WORK / f"{number}.lock", str(job.out / shard_name(number))):
                _encode_shard(job, number, progress)
        with finishing(job.out):
            index = _complete(job) if (job.out / INDEX).exists() else _finish(job)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (job.out / INDEX).exists():
            return _complete(job)  # another process wrote the index, and has taken the work folder away
        why = f"{error.strerror or error} ({error.filename or job.out})"
        raise UserError(f"cannot write to {job.out}: {why}; mend that and run the same command again, it goes on") from None
    if index is not None:
        shutil.rmtree(job.out / WORK, ignore_errors=True)
    return index


def _complete(job: LatentJob) -> dict[str, Any]:
    """The index of the finished set in `out`."""
    try:
        index = json.loads((job.out / INDEX).read_bytes())
        same = index["plan"] == job.plan
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{job.out} holds a set made of other clips, by another autoencoder or with other settings: choose another --out")
    return index


def _finished(job: LatentJob, number: int) -> bool:
    """Whether a shard is there and whole. UserError when it is not of this set."""
    table = finished_shard(job.out, shard_name(number))
    if table is not None and table["progress"].get("plan") != job.plan:
        raise UserError(
            f"{job.out / shard_name(number)} was made of other clips, by another autoencoder or with other settings: choose another --out"
        )
    return table is not None


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


def _encode_shard(job: LatentJob, number: int, progress: Callable[[int], None]) -> None:
    writer = ShardWriter(job.out, shard_name(number))
    moments, damaged = Moments(), []
    try:
        for batch in _read_ahead(job, job.windows(number)):
            encoded = job.encode(batch.frames) if batch.windows else {}
            with np.errstate(over="ignore"):  # infinities are named with their sample
                tensors = {name: values.astype(job.rules.dtype) for name, values in sorted(encoded.items())}
            for place, (window, members) in enumerate(zip(batch.windows, batch.members, strict=True)):
                own = {name: np.ascontiguousarray(values[place]) for name, values in tensors.items()}
                writer.add(_sample(job, window, own, members))
                moments.add(own)
            damaged += batch.damaged
            progress(len(batch.windows) + len(batch.damaged))
        writer.close({"plan": job.plan, "moments": moments.to_dict(), "short": job.short(number), "damaged": damaged})
    except BaseException:
        writer.abandon()
        raise


def _read_ahead(job: LatentJob, windows: list[tuple[int, int]]) -> Iterator[_Batch]:
    """The windows in order, `batch_size` at a time; the last batch is smaller."""
    reader = ClipReader(job.pixels, job.rules.frames)
    with ThreadPoolExecutor(max(1, job.workers), thread_name_prefix="clips") as pool:
        waiting: deque[Future[_Batch]] = deque()
        try:
            for first in range(0, len(windows), job.batch_size):
                waiting.append(pool.submit(_read, job, reader, windows[first : first + job.batch_size]))
                if len(waiting) > job.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


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
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise UserError(f"latents of {job.pixels.describe(row)} are not finite in {job.rules.dtype}: use --dtype float32")
    payload = save(tensors)
    size = sum(value.nbytes for value in tensors.values())
    # A copy, because the tensors begin wherever the header ends and sums are taken of aligned words.
    block = np.frombuffer(payload, dtype=np.uint8)[len(payload) - size :].copy()
    sums = frame_sums(block.reshape(1, -1)).astype(">u8").tobytes().hex()
    return Sample(job.name(*window), {"safetensors": payload} | members, 1, int(job.pixels.label[row]), sums)


def _finish(job: LatentJob) -> dict[str, Any] | None:
    """Writes index.json when all shards are there."""
    tables = []
    for number in job.shards:
        try:
            table = json.loads((job.out / sidecar_name(shard_name(number))).read_bytes())
            same = table["progress"]["plan"] == job.plan
        except (FileNotFoundError, ValueError, KeyError):
            same = False
        if not same:
            return None
        tables.append(table)
    entries = [shard_entry(job.out, shard_name(number), table) for number, table in zip(job.shards, tables, strict=True)]
    progress = [table["progress"] for table in tables]
    if not sum(entry["samples"] for entry in entries):
        raise UserError(f"no clip of {job.pixels.folder} could be encoded: {_left_out(progress)}")
    index = _index(job, [entry for entry in entries if entry["samples"]], progress)
    remove_unfinished(job.out)
    atomic_write_bytes(job.out / INDEX, json.dumps(index, indent=1, sort_keys=True).encode() + b"\n")
    return index


def _left_out(progress: list[dict[str, Any]]) -> dict[str, Any]:
    return {"short": sum(part["short"] for part in progress), "damaged": [line for part in progress for line in part["damaged"]]}


def _index(job: LatentJob, entries: list[dict[str, Any]], progress: list[dict[str, Any]]) -> dict[str, Any]:
    own = ("shards", "dropped", "plan", "samples", "codec", "clip_length")
    return {
        **{key: value for key, value in job.pixels.meta.items() if key not in own},
        "codec": {"name": "latent", "dtype": job.rules.dtype},
        "clip_length": job.rules.frames,
        "rules": asdict(job.rules),
        "autoencoder": dict(job.autoencoder),
        "pixels": job.pixels.digest,
        "samples": sum(entry["samples"] for entry in entries),
        "left_out": _left_out(progress),
        "plan": job.plan,
        "shards": entries,
        **statistics([part["moments"] for part in progress]),
    }
