"""HVDM's denoiser as a task: what a sample learns and what it is told of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.task import Batch
from models.layers.motion import motion_class, motion_edges, motion_energy, still_clip
from models.layers.tables import FROM_CLIP, FROM_IMAGE, NO_TASK
from models.layers.wavelet import haar3d
from pipelines.hvdm import HVDMPipeline
from tasks.dynamics import Dynamics
from tasks.latent import LatentTask
from tests.hvdm_denoiser import (
    CLIPS,
    FRAMES,
    LATENT,
    SINGLE,
    Spy,
    batch,
    built,
    latent_clips,
    moving,
    rng,
    space_of,
    task,
)
from tests.hvdm_exports import export_autoencoder
from utils.media import to_float
from utils.rng import SampleRng


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_autoencoder(tmp_path_factory.mktemp("hvdm") / "ae")


# ---- motion


def test_motion_is_that_of_the_bands_high_in_time() -> None:
    """Of two frames a and b (a - b) / sqrt 2, then sums and differences over four pixels."""
    video = torch.rand(2, 3, 4, 6, 8, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(motion_energy(video).double(), haar3d(video)[:, 4:].abs().flatten(1).mean(dim=1), rtol=1e-5, atol=0)
    step = (video[:, :, ::2] - video[:, :, 1::2]) / 2**0.5
    corners = [step[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    signs = [(1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1)]
    bands = [sum(sign * corner for sign, corner in zip(row, corners, strict=True)) / 2 for row in signs]
    expected = torch.stack([band.abs().flatten(1).mean(dim=1) for band in bands]).mean(dim=0)  # type: ignore[union-attr]
    found = motion_energy(video)
    assert found.dtype == torch.float32 and found.shape == (2,)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for odd in ((3, 6, 8), (4, 5, 8), (4, 6, 7)):
        with pytest.raises(ValueError, match="not all even"):
            motion_energy(torch.zeros(1, 3, *odd))


def test_a_still_clip_has_none_and_contrast_scales_it() -> None:
    video = torch.rand(3, 3, 4, 8, 8) * 2 - 1
    assert (motion_energy(still_clip(video)) == 0).all()
    for factor in (0.5, -0.25, 0.0):
        torch.testing.assert_close(motion_energy(factor * video), abs(factor) * motion_energy(video))
    assert motion_energy(video.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(motion_energy(video), motion_energy(video.clone()), rtol=0, atol=0)


def test_classes_have_equally_many_clips() -> None:
    energies = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    edges = motion_edges(energies, 10)
    assert edges.shape == (9,) and (edges.diff() > 0).all()
    found = motion_class(energies, edges)
    assert torch.bincount(found, minlength=10).tolist() == [100] * 10
    assert (found[energies.argsort()].diff() >= 0).all()
    many_still = motion_edges(torch.cat([torch.zeros(300), energies]), 10)
    assert motion_class(torch.zeros(1), many_still).item() == 0, "whatever the edges"


# ---- what a sample is


def learnt(made: LatentTask, networks: dict[str, Any], samples: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    target, told = made.space.latents(networks, samples, rng(samples))
    assert target.dtype == torch.float32 and target.shape[1:] == LATENT
    return target, told


def test_a_sample_starts_from_its_own_first_frame(ae: Path) -> None:
    made, samples = task(ae, "--cond-prob", "0", "--img-prob", "1"), batch(16)
    networks = built(made)
    target, told = learnt(made, networks, samples)
    assert told["task"].tolist() == [FROM_IMAGE] * 16
    starts = rng(samples).integers("window", FRAMES + 1)
    starts = torch.where(samples["has_previous"], starts, FRAMES)
    assert len(set(starts.tolist())) > 2, "the clip begins anywhere"
    video = to_float(samples["video"])
    for row, start in enumerate(starts.tolist()):
        clip = video[row : row + 1, :, start : start + FRAMES]
        torch.testing.assert_close(target[row : row + 1], networks["ae"].encode(clip))
        torch.testing.assert_close(told["previous"][row : row + 1], networks["ae"].encode(clip[:, :, :1].repeat(1, 1, FRAMES, 1, 1)))


def test_a_sample_that_goes_on_after_nothing_is_told_so(ae: Path) -> None:
    made, samples = task(ae, "--cond-prob", "1", "--model.tasks"), batch(12)
    _, told = learnt(made, built(made), samples)
    assert torch.equal(told["task"], torch.where(samples["has_previous"], FROM_CLIP, NO_TASK))
    assert not told["previous"][~samples["has_previous"]].any()


def test_samples_divide_into_three_kinds(ae: Path) -> None:
    made = task(ae, "--cond-prob", "0.3", "--img-prob", "0.2", clips=latent_clips(ae))
    halves = {name: torch.rand(1000, *shape) for name, shape in latent_clips(ae).latents.tensors.items()}  # type: ignore[union-attr]
    samples = {**halves, "label": torch.zeros(1000, dtype=torch.int64), "index": torch.arange(1000)}
    target, told = learnt(made, {}, samples)
    kind = told["task"]
    shares = torch.bincount(kind, minlength=3) / 1000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.04, rtol=0)
    alone = task(ae, "--cond-prob", "0.3", clips=latent_clips(ae))
    _, without = learnt(alone, {}, samples)
    assert without.keys() == {"previous"}, "nobody asked for more"
    torch.testing.assert_close(without["previous"][kind == FROM_CLIP], told["previous"][kind == FROM_CLIP])
    assert not without["previous"][kind != FROM_CLIP].any() and not told["previous"][kind == NO_TASK].any()
    after, image = kind == FROM_CLIP, kind == FROM_IMAGE
    assert torch.equal(target[after], halves["latent"][after]) and torch.equal(told["previous"][after], halves["previous"][after])
    second = (target == halves["latent"]).flatten(1).all(dim=1)
    assert torch.equal(target[~second], halves["previous"][~second]) and 0.3 < second[image].float().mean() < 0.7
    for half, name in ((second, "still"), (~second, "previous_still")):
        assert torch.equal(told["previous"][half & image], halves[name][half & image])


def test_each_sample_is_the_same_in_any_batch(ae: Path) -> None:
    made = task(ae, "--cond-prob", "0.3", "--img-prob", "0.4", "--dynamics-bins", "4")
    networks, samples = built(made), moving(12)
    target, told = learnt(made, networks, samples)
    assert set(told["task"].tolist()) == {NO_TASK, FROM_CLIP, FROM_IMAGE}
    for row in range(12):
        one = {name: value[row : row + 1] for name, value in samples.items()}
        alone, told_alone = learnt(made, networks, one)
        torch.testing.assert_close(alone, target[row : row + 1])
        for name, value in told_alone.items():
            torch.testing.assert_close(value, told[name][row : row + 1])


def test_a_sample_is_told_the_motion_of_what_it_learns(ae: Path) -> None:
    made = task(ae, "--cond-prob", "0.3", "--dynamics-bins", "4", "--dynamics-dropout", "0")
    networks, samples = built(made), moving(24)
    _, told = learnt(made, networks, samples)
    clips = to_float(samples["video"])
    starts = torch.where(samples["has_previous"], rng(samples).integers("window", FRAMES + 1), FRAMES)
    after = (rng(samples).uniform("previous") < 0.3) & samples["has_previous"]
    starts = torch.where(after, FRAMES, starts)
    energy = torch.cat([motion_energy(clips[row : row + 1, :, k : k + FRAMES]) for row, k in enumerate(starts.tolist())])
    expected = torch.bucketize(energy.double(), torch.tensor([0.02, 0.04, 0.06], dtype=torch.float64))
    assert torch.equal(told["dynamics"], expected) and len(set(expected.tolist())) == 4
    torch.testing.assert_close(space_of(made).energy(samples, rng(samples)), energy)


def test_a_share_is_told_of_no_motion(ae: Path) -> None:
    """An addressed draw: the same whatever the motion is."""
    dynamics, index = Dynamics(10, 0.15, [k / 10 for k in range(1, 10)]), torch.arange(2000)
    found = dynamics.told(torch.rand(2000), SampleRng(0, index))
    assert found.max() == 10 and found.min() == 0
    dropped = found == 10
    assert dropped.float().mean().item() == pytest.approx(0.15, abs=0.03)
    assert torch.equal(dynamics.told(torch.zeros(2000), SampleRng(0, index)) == 10, dropped)
    assert not (Dynamics(10, 0.0).told(torch.rand(2000), SampleRng(0, index)) == 10).any()


def test_latents_and_pixels_give_the_same_loss(ae: Path) -> None:
    """Where both define it: of clips that go on, and of single clips that begin or start from a picture."""
    pipeline = HVDMPipeline.from_exports(ae=ae)
    pipeline.stills = True
    ways = ((True, ["--cond-prob", "1"]), (False, ["--cond-prob", "0", "--img-prob", "0.5"]))
    for pairs, argv in ways:
        argv = [*argv, "--dynamics-bins", "4", "--latent-scale", "2.5", "--latent-shift", "0.1"]
        pixels = task(ae, *argv, clips=CLIPS if pairs else SINGLE)
        latents = task(None, *argv, clips=latent_clips(ae, pairs))
        networks, samples = built(pixels), moving(8)
        if pairs:
            samples["has_previous"][:] = True
        else:
            del samples["has_previous"]
            samples["video"] = samples["video"][:, :, :FRAMES]
        pipeline.pairs = pairs
        held = pipeline.encode_latents(to_float(samples["video"]))
        assert held.keys() == latent_clips(ae, pairs).latents.tensors.keys()  # type: ignore[union-attr]
        held |= {name: samples[name] for name in ("label", "index")}
        encoded = pixels.loss("model", networks, samples, rng(samples))
        read = latents.loss("model", {"model": networks["model"]}, held, rng(samples))
        assert read.total.item() == pytest.approx(encoded.total.item(), rel=1e-5)
        assert latents.networks().keys() == {"model"}, "latents need no autoencoder"
        seen = [Spy(), Spy()]
        pixels.loss("model", {**networks, "model": seen[0]}, samples, rng(samples))
        latents.loss("model", {"model": seen[1]}, held, rng(samples))
        assert seen[0].calls[0].keys() == seen[1].calls[0].keys() >= {"previous", "dynamics"}
        for name, value in seen[0].calls[0].items():
            torch.testing.assert_close(value, seen[1].calls[0][name])


def test_no_picture_and_no_clip_are_zero_whatever_the_normalisation(ae: Path) -> None:
    made = task(ae, "--cond-prob", "1e-9", "--img-prob", "1e-9", "--latent-scale", "3", "--latent-shift", "0.5")
    samples = batch()
    _, told = learnt(made, built(made), samples)
    assert not told["previous"].any() and not told["task"].any()
