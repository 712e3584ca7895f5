"""Latent shards: what is written, that nobody can tell who wrote it or how often it was killed, and that stages train on it as on clips."""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.prepare import latents
from datasets.prepare.latents import LatentJob, Share, encode_set
from datasets.prepare.tars import read_members
from datasets.shards import ShardSet, frame_sums
from engine.loop import fit
from launch.env import distributed, independent
from pipelines.cmd import CMDPipeline
from pipelines.latents import add_latents_arguments, encode_with, prepare, run_latents
from pipelines.loading import load_autoencoder
from tasks import autoencoder, content, diffusion_task, motion
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.clips import ClipInfo
from tasks.content import CMDContentConfig, CMDContentTask
from tasks.diffusion_task import open_first_stage
from tasks.motion import CMDMotionConfig, CMDMotionTask
from tests.cmd_family import CLIPS, autoencoder_task, config, export, family
from tests.distributed import ROOT, environment
from tests.test_tasks_cmd import fake_vae
from tests.videos import folder_digests, noise_frames, write_video
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng

STAGES = {"content": (CMDContentConfig, CMDContentTask, content.build), "motion": (CMDMotionConfig, CMDMotionTask, motion.build)}
TRAIN = "--global-batch-size 8 --num-workers 0 --preview-every 0 --eval-every 0 --no-tensorboard --ckpt-every 2 --log-every 1"
TRAIN += " --parallel ddp --precision fp32 --compile off --preview.samples 2 --preview.steps 2"


def command(*argv: object) -> list[str]:
    return [sys.executable, str(ROOT / "preprocess.py"), *map(str, argv)]


