"""Latents of encoders of frames: a row for each frame of clips of any length, exact statistics, and nothing stale is ever taken."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from datasets.prepare import frame_latents
from datasets.prepare.frame_latents import LOAD_BYTES
from datasets.prepare.latents import Share, encode_set
from datasets.prepare.moments import Moments
from datasets.prepare.stored import decode_clip
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from pipelines import latents as command
from tests.distributed import ROOT, environment
from tests.frame_encoders import ConvEncoder, frame_job
from tests.latent_sets import arguments, rows
from tests.preprocessing import call, run
from tests.shard_sets import spoil
from tests.videos import folder_digests, noise_frames, write_tree, write_video
from utils.errors import ConfigError, UserError
from utils.media import to_float


def make(pixels: Path, out: Path, encoder: ConvEncoder | None = None, **rules: Any) -> Path:
    assert encode_set(frame_job(pixels, out, encoder, **rules), Share(), lambda samples: None) is not None
    return out


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole videos of 13, 1, 30, 7 and 22 frames of 8 x 12 in three shards, of two classes."""
    root = tmp_path_factory.mktemp("videos")
    for number, count in enumerate((13, 1, 30, 7, 22)):
        write_video(root / "in" / "ab"[number % 2] / f"{number}.mp4", noise_frames(count, seed=number))
    run(root / "in", "--out", root / "set", "--image-size", 8, 12, "--clip-length", "video", "--shard-size", 2)
    return root / "set"


@pytest.fixture(scope="module")
def whole(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(pixels, tmp_path_factory.mktemp("latents") / "set", dtype="float32")


def frames_of(members: dict[str, bytes], count: int) -> torch.Tensor:
    clip = decode_clip(members["npy"], "npy", count)
    return to_float(torch.from_numpy(clip.copy()).permute(3, 0, 1, 2)[None])


def test_any_memory_layout_of_the_encoder_gives_the_same_bytes(pixels: Path, whole: Path, tmp_path: Path) -> None:
    class ChannelsLast(ConvEncoder):
        def encode_moments(self, video: torch.Tensor) -> torch.Tensor:
            return super().encode_moments(video).permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)

    assert folder_digests(make(pixels, tmp_path / "set", ChannelsLast(), dtype="float32")) == folder_digests(whole)


def test_sums_do_not_depend_on_the_order_of_memory() -> None:
    values = np.random.default_rng(0).normal(size=(16, 9, 13)).astype(np.float32)
    found = []
    for laid_out in (values, np.asfortranarray(values), values.transpose(1, 2, 0).copy().transpose(2, 0, 1)):
        moments = Moments()
        moments.add({"sample": laid_out})
        found.append(moments.to_dict())
    assert found[0] == found[1] == found[2]


def test_each_frame_has_its_row(pixels: Path, whole: Path) -> None:
    """Against the whole clip through the encoder in one piece, whatever pieces it was encoded in."""
    index = json.loads((whole / "index.json").read_bytes())
    assert index["codec"] == {"name": "latent", "dtype": "float32", "framewise": True}
    assert (index["tensors"], index["clip_length"], index["size"]) == ({"moments": [4, 2, 3]}, 0, [8, 12])
    means, variances = [], []
    for (row, before), (ours, members) in zip(rows(pixels), rows(whole), strict=True):
        assert {name: ours[name] for name in ("key", "frames", "label")} == {name: row[name] for name in ("key", "frames", "label")}
        assert list(members) == ["safetensors", "json", "cls"] and members["json"] == before["json"]
        (name, stored), *others = load(members["safetensors"]).items()
        wanted = ConvEncoder().encode_moments(frames_of(before, row["frames"]))[0].transpose(0, 1).numpy()
        assert name == "moments" and not others and stored.shape == (row["frames"], 4, 2, 3)
        assert np.allclose(stored, wanted, atol=1e-6)
        words = stored.reshape(len(stored), -1).view(np.uint64).sum(axis=1, dtype=np.uint64)
        assert ours["sums"] == "".join(f"{int(word):016x}" for word in words)
        mean, std = np.split(stored.astype(np.float64), 2, axis=1)
        means.append(mean.ravel())
        variances.append(std.ravel() ** 2)
    drawn = np.concatenate(means)
    std = np.sqrt(drawn.var() + np.concatenate(variances).mean())
    assert index["latent"] == pytest.approx({"mean": drawn.mean(), "std": std, "scale": 1 / std, "shift": drawn.mean()}, rel=1e-12)


