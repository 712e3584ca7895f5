"""Latent shards: what is written, and that nobody can tell who wrote it or how often it was killed."""

import dataclasses
import json
import random
import re
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from datasets.prepare import latents
from datasets.prepare.latents import Share, encode_set
from datasets.shards import ShardSet, frame_sums
from launch.env import independent
from pipelines.cmd import CMDPipeline
from tasks.clips import ClipInfo
from tests.cmd_family import autoencoder_task, export, family
from tests.distributed import interrupt
from tests.latent_sets import digits, job, make, rows, run
from tests.videos import folder_digests, noise_frames, write_video
from utils.errors import ConfigError, UserError
from utils.media import to_float


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("runs"))["ae"]


@pytest.fixture(scope="module")
def half(pixels: Path, ae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips' latents in float16."""
    return make(pixels, ae, tmp_path_factory.mktemp("half"))


def test_members_hold_the_latents_and_what_stood_beside_the_clips(pixels: Path, ae: Path, half: Path) -> None:
    pipeline, tensors = CMDPipeline.from_exports(ae), []
    torch.set_num_threads(1)
    for (clip, before), (row, members) in zip(rows(pixels), rows(half), strict=True):
        assert list(members) == ["safetensors", "json", "cls"]
        payload = members.pop("safetensors")
        assert members == {name: before[name] for name in ("json", "cls")}
        stored = load(payload)
        block = b"".join(stored[name].numpy().tobytes() for name in ("content", "motion"))
        assert payload.endswith(block) and row["frames"] == 1
        assert row["sums"] == f"{int(frame_sums(np.frombuffer(block, np.uint8)[None])[0]):016x}"
        assert row["crc32"] == zlib.crc32(payload)
        assert (row["key"], row["label"]) == (clip["key"], clip["label"])
        frames = torch.from_numpy(np.frombuffer(before["npy"], np.uint8)[-4 * 16 * 24 * 3 :].reshape(1, 4, 16, 24, 3).copy())
        encoded = pipeline.encode_latents(to_float(frames.permute(0, 4, 1, 2, 3)))
        for name, value in encoded.items():
            assert stored[name].dtype == torch.float16
            assert torch.allclose(stored[name].float(), value[0], rtol=1e-3, atol=1e-4)
        tensors.append(stored)
    index = json.loads((half / "index.json").read_bytes())
    for name in ("content", "motion"):
        values = torch.stack([item[name] for item in tensors]).double()
        assert index["mean"][name] == pytest.approx(values.mean().item(), rel=1e-12)
        assert index["std"][name] == pytest.approx(values.std(correction=0).item(), rel=1e-9)
        assert index["scale"][name] * index["std"][name] == pytest.approx(1)
        assert index["tensors"][name] == list(values.shape[1:])


def test_the_index_says_what_was_encoded_by_what(pixels: Path, ae: Path, half: Path) -> None:
    index, before = (json.loads((folder / "index.json").read_bytes()) for folder in (half, pixels))
    assert {name: index[name] for name in ("classes", "fps", "size", "licence", "name", "clip_length")} == {
        name: before[name] for name in ("classes", "fps", "size", "licence", "name", "clip_length")
    }
    assert (index["codec"], index["pixels"]) == ({"name": "latent", "dtype": "float16"}, ShardSet.open(pixels).digest)
    loaded = CMDPipeline.from_exports(ae).ae
    assert (index["autoencoder"]["sha256"], index["autoencoder"]["system"]) == (loaded.sha256, "cmd")
    assert index["samples"] == before["samples"] == sum(1 for _ in rows(half))


def test_shares_and_restarts_do_not_change_a_byte(pixels: Path, ae: Path, half: Path, tmp_path: Path) -> None:
    """Three processes in the order 2, 0, 1, each broken off in its work at first, after others left something half written."""
    task = job(pixels, ae, tmp_path / "set")
    count = len(task.shards)
    calls = [0]

    def breaks(frames: np.ndarray) -> dict[str, np.ndarray]:
        calls[0] += 1
        if calls[0] % 6 == 0:
            raise KeyboardInterrupt
        return task.encode(frames)

    for index in (2, 0, 1):
        with pytest.raises(KeyboardInterrupt):
            encode_set(dataclasses.replace(task, encode=breaks), Share(index, 3), lambda samples: None)
        (tmp_path / "set" / f"shard-{index + 3:05d}.tar.tmp").write_bytes(b"half")
        done = encode_set(task, Share(index, 3), lambda samples: None)
        assert (done is None) == (index != 1)
    assert count == 6 and folder_digests(tmp_path / "set") == folder_digests(half)
    assert encode_set(task, Share(), lambda samples: pytest.fail("nothing is left to do")) is not None


def test_a_shard_that_was_damaged_is_made_again(pixels: Path, ae: Path, half: Path, tmp_path: Path) -> None:
    out = make(pixels, ae, tmp_path / "set")
    (out / "index.json").unlink()
    raw = bytearray((out / "shard-00001.tar").read_bytes())
    raw[700] ^= 1
    (out / "shard-00001.tar").write_bytes(raw)
    (out / "shard-00003.index.json").write_bytes(b"{}")
    for name in (".index.json.1234abcd.tmp", ".shard-00003.index.json.1234abcd.tmp"):
        (out / name).write_bytes(b"half written")
    make(pixels, ae, out)
    assert folder_digests(out) == folder_digests(half)


@pytest.mark.slow
def test_killed_processes_and_torchrun_give_the_same_bytes(pixels: Path, ae: Path, half: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "set", random.Random(0)
    line = ("latents", pixels, "--ae", ae, "--out", out, "--batch-size", 5)
    for number in range(4):
        processes = ("--nproc_per_node", 2) if number % 2 else ()

        def due(number: int = number) -> bool:
            there = len(list(out.glob("shard-*.index.json"))) >= number
            time.sleep(rng.uniform(0, 0.02) if there else 0)
            return there

        interrupt(["preprocess.py", *line, *processes], due, group=True, timeout=60)
    time.sleep(1)  # workers of a killed agent end by themselves
    assert "96 samples of float16 latents" in run(*line, "--nproc_per_node", 2)
    assert folder_digests(out) == folder_digests(half)


def test_a_process_knows_its_place_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 4, "WORLD_SIZE": 6, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    env = independent()
    assert (env.rank, env.world_size) == (4, 6) and not torch.distributed.is_initialized()


def test_longer_videos_are_cut_into_windows(ae: Path, tmp_path: Path) -> None:
    for name, frames in (("a", 11), ("b", 3), ("c", 4)):
        write_video(tmp_path / "videos" / f"{name}.mp4", noise_frames(frames, seed=frames))
    run("shards", tmp_path / "videos", "--out", tmp_path / "pixels", "--image-size", 16, 24, "--clip-length", "video", "--workers", 1)
    out = make(tmp_path / "pixels", ae, tmp_path / "set")
    cards = {json.loads(members["json"])["source"] + row["key"][16:]: json.loads(members["json"]) for row, members in rows(out)}
    assert {name: card["window"] for name, card in cards.items()} == {
        "a.mp4_000000_w000000": [0, 4],
        "a.mp4_000000_w000004": [4, 8],
        "c.mp4_000000_w000000": [0, 4],
    }
    index = json.loads((out / "index.json").read_bytes())
    assert (index["clip_length"], index["left_out"]["short"], index["samples"]) == (4, 1, 3)
    overlapping = make(tmp_path / "pixels", ae, tmp_path / "overlapping", "--window-stride", 2)
    assert [row["key"][16:] for row, _ in rows(overlapping)].count("_000000_w000006") == 1
    payload = {row["key"]: members["safetensors"] for row, members in rows(overlapping)}
    for row, members in rows(out):
        ours, theirs = load(members["safetensors"]), load(payload[row["key"]])
        assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=2e-3) for name in ours)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--task-id", 2, "--num-tasks", 2), "--task-id 2: from 0 to 1"),
        (("--num-tasks", 2), "--task-id is missing: from 0 to 1"),
        (("--dtype", "float32"), "holds a set made of other clips, by another autoencoder or with other settings: choose another --out"),
    ],
)
def test_what_cannot_be_is_one_line(pixels: Path, ae: Path, half: Path, argv: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make(pixels, ae, half, *argv)
    assert "\n" not in str(caught.value)


def test_sets_that_do_not_fit_are_refused(pixels: Path, ae: Path, half: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds latents already"):
        make(half, ae, tmp_path / "set")
    with pytest.raises(ConfigError, match="is the pixel set"):
        make(pixels, ae, pixels)
    with pytest.raises(UserError, match="does not exist"):
        make(pixels, tmp_path / "nowhere", tmp_path / "set")
    clips = ClipInfo(n_frames=8, image_size=(16, 24))
    with pytest.raises(ConfigError, match=r"takes clips of 8 frames, those of .* have 4"):
        make(pixels, export(autoencoder_task(clips=clips), tmp_path / "long"), tmp_path / "set")
    clips = ClipInfo(n_frames=4, image_size=(16, 16))
    with pytest.raises(ConfigError, match=r"takes frames of 16x16, .* holds 16x24"):
        make(pixels, export(autoencoder_task(clips=clips), tmp_path / "square"), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_numbers_that_float16_cannot_hold_are_refused(pixels: Path, ae: Path, tmp_path: Path) -> None:
    task = job(pixels, ae, tmp_path / "set")
    huge = dataclasses.replace(task, encode=lambda frames: {"content": np.full((len(frames), 2), 1e6, np.float32)})
    with pytest.raises(UserError, match="not finite in float16: use --dtype float32"):
        encode_set(huge, Share(), lambda samples: None)
    assert not list((tmp_path / "set").glob("*.tar*"))


def damaged(pixels: Path, folder: Path) -> tuple[Path, str]:
    """A copy of the set in which a bit of the third clip has changed, and that clip's key."""
    shutil.copytree(pixels, folder)
    shards = ShardSet.open(folder)
    raw = bytearray((folder / "shard-00000.tar").read_bytes())
    raw[int(shards.offset[2] + shards.nbytes[2]) - 1] ^= 1
    (folder / "shard-00000.tar").write_bytes(raw)
    return folder, shards.keys[2]


def test_a_damaged_clip_ends_the_work_or_is_left_out(pixels: Path, ae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, key = damaged(pixels, tmp_path / "copy")
    with pytest.raises(UserError, match=f"shard-00000.tar sample {key} is damaged"):
        make(copy, ae, tmp_path / "set")
    out = make(copy, ae, tmp_path / "skipped", "--on-bad-sample", "skip")
    assert re.search(f"left out, damaged: {key}: .*shard-00000.tar", capsys.readouterr().out)
    kept = [row["key"] for row, _ in rows(out)]
    assert len(kept) == 95 and key not in kept


def test_two_processes_on_one_shard_are_told(pixels: Path, ae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = job(pixels, ae, tmp_path / "set")

    def rival(*args: object) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"is writing .*shard-"):
            encode_set(task, Share(), lambda samples: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(latents, "_encode_shard", rival)
    with pytest.raises(KeyboardInterrupt):
        encode_set(task, Share(), lambda samples: None)
