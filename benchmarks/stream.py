"""The training stream against a plain read of the same tars, a plain webdataset pipeline, and decoding from the original videos.

Without --shards it makes its own set of moving digits, raw and as mp4. Every figure is the best of some rounds in this one run, which
alternate, with the tars in the page cache (each round reads all of them), so that the disk does not hide what the stream costs.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.common import machine
from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.prepare.build import SetInfo, build
from datasets.prepare.clips import ClipRules
from datasets.shards import ShardSet
from datasets.sources import SourceOptions, list_videos
from datasets.stored_video import decode_window
from datasets.synthetic import DigitsConfig, make_digits
from datasets.transforms import resize_clip

TARGET = 0.5
"""Of the raw read rate, for clips stored as they are (npy)."""
WEBDATASET_TARGET = 0.9
"""Of the rate of a plain webdataset pipeline with as many workers."""


def raw_read(shards: ShardSet) -> float:
    """Seconds of one sequential read of all tars in blocks of 1 MiB."""
    block = bytearray(1 << 20)
    started = time.perf_counter()
    for entry in shards.meta["shards"]:
        with (shards.folder / entry["name"]).open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - started


def stream(shards: ShardSet, batch: int, workers: int, first_step: int) -> float:
    """Seconds per epoch of the batches of one rank, the start of the workers included."""
    source = ClipSource(shards, DataConfig(num_workers=workers), seed=0, global_batch_size=batch)
    # The clock starts before the first batch is asked for: nothing is read ahead of it.
    started = time.perf_counter()
    batches = source.batches(first_step)
    for _ in range(source.steps_per_epoch):
        next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return seconds * shards.num_samples / (source.steps_per_epoch * batch)


def plain_webdataset(shards: ShardSet, batch: int, workers: int) -> float:
    """Seconds per epoch of webdataset as its manual shows it: shuffled shards, a shuffle buffer, decode, batches, a loader."""
    urls = [str(shards.folder / entry["name"]) for entry in shards.meta["shards"]]

    def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        if shards.codec == "npy":
            frames = np.load(io.BytesIO(sample["npy"]))
        else:
            frames = decode_window(sample["mp4"], 0, shards.clip_length)
        return torch.from_numpy(frames).permute(3, 0, 1, 2), int(sample["cls"])

    pipeline = webdataset.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(256).map(decode).batched(batch)
    return _drain(DataLoader(pipeline, batch_size=None, num_workers=workers))


def _card(shards: ShardSet, sample: int) -> dict[str, Any]:
    """The json member of a sample, which follows its clip in the tar."""
    with tarfile.open(shards.shard_path(sample)) as tar:
        member = tar.extractfile(f"{shards.keys[sample]}.json")
        assert member is not None
        return json.load(member)


class OriginalVideos(IterableDataset[tuple[torch.Tensor, int]]):
    """What a loader without shards does for each clip: open the video, decode up to the clip's end, crop and resize."""

    def __init__(self, shards: ShardSet, root: Path) -> None:
        self.shards, self.root = shards, root
        order = np.random.default_rng(0).permutation(shards.num_samples)
        self.cards = [_card(shards, int(sample)) for sample in order]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        height, width = self.shards.size
        for card in self.cards:
            path, (first, last) = self.root / card["source"], card["span"]
            with av.open(str(path)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame, _ in zip(container.decode(video=0), range(last), strict=False)]
            clip = resize_clip(np.stack(frames[first:last]), (height, width))
            yield torch.from_numpy(clip).permute(3, 0, 1, 2), 0


def original_videos(shards: ShardSet, root: Path, batch: int) -> float:
    """Seconds per epoch of decoding every clip from its source video, in random order, with one worker."""
    return _drain(DataLoader(OriginalVideos(shards, root), batch_size=batch, num_workers=1))


def _drain(loader: DataLoader[Any]) -> float:
    started = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - started


def report(shards: ShardSet, batch: int, workers: list[int], rounds: int, root: Path | None) -> None:
    """Prints a table of one shard set. Rounds of the variants alternate: a busy machine slows all of them alike."""
    raw_read(shards)
    variants: dict[str, Callable[[int], float]] = {"raw read": lambda turn: raw_read(shards)}
    for count in workers:
        variants[f"webdataset, {count} workers"] = lambda turn, count=count: plain_webdataset(shards, batch, count)  # type: ignore[misc]
        variants[f"stream, {count} workers"] = lambda turn, count=count: stream(shards, batch, count, turn * 1000)  # type: ignore[misc]
    if root is not None:
        variants["original videos, 1 worker"] = lambda turn: original_videos(shards, root, batch)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, work in variants.items():
            seconds[name].append(work(turn))
    size = sum(entry["bytes"] for entry in shards.meta["shards"])
    height, width = shards.size
    print(f"{shards.codec}: {shards.num_samples} clips {shards.clip_length}x{height}x{width}, {size / 1e6:.0f} MB, batches of {batch}")
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        rate, share = shards.num_samples / value, best["raw read"] / value
        line = f"  {name:<26} {rate:>9.0f} clips/s {size / value / 1e9:>7.2f} GB/s   ratio {share:.3f}"
        plain = name.replace("stream", "webdataset")
        print(line + (f"   to webdataset {best[plain] / value:.2f}" if plain != name else ""), flush=True)
    print(f"  target: at least {WEBDATASET_TARGET} of webdataset" + (f", {TARGET} of the raw read" if shards.codec == "npy" else ""))


def digits(folder: Path, rules: ClipRules, videos: int) -> ShardSet:
    """A set of moving digits: 8 clips a video."""
    make_digits(folder / "source", DigitsConfig(num_videos=videos, size=rules.size, frames=8 * rules.clip_length))
    listing = list_videos(folder / "source", "folder", SourceOptions(), seed=0)
    out = folder / rules.codec
    build(listing, rules, SetInfo("digits", "folder", shard_samples=128), out, workers=2, progress=lambda videos, tally: None)
    return ShardSet.open(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=Path, help="an own shard set")
    parser.add_argument("--originals", type=Path, help="the folder that an own shard set was made of, to time decoding from it too")
    parser.add_argument("--videos", type=int, default=128, help="videos of the set made without --shards (default 128, 8 clips each)")
    parser.add_argument("--batch", type=int, default=64, help="clips per batch (default 64)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loader workers (default 0 1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    if args.shards:
        report(ShardSet.open(args.shards), args.batch, args.workers, args.rounds, args.originals)
        return
    with tempfile.TemporaryDirectory() as folder:
        for codec in ("npy", "mp4"):
            rules = ClipRules(size=(64, 64), codec=codec, decoder="pyav")
            shards = digits(Path(folder), rules, args.videos)
            report(shards, args.batch, args.workers, args.rounds, Path(folder) / "source")


if __name__ == "__main__":
    main()
