"""Where a run of HVDM's first stage starts from, which settings it refuses, and its recipes."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from models.autoencoders.hvdm import HVDMAEConfig
from models.official.hvdm import export_autoencoder
from tasks.hvdm_autoencoder_config import HVDMAutoencoderConfig
from tasks.hvdm_config import HVDMRunConfig
from tests.hvdm_stage import CLIPS, config, export, modules, task
from utils.config import load_config
from utils.errors import ConfigError, UserError

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "hvdm"
RELEASED = "--model.wavelet_time tile --model.frame_rotary release --model.readout first"
SETS = ("ucf101", "sky", "taichi")


def recipe(*names: str, stage: type = HVDMAutoencoderConfig) -> HVDMAutoencoderConfig:
    """The settings of recipes on top of each other."""
    argv = [word for name in names for word in ("--config", str(RECIPES / f"{name}.yaml"))]
    setting = load_config({"hvdm": stage}, argv, prog="train.py")
    setting.validate()
    return setting


def sizes(setting: HVDMAutoencoderConfig) -> HVDMAEConfig:
    clips = dataclasses.replace(CLIPS, n_frames=setting.data.n_frames, image_size=setting.data.image_size)
    return dataclasses.replace(setting.model.of(clips), plane_head_dim=0)


# ---- where it starts from


@pytest.mark.parametrize("kind", ["run", "release"])
def test_a_run_starts_from_trained_weights(tmp_path: Path, kind: str) -> None:
    run, flags = export(tmp_path / "run", RELEASED, seed=7), RELEASED
    trained = modules(task(flags), seed=7)["ae"]
    if kind == "release":
        run = tmp_path / "model_last.pth"
        torch.save({f"module.{name}": value for name, value in export_autoencoder(trained.state_dict(), trained.config).items()}, run)
    started = modules(task(flags, f"--init-from {run}"), seed=1)["ae"].state_dict()
    assert started.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, started[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.wavelet_time tile", "its wavelet_time is repeat, that of the run tile"),
        ("--model.frame_rotary release", "its frame_rotary is corrected, that of the run release"),
        ("--model.readout first", "its readout is token, that of the run first"),
        ("--model.fusion_depth 2", "its fusion_depth is 1, that of the run 2"),
        ("--model.freq_widths 4 8 8 8", "its freq_widths is (4, 4, 8, 8), that of the run (4, 8, 8, 8)"),
    ],
)
def test_a_network_that_differs_does_not_start_a_run(tmp_path: Path, flags: str, message: str) -> None:
    run = export(tmp_path / "run")
    with pytest.raises(UserError, match=re.escape(f"--init-from {run} cannot start this run: {message}")) as caught:
        task(f"--init-from {run}", flags).networks()
    assert "\n" not in str(caught.value)


def test_released_weights_do_not_start_what_computes_something_else(tmp_path: Path) -> None:
    trained = modules(task(RELEASED))["ae"]
    path = tmp_path / "model_last.pth"
    torch.save(export_autoencoder(trained.state_dict(), trained.config), path)
    with pytest.raises(UserError, match="its frame_rotary is release, that of the run corrected"):
        task(f"--init-from {path}").networks()


# ---- settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss.subbands -1", r"loss\.subbands -1\.0: 0 or more"),
        ("--loss.subbands nan", r"loss\.subbands nan: 0 or more"),
        ("--loss.l1 0 --loss.subbands 0", "l1, l2, subbands and the perceptual loss are all off, nothing is left to train on"),
        ("--best-metric fvd --best-mode min", "--best-metric fvd: evaluations measure l1, psnr, ssim$"),
    ],
)
def test_impossible_settings_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "frames", "size"),
    [
        *((flag, 4, (16, 24)) for flag in ("--patch-size 5", "--patch-size 1", "--embed-dim 0", "--model.fusion_depth -1")),
        *((flag, 4, (16, 24)) for flag in ("--model.freq_widths 0 4 4 4", "--model.heads 0")),
        ("", 5, (16, 24)),
        ("", 4, (18, 24)),
    ],
)
def test_sizes_that_cannot_be_are_one_line(flags: str, frames: int, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"^model: ") as caught:
        task(flags, clips=dataclasses.replace(CLIPS, n_frames=frames, image_size=size))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model.double_z", "model.skip", "model.attn_resolutions", "model.num_res_blocks", "model.ddconfig"])
def test_what_nothing_would_read_is_refused(tmp_path: Path, key: str) -> None:
    """The release takes such settings and ignores them."""
    (tmp_path / "own.yaml").write_text(f"system: hvdm\n{key}: 1\n")
    with pytest.raises(ConfigError, match=f"unknown key '{re.escape(key)}'"):
        config(f"--config {tmp_path / 'own.yaml'}")


# ---- recipes


@pytest.mark.parametrize("name", SETS)
def test_recipes_train_with_the_release_s_settings(name: str) -> None:
    setting = recipe(name)
    assert sizes(setting) == HVDMAEConfig(), "new trainings have the corrected ways"
    assert (setting.optim.lr, setting.optim.betas, setting.optim.weight_decay, setting.ema.decay) == (1e-4, (0.5, 0.9), 0.01, 0)
    assert (setting.train.global_batch_size, setting.train.accumulation, setting.train.max_steps) == (72, 3, 333333)
    assert (setting.loss.l1, setting.loss.subbands, setting.loss.perceptual.weight, setting.loss.perceptual.kind) == (4, 4, 4, "lpips-vgg")
    assert not setting.loss.adversarial.enabled and not setting.data.flip and setting.data.frame_interval == 1
    assert setting.parallel.precision == "fp32"


@pytest.mark.parametrize("name", SETS)
def test_denoisers_learn_from_nothing_from_clips_and_from_pictures(name: str) -> None:
    setting = recipe(name, stage=HVDMRunConfig)
    assert (setting.cond_prob, setting.img_prob) == (0.2 if name == "sky" else 0.3, 0.2)
    assert (setting.model.tasks, setting.model.dynamics_bins, setting.dynamics.dropout) == (True, 10, 0.15)
    assert (setting.optim.lr, setting.optim.betas, setting.ema.decay, setting.ema.every) == (1e-4, (0.9, 0.999), 0.9999, 25)
    network = setting.denoiser_size(latent_res=(32, 32), latent_frames=16)
    assert (network.model_channels, network.channel_mult, network.num_res_blocks) == (192, (1, 2, 4, 4), 2)
    released = recipe(name, "release", stage=HVDMRunConfig)
    assert (released.img_prob, released.model.tasks, released.model.dynamics_bins) == (0, False, 0)
    assert dataclasses.replace(network, tasks=False, dynamics_bins=0) == released.denoiser_size(latent_res=(32, 32), latent_frames=16)
    recipe("dit", stage=HVDMRunConfig)


@pytest.mark.parametrize("name", SETS)
def test_the_adversarial_run_goes_on_with_the_recipe_s_network(name: str) -> None:
    first, second = recipe(name), recipe(name, "adversarial")
    assert second.model == first.model and second.optim == first.optim and second.data == first.data
    defaults = HVDMAutoencoderConfig().loss.adversarial
    assert second.loss.adversarial == dataclasses.replace(defaults, enabled=True, disc_lr=1e-4)
    assert (second.train.max_steps, second.best.metric, second.best.patience) == (4667, "perceptual", 8)
    of_release = sizes(recipe(name, "release", "adversarial"))
    assert (of_release.wavelet_time, of_release.frame_rotary, of_release.readout) == ("tile", "release", "first")
