"""The three CMD stages as tasks: losses by hand, addressed randomness, conditions, what they refuse, what they hand on."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.task import Batch, Network, Task
from pipelines.cmd_sample import CMDSampleConfig
from pipelines.image_vae import ImageVae
from pipelines.loading import load_autoencoder, load_content, load_motion
from tasks.autoencoder import CMDAutoencoderConfig, CMDAutoencoderTask
from tasks.clips import ClipInfo
from tasks.content import CMDContentConfig
from tasks.diffusion_task import Condition, ConditionConfig, FirstStage
from tasks.motion import CMDMotionConfig
from tests.cmd_family import CLIPS, autoencoder_task, config, content_task, export, family, motion_task
from utils.config import load_config
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng

ROOT = Path(__file__).resolve().parent.parent
STAGES = (CMDAutoencoderConfig, CMDContentConfig, CMDMotionConfig)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("runs"))


def batch(count: int = 4, clips: ClipInfo = CLIPS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (count, 3, clips.n_frames, *clips.image_size), generator=generator, dtype=torch.uint8)
    return {"video": video, "label": torch.arange(count) % 3, "index": torch.arange(10, 10 + count)}


def rng(samples: Batch, seed: int = 0) -> SampleRng:
    return SampleRng(seed, samples["index"])


def modules(networks: dict[str, Network]) -> dict[str, nn.Module]:
    return {name: network.module for name, network in networks.items()}


def built(task: Task, seed: int = 0) -> dict[str, nn.Module]:
    """The task's modules with random weights, also those that start at zero."""
    torch.manual_seed(seed)
    networks = modules(task.networks())
    for parameter in next(iter(networks.values())).parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return networks


def tasks(runs: dict[str, Path]) -> list[Task]:
    return [autoencoder_task("--loss.l2", "1"), content_task(runs["ae"]), motion_task(runs["ae"])]


@pytest.mark.parametrize("recipe", ["tiny", "ucf101-64-release", "ucf101-64-paper"])
@pytest.mark.parametrize("schema", STAGES)
def test_recipes_serve_every_stage(recipe: str, schema: type) -> None:
    setting = load_config({"cmd": schema}, ["--config", str(ROOT / f"configs/cmd/{recipe}.yaml")], prog="test")
    setting.validate()
    assert setting.stage == schema.stage


def test_release_flags_reach_their_settings() -> None:
    argv = "--motion-model-config DiT-B/2 --keyframe-patch-size 8 --num-classes 7 --use-text-embed --mode pixel --scale-factor 0.2 --final"
    setting = load_config(
        {"cmd": CMDMotionConfig}, [*argv.split(), "--embed-dim", "4", "--image-size", "16", "24", "--n-frames", "4"], prog="test"
    )
    setting.validate()
    found = (setting.model.name, setting.model.keyframe_patch_size, setting.condition.num_classes, setting.condition.use_text_embed)
    assert found == ("DiT-B/2", 8, 7, True)
    assert (setting.ae.mode, setting.vae.scale_factor, setting.final, setting.ae.embed_dim, setting.data.n_frames) == (
        "pixel",
        0.2,
        True,
        4,
        4,
    )


@pytest.mark.parametrize(
    ("schema", "argv", "message"),
    [
        (CMDAutoencoderConfig, ["--mode", "latent"], "--vae"),
        (CMDAutoencoderConfig, ["--loss.l1", "0", "--perceptual", "none"], "nothing is left"),
        (CMDAutoencoderConfig, ["--mode", "latent", "--vae", "x", "--adversarial"], "pixel"),
        (CMDContentConfig, ["--motion-model-config", "DiT-Q/2"], "nearest"),
        (CMDMotionConfig, ["--condition.dropout", "1"], "dropout"),
        (CMDMotionConfig, ["--preview.steps", "2000"], "1000"),
        (CMDMotionConfig, ["--preview.samples", "0"], "at least 1"),
        (CMDAutoencoderConfig, ["--loss.l1", "-1"], "loss.l1 -1.0: 0 or more"),
        (CMDAutoencoderConfig, ["--loss.adversarial.ndf", "0"], "at least 1"),
        (CMDSampleConfig, ["--run", "r", "--steps", "0"], "--steps 0: at least 1"),
    ],
)
def test_impossible_settings_are_refused(schema: type, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"cmd": schema}, argv, prog="test").validate()


def test_autoencoder_loss_is_its_formula() -> None:
    task = autoencoder_task("--loss.l1", "4", "--loss.l2", "0.5")
    networks, samples = built(task), batch()
    clips = to_float(samples["video"])
    recon = networks["ae"](clips)[0]
    out = task.loss("ae", networks, samples, rng(samples))
    expected = 4 * (clips - recon).abs().mean() + 0.5 * (clips - recon).square().mean()
    assert out.count == 4
    assert out.total.item() / 4 == pytest.approx(expected.item(), rel=1e-6)


