"""Latents of single frames: windows, single frames and checksums as of clips, however the stream is cut."""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.config import DataConfig, open_shards, resolve
from datasets.frames import linspace, strided
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.prepare.latents import Share, encode_set
from datasets.shards import ShardSet
from datasets.statistics import pooled_statistics
from tasks.clips import ClipInfo, empty_batch
from tests.frame_encoders import ConvEncoder, frame_job
from tests.preprocessing import run as prepare
from tests.shard_sets import crc, frames_in, spoil, write_set
from tests.stream_cuts import draw_cut, equal, joined, replaced, take
from tests.videos import noise_frames, write_video
from utils.errors import ConfigError, UserError
from utils.media import to_float


def write(folder: Path, sizes: list[int], **more: Any) -> Path:
    return write_set(folder, sizes, codec="framewise", **more)


def edit(folder: Path, **values: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_cut_is_the_same_stream(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda found: sum(found) > 0))
    cut = draw_cut(data, sum(sizes))
    with tempfile.TemporaryDirectory() as folder:
        path = str(write(Path(folder) / "set", sizes, lengths=data.draw(st.sampled_from([(5,), (5, 9, 7)]))))
        base: dict[str, Any] = {"path": (path,), "n_frames": 3, "frame_interval": data.draw(st.integers(1, 2)), "shuffle_shards": 2}
        base |= {"shuffle": data.draw(st.sampled_from(["full", "block"])), "images": data.draw(st.integers(0, 2))}
        base |= {"clip_rule": data.draw(st.sampled_from(["consecutive", "linspace"]))}
        shards = open_shards(DataConfig(path=(path,)))
        steps = 2 * (sum(sizes) // cut.batch) + 1
        alone = take(shards, DataConfig(num_workers=0, **base), 0, steps, global_batch_size=cut.batch)
        stop = data.draw(st.integers(0, steps - 1))
        assert equal(joined(shards, base, cut, stop, steps - stop), alone[stop:])
    assert all((np.diff(frames) >= 0).all() for batch in alone for _, frames in frames_in(batch["moments"]))


@pytest.mark.parametrize(("rule", "interval"), [("consecutive", 1), ("consecutive", 3), ("linspace", 3)])
def test_frames_of_a_window_follow_the_rule(tmp_path: Path, rule: str, interval: int) -> None:
    path = str(write(tmp_path / "set", [4, 3], lengths=(12, 15)))
    data = DataConfig(path=(path,), n_frames=4, frame_interval=interval, clip_rule=rule, num_workers=0)  # type: ignore[arg-type]
    seen = set()
    for batch in take(open_shards(data), data, 0, 20, global_batch_size=7):
        assert [sample % 2 for sample, _ in frames_in(batch["moments"])] == batch["label"].tolist()
        for sample, frames in frames_in(batch["moments"]):
            first, total = frames[0], (12, 15)[sample % 2]
            assert frames == (strided(first, 4, interval) if rule == "consecutive" else linspace(first, total, 4, interval))
            seen.add((sample, first))
    assert len(seen) > 10, "windows are drawn"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tensor", ["moments", "sample"])
def test_a_batch_is_as_its_spec_says(tmp_path: Path, dtype: torch.dtype, tensor: str) -> None:
    path = str(write(tmp_path / "set", [5], lengths=(6,), dtype=dtype, tensor=tensor))
    data = DataConfig(path=(path,), num_workers=0, images=2)
    shards = open_shards(data)
    batch = take(shards, data, 0, 1, global_batch_size=4)[0]
    assert batch[tensor].shape == (4, 4, 6, 1, 2) and batch["images"].shape == (4, 4, 2, 1, 2) and (batch[tensor][:, 2:] == 0.5).all()
    clips = ClipInfo.of(shards, resolve(data, shards))
    spec = empty_batch(clips, 4)
    assert {name: (value.shape, value.dtype) for name, value in spec.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }
    assert clips.latents is not None and clips.latents.framewise and dict(clips.latents.tensors) == {tensor: (4, 1, 2)}
    assert clips.latents.statistics == {"mean": 0.5, "std": 2.0, "scale": 0.5, "shift": 0.5}


def test_single_frames_can_be_samples(tmp_path: Path) -> None:
    shards = ShardSet.open(write(tmp_path / "set", [5, 3], lengths=(6, 3)))
    source = ClipSource(shards, DataConfig(frame_sample_prob=1.0, num_workers=0), seed=0, global_batch_size=1)
    found = [frames_in(batch["moments"])[0] for batch in islice(source.batches(0), source.steps_per_epoch)]
    assert sorted((sample, frame) for sample, (frame,) in found) == [(k, i) for k in range(8) for i in range((6, 3)[k % 2])]


def test_a_flipped_byte_is_named_or_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [6, 6], lengths=(4,))
    spoil(folder, 3, 8)  # in the last frame
    data = DataConfig(path=(str(folder),), n_frames=4, num_workers=0)
    with pytest.raises(UserError, match=r"sample clip_0000[38] is damaged \(checksum\)"):
        take(open_shards(data), data, 0, 1, global_batch_size=12)
    first = DataConfig(path=(str(folder),), n_frames=1, num_workers=0)
    for batch in islice(ClipSource(open_shards(first), first, seed=1, global_batch_size=1).batches(0), 1):
        assert batch["moments"].shape[2] == 1
    skip = DataConfig(path=(str(folder),), num_workers=0, on_bad_sample="skip", max_bad_share=1.0, images=1)
    source = ClipSource(open_shards(skip), skip, seed=1, global_batch_size=12)
    batches = list(islice(source.batches(0), 3))
    assert all(sample not in (3, 8) for batch in batches for sample, _ in frames_in(batch["moments"]))
    assert replaced(source) >= 6
    again = islice(ClipSource(open_shards(skip), skip, seed=1, global_batch_size=12).batches(2), 1)
    assert [crc(batch) for batch in again] == [crc(batches[2])]


