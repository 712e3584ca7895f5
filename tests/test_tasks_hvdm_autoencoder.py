"""HVDM's first stage as a task: what it adds to PVDM's, and what of the release does not come back."""

import dataclasses

import numpy as np
import pytest
import pywt
import torch

from losses.reconstruction import subbands
from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from tests.hvdm_stage import CLIPS, batch, modules, task
from tests.test_tasks_pvdm_autoencoder import Counting, rng
from utils.config import from_dict
from utils.media import to_float


def by_pywavelets(clips: torch.Tensor) -> list[np.ndarray]:
    """The eight subbands of clips b c t h w."""
    bands = pywt.dwtn(clips.detach().double().numpy(), "haar", axes=(2, 3, 4))
    return [bands[name] for name in ("aaa", "aad", "ada", "add", "daa", "dad", "dda", "ddd")]


# ---- losses


def test_the_distance_of_the_subbands_is_theirs_and_not_that_of_the_pixels() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(3, 3, 4, 6, 8), torch.rand(3, 3, 4, 6, 8)
    expected = sum(abs(x - y).mean(axis=(1, 2, 3, 4)) for x, y in zip(by_pywavelets(a), by_pywavelets(b), strict=True)) / 8
    np.testing.assert_allclose(subbands(a, b).numpy(), expected, rtol=1e-5)
    assert not subbands(a, a).any()
    brighter = subbands(a, a + 0.1)
    torch.testing.assert_close(brighter, torch.full((3,), 0.1 * 8**0.5 / 8), rtol=1e-4, atol=0)  # all of it in the one low band
    with pytest.raises(ValueError, match="time is 3"):
        subbands(a[:, :, :3], b[:, :, :3])


def test_the_loss_of_the_subbands_stays_in_float32() -> None:
    """Under autocast too: the low band is nearly three times the pixels."""
    a, b = torch.full((1, 3, 2, 2, 2), 0.7), torch.full((1, 3, 2, 2, 2), 0.699)
    with torch.autocast("cpu", torch.bfloat16):
        found = subbands(a, b)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.001 * 8**0.5 / 8, rel=1e-3)


def test_the_loss_is_its_formula() -> None:
    """4 L1, half of the sum over the subbands, 4 LPIPS on one frame of each clip."""
    clips = dataclasses.replace(CLIPS, n_frames=6)
    made = task(clips=clips)
    nets, samples = modules(made), batch(16, clips=clips)
    nets["perceptual"] = lambda a, b: (a - b).square().mean((1, 2, 3))
    out = made.loss("ae", nets, samples, rng(samples))
    x = to_float(samples["video"])
    recon = nets["ae"](x)
    frame = rng(samples).integers("loss-frame", 6)
    seen = [video[torch.arange(16), :, frame] for video in (x, recon)]
    bands = [abs(a - b).mean() for a, b in zip(by_pywavelets(x), by_pywavelets(recon), strict=True)]
    expected = 4 * (x - recon).abs().mean() + 4 / 8 * sum(bands) + 4 * (seen[0] - seen[1]).square().mean()
    assert out.count == 16 and out.total.item() / 16 == pytest.approx(expected.item(), rel=1e-5)
    assert out.metrics.keys() == {"l1", "subbands", "perceptual"}
    assert (out.metrics["subbands"][0] / 16).item() == pytest.approx(float(sum(bands)) / 8, rel=1e-5), "one number for all eight"


def test_the_subbands_train_the_autoencoder() -> None:
    made = task("--loss.l1 0")
    nets, samples = modules(made), batch(2)
    made.loss("ae", nets, samples, rng(samples)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nets["ae"].parameters())
    assert "subbands" not in task("--loss.subbands 0").loss("ae", nets, samples, rng(samples)).metrics


# ---- discriminators


def test_discriminators_do_nothing_while_they_do_not_count() -> None:
    """The release runs both four times a step and multiplies by 0."""
    assert "disc" not in task().networks()
    made = task("--adversarial --disc-start 2 --global-batch-size 4")
    nets = modules(made)
    nets["disc"] = Counting(nets["disc"])
    for step, passes in enumerate((0, 0, 2)):
        samples = batch(4, 4 * step)
        terms = made.loss("ae", nets, samples, rng(samples)).metrics
        assert nets["disc"].calls == passes and ("adversarial" in terms) == (step == 2)


def test_discriminators_that_count_are_trained() -> None:
    """The release's trainer never calls their turn: an earlier start would train against random networks that stay as they are."""
    made = task("--adversarial --global-batch-size 4")
    assert [made.phases(step) for step in range(4)] == [("ae",), ("disc",), ("ae",), ("disc",)]
    nets, samples = modules(made), batch()
    out = made.loss("disc", nets, samples, rng(samples))
    out.total.backward()
    assert out.metrics.keys() == {"disc_2d", "disc_3d"}
    assert all(p.grad is not None for p in nets["disc"].parameters()) and all(p.grad is None for p in nets["ae"].parameters())
    optim = made.networks()["disc"].optim
    assert optim is not None and (optim.lr, optim.clip_norm) == (1e-4, 1.0)


# ---- what it shows and hands on


def test_evaluation_and_previews_take_clips_alone() -> None:
    """The release's evaluation forgets the subbands, which its network wants beside the clip, and ends the run before its first step."""
    made = task()
    nets, samples = modules(made), batch()
    x = to_float(samples["video"])
    with torch.no_grad():
        found = {name: (value / count).item() for name, (value, count) in made.evaluate(nets, samples, rng(samples)).items()}
        shown = made.preview(nets, samples, rng(samples))["reconstruction"]
        recon = nets["ae"](x)
    assert found.keys() == {"l1", "psnr", "ssim"} and found["l1"] == pytest.approx((x - recon).abs().mean().item(), rel=1e-5)
    assert torch.equal(shown, torch.cat([x, recon], dim=3))
    card = made.card()
    assert (card["system"], card["stage"], made.name) == ("hvdm", "autoencoder", "hvdm-autoencoder")
    again = HVDMAutoencoder(from_dict(HVDMAEConfig, card["model"], "card"))
    assert again.config == made.model_config
    assert "frame_interval" not in card["data"]
    assert task(clips=dataclasses.replace(CLIPS, frame_interval=4)).card()["data"]["frame_interval"] == 4


@pytest.mark.parametrize(("frames", "size", "patch"), [(2, (128, 128), 8), (10, (32, 48), 8), (4, (16, 32), 2)])
def test_other_sizes_follow_the_patch(frames: int, size: tuple[int, int], patch: int) -> None:
    """The release knows one: its sizes are numbers in the code."""
    clips = dataclasses.replace(CLIPS, n_frames=frames, image_size=size)
    made = task(f"--patch-size {patch}", clips=clips)
    assert made.model_config.latent_shape == (4, frames, size[0] // patch, size[1] // patch)
    nets, samples = modules(made), batch(1, clips=clips)
    with torch.no_grad():
        assert made.loss("ae", nets, samples, rng(samples)).total.isfinite()