def test_perceptual_loss_sees_one_frame_of_its_own_per_clip() -> None:
    """The same frame of original and reconstruction, over all frames that the clip has (defect A9), addressed by the sample."""
    clips = dataclasses.replace(CLIPS, n_frames=6)
    task = autoencoder_task(clips=clips)
    networks, samples = built(task), batch(64, clips)
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            seen.extend((a, b))
            return (a - b).square().mean(dim=(1, 2, 3))

    networks["perceptual"] = Spy()
    out = task.loss("ae", networks, samples, rng(samples))
    frame = SampleRng(0, samples["index"]).integers("loss-frame", 6)
    assert set(frame.tolist()) == set(range(6))
    original = to_float(samples["video"])[torch.arange(64), :, frame]
    assert any(torch.equal(picture, original) for picture in seen)
    assert out.metrics["perceptual"][0].item() > 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_loss_of_a_batch_is_the_sum_over_its_parts(runs: dict[str, Path], stage: int) -> None:
    """Everything random belongs to the sample: how samples are put together changes nothing."""
    task = tasks(runs)[stage]
    networks, samples = built(task), batch(4)
    phase = next(iter(task.networks()))
    whole = task.loss(phase, networks, samples, rng(samples))
    parts = [{name: value[part] for name, value in samples.items()} for part in (slice(0, 1), slice(1, 4))]
    split = [task.loss(phase, networks, part, rng(part)) for part in parts]
    assert sum(out.total.item() for out in split) == pytest.approx(whole.total.item(), rel=1e-5)
    for name, (value, count) in whole.metrics.items():
        assert sum(out.metrics[name][0].item() for out in split) == pytest.approx(value.item(), rel=1e-5), name
        assert sum(out.metrics[name][1] for out in split) == count
    other = task.loss(phase, networks, samples, rng(samples, seed=1))
    assert (other.total.item() != whole.total.item()) == (stage > 0)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_only_the_trained_network_gets_a_gradient(runs: dict[str, Path], stage: int) -> None:
    task = tasks(runs)[stage]
    networks, samples = built(task), batch(2)
    phase = next(iter(networks))
    task.loss(phase, networks, samples, rng(samples)).total.backward()
    without = [name for name, value in networks[phase].named_parameters() if value.requires_grad and value.grad is None]
    assert not without
    assert all(value.grad is None for name, net in networks.items() if name != phase for value in net.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_batch_spec_runs_on_the_meta_device(runs: dict[str, Path], stage: int) -> None:
    task = tasks(runs)[stage]
    networks = {name: net.to("meta") for name, net in modules(task.networks()).items()}
    spec = task.batch_spec(3)
    out = task.loss(next(iter(networks)), networks, spec, SampleRng(0, spec["index"], "meta"))
    assert out.total.is_meta and out.count == 3


def test_motion_model_has_the_size_of_the_autoencoders_latent(runs: dict[str, Path]) -> None:
    """(frames, W' + H'), not the release's h + w (defects A5 and A7), also for frames that are not square."""
    model = motion_task(runs["ae"]).model_config
    assert (model.input_size, model.in_channels, model.keyframe_size) == ((4, 24 // 4 + 16 // 4), 4, (16, 24))


def test_classes_come_from_the_shards_or_are_checked_against_them() -> None:
    assert Condition.of(ConditionConfig(), CLIPS).num_classes == 3
    assert Condition.of(ConditionConfig(num_classes=101), CLIPS).num_classes == 101
    assert Condition.of(ConditionConfig(num_classes=0), CLIPS).num_classes == 0
    with pytest.raises(ConfigError, match="has 3 classes"):
        Condition.of(ConditionConfig(num_classes=2), CLIPS)
    with pytest.raises(ConfigError, match="no condition vectors"):
        Condition.of(ConditionConfig(use_text_embed=True), CLIPS)
    assert Condition.of(ConditionConfig(use_text_embed=True), dataclasses.replace(CLIPS, cond_dim=5)).cond_dim == 5


def test_a_tenth_of_the_conditions_is_dropped_in_training_and_none_in_evaluation() -> None:
    samples = {"label": torch.zeros(4000, dtype=torch.int64), "index": torch.arange(4000), "video": torch.zeros(4000)}
    condition = Condition(num_classes=3, dropout=0.1)
    drop = condition.training(samples, rng(samples))["drop"]
    assert 0.08 < drop.float().mean().item() < 0.12
    assert torch.equal(drop[7:], condition.training(part := {k: v[7:] for k, v in samples.items()}, rng(part))["drop"])
    assert set(condition.given(samples)) == {"y"}
    assert Condition(num_classes=0).training(samples, rng(samples)) == {}


def test_vectors_condition_the_motion_model(runs: dict[str, Path]) -> None:
    clips = dataclasses.replace(CLIPS, cond_dim=5)
    task = motion_task(runs["ae"], "--use-text-embed", "--condition.dropout", "0.5", clips=clips)
    networks, samples = built(task), batch(4)
    samples["cond"] = torch.randn(4, 5)
    kept = task.evaluate(networks, samples, rng(samples))["loss"][0]
    samples["cond"] = samples["cond"] + 1
    assert task.evaluate(networks, samples, rng(samples))["loss"][0] != kept
    assert task.preview(networks, samples, rng(samples))["motion_samples"].shape == (4, 3, 4, 32, 24)


def test_discriminators_train_on_detached_reconstructions() -> None:
    argv = ["--adversarial", "--loss.adversarial.start_step", "2", "--loss.adversarial.ndf", "4", "--loss.adversarial.n_layers", "1"]
    task = autoencoder_task(*argv, "--global-batch-size", "4")
    assert "disc" not in autoencoder_task().networks()
    assert task.phases(1) == ("ae",) and task.phases(2) == ("ae", "disc")
    networks, samples = built(task), batch(4)
    early = task.loss("ae", networks, samples | {"index": torch.arange(4)}, SampleRng(0, torch.arange(4)))
    assert "adversarial" not in early.metrics
    late = task.loss("ae", networks, samples | {"index": torch.arange(8, 12)}, SampleRng(0, torch.arange(8, 12)))
    assert {"adversarial", "feature_matching"} <= set(late.metrics)
    task.loss("disc", networks, samples, rng(samples)).total.backward()
    assert all(value.grad is None for value in networks["ae"].parameters())
    assert all(value.grad is not None for value in networks["disc"].parameters())


class FakeVae(nn.Module):
    """Halves the size; its posterior has the mean of each 2x2 block and a spread of 0.1."""

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        mean = nn.functional.avg_pool2d(x, 2)
        mean = torch.cat([mean, mean[:, :1]], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1)))

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=nn.functional.interpolate(z[:, :3], scale_factor=2))


