"""The training stream against a plain read of the same tars: clips/s, GB/s and their ratio.

Without --shards it makes its own set of moving digits, raw and as mp4. Every figure is the best of some rounds in this one run, which
alternate, with the tars in the page cache (each round reads all of them), so that the disk does not hide what the stream costs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import machine
from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.prepare.build import SetInfo, build
from datasets.prepare.clips import ClipRules
from datasets.shards import ShardSet
from datasets.sources.base import SourceOptions, list_videos
from datasets.synthetic import DigitsConfig, make_digits

TARGET = 0.5
"""Of the raw read rate, for clips stored as they are (npy)."""


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


def report(shards: ShardSet, batch: int, workers: list[int], rounds: int) -> None:
    """Prints a table of one shard set. Rounds of the variants alternate: a busy machine slows all of them alike."""
    raw_read(shards)
    names = ["raw read", *(f"stream, {count} workers" for count in workers)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        seconds["raw read"].append(raw_read(shards))
        for name, count in zip(names[1:], workers, strict=True):
            seconds[name].append(stream(shards, batch, count, turn * 1000))
    size = sum(entry["bytes"] for entry in shards.meta["shards"])
    height, width = shards.size
    print(f"{shards.codec}: {shards.num_samples} clips {shards.clip_length}x{height}x{width}, {size / 1e6:.0f} MB, batches of {batch}")
    raw = min(seconds["raw read"])
    for name, values in seconds.items():
        best = min(values)
        print(f"  {name:<20} {shards.num_samples / best:>9.0f} clips/s {size / best / 1e9:>7.2f} GB/s   ratio {raw / best:.3f}", flush=True)


def digits(folder: Path, rules: ClipRules, videos: int) -> ShardSet:
    """A set of moving digits: 8 clips a video."""
    make_digits(folder / "source", DigitsConfig(num_videos=videos, size=rules.size, frames=8 * rules.clip_length))
    listing = list_videos(folder / "source", "folder", SourceOptions(), seed=0)
    out = folder / rules.codec
    build(listing, rules, SetInfo("digits", "folder"), out, workers=2, progress=lambda videos, tally: None)
    return ShardSet.open(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=Path, help="an own shard set")
    parser.add_argument("--videos", type=int, default=128, help="videos of the set made without --shards (default 128, 8 clips each)")
    parser.add_argument("--batch", type=int, default=64, help="clips per batch (default 64)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loader workers (default 0 1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    if args.shards:
        report(ShardSet.open(args.shards), args.batch, args.workers, args.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        for codec in ("npy", "mp4"):
            rules = ClipRules(size=(64, 64), codec=codec, decoder="pyav")
            report(digits(Path(folder), rules, args.videos), args.batch, args.workers, args.rounds)


if __name__ == "__main__":
    main()
