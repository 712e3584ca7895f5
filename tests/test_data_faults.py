"""Bad samples: named and fatal, or replaced, reported once and counted, the same for any number of ranks and workers."""

import logging
import multiprocessing
import re
import subprocess
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.config import DataConfig, open_shards
from datasets.faults import FEW
from datasets.loader import ClipSource
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from engine.metrics import counted
from launch.env import Env
from launch.failures import mendable
from tasks.clips import _open as open_clips_of
from tests import distributed
from tests.shard_sets import crc, frames_of, sample_of, spoil, write_set
from utils.errors import UserError

MP4 = {"codec": "mp4", "size": (16, 16)}


def source(path: Path, workers: int = 0, batch: int = 8, shuffle: str = "full", on_bad: str = "skip", **more: Any) -> ClipSource:
    cut = {name: more.pop(name) for name in ("rank", "world_size", "accumulation") if name in more}
    given = {"flip": True, "shuffle_shards": 2} | more
    data = DataConfig(path=(str(path),), num_workers=workers, shuffle=shuffle, on_bad_sample=on_bad, **given)  # type: ignore[arg-type]
    return ClipSource(open_shards(data), data, seed=2, global_batch_size=batch, **cut)


def take(stream: ClipSource, first: int, count: int) -> list[dict[str, torch.Tensor]]:
    batches = stream.batches(first)
    found = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("kind", [{}, MP4, {"codec": "latent"}])
def test_bad_samples_are_replaced_alike_by_all_worlds_workers_and_restarts(tmp_path: Path, kind: dict[str, Any], shuffle: str) -> None:
    path = write_set(tmp_path / "set", [7, 6, 7, 5], lengths=(4,), **kind)
    more = {"flip": False} if kind.get("codec") == "latent" else {"n_frames": 2}
    more["max_bad_share"] = 1.0
    spoil(path, 3, 9, 10, 20)
    (path / "shard-00003.tar").write_bytes(b"")
    alone = take(source(path, shuffle=shuffle, **more), 0, 9)
    labels = {int(label) for batch in alone for label in batch["label"]}
    assert labels == {0, 1} and all(len(batch["index"]) == 8 for batch in alone), "batches stay full"
    if not kind:
        seen = {sample for batch in alone for sample, _ in sample_of(batch["video"])}
        assert len(seen) > 10 and not seen & set(range(20, 25))
        assert all(3 not in frames for b in alone for sample, frames in sample_of(b["video"]) if sample in (3, 9, 10)), "the bad frame"
        for batch in alone:
            assert batch["label"].tolist() == [sample % 2 for sample, _ in sample_of(batch["video"])]
    for world, workers, first in ((2, 0, 0), (4, 1, 3), (8, 2 if kind else 4, 5)):
        parts = [take(source(path, workers, shuffle=shuffle, rank=r, world_size=world, **more), first, 4) for r in range(world)]
        for step in range(4):
            joined = {name: torch.cat([part[step][name] for part in parts]) for name in alone[0]}
            assert crc(joined) == crc(alone[first + step])


def test_rows_are_filled_in_any_order(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [4], lengths=(4,))
    reader = ClipReader(ShardSet.open(path), 4)
    out, rows, samples = reader.empty(3), np.array([2, 0, 1]), np.array([3, 1, 0])
    assert reader.fill(out, rows, samples, np.zeros(3, np.int64)) == [], "sums are compared row by row"
    assert (out[rows] == [frames_of(sample, 4).reshape(4, -1) for sample in samples.tolist()]).all()


def test_a_small_batch_of_bad_samples_of_two_kinds_is_replaced_as_a_large_one(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [6, 6, 6, 6], lengths=(4,))
    spoil(path, *range(6))
    (path / "shard-00002.tar").unlink()
    more = {"max_bad_share": 1.0, "n_frames": 4}
    alone = take(source(path, batch=24, **more), 0, 4)
    parts = [take(source(path, batch=24, rank=rank, world_size=12, **more), 0, 4) for rank in range(12)]
    for step, expected in enumerate(alone):
        assert crc({name: torch.cat([part[step][name] for part in parts]) for name in expected}) == crc(expected)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [{}, MP4])
def test_each_is_reported_once_with_shard_and_key_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: dict[str, Any], workers: int
) -> None:
    path = write_set(tmp_path / "set", [8, 8, 8], lengths=(4,), **kind)
    spoil(path, 5, 17)
    stream = source(path, workers)
    with caplog.at_level(logging.WARNING):
        take(stream, 0, 9)
    lines = [record.getMessage() for record in caplog.records if record.name == "datasets.faults"]
    assert len(lines) == 2
    assert {re.search(r"(shard-\d+\.tar) sample (clip_\d+)", line).groups() for line in lines} == {  # type: ignore[union-attr]
        ("shard-00000.tar", "clip_00005"),
        ("shard-00002.tar", "clip_00017"),
    }
    assert stream.counters() == {"data/bad_samples": 6, "data/bad_shards": frozenset()}, "twice in each of three epochs"


