"""Stages train on latent shards as they do on the clips, and refuse those of another autoencoder."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.prepare.latents import Share, encode_set
from datasets.shards import ShardSet
from engine.loop import fit
from launch.env import distributed
from pipelines.cmd import CMDPipeline
from pipelines.latents import encode_with
from pipelines.loading import load_autoencoder
from tasks import autoencoder, content, diffusion_task, motion
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.clips import ClipInfo
from tasks.content import CMDContentConfig, CMDContentTask
from tasks.diffusion_task import open_first_stage
from tasks.motion import CMDMotionConfig, CMDMotionTask
from tests.cmd_family import CLIPS, autoencoder_task, config, export, family
from tests.latent_sets import digits, job, make, run
from tests.test_tasks_cmd import fake_vae
from utils.errors import ConfigError
from utils.media import to_float
from utils.rng import SampleRng

STAGES = {"content": (CMDContentConfig, CMDContentTask, content.build), "motion": (CMDMotionConfig, CMDMotionTask, motion.build)}
TRAIN = "--global-batch-size 8 --num-workers 0 --preview-every 0 --eval-every 0 --no-tensorboard --ckpt-every 2 --log-every 1"
TRAIN += " --parallel ddp --precision fp32 --compile off --preview.samples 2 --preview.steps 2"


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


@pytest.fixture(scope="module")
def single(pixels: Path, ae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips' latents in float32."""
    return make(pixels, ae, tmp_path_factory.mktemp("single"), "--dtype", "float32")


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
        with pytest.raises(ConfigError, match=r"--val-path .* holds clips, --data-path .* latents .*of the autoencoder"):
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