def test_memory_is_bounded_and_batches_are_full(pixels: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read at a time, the values are those of whole clips; no call of the encoder sees more frames than it should."""
    assert LOAD_BYTES == 1 << 26
    monkeypatch.setattr(frame_latents, "LOAD_BYTES", 2 * 5 * 8 * 12 * 3)
    read: list[int] = []
    plain = ClipReader.read
    monkeypatch.setattr(ClipReader, "read", lambda self, *args: read.append(self.n_frames) or plain(self, *args))
    encoder = ConvEncoder()
    make(pixels, tmp_path / "set", encoder, dtype="float32")
    assert max(read) <= 10 and max(encoder.batches) == 5 and sum(encoder.batches) == 73
    assert sum(size < 5 for size in encoder.batches) <= 3, "only the last batch of a shard is smaller"
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


def test_shares_restarts_and_kills_do_not_change_a_byte(pixels: Path, whole: Path, tmp_path: Path) -> None:
    task, calls = frame_job(pixels, tmp_path / "set", dtype="float32"), [0]

    def breaks(frames: np.ndarray) -> dict[str, np.ndarray]:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise KeyboardInterrupt
        return task.encode(frames)

    for index in (1, 0):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                encode_set(dataclasses.replace(task, encode=breaks), Share(index, 2), lambda samples: None)
        assert not list((tmp_path / "set").glob("*.tmp"))
        done = encode_set(task, Share(index, 2), lambda samples: None)
        assert (done is None) == (index == 1)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


KILLED = """
import sys, time
from pathlib import Path
from datasets.prepare.latents import Share, encode_set
from tests.frame_encoders import ConvEncoder, frame_job
job = frame_job(Path(sys.argv[1]), Path(sys.argv[2]), dtype="float32")
encode = job.encode
object.__setattr__(job, "encode", lambda frames: (time.sleep(0.02), encode(frames))[1])
encode_set(job, Share(), lambda samples: print(samples, flush=True))
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_is_gone_on_from(pixels: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(3):
        line = [sys.executable, "-c", KILLED, str(pixels), str(tmp_path / "set")]
        child = subprocess.Popen(line, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(number + 1):
            child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    make(pixels, tmp_path / "set", dtype="float32")
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    pixels: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, room = os.fsync, [3]

    def full(fd: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again") as caught:
        make(pixels, tmp_path / "set", dtype="float32")
    assert "\n" not in str(caught.value) and not list((tmp_path / "set").glob("*.tar.tmp"))
    monkeypatch.undo()
    make(pixels, tmp_path / "set", dtype="float32")
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


def test_damaged_clips_end_the_work_or_are_left_out(pixels: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip that is damaged in its last frames is gone as a whole, and leaves nothing of itself in others."""
    copy = shutil.copytree(pixels, tmp_path / "copy")
    shards = ShardSet.open(copy)
    followed = (shards.shard[1:] == shards.shard[:-1]) & (shards.frames[:-1] > 5)
    victim = int(np.flatnonzero(followed)[0])
    key = shards.keys[victim]
    spoil(copy, victim)
    with pytest.raises(UserError, match=f"sample {key} is damaged"):
        make(copy, tmp_path / "fail", dtype="float32")
    monkeypatch.setattr(frame_latents, "LOAD_BYTES", 5 * 8 * 12 * 3)
    told: list[int] = []
    job = frame_job(copy, tmp_path / "skip", on_bad="skip", dtype="float32")
    index = encode_set(job, Share(), told.append)
    assert index is not None and sum(told) == 5 and index["samples"] == 4
    assert len(index["left_out"]["damaged"]) == 1 and index["left_out"]["damaged"][0].startswith(f"{key}: ")
    rest = {row["key"]: load(members["safetensors"])["moments"] for row, members in rows(tmp_path / "skip")}
    before = {row["key"]: load(members["safetensors"])["moments"] for row, members in rows(whole)}
    assert rest.keys() == before.keys() - {key} and all(np.allclose(rest[name], before[name], atol=1e-6) for name in rest)
    assert "no fault" in call("verify", tmp_path / "skip", "--workers", 1)


def test_draws_are_addressed_by_clip_and_frame(pixels: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = make(pixels, tmp_path / "a", store="sample", seed=3, dtype="float32")
    monkeypatch.setattr(frame_latents, "LOAD_BYTES", 1)
    assert folder_digests(make(pixels, tmp_path / "b", store="sample", seed=3, dtype="float32")) == folder_digests(drawn)
    other = make(pixels, tmp_path / "c", store="sample", seed=4, dtype="float32")
    noise = []
    for (_, moments), (_, ours), (_, theirs) in zip(rows(whole), rows(drawn), rows(other), strict=True):
        mean, std = np.split(load(moments["safetensors"])["moments"], 2, axis=1)
        values = [load(members["safetensors"])["sample"] for members in (ours, theirs)]
        assert values[0].shape == mean.shape and not np.isclose(values[0], values[1]).any(axis=(1, 2, 3)).all()
        noise.append((values[0] - mean) / std)
    together = np.concatenate(noise)
    assert abs(together.mean()) < 0.15 and abs(together.std() - 1) < 0.1
    assert len(np.unique(together[:, 0, 0, 0])) == len(together), "no two frames have the same noise"
    index = json.loads((drawn / "index.json").read_bytes())
    assert index["tensors"] == {"sample": [2, 2, 3]}
    values = np.concatenate([load(members["safetensors"])["sample"].ravel() for _, members in rows(drawn)]).astype(np.float64)
    assert (index["latent"]["mean"], index["latent"]["std"]) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_a_scale_that_is_given_is_what_training_is_told(pixels: Path, whole: Path, tmp_path: Path) -> None:
    given = json.loads((make(pixels, tmp_path / "set", scale=0.18215, dtype="float32") / "index.json").read_bytes())["latent"]
    measured = json.loads((whole / "index.json").read_bytes())["latent"]
    assert given == {"mean": measured["mean"], "std": measured["std"], "scale": 0.18215, "shift": 0.0}


def test_clips_of_compressed_frames_and_of_one_length(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", ["1.mp4", "2.mp4"], frames=20)
    run(tmp_path / "in", "--out", tmp_path / "pixels", "--image-size", 16, 16, "--clip-length", 8, "--codec", "mp4")
    out = make(tmp_path / "pixels", tmp_path / "set")
    index = json.loads((out / "index.json").read_bytes())
    assert (index["clip_length"], index["samples"], index["codec"]["dtype"]) == (8, 4, "float16")
    shards = ShardSet.open(tmp_path / "pixels")
    clips = ClipReader(shards, 8).read(np.arange(4), np.zeros(4, np.int64))
    for clip, (_, members) in zip(clips, rows(out), strict=True):
        wanted = ConvEncoder().encode_moments(to_float(torch.from_numpy(clip).permute(3, 0, 1, 2)[None]))[0].transpose(0, 1)
        assert np.allclose(load(members["safetensors"])["moments"], wanted.numpy(), rtol=2e-3, atol=1e-3)
    assert "no fault" in call("verify", out, "--workers", 1)


def test_verify_and_inspect_know_them(whole: Path, tmp_path: Path) -> None:
    assert "no fault" in call("verify", whole, "--workers", 1)
    printed = call("inspect", whole)
    assert "latent float32 frame by frame" in printed and "moments [4, 2, 3]" in printed and "scale" in printed
    spoil(shutil.copytree(whole, tmp_path / "flipped"), 0)
    assert "crc32" in call("verify", tmp_path / "flipped", "--workers", 1, code=1)


def test_latents_that_are_not_numbers_are_refused(pixels: Path, tmp_path: Path) -> None:
    job = frame_job(pixels, tmp_path / "set")
    huge = dataclasses.replace(job, encode=lambda frames: {"moments": np.full((1, 4, frames.shape[1], 2, 3), 1e6, np.float32)})
    with pytest.raises(UserError, match=r"latents of .* sample .* are not finite in float16: use --dtype float32"):
        encode_set(huge, Share(), lambda samples: None)
    assert not list((tmp_path / "set").glob("*.tar*"))


def test_latents_are_never_trusted_by_their_number(pixels: Path, whole: Path, tmp_path: Path) -> None:
    """As many latents as clips, of other clips or of another autoencoder, finished or not, are refused; a part of a set is none."""
    for number, count in enumerate((13, 1, 30, 7, 22)):
        write_video(tmp_path / "in" / "ab"[number % 2] / f"{number}.mp4", noise_frames(count, seed=50 + number))
    run(tmp_path / "in", "--out", tmp_path / "other", "--image-size", 8, 12, "--clip-length", "video", "--shard-size", 2)
    assert ShardSet.open(tmp_path / "other").keys == ShardSet.open(pixels).keys
    stale = "other clips, by another autoencoder or with other settings: choose another --out"
    for clips, encoder in ((tmp_path / "other", ConvEncoder()), (pixels, ConvEncoder(1))):
        finished = shutil.copytree(whole, tmp_path / "finished", dirs_exist_ok=True)
        with pytest.raises(UserError, match=stale):
            make(clips, finished, encoder, dtype="float32")
        (finished / "index.json").unlink()
        with pytest.raises(UserError, match=stale):
            make(clips, finished, encoder, dtype="float32")
        with pytest.raises(UserError, match="holds an unfinished shard set"):
            ShardSet.open(finished)
        assert {name: digest for name, digest in folder_digests(whole).items() if name != "index.json"} == folder_digests(finished)
    foreign = make(tmp_path / "other", tmp_path / "foreign", dtype="float32")
    mixed = shutil.copytree(whole, tmp_path / "mixed")
    for name in ("shard-00001.tar", "shard-00001.index.json"):
        shutil.copy(foreign / name, mixed / name)
    with pytest.raises(UserError, match=r"shard-00001.* is damaged|shard-00001.*sha256"):
        ShardSet.open(mixed)


def test_the_command_line(pixels: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[command.EncoderOptions] = []
    monkeypatch.setitem(command.ENCODERS, "latte", lambda options: opened.append(options) or ConvEncoder())
    flags = ["--vae", "folder", "--out", tmp_path / "set", "--dtype", "float32", "--batch-size", 5]
    printed = call("latents", pixels, *flags)
    assert "5 samples of float32 latents: moments 4x2x3" in printed and "scale" in printed
    assert (opened[0].path, opened[0].vae, opened[0].chunk) == ("", "folder", 5)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)
    for extra, words in (
        (("--window-stride", 2), "--window-stride means nothing here: folder encodes frame by frame"),
        (("--seed", 2), "--seed means nothing here: moments are no draws"),
        (("--latent-scale", 2), "with other settings"),
        (("--store", "sample"), "with other settings"),
    ):
        assert words in call("latents", pixels, *flags, *extra, code=2 if "means" in words else 1)
    with pytest.raises(ConfigError, match="say what encodes the clips"):
        command.prepare(arguments(pixels, "", tmp_path / "no"), 0, 1, torch.device("cpu"))
    odd = tmp_path / "odd"
    write_tree(tmp_path / "in", ["1.mp4"])
    run(tmp_path / "in", "--out", odd, "--image-size", 10, 12)
    assert "multiples of 4" in call("latents", odd, "--vae", "x", "--out", tmp_path / "none", code=1)
    assert not (tmp_path / "none").exists()
