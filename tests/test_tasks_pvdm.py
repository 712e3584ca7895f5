"""PVDM's denoiser as a task: what a sample learns and what it is told of, every option, what it is tied to, what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.task import Batch
from models.transformers.plane_dit import PlaneDiT
from models.unets.plane_unet import PlaneUNet
from pipelines.pvdm_loading import load_pvdm_autoencoder
from tasks.latent import LatentTask
from tasks.pvdm_config import PVDMRunConfig
from tests.pvdm_denoiser import CLIPS, DIT, FRAMES, SINGLE, Spy, batch, built, config, latent_clips, rng, space_of, task
from tests.pvdm_exports import AE, UNET, export_autoencoder, export_denoiser, official
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_autoencoder(tmp_path_factory.mktemp("pvdm") / "ae")


def learnt(made: LatentTask, networks: dict[str, Any], samples: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the samples learn, and what they are told of."""
    target, told = made.space.latents(networks, samples, rng(samples))
    assert target.dtype == torch.float32 and told.keys() == {"previous"}
    return target, told["previous"]


# ---- what a sample is


def test_a_sample_goes_on_after_the_clip_before_it(ae: Path) -> None:
    made, samples = task(ae, "--cond-prob", "1"), batch()
    networks = built(made)
    target, previous = learnt(made, networks, samples)
    video = to_float(samples["video"])
    torch.testing.assert_close(target, networks["ae"].encode(video[:, :, FRAMES:]))
    before = networks["ae"].encode(video[:, :, :FRAMES])
    known = samples["has_previous"]
    torch.testing.assert_close(previous[known], before[known])
    assert not known.all() and before[~known].abs().max() > 0, "padding has a latent"
    assert not previous[~known].any(), "and is none of a clip: exact zeros"


def test_a_black_clip_before_it_is_a_clip(ae: Path) -> None:
    """Told by the stream, not by the pixels: the release takes a black first half for padding, in training and, encoded, in evaluation."""
    made, samples = task(ae, "--cond-prob", "1"), batch()
    samples["video"][:, :, :FRAMES] = 0
    networks = built(made)
    _, previous = learnt(made, networks, samples)
    black = networks["ae"].encode(-torch.ones(1, 3, FRAMES, 16, 16))
    for row, known in enumerate(samples["has_previous"].tolist()):
        torch.testing.assert_close(previous[row], black[0] if known else torch.zeros_like(black[0]))
    made.evaluate({**networks, "model": Spy()}, samples, rng(samples))


def test_a_sample_that_goes_on_after_nothing_is_any_window(ae: Path) -> None:
    made, samples = task(ae, "--cond-prob", "1e-9"), batch(64)
    networks = built(made)
    target, previous = learnt(made, networks, samples)
    assert not previous.any()
    video = to_float(samples["video"])
    windows = torch.stack([networks["ae"].encode(video[:, :, k : k + FRAMES]) for k in range(FRAMES + 1)], dim=1)
    found = (windows - target[:, None]).abs().amax(dim=(2, 3))
    starts = found.argmin(dim=1)
    assert found.amin(dim=1).max() < 1e-5
    assert set(starts[samples["has_previous"]].tolist()) == set(range(FRAMES + 1)), "both ends included"
    assert set(starts[~samples["has_previous"]].tolist()) == {FRAMES}, "never into the padding"


def test_each_sample_draws_for_itself(ae: Path) -> None:
    """The same whatever else is in its batch; the release draws once for a whole batch on each rank."""
    made, samples = task(ae, "--cond-prob", "0.3"), batch(400)
    networks = built(made)
    told = (SampleRng(0, samples["index"]).uniform("previous") < 0.3).float().mean().item()
    assert told == pytest.approx(0.3, abs=0.07)
    few = {name: value[:12] for name, value in samples.items()}
    target, previous = learnt(made, networks, few)
    assert 0 < previous.flatten(1).any(dim=1).sum() < 12
    for row in range(12):
        one = {name: value[row : row + 1] for name, value in samples.items()}
        torch.testing.assert_close(learnt(made, networks, one), (target[row : row + 1], previous[row : row + 1]))
    other = made.space.latents(networks, few, rng(few, seed=1))
    assert not torch.allclose(other[0], target)