def test_without_skip_the_first_bad_one_ends_the_stream(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [8, 8], lengths=(4,))
    spoil(path, 11)
    stream = source(path, on_bad="fail", batch=16)
    assert stream.counters() == {}
    with pytest.raises(UserError, match=r"shard-00001.tar sample clip_00011 is damaged \(checksum\)") as caught:
        take(stream, 0, 1)
    assert "\n" not in str(caught.value)


def ruin(path: Path, how: str, shard: int) -> None:
    tar = path / f"shard-{shard:05d}.tar"
    if how == "missing":
        tar.unlink()
    elif how == "truncated":
        tar.write_bytes(tar.read_bytes()[:-3000])
    elif how == "sidecar":
        (path / f"shard-{shard:05d}.index.json").write_bytes(b"{}")
    else:
        tar.write_bytes(b"\0" * tar.stat().st_size)


@pytest.mark.parametrize("kind", [{}, MP4])
@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("how", ["missing", "truncated", "sidecar", "zeroed"])
def test_a_bad_shard_is_fatal_or_skipped_as_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, shard: int, kind: dict[str, Any]
) -> None:
    path = write_set(tmp_path / "set", [8, 8, 8], lengths=(4,), **kind)
    ruin(path, how, shard)
    name = f"shard-{shard:05d}"
    with pytest.raises(UserError, match=name):
        take(source(path, on_bad="fail"), 0, 4)
    with caplog.at_level(logging.WARNING):
        stream = source(path)
        batches = take(stream, 0, 4)
    assert stream.steps_per_epoch == 3
    if not kind:
        seen = {sample for batch in batches for sample, _ in sample_of(batch["video"])}
        assert not seen & set(range(8 * shard, 8 * shard + 8)) and len(seen) > 12
    lines = [record.getMessage() for record in caplog.records if record.name == "datasets.faults"]
    assert len(lines) == (8 if how == "zeroed" else 1) and all(name in line for line in lines)
    counters = stream.counters()
    assert counters["data/bad_samples"] >= 8
    assert counters["data/bad_shards"] == (frozenset() if how == "zeroed" else frozenset({str(path / f"{name}.tar")}))


def test_a_shard_that_goes_away_while_training_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_set(tmp_path / "set", [9, 4, 9], lengths=(4,))
    stream = source(path)
    (path / "shard-00001.tar").unlink()
    with caplog.at_level(logging.WARNING):
        take(stream, 0, 4)
    assert [record.getMessage().split(":")[0] for record in caplog.records if record.name == "datasets.faults"] == [
        "bad shard, another takes its place"
    ]
    assert stream.counters()["data/bad_shards"] == {str(path / "shard-00001.tar")}


def test_a_key_that_comes_twice_is_fatal_or_left_out(tmp_path: Path) -> None:
    keys = [f"k{number}" for number in range(20)]
    keys[13] = "k4"
    path = write_set(tmp_path / "set", [10, 10], lengths=(4,), keys=keys)
    with pytest.raises(UserError, match="k4"):
        source(path, on_bad="fail")
    stream = source(path, batch=10)
    seen = {sample for batch in take(stream, 0, 4) for sample, _ in sample_of(batch["video"])}
    assert 13 not in seen and stream.counters()["data/bad_samples"] == 2


def test_pictures_of_another_size_than_the_index_says_are_not_decoded(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [8], lengths=(4,), codec="mp4", size=(64, 64))
    index = path / "index.json"
    index.write_text(index.read_text().replace('"size": [64, 64]', '"size": [16, 15]'))
    with pytest.raises(UserError, match="does not decode: pictures of 64 x 64 where 16 x 16 are stored"):
        take(source(path, on_bad="fail"), 0, 1)


def test_too_many_end_the_run_with_a_summary(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [40, 40], lengths=(4,))
    spoil(path, *range(0, 80, 5))  # a fifth
    stream = source(path, max_bad_share=0.1)
    with pytest.raises(
        UserError, match=r"1\d of \d+ samples read are bad, more than --max-bad-share 0.1 \(checksum 1\d; first .*clip_"
    ) as caught:
        take(stream, 0, 20)
    assert "\n" not in str(caught.value) and "verify" in str(caught.value)
    take(source(path, max_bad_share=0.25), 0, 30)


