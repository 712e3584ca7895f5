"""Pixel shard set -> latent shard set: shard number k of the one is encoded into shard number k of the other, whoever encodes it.

shard-00000.tar         <key>.safetensors (tensors in the order of their names, one dtype), and the .json, .cls and .txt of the clip
shard-00000.index.json  as of a pixel set, with one checksum a sample: that of its tensors' bytes, the end of the member
index.json              what the pixel set says, and: tensors (name -> shape), autoencoder, mean, std and scale = 1 / std of each tensor

An autoencoder of frames gives each frame a row of its own: see `datasets.prepare.frame_latents`. Shapes in index.json are then those of
one frame, and `latent` has the mean, std and scale = 1 / std of draws from the posteriors.

A shard of latents depends on its pixel shard, the autoencoder, the rules and the batch size only: processes share the shards out
among them, meet nowhere, and may be killed at any moment. Whoever finds all shards finished writes index.json.
"""

import json
import shutil
from collections.abc import Callable
from typing import Any

from datasets.prepare.clip_latents import encode_clips
from datasets.prepare.frame_latents import encode_frames
from datasets.prepare.latent_job import Encode, LatentJob, LatentRules, Share, Tensors
from datasets.prepare.moments import posterior_statistics, statistics
from datasets.prepare.parts import WORK, finishing, held
from datasets.prepare.writer import ShardWriter, finished_shard, remove_unfinished, shard_entry, shard_name
from datasets.shards import INDEX, sidecar_name
from utils.errors import UserError
from utils.files import atomic_write_bytes

__all__ = ["Encode", "LatentJob", "LatentRules", "Share", "Tensors", "encode_set"]


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


def _encode_shard(job: LatentJob, number: int, progress: Callable[[int], None]) -> None:
    writer = ShardWriter(job.out, shard_name(number))
    try:
        found = (encode_frames if job.framewise else encode_clips)(job, number, writer.add, progress)
        writer.close({"plan": job.plan} | found)
    except BaseException:
        writer.abandon()
        raise


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
    codec: dict[str, Any] = {"name": "latent", "dtype": job.rules.dtype}
    latent: dict[str, Any] = {}
    if job.framewise:
        codec["framewise"] = True
        latent = {"latent": posterior_statistics([part["posterior"] for part in progress], job.rules.scale)}
    return {
        **{key: value for key, value in job.pixels.meta.items() if key not in own},
        "codec": codec,
        "clip_length": job.rules.clip_frames or job.pixels.meta["clip_length"],
        "rules": job.rules.to_dict(),
        "autoencoder": dict(job.autoencoder),
        "pixels": job.pixels.digest,
        "samples": sum(entry["samples"] for entry in entries),
        "left_out": _left_out(progress),
        "plan": job.plan,
        "shards": entries,
        **statistics([part["moments"] for part in progress]),
        **latent,
    }
