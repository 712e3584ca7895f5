"""The shard set and the stream: one-line errors, the same batches for any number of ranks and workers, damage named."""

import io
import json
import multiprocessing
import shutil
import subprocess
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from datasets.config import DataConfig, resolve
from datasets.loader import ClipSource
from datasets.prepare.build import SetInfo, build
from datasets.prepare.clips import ClipRules
from datasets.shards import ShardSet
from datasets.sources import SourceOptions, list_videos
from tests.videos import write_tree
from utils.errors import ConfigError, UserError

NAMES = [f"{name}/{i}.mp4" for name in ("walk", "run", "jump") for i in range(3)]


def make(source: Path, out: Path, **rules: object) -> ShardSet:
    settings = ClipRules(**({"size": (16, 24), "clip_length": 8, "clip_stride": 4, "decoder": "pyav"} | rules))
    listing = list_videos(source, "folder", SourceOptions(), seed=0)
    build(listing, settings, SetInfo("toy", "folder", shard_samples=7), out, workers=1, progress=lambda videos, tally: None)
    return ShardSet.open(out)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("source"), NAMES)


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make(source, tmp_path_factory.mktemp("shards") / "set")


def clip_source(shards: ShardSet, batch: int = 8, workers: int = 0, **more: object) -> ClipSource:
    accumulation, rank, world = (more.pop(name, default) for name, default in (("accumulation", 1), ("rank", 0), ("world_size", 1)))
    data = DataConfig(num_workers=workers, n_frames=5, flip=True, **more)
    return ClipSource(shards, data, seed=3, global_batch_size=batch, accumulation=accumulation, rank=rank, world_size=world)


def take(source: ClipSource, first_step: int, count: int) -> list[dict[str, torch.Tensor]]:
    stream = source.batches(first_step)
    batches = list(islice(stream, count))
    stream.close()
    return batches


def test_a_shard_set_says_what_it_holds(shards: ShardSet) -> None:
    assert (shards.clip_length, shards.size, shards.fps, shards.classes, shards.name) == (8, (16, 24), 25.0, ["jump", "run", "walk"], "toy")
    assert shards.num_samples == sum(entry["samples"] for entry in shards.meta["shards"]) == 42
    assert len(shards.meta["shards"]) == 6 and len(set(shards.keys)) == 42 and len(shards.digest) == 64


def test_a_batch_is_as_the_contract_says(shards: ShardSet) -> None:
    batch = take(clip_source(shards), 0, 1)[0]
    assert batch["video"].shape == (8, 3, 5, 16, 24) and batch["video"].dtype == torch.uint8
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["index"].tolist() == list(range(8))


def test_labels_belong_to_their_clips(shards: ShardSet) -> None:
    source = clip_source(shards)
    for batch in take(source, 0, 5):
        for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
            sample = int(source.order.samples(np.array([index]))[0])
            card = json.loads(members(shards, sample)["json"])
            assert card["class"] == shards.classes[label] == card["source"].split("/")[0]
            assert shards.keys[sample] in source.describe(index)


def members(shards: ShardSet, sample: int) -> dict[str, bytes]:
    with tarfile.open(shards.shard_path(sample)) as tar:
        infos = [info for info in tar if info.name.startswith(shards.keys[sample] + ".")]
        return {info.name.split(".")[1]: tar.extractfile(info).read() for info in infos}  # type: ignore[union-attr]


def test_webdataset_reads_the_tars(shards: ShardSet) -> None:
    urls = [str(shards.folder / entry["name"]) for entry in shards.meta["shards"]]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [row["__key__"] for row in rows] == shards.keys
    for row, label in zip(rows, shards.label, strict=True):
        assert np.load(io.BytesIO(row["npy"])).shape == (8, 16, 24, 3)
        assert int(row["cls"]) == label


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("codec", ["npy", "mp4"])
def test_worlds_workers_and_accumulation_cut_the_same_batches(source: Path, tmp_path: Path, workers: int, codec: str) -> None:
    shards = make(source, tmp_path / "set", codec=codec)
    alone = take(clip_source(shards), 3, 6)
    for world, accumulation in ((1, 2), (2, 1), (4, 2)):
        parts = [clip_source(shards, workers=workers, rank=rank, world_size=world, accumulation=accumulation) for rank in range(world)]
        found = [take(part, 3, 6 * accumulation) for part in parts]
        for step, expected in enumerate(alone):
            pieces = [found[rank][step * accumulation + k] for rank in range(world) for k in range(accumulation)]
            for name, value in expected.items():
                assert torch.equal(torch.cat([piece[name] for piece in pieces]), value), (world, accumulation, name)


def test_a_restart_begins_at_the_next_sample(shards: ShardSet) -> None:
    whole = take(clip_source(shards, workers=2), 0, 12)
    for first in (1, 4, 5, 11):
        later = take(clip_source(shards, workers=1), first, 12 - first)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(later, whole[first:], strict=True) for name in a)


def test_windows_and_flips_are_drawn_anew_each_epoch(shards: ShardSet) -> None:
    source = clip_source(shards, batch=42)
    first, second = take(source, 0, 2)
    by_sample = [dict(zip(source.order.samples(b["index"].numpy()).tolist(), b["video"], strict=True)) for b in (first, second)]
    same = sum(torch.equal(by_sample[0][sample], by_sample[1][sample]) for sample in range(42))
    assert same < 15
    stored = np.lib.format.read_array(io.BytesIO(members(shards, 7)["npy"]))
    windows = [stored[i : i + 5] for i in range(4)]
    choices = [torch.from_numpy(w[:, :, ::step].copy()).permute(3, 0, 1, 2) for w in windows for step in (1, -1)]
    assert any(torch.equal(by_sample[0][7], choice) for choice in choices)