def test_sets_of_other_lengths_mix_and_those_of_other_encoders_do_not(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(k), [4], lengths=(4 + k,), first=100 * k) for k in range(2)]
    data = DataConfig(path=tuple(map(str, paths)), n_frames=3, num_workers=0, weights=(1.0, 3.0))
    batch = take(open_shards(data), data, 0, 1, global_batch_size=8)[0]
    assert sum(sample >= 100 for sample, _ in frames_in(batch["moments"])) == 6
    edit(paths[1], autoencoder={"sha256": "1" * 64})
    with pytest.raises(ConfigError, match="different autoencoders"):
        open_shards(data)
    clips = write_set(tmp_path / "clips", [4])
    with pytest.raises(ConfigError, match="latents"):
        open_shards(DataConfig(path=(str(paths[0]), str(clips))))


def told(folder: Path, latent: dict[str, float]) -> ShardSet:
    edit(folder, latent=latent)
    return ShardSet.open(folder)


def test_statistics_of_several_sets_are_those_of_all_their_frames(tmp_path: Path) -> None:
    values = [np.random.default_rng(k).normal(k, 1 + k, size=frames) for k, frames in enumerate((30, 90))]
    folders = [write(tmp_path / str(k), [6], lengths=(len(part) // 6,)) for k, part in enumerate(values)]
    sets = [
        told(folder, {"mean": part.mean(), "std": part.std(), "scale": 1 / part.std(), "shift": part.mean()})
        for folder, part in zip(folders, values, strict=True)
    ]
    found, whole = pooled_statistics(Collection.of(*sets)), np.concatenate(values)
    assert found == pytest.approx({"mean": whole.mean(), "std": whole.std(), "scale": 1 / whole.std(), "shift": whole.mean()})
    given = told(folders[0], {"mean": 0.3, "std": 1.5, "scale": 0.18215, "shift": 0.0})
    assert pooled_statistics(Collection.of(given)) == {"mean": 0.3, "std": 1.5, "scale": 0.18215, "shift": 0.0}
    assert pooled_statistics(Collection.of(given, sets[1])) == {}
    edit(folders[0], latent={"mean": 0.3})
    assert pooled_statistics(Collection.of(ShardSet.open(folders[0]))) == {}


@pytest.mark.parametrize(
    ("wrong", "words"), [({"flip": True}, "--flip"), ({"n_frames": 9}, "--n-frames 9"), ({"n_frames": 3, "frame_interval": 3}, "7 frames")]
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    shards = ShardSet.open(write(tmp_path / "set", [4], lengths=(6,)))
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(DataConfig(**wrong), shards)
    assert "\n" not in str(caught.value)
    assert resolve(DataConfig(), shards).n_frames == 6


@pytest.mark.parametrize(
    "values",
    [
        {"tensors": {"moments": [4, 1, 2], "more": [2]}},
        {"tensors": {"other": [4, 1, 2]}},
        {"tensors": {"moments": [4, 9, 9]}},
        {"clip_length": 5},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = write(tmp_path / "set", [4], lengths=(6,))
    edit(folder, **values)
    with pytest.raises(UserError, match="damaged"):
        ShardSet.open(folder)


def test_a_set_that_preparation_wrote_gives_the_latents_of_what_the_clips_give(tmp_path: Path) -> None:
    """Same samples, windows and images of both kinds of shards, with the condition vectors that lay beside the videos."""
    for number, count in enumerate((13, 4, 30, 7, 22)):
        video = write_video(tmp_path / "in" / "ab"[number % 2] / f"{number}.mp4", noise_frames(count, seed=number))
        np.save(Path(video).with_suffix(".emb.npy"), np.arange(6, dtype=np.float16).reshape(2, 3) + number)
    prepare(tmp_path / "in", "--out", tmp_path / "clips", "--image-size", 8, 12, "--clip-length", "video", "--shard-size", 2)
    encode_set(frame_job(tmp_path / "clips", tmp_path / "latents", dtype="float32"), Share(), lambda samples: None)
    data = DataConfig(n_frames=3, images=2, frame_interval=1, num_workers=0, weights=(), shuffle="block", shuffle_shards=2)
    pairs = [take(Collection.of(ShardSet.open(tmp_path / kind)), data, 0, 6, global_batch_size=4) for kind in ("clips", "latents")]
    encode = ConvEncoder().encode_moments
    for clips, latents in zip(*pairs, strict=True):
        assert torch.allclose(latents["moments"], encode(to_float(clips["video"])), atol=1e-6)
        assert torch.allclose(latents["images"], encode(to_float(clips["images"])), atol=1e-6)
        assert all(torch.equal(clips[name], latents[name]) for name in ("label", "index", "image_label", "cond"))
        assert torch.equal(clips["cond"] - clips["cond"][:, :1], torch.arange(6.0).expand(4, 6))
        assert torch.equal(clips["cond"][:, 0].long() % 2, clips["label"])
