"""Flipped, cut and foreign bytes by the thousand: a shard set gives its samples or an error in one line, a video clips or a reason."""

import faulthandler
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.conditions import CondFormat
from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.prepare.clips import ClipRules
from datasets.prepare.workers import prepare
from datasets.shards import ShardSet
from datasets.sources.base import Video
from tests.shard_sets import frames_of, sample_of, write_set
from tests.videos import noise_frames, write_video
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 40.0
"""Bound of each fuzzing loop; a slow machine tries fewer cases."""
LEAST = 150
"""Cases that even a slow machine must get through."""


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed: one bit, a few bytes, or a stretch of zeros or noise."""
    changed = bytearray(data)
    kind = rng.randrange(4)
    at = rng.randrange(len(changed))
    if kind == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    else:
        length = min(rng.randint(1, 600), len(changed) - at)
        changed[at : at + length] = bytes(length) if kind == 2 else rng.randbytes(length)
    return bytes(changed)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flipped bytes, a cut, or something appended."""
    kind = rng.randrange(6)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    return data + rng.randbytes(rng.randint(1, 2000)) if kind == 1 else flip(data, rng)


def fuzz(case: Callable[[random.Random], str], wanted: int) -> Counter[str]:
    """Outcomes of up to `wanted` cases, each with its own seed."""
    started, outcomes = time.monotonic(), Counter[str]()
    faulthandler.dump_traceback_later(SECONDS + 60, exit=True)
    try:
        for seed in range(wanted):
            outcomes[case(random.Random(seed))] += 1
            if time.monotonic() - started > SECONDS:
                break
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert sum(outcomes.values()) >= min(wanted, LEAST), outcomes
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "wanted"), [("npy", 4000), ("latent", 1500), ("framewise", 1500), ("mp4", 800)])
def test_damaged_shards_give_their_samples_or_one_line(tmp_path: Path, codec: str, wanted: int) -> None:
    size, cond = ((16, 16) if codec == "mp4" else (2, 4)), CondFormat((2, 3), "float16") if codec == "framewise" else None
    folder = write_set(tmp_path / "set", [5, 4], codec=codec, size=size, cond=cond)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def contents() -> list[torch.Tensor]:
        shards = ShardSet.open(folder)
        source = ClipSource(shards, DataConfig(num_workers=0), seed=0, global_batch_size=shards.num_samples)
        batch = next(source.batches(0))
        rows = torch.from_numpy(np.argsort(source.order.samples(batch["index"].numpy())))
        return [batch[name][rows].contiguous() for name in sorted(batch) if name != "index"]

    expected = contents()

    def case(rng: random.Random) -> str:
        name = rng.choice(sorted(whole))
        (folder / name).write_bytes(damage(whole[name], rng))
        try:
            found = contents()
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error
            return "refused"
        finally:
            (folder / name).write_bytes(whole[name])
        if name != "index.json":  # the one file that nothing vouches for
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{name}: a wrong sample went unnoticed"
        return "as before"

    outcomes = fuzz(case, wanted)
    print(codec, dict(outcomes))
    assert outcomes["refused"] > outcomes["as before"] * 0.2


@pytest.mark.slow
def test_damaged_shards_are_passed_over_without_a_wrong_sample(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [6, 6, 6])
    tars = {path: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
    data = DataConfig(num_workers=0, on_bad_sample="skip", max_bad_share=1.0)

    def case(rng: random.Random) -> str:
        path = rng.choice(list(tars))
        path.write_bytes(damage(tars[path], rng))
        try:
            source = ClipSource(ShardSet.open(folder, on_bad="skip"), data, seed=rng.randrange(3), global_batch_size=6)
            batches = list(islice(source.batches(rng.randrange(4)), 3))
        finally:
            path.write_bytes(tars[path])
        for batch in batches:
            assert batch["video"].shape == (6, 3, 3, 2, 4)
            for clip, label in zip(batch["video"], batch["label"].tolist(), strict=True):
                ((number, _),) = sample_of(clip[None])
                assert number % 2 == label
                assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), frames_of(number, 3))
        return "replaced" if source.counters()["data/bad_samples"] else "as before"

    outcomes = fuzz(case, 1500)
    print(dict(outcomes))
    assert outcomes["replaced"] > 50


def fuzz_videos(folder: Path, decoder: str, wanted: int) -> None:
    """Damages the videos of a folder and prepares them; runs as a process of its own, which a crash of a decoder would end."""
    whole = {path: path.read_bytes() for path in sorted(folder.glob("video.*"))}
    rules = ClipRules(size=(16, 16), clip_length=4, clip_stride=4, decoder=decoder)  # type: ignore[arg-type]

    def case(rng: random.Random) -> str:
        source = rng.choice(list(whole))
        path = source.with_name(f"damaged{source.suffix}")
        path.write_bytes(damage(whole[source], rng))
        prepared = prepare(Video(path, path.name), rules, None, folder / "spool")
        if prepared.skipped:
            name, reason, detail = prepared.skipped
            assert name == path.name and reason and len(detail.splitlines()) == 1 and str(folder) not in detail, prepared.skipped
            return reason
        sizes = [size for _, members, _ in prepared.rows for extension, size in members if extension == "npy"]
        assert len(sizes) == len(prepared.rows) > 0 and len(set(sizes)) == 1
        return "clips"

    print(dict(fuzz(case, wanted)))


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "wanted"), [("pyav", 2000), ("ffmpeg", 150)])
def test_damaged_videos_give_clips_or_a_reason(tmp_path: Path, decoder: str, wanted: int) -> None:
    for suffix, codec in (("mp4", "libx264"), ("avi", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx")):
        write_video(tmp_path / f"video.{suffix}", noise_frames(12, (32, 48)), codec=codec)
    call = f"fuzz_videos(Path({str(tmp_path)!r}), {decoder!r}, {wanted})"
    process = subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; from tests.test_data_fuzz import fuzz_videos; {call}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    print(process.stdout)
    assert "clips" in process.stdout and "damaged" in process.stdout