def test_what_is_read_in_place_of_bad_samples_counts_as_read(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [80], lengths=(4,))
    spoil(path, *range(72))
    take(source(path, batch=4, max_bad_share=1.0), 0, 30)
    with pytest.raises(UserError, match="samples read are bad") as caught:
        take(source(path, batch=4, max_bad_share=0.5), 0, 30)
    bad, read = map(int, re.findall(r"\d+", str(caught.value))[:2])
    assert FEW < bad <= read < 80


def test_a_few_never_end_a_run_unless_none_are_allowed(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [12, 12], lengths=(4,))
    spoil(path, *range(FEW))
    take(source(path, max_bad_share=0.001), 0, 9)
    with pytest.raises(UserError, match="--max-bad-share 0 "):
        take(source(path, max_bad_share=0.0), 0, 9)


def test_too_many_known_at_the_start_end_the_run_at_once(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [12, 12, 12], lengths=(4,))
    (path / "shard-00001.tar").unlink()
    with pytest.raises(UserError, match=r"12 of 36 samples cannot be used, .*unreadable shard 12; first .*shard-00001.tar"):
        source(path, max_bad_share=0.3)
    source(path, max_bad_share=0.4)


def test_a_set_of_bad_samples_only_ends(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [8], lengths=(4,))
    spoil(path, *range(8))
    with pytest.raises(UserError, match="no good sample in"):
        take(source(path, max_bad_share=1.0), 0, 1)


def test_a_loader_process_that_is_killed_is_said_in_a_line(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [8, 8], lengths=(4,), **MP4)
    before = multiprocessing.active_children()
    stream = source(path, workers=1, prefetch=1).batches(0)
    next(stream)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    worker.kill()
    with pytest.raises(RuntimeError) as caught:
        for _ in range(20):
            next(stream)
            time.sleep(0.05)
    line = str(mendable(caught.value))
    assert line.startswith("DataLoader worker (pid") and "--num-workers" in line and "\n" not in line


def count_over_ranks(env: Env, path: str) -> list[dict[str, float]]:
    stream = source(Path(path), rank=env.rank, world_size=env.world_size)
    before = counted(stream)
    take(stream, 0, 3)
    return [before, counted(stream), counted(source(Path(path), on_bad="skip", rank=env.rank, world_size=env.world_size))]


def test_counts_are_added_up_and_names_united_over_ranks(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [9, 4, 11], lengths=(4,))
    spoil(path, 0, 23)
    (path / "shard-00001.tar").unlink()
    first, second = distributed.run(count_over_ranks, 2, path=str(path))
    assert first == second
    assert first[0] == {"data/bad_samples": 0, "data/bad_shards": 1}
    alone = source(path)
    take(alone, 0, 3)
    assert first[1] == {"data/bad_samples": alone.counters()["data/bad_samples"], "data/bad_shards": 1}


def open_own(env: Env, paths: list[str]) -> str:
    try:
        return open_clips_of(DataConfig(path=(paths[env.rank],)), env).name
    except UserError as error:
        return str(error)


def test_ranks_that_see_other_samples_are_told_so(tmp_path: Path) -> None:
    paths = [str(write_set(tmp_path / name / "set", [count])) for name, count in (("a", 8), ("b", 9))]
    assert distributed.run(open_own, 2, paths=[paths[0], paths[0]]) == ["set", "set"]
    for message in distributed.run(open_own, 2, paths=paths):
        assert "8 samples on rank 0, 9 on rank 1" in message and "\n" not in message


SMALL = ["--config", "configs/cmd/tiny.yaml", "--global-batch-size", "4", "--num-workers", "0"]
SMALL += ["--perceptual", "none", "--preview-every", "0", "--no-tensorboard"]


def train(path: Path, results: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    line = ["train_ae.py", *SMALL, "--data-path", str(path), "--results-dir", str(results), "--max-steps", "3", "--log-every", "1"]
    start = distributed.command if flags else distributed.torchrun
    return start([*line, *flags], 2, 180)


def test_a_bad_sample_of_one_rank_ends_all_quickly_in_one_line_or_is_counted(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", [8, 8], lengths=(16,), size=(32, 32))
    data = DataConfig(path=(str(path),))
    bad = ClipSource(open_shards(data), data, seed=0, global_batch_size=4).order.samples(torch.arange(3, 4).numpy())[0]
    spoil(path, int(bad))  # in the second rank's half of the first batch
    done = train(path, tmp_path / "fail")
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and "Traceback (most recent call last):\n  File" not in "".join(errors)
    assert len(errors) == 1 and re.search(rf"\[rank 1\] .* sample clip_{bad:05d} is damaged", errors[0]), done.stdout[-3000:]
    done = train(path, tmp_path / "skip", "--on-bad-sample", "skip")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"sample clip_{bad:05d} is damaged" in done.stdout + done.stderr
    (log,) = (tmp_path / "skip").glob("*/log.txt")
    assert "bad samples 1" in log.read_text()