def test_whole_videos_give_windows(source: Path, tmp_path: Path) -> None:
    for codec in ("npy", "mp4"):
        shards = make(source, tmp_path / codec, codec=codec, clip_length=0)
        assert shards.num_samples == 9 and shards.clip_length == 20 and shards.frames.max() == 28
        assert take(clip_source(shards, batch=9), 0, 1)[0]["video"].shape == (9, 3, 5, 16, 24)
        with pytest.raises(ConfigError, match="--n-frames"):
            resolve(DataConfig(), shards)


def test_resolve_fills_and_refuses(shards: ShardSet) -> None:
    data = resolve(DataConfig(), shards)
    assert (data.n_frames, data.image_size, data.dataset_name) == (8, (16, 24), "toy")
    assert resolve(DataConfig(n_frames=3, image_size=(16, 24), dataset_name="x"), shards).n_frames == 3
    with pytest.raises(ConfigError, match=r"--n-frames 9: its clips have 8"):
        resolve(DataConfig(n_frames=9), shards)
    with pytest.raises(ConfigError, match=r"--image-size 24 16.*holds 16 24"):
        resolve(DataConfig(image_size=(24, 16)), shards)


def test_batch_sizes_that_cannot_be_are_refused(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match="use 6 or 8"):
        clip_source(shards, batch=7, world_size=2)
    with pytest.raises(ConfigError, match="at most 42"):
        clip_source(shards, batch=43)


def copy_set(shards: ShardSet, folder: Path) -> Path:
    return Path(shutil.copytree(shards.folder, folder / "copy"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("codec", ["npy", "mp4"])
def test_a_flipped_byte_is_named(source: Path, tmp_path: Path, codec: str, workers: int) -> None:
    shards = make(source, tmp_path / "set", codec=codec)
    sample, path = 10, shards.shard_path(10)
    data = bytearray(path.read_bytes())
    data[int(shards.offset[sample] + shards.nbytes[sample]) - 3000 * (codec == "npy") - 50] ^= 0x10
    path.write_bytes(data)
    source_ = ClipSource(ShardSet.open(tmp_path / "set"), DataConfig(num_workers=workers), seed=0, global_batch_size=42)
    with pytest.raises(UserError, match=f"{path.name} sample {shards.keys[sample]} is damaged") as caught:
        take(source_, 0, 1)
    assert "\n" not in str(caught.value)


def test_a_shard_that_goes_away_while_training_is_named(shards: ShardSet, tmp_path: Path) -> None:
    folder = copy_set(shards, tmp_path)
    source = clip_source(ShardSet.open(folder), batch=42)
    (folder / "shard-00002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00002.tar"):
        take(source, 0, 1)


def edit_index(folder: Path, **values: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "is empty"),
        (lambda folder: (folder / "index.json").unlink(), "unfinished"),
        (lambda folder: (folder / "shard-00001.tar").unlink(), "shard-00001.tar is missing"),
        (lambda folder: (folder / "shard-00001.index.json").unlink(), "shard-00001.index.json is missing"),
        (lambda folder: (folder / "shard-00001.tar").write_bytes(b"x" * 99), "has 99 bytes"),
        (lambda folder: (folder / "shard-00001.index.json").write_bytes(b"{}"), "does not match"),
        (lambda folder: (folder / "index.json").write_bytes(b"{"), "is damaged"),
        (lambda folder: (folder / "index.json").write_bytes(b"{}"), "not the index of a shard set"),
        (lambda folder: edit_index(folder, schema=99), "schema 99"),
        (lambda folder: edit_index(folder, shards="x"), "is damaged"),
    ],
)
def test_a_set_that_is_not_whole_is_refused_in_one_line(shards: ShardSet, tmp_path: Path, spoil: object, words: str) -> None:
    folder = copy_set(shards, tmp_path)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=words) as caught:
        ShardSet.open(folder)
    assert "\n" not in str(caught.value)


def test_a_video_folder_is_answered_with_the_command_to_run(source: Path) -> None:
    with pytest.raises(UserError, match=rf"python preprocess.py shards {source} --out {source}-shards"):
        ShardSet.open(source)


def test_a_temporary_folder_with_a_long_name_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make(source, tmp_path / "set", codec="mp4")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 80)))
    with pytest.raises(ConfigError, match=r"TMPDIR .* is longer than 75 characters"):
        next(clip_source(shards, workers=1).batches(0))


def test_loader_processes_leave_signals_to_their_parent(source: Path, tmp_path: Path) -> None:
    """torchrun and Ctrl-C signal the whole process group: the step that is at work must still get its samples."""
    before = multiprocessing.active_children()
    stream = clip_source(make(source, tmp_path / "set", codec="mp4"), workers=1, prefetch=1).batches(0)
    next(stream)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    time.sleep(0.5)
    for _ in range(4):
        next(stream)
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0, "its parent may end it"
    stream.close()


@pytest.mark.parametrize("setting", ["num_workers", "prefetch"])
def test_negative_numbers_are_refused(shards: ShardSet, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{setting} -1 is negative"):
        resolve(DataConfig(**{setting: -1}), shards)