def run(*argv: object) -> str:
    done = subprocess.run(command(*argv), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 clips of 4 frames of 16 x 24 in six shards."""
    folder = tmp_path_factory.mktemp("pixels")
    flags = ["--image-size", 16, 24, "--clip-length", 4, "--shard-size", 16, "--workers", 1]
    run("shards", "--dataset-name", "synthetic-digits", "--num-videos", 12, *flags, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("runs"))["ae"]


def arguments(pixels: Path, ae: Path, out: Path, *argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_latents_arguments(parser)
    return parser.parse_args([str(pixels), "--ae", str(ae), "--out", str(out), "--batch-size", "5", *map(str, argv)])


def job(pixels: Path, ae: Path, out: Path, *argv: object) -> LatentJob:
    return prepare(arguments(pixels, ae, out, *argv), 0, 1, torch.device("cpu"))[0]


def make(pixels: Path, ae: Path, out: Path, *argv: object) -> Path:
    run_latents(arguments(pixels, ae, out, *argv))
    return out


@pytest.fixture(scope="module")
def half(pixels: Path, ae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips' latents in float16."""
    return make(pixels, ae, tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="module")
def single(pixels: Path, ae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips' latents in float32."""
    return make(pixels, ae, tmp_path_factory.mktemp("single"), "--dtype", "float32")


def rows(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """(row of the offset index, extension -> bytes) of each sample, read without the code under test."""
    for entry in json.loads((folder / "index.json").read_bytes())["shards"]:
        raw = (folder / entry["name"]).read_bytes()
        table = json.loads((folder / entry["name"].replace(".tar", ".index.json")).read_bytes())
        columns = ("key", "offset", "nbytes", "crc32", "frames", "label", "sums")
        for values in zip(*(table[name] for name in columns), strict=True):
            row = dict(zip(columns, values, strict=True))
            with (folder / entry["name"]).open("rb") as file:
                members, _ = read_members(file, row["offset"] - 512, row["key"])
            found = {member.extension: member.payload for member in members}
            assert raw[row["offset"] : row["offset"] + row["nbytes"]] == members[0].payload
            yield row, found


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
        child = subprocess.Popen(
            command(*line, *processes),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        limit = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < limit and len(list(out.glob("shard-*.index.json"))) < number:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    time.sleep(1)  # workers of a killed agent end by themselves
    last = command(*line, "--nproc_per_node", 2)
    done = subprocess.run(last, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "96 samples of float16 latents" in done.stdout
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


# Training on them.


def stream(path: Path, **changes: Any) -> ClipSource:
    return ClipSource(ShardSet.open(path), DataConfig(path=(str(path),), num_workers=0, **changes), seed=0, global_batch_size=16)


def task_on(stage: str, path: Path, ae: Path) -> Any:
    schema, task, _ = STAGES[stage]
    setting = config(schema, "--ae", str(ae), "--preview.samples", "3", "--preview.steps", "2")
    source = stream(path)
    clips = ClipInfo.of(source.shards, source.data)
    return task(setting, clips, open_first_stage(setting.ae, setting.vae, clips))


def networks_of(task: Any) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    networks = {name: network.module for name, network in task.networks().items()}
    for parameter in next(iter(networks.values())).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return networks


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_the_clips(stage: str, pixels: Path, single: Path, half: Path, ae: Path) -> None:
    """In float32 to 1e-6; rounding latents to float16 moves a sample's latent by 5e-4 of itself, its loss by less than 2e-3."""
    losses, values = {}, {}
    for name, path in (("pixels", pixels), ("single", single), ("half", half)):
        task, batch = task_on(stage, path, ae), next(stream(path).batches(3))
        networks = networks_of(task)
        assert ("video" in batch) == (name == "pixels")
        out = task.loss(stage, networks, batch, SampleRng(0, batch["index"]))
        assert out.total.requires_grad
        values[name] = torch.cat([part.flatten() for part in task.first.latents(networks, batch, SampleRng(0, batch["index"]))])
        losses[name] = (out.total.item(), task.evaluate(networks, batch, SampleRng(1, batch["index"]))["loss"][0].item())
    assert torch.allclose(values["single"], values["pixels"], rtol=1e-6, atol=1e-6)
    assert torch.allclose(values["half"], values["pixels"], rtol=5e-4, atol=1e-6)
    assert losses["single"] == pytest.approx(losses["pixels"], rel=1e-6)
    assert losses["half"] == pytest.approx(losses["pixels"], rel=2e-3)
    assert losses["half"] != losses["single"]


@pytest.mark.parametrize("stage", STAGES)
def test_previews_and_meta_batches_need_no_clips(stage: str, pixels: Path, single: Path, ae: Path) -> None:
    task, batch = task_on(stage, single, ae), next(stream(single).batches(0))
    networks = networks_of(task)
    with torch.no_grad():
        (shown,) = task.preview(networks, batch, SampleRng(0, batch["index"])).values()
    assert shown.shape == {"content": (3, 3, 16, 24), "motion": (3, 3, 4, 32, 24)}[stage]
    spec = task.batch_spec(5)
    assert {name: (value.dtype, value.shape[1:]) for name, value in spec.items()} == {
        name: (value.dtype, value.shape[1:]) for name, value in batch.items()
    }
    meta = {name: network.to("meta") for name, network in networks.items()}
    assert task.loss(stage, meta, spec, SampleRng(0, spec["index"], "meta")).total.is_meta
    if stage == "motion":
        clips = next(stream(pixels).batches(0))
        own = task_on(stage, pixels, ae)
        networks = networks_of(own)
        recon = networks["ae"](to_float(clips["video"][:3]))[0]
        assert torch.allclose(shown[:, :, :, :16], recon, atol=1e-5), "the upper row is the reconstruction"


def test_latents_of_another_autoencoder_are_refused_by_name(pixels: Path, single: Path, ae: Path, tmp_path: Path) -> None:
    other = export(autoencoder_task(), tmp_path / "other", seed=9)
    for stage in STAGES:
        with pytest.raises(ConfigError) as caught:
            task_on(stage, single, other)
        text = str(caught.value)
        hashes = [CMDPipeline.from_exports(path).ae.sha256[:12] for path in (ae, other)]
        assert all(part in text for part in (str(single), str(ae), str(other), *hashes)) and "\n" not in text


def test_latents_behind_an_image_vae_name_it(pixels: Path, ae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = autoencoder.CMDAutoencoderTask(config(CMDAutoencoderConfig, "--mode", "latent", "--vae", "x"), CLIPS, fake_vae())
    run_folder = export(trained, tmp_path / "run")
    pipeline = CMDPipeline(load_autoencoder(run_folder), vae=fake_vae())
    assert pipeline.clip_shape == (4, 16, 24)
    encode = encode_with(pipeline, torch.device("cpu"))
    behind = dataclasses.replace(job(pixels, ae, tmp_path / "set"), autoencoder=pipeline.identity(), encode=encode)
    index = encode_set(behind, Share(), lambda samples: None)
    assert index is not None and index["tensors"] == {"content": [4, 8, 12], "motion": [4, 4, 5]}
    assert index["autoencoder"]["vae"] == {"sha256": "fake", "scale_factor": 0.5}
    monkeypatch.setattr(diffusion_task, "vae_of", lambda *args: fake_vae())
    task, batch = task_on("content", tmp_path / "set", run_folder), next(stream(tmp_path / "set").batches(0))
    networks = networks_of(task)
    assert task.loss("content", networks, batch, SampleRng(0, batch["index"])).total.isfinite()
    assert task.preview(networks, batch, SampleRng(0, batch["index"]))["content_samples"].shape == (3, 3, 16, 24)
    other = fake_vae()
    other.scale_factor = 0.7
    monkeypatch.setattr(diffusion_task, "vae_of", lambda *args: other)
    with pytest.raises(ConfigError, match="another image VAE or --scale-factor"):
        task_on("content", tmp_path / "set", run_folder)


def test_stages_say_what_they_cannot_train_on(pixels: Path, single: Path, ae: Path, tmp_path: Path) -> None:
    flags = ["--global-batch-size", "8", "--num-workers", "0"]
    with distributed(60) as env:
        with pytest.raises(ConfigError, match="holds latents: an autoencoder is trained on the clips"):
            autoencoder.build(config(CMDAutoencoderConfig, *flags, "--data-path", str(single)), env)
        on = config(CMDContentConfig, *flags, "--data-path", str(single), "--val-path", str(pixels), "--ae", str(ae))
        with pytest.raises(ConfigError, match=r"--val-path .* holds clips, --data-path .* latents of the autoencoder"):
            content.build(on, env)
        with pytest.raises(ConfigError, match="mirrored"):
            content.build(config(CMDContentConfig, *flags, "--data-path", str(single), "--ae", str(ae), "--flip"), env)


def train(stage: str, path: Path, ae: Path, results: Path, steps: int) -> Path:
    schema, _, build = STAGES[stage]
    flags = ["--data-path", str(path), "--ae", str(ae), "--results-dir", str(results), "--max-steps", str(steps)]
    with distributed(60) as env:
        setting = config(schema, *TRAIN.split(), *flags)
        task, source, valid = build(setting, env)
        return fit(task, source, setting, env, valid=valid)


def losses(run: Path) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


@pytest.mark.parametrize("stage", STAGES)
def test_runs_on_latents_resume_and_learn_as_on_clips(stage: str, pixels: Path, single: Path, ae: Path, tmp_path: Path) -> None:
    train(stage, single, ae, tmp_path / "parts", 3)
    parts = train(stage, single, ae, tmp_path / "parts", 6)
    assert len(losses(parts)) == 6 and len(list((tmp_path / "parts").iterdir())) == 1, "it went on from step 3"
    whole = train(stage, single, ae, tmp_path / "whole", 6)
    weights = [load_file(run / "export" / "model.safetensors") for run in (parts, whole)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    clips = train(stage, pixels, ae, tmp_path / "clips", 6)
    assert len(losses(clips)) == 6
    assert losses(whole) == pytest.approx(losses(clips), rel=1e-5)


def test_latent_sets_mix_when_one_autoencoder_made_them(pixels: Path, ae: Path, half: Path, single: Path, tmp_path: Path) -> None:
    """The measured scale differs from set to set, and an export may have been moved meanwhile."""
    run("shards", "--dataset-name", "synthetic-digits", "--num-videos", 2, "--seed", 1, "--image-size", 16, 24, "--clip-length", 4,
        "--workers", 1, "--out", tmp_path / "more")  # fmt: skip
    moved = shutil.copytree(ae, tmp_path / "moved")
    more = make(tmp_path / "more", moved, tmp_path / "latents")
    both = Collection.of(ShardSet.open(half), ShardSet.open(more))
    assert both.num_samples == 96 + 16 and both.meta["scale"] != ShardSet.open(more).meta["scale"]
    other = make(tmp_path / "more", export(autoencoder_task(), tmp_path / "other", seed=9), tmp_path / "foreign")
    with pytest.raises(ConfigError, match="latents of different autoencoders"):
        Collection.of(ShardSet.open(half), ShardSet.open(other))
    with pytest.raises(ConfigError, match="their codec differ"):
        Collection.of(ShardSet.open(more), ShardSet.open(single))