def test_only_what_is_needed_is_encoded(ae: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.rows: list[int] = []

        def encode(self, video: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(video))
            return torch.zeros(len(video), *space_of(made).shape)

    samples = batch(12)
    for share, least, most in (("1e-9", 0, 0), ("0.4", 1, 11), ("1", 12, 12)):
        made, counting = task(ae, "--cond-prob", share), Counting()
        made.space.latents({"ae": counting}, samples, rng(samples))
        assert counting.rows[0] == 12 and least <= sum(counting.rows[1:]) <= most
        assert set(counting.rows[1:]) <= {1}, "as many at a time as in any other batch: compiled units are made for each number"


def test_latents_and_pixels_give_the_same_loss(ae: Path) -> None:
    """Where all samples go on; of the others latents have halves in place of windows."""
    for scale in ("1", "2.5"):
        argv = ["--cond-prob", "1", "--latent-scale", scale, "--latent-shift", "0.1"]
        pixels, latents = task(ae, *argv), task(None, *argv, clips=latent_clips(ae))
        networks, samples = built(pixels), batch()
        samples["has_previous"][:] = True
        video = to_float(samples.pop("video"))
        held = {"previous": networks["ae"].encode(video[:, :, :FRAMES]), "latent": networks["ae"].encode(video[:, :, FRAMES:])}
        held |= {name: value for name, value in samples.items() if name != "has_previous"}
        samples["video"] = ((video + 1) * 127.5).round().to(torch.uint8)
        encoded = pixels.loss("model", networks, samples, rng(samples))
        read = latents.loss("model", {"model": networks["model"]}, held, rng(samples))
        assert read.total.item() == pytest.approx(encoded.total.item(), rel=1e-5)
        assert latents.networks().keys() == {"model"}, "latents need no autoencoder"


def test_of_stored_pairs_either_half_is_learnt_alone(ae: Path) -> None:
    made = task(None, "--cond-prob", "0.5", clips=latent_clips(ae))
    halves = {"previous": torch.full((200, 4, 48), 0.25), "latent": torch.full((200, 4, 48), 0.75)}
    samples = {**halves, "label": torch.zeros(200, dtype=torch.int64), "index": torch.arange(200)}
    target, previous = learnt(made, {}, samples)
    told = previous.flatten(1).any(dim=1)
    assert torch.equal(told, SampleRng(0, samples["index"]).uniform("previous") < 0.5)
    assert torch.equal(previous[told], halves["previous"][told]) and (target[told] == 0.75).all()
    first = target[~told, 0, 0] == 0.25
    assert 0.3 < first.float().mean() < 0.7


def test_no_clip_before_is_zero_whatever_the_normalisation(ae: Path) -> None:
    samples = batch()
    for clips, held in ((CLIPS, samples), (latent_clips(ae), None)):
        made = task(ae, "--cond-prob", "1e-9", "--latent-scale", "3", "--latent-shift", "0.5", clips=clips)
        halves = {name: torch.full((6, 4, 48), 0.25) for name in ("previous", "latent")}
        _, previous = learnt(made, built(made), held or {**halves, "label": samples["label"], "index": samples["index"]})
        assert not previous.any()


def test_single_clips_are_learnt_alone(ae: Path) -> None:
    made = task(ae, "--cond-prob", "0", clips=SINGLE)
    networks, samples = built(made), batch(frames=FRAMES)
    target, told = made.space.latents(networks, samples, rng(samples))
    assert not told
    torch.testing.assert_close(target, networks["ae"].encode(to_float(samples["video"])))
    assert made.preview(networks, samples, rng(samples))["samples"].shape == (2, 3, FRAMES, 16, 16)


# ---- settings

RELEASE: dict[str, Any] = {
    "optim.lr": 1e-4,
    "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0.01,
    "optim.clip_norm": 0.0,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "ema.decay": 0.9999,
    "ema.every": 25,
    "ema.warmup": True,
    "diffusion.steps": 1000,
    "diffusion.schedule": "quad",
    "diffusion.predict": "eps",
    "diffusion.variance": "fixed_small",
    "diffusion.loss": "mse",
    "latent.scale": 1.0,
    "model.name": "PVDM-L",
    "cond_prob": 0.3,
}


def test_defaults_are_the_releases() -> None:
    found = PVDMRunConfig()
    for name, value in RELEASE.items():
        at: Any = found
        for part in name.split("."):
            at = getattr(at, part)
        assert at == value, name


def test_what_the_settings_say_happens(ae: Path) -> None:
    """The release configures the absolute error and a warm-up, and uses neither."""
    samples = batch()
    losses = {}
    for name in ("mse", "l1"):
        made = task(ae, "--diffusion.loss", name)
        losses[name] = made.loss("model", built(made), samples, rng(samples)).total.item()
    assert losses["l1"] != pytest.approx(losses["mse"], rel=1e-2)
    optim = task(ae, "--warmup-steps", "10", "--optim.warmup_start", "1e-6").networks()["model"].optim
    assert optim is not None and optim.warmup_steps == 10 and optim.warmup_start == 1e-6


OPTIONS: dict[str, tuple[list[str], list[str] | None]] = {
    "as released": ([], None),
    "classes": (["--num-classes", "2"], None),
    "all go on": (["--cond-prob", "1"], None),
    "none goes on": (["--cond-prob", "0"], None),
    "not conditional": (["--cond-prob", "0", "--no-model.conditional"], None),
    "l1": (["--diffusion.loss", "l1"], None),
    "x0": (["--diffusion.predict", "x0"], None),
    "v, min-SNR": (["--diffusion.predict", "v", "--loss-weighting", "min_snr"], None),
    "fixed large": (["--diffusion.variance", "fixed_large"], None),
    "flow": (["--process", "flow"], None),
    "no scale-shift": (["--no-model.use_scale_shift_norm", "--no-model.resblock_updown"], None),
    "transformer": ([], DIT),
    "transformer, flow, classes": (["--process", "flow", "--num-classes", "2"], DIT),
    "transformer, learned variance": (["--diffusion.variance", "learned_range"], DIT),
    "transformer, patches of one": (["--model.patch_size", "1"], DIT),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_and_shows(ae: Path, option: str) -> None:
    argv, model = OPTIONS[option]
    made = task(ae, *argv, **({"model": model} if model else {}))
    networks, samples = built(made), batch(4)
    assert isinstance(networks["model"], PlaneDiT if model else PlaneUNet)
    out = made.loss("model", networks, samples, rng(samples))
    assert out.total.isfinite() and out.count == 4
    out.total.backward()
    assert not [name for name, value in networks["model"].named_parameters() if value.grad is None]
    assert all(value.grad is None for value in networks["ae"].parameters())
    with torch.no_grad():
        assert made.evaluate(networks, samples, rng(samples))["loss"][0].isfinite()
        shown = made.preview(networks, samples, rng(samples))["samples"]
        again = made.preview(networks, samples, rng(samples))["samples"]
    frames = FRAMES if "0" in argv else 2 * FRAMES  # a clip, and the one that goes on after it
    assert shown.shape == (2, 3, frames, 16, 16) and shown.abs().max() <= 1 and torch.equal(shown, again)


def test_other_sizes_are_the_autoencoders(tmp_path: Path) -> None:
    """The release works for latents of 32 x 32 and 16 frames alone, and cuts one that is too long without a word."""
    config = dataclasses.replace(AE, image_size=(16, 24), n_frames=6, embed_dim=3)
    where = export_autoencoder(tmp_path / "ae", config)
    made = task(where, "--cond-prob", "1", clips=dataclasses.replace(CLIPS, n_frames=6, image_size=(16, 24)))
    networks = built(made)
    length = 4 * 6 + 6 * 6 + 6 * 4
    assert space_of(made).shape == (3, length) and networks["model"].config.length == length
    samples = {"video": torch.zeros(2, 3, 12, 16, 24, dtype=torch.uint8), "label": torch.zeros(2, dtype=torch.int64)}
    samples |= {"index": torch.arange(2), "has_previous": torch.ones(2, dtype=torch.bool)}
    assert made.loss("model", networks, samples, rng(samples)).total.isfinite()
    x, t = torch.zeros(2, 3, length + 1), torch.zeros(2)
    with pytest.raises(ValueError, match=rf"\(2, 3, {length}\), not \(2, 3, {length + 1}\)"):
        networks["model"](x, t)
    with pytest.raises(ValueError, match=r"previous: the model takes \(2, 3, 84\)"):
        networks["model"](x[:, :, :-1], t, previous=x)
    odd = export_autoencoder(tmp_path / "odd", dataclasses.replace(AE, n_frames=5))
    with pytest.raises(ConfigError, match=r"model: latent_frames 5 cannot be halved 1 times"):
        task(odd, clips=dataclasses.replace(CLIPS, n_frames=5))


def test_a_batch_spec_runs_on_the_meta_device(ae: Path) -> None:
    for made in (task(ae), task(ae, "--cond-prob", "0", clips=SINGLE), task(None, clips=latent_clips(ae))):
        networks = {name: network.module.to("meta") for name, network in made.networks().items()}
        spec = made.batch_spec(3)
        out = made.loss("model", networks, spec, SampleRng(0, spec["index"], "meta"))
        assert out.total.is_meta and out.count == 3


# ---- what it is tied to


def test_a_run_does_not_go_on_with_another_autoencoder(ae: Path, tmp_path: Path) -> None:
    other = export_autoencoder(tmp_path / "other", seed=1)
    began = task(ae).state()
    for made in (task(other), task(None, clips=latent_clips(other))):
        with pytest.raises(UserError, match=r"began with other weights .*--resume none$") as error:
            made.load_state(began)
        assert "\n" not in str(error.value)
    task(None, clips=latent_clips(ae)).load_state(began)
    kept = task(ae)
    kept.load_state(began | {"latent_scale": 2.0, "latent_shift": 0.5})
    assert kept.card()["latent"] == {"scale": 2.0, "shift": 0.5}


def test_a_card_says_what_sampling_needs(ae: Path) -> None:
    for made in (task(ae), task(None, clips=latent_clips(ae))):
        card = made.card()
        assert (card["system"], card["stage"]) == ("pvdm", "denoiser")
        assert card["ae"]["sha256"] == load_pvdm_autoencoder(ae).sha256 and card["ae"]["path"] == str(ae)
        assert card["model"]["latent_res"] == [4, 4] and card["diffusion"]["schedule"] == "quad"


MADE_BY = {"system": "pvdm", "sha256": "f" * 64, "path": "/other/run", "weights": "ema"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": MADE_BY | {"model": {}}}, r"of the autoencoder /other/run \(ffffffffffff.*, not of "),
        ({"autoencoder": {"system": "cmd", "sha256": "f" * 64}}, "latents of the system 'cmd'; this stage takes those of PVDM's"),
        ({"tensors": {"latent": (4, 40)}}, "not latents of 4x48"),
        ({"tensors": {"previous": (4, 48)}}, "not latents of 4x48"),
    ],
)
def test_latents_of_something_else_are_refused_in_one_line(ae: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        task(ae, clips=latent_clips(ae, **changes))
    assert "\n" not in str(error.value)


def test_latents_that_are_older_than_their_autoencoder_are_stale(tmp_path: Path) -> None:
    old = latent_clips(export_autoencoder(tmp_path / "run"))
    export_autoencoder(tmp_path / "run", seed=1)
    with pytest.raises(ConfigError, match=r"LATENTS is stale: .*run preprocess.py latents again"):
        task(tmp_path / "run" / "export", clips=old)


def test_previews_are_sampled_as_the_release_does(ae: Path) -> None:
    """Estimates kept in [-1, 1] where latents are the planes themselves, the network's noise as it is; not where they are rescaled."""
    for argv, wanted in (
        ([], (1.0, True, True)),
        (["--latent-scale", "2"], (1.0, False, False)),
        (["--process", "flow"], (0.0, True, False)),
    ):
        found = task(ae, *argv).sampling
        assert (found.eta, found.clip, found.keep_eps) == wanted


def test_what_does_not_fit_is_refused_in_one_line(ae: Path) -> None:
    with pytest.raises(ConfigError, match="which autoencoder"):
        task(None)
    with pytest.raises(ConfigError, match=r"takes clips of 4x16x16 .*these are 4x16x32"):
        task(ae, clips=dataclasses.replace(CLIPS, image_size=(16, 32)))
    for clips in (SINGLE, latent_clips(ae, pairs=False)):
        with pytest.raises(ConfigError, match=r"--cond-prob 0.3: toy holds single clips.*--pairs.*--cond-prob 0$"):
            task(ae, clips=clips)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cond-prob", "1.5"], "--cond-prob 1.5: a share"),
        (["--no-model.conditional"], "with model.conditional off"),
        (["--diffusion.variance", "learned_range"], "the UNet PVDM-S has no channels for it"),
        (["--model", "PVDM-XL"], "PVDM-L"),
        (["--model", "PlanDiT-S/2"], "the nearest is 'PlaneDiT-S/2'"),
        (["--model.hidden_size", "32"], "has no setting 'hidden_size'"),
        (["--model.model_channels", "33"], "33 x 1 is not a multiple of 32"),
        (["--use-text-embed"], "no vectors"),
        (["--process", "flow", "--diffusion.predict", "x0"], "means nothing in the process flow"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config(*argv)
    assert "\n" not in str(error.value)


# ---- where it starts


def test_it_starts_from_a_trained_one(ae: Path, tmp_path: Path) -> None:
    run, released = export_denoiser(tmp_path / "run", ae), official(tmp_path / "official")["denoiser"]
    same = ["--model.attention_resolutions", "2", "1", "--model.num_heads", str(UNET.num_heads)]
    states = [built_plain(task(ae, *same, "--init-from", str(path))) for path in (run, released)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    with pytest.raises(UserError, match=r"its attention_resolutions is .* that of the run") as error:
        task(ae, "--init-from", str(run)).networks()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"it is a PlaneUNet, the run trains a PlaneDiT$"):
        task(ae, "--init-from", str(run), model=DIT).networks()


def built_plain(made: LatentTask) -> dict[str, torch.Tensor]:
    return made.networks()["model"].module.state_dict()
