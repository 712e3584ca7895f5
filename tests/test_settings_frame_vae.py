"""Settings of Latte's first stage: what is refused in one line, what single frames of a set are, the recipes."""

import dataclasses
from pathlib import Path

import pytest

from launch.env import Env
from models.autoencoders.frame_vae import FrameVAEConfig
from tasks.frame_vae import FrameVAETask, build
from tasks.frame_vae_config import FrameVAERunConfig
from tests.shard_sets import write_set
from tests.test_tasks_frame_vae import CLIPS, config
from utils.config import load_config
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-frames 16", "--n-frames 16: the frame VAE is trained on single frames"),
        ("--model.channels 2", r"model\.channels 2: 3, or 1 for luma"),
        ("--model.norm_channels 3", "model: norm_channels 3 does not divide"),
        ("--kl-weight -1", r"loss\.kl_weight -1\.0: 0 or more"),
        ("--disc-start -1", r"loss\.adversarial\.start_step -1: 0 or more"),
        ("--loss.adversarial.conv_channels 0", r"loss\.adversarial: .*at least 1"),
        ("--loss.adversarial.betas 0.5 1", r"betas 0\.5 1\.0: 0 or more, and below 1"),
        ("--model.down_chanels 8", r"did you mean '--model\.down-channels'"),
    ],
)
def test_impossible_settings_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(flags)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="15 x 24 do not divide"):
        FrameVAETask(config(), dataclasses.replace(CLIPS, image_size=(15, 24)))
    with pytest.raises(ConfigError, match="4 x 4 are too small for a discriminator"):
        FrameVAETask(config(), dataclasses.replace(CLIPS, image_size=(4, 4)))
    FrameVAETask(config("--disc-weight 0"), dataclasses.replace(CLIPS, image_size=(4, 4)))


def test_single_frames_of_a_set_of_clips(tmp_path: Path) -> None:
    """Every frame once at probability 1; without it one frame of each clip. A set of latents is refused."""
    folder = write_set(tmp_path / "clips", [4], lengths=(3,), size=(16, 24))
    env = Env.single()
    common = f"--data-path {folder} --global-batch-size 4 --num-workers 0"
    task, source, _ = build(config(common, "--frame-sample-prob 1"), env)
    assert source.steps_per_epoch == 3 and task.clips.n_frames == 1
    assert next(source.batches(0))["video"].shape == (4, 3, 1, 16, 24)
    assert build(config(common, "--frame-sample-prob 0"), env)[1].steps_per_epoch == 1
    latents = write_set(tmp_path / "latents", [4], codec="latent")
    with pytest.raises(ConfigError, match="holds latents: an autoencoder is trained on the clips"):
        build(config(f"--data-path {latents} --global-batch-size 4"), env)


@pytest.mark.parametrize("recipe", ["tiny", "mmnist", "ucf101"])
def test_recipes(recipe: str) -> None:
    setting = load_config({"latte": FrameVAERunConfig}, ["--config", str(ROOT / f"configs/latte/{recipe}.yaml")], prog="train_ae.py")
    setting.validate()
    if recipe == "ucf101":
        assert (setting.model, setting.optim.lr, setting.loss.adversarial.start_step) == (FrameVAEConfig(), 1e-5, 5000)
    if recipe == "mmnist":
        assert (setting.model.channels, setting.train.global_batch_size, setting.optim.lr) == (1, 64, 1e-4)