def fake_vae(chunk: int = 16) -> ImageVae:
    return ImageVae(FakeVae(), channels=4, factor=2, scale_factor=0.5, chunk=chunk, sha256="fake")


def test_image_vae_gives_scaled_posterior_samples_whatever_the_chunk() -> None:
    vae, video = fake_vae(), to_float(batch(2)["video"])
    noise = torch.randn(vae.latent_shape(video.shape))
    latents = vae.encode(video, noise)
    assert torch.equal(latents, fake_vae(chunk=3).encode(video, noise))
    expected = (nn.functional.avg_pool3d(video, (1, 2, 2)) + 0.1 * noise[:, :3]) * 0.5
    assert torch.allclose(latents[:, :3], expected, atol=1e-6)
    assert vae.decode(latents).shape == video.shape
    with pytest.raises(UserError, match="multiples of 2"):
        vae.latent_shape((1, 3, 4, 15, 24))


def test_latent_mode_trains_with_the_squared_error_of_latents(tmp_path: Path) -> None:
    setting = config(CMDAutoencoderConfig, "--mode", "latent", "--vae", "x")
    task = CMDAutoencoderTask(setting, CLIPS, fake_vae())
    networks, samples = built(task), batch(2)
    out = task.loss("ae", networks, samples, rng(samples))
    noise = rng(samples).normal("vae", (4, 4, 8, 12))
    clips = networks["vae"].encode(to_float(samples["video"]), noise)
    assert out.total.item() / 2 == pytest.approx((clips - networks["ae"](clips)[0]).square().mean().item(), rel=1e-5)
    assert task.preview(networks, samples, rng(samples))["reconstruction"].shape == (2, 3, 4, 32, 24)
    assert set(task.evaluate(networks, samples, rng(samples))) == {"l1", "psnr", "ssim"}
    first = FirstStage(load_autoencoder(export(task, tmp_path / "ae")), fake_vae())
    assert (first.channels, first.size) == (4, (8, 12))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_previews_are_pictures_and_the_same_each_time(runs: dict[str, Path], stage: int) -> None:
    task = tasks(runs)[stage]
    networks, samples = built(task), batch(3)
    with torch.no_grad():
        shown = task.preview(networks, samples, rng(samples))
        again = task.preview(networks, samples, rng(samples))
    for name, picture in shown.items():
        assert picture.ndim in (4, 5) and picture.shape[1] == 3 and picture.abs().max() <= 1, name
        assert torch.equal(picture, again[name])


@pytest.mark.parametrize(
    ("argv", "clips", "message"),
    [
        (["--mode", "latent"], CLIPS, "pixel mode"),
        (["--embed-dim", "8"], CLIPS, "has 4"),
        ([], dataclasses.replace(CLIPS, n_frames=8), "4x16x24"),
        ([], dataclasses.replace(CLIPS, image_size=(16, 16)), "4x16x24"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(runs: dict[str, Path], argv: list[str], clips: ClipInfo, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        content_task(runs["ae"], *argv, clips=clips)


def test_exports_of_other_stages_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="cmd content"):
        load_autoencoder(runs["content"])
    with pytest.raises(UserError, match="cmd autoencoder"):
        load_motion(runs["ae"], autoencoder_task().model_config)


def test_cards_rebuild_the_networks(runs: dict[str, Path]) -> None:
    ae = load_autoencoder(runs["ae"])
    loaded = [ae, load_content(runs["content"], ae.config), load_motion(runs["motion"], ae.config)]
    for part, task in zip(loaded, tasks(runs), strict=True):
        assert part.config == task.model_config
        assert not any(value.requires_grad for value in part.module.parameters())
    assert loaded[1].card["ae"]["sha256"] == loaded[2].card["ae"]["sha256"] == ae.sha256
