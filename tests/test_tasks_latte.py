"""Latte's denoiser as a task: one loss from pixels and from latents, images beside clips, every option, what it hands on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tasks.frame_latents as frame_latents
from diffusion import DiffusionConfig, build
from engine.task import Batch, Network
from models.official.latte import export_official
from models.transformers.latte import Latte, LatteConfig
from pipelines.image_vae import SD_SCALE
from tasks.clips import ClipInfo, Networks, StoredLatents
from tasks.diffusion_task import Condition
from tasks.frame_latents import FrameSpace
from tasks.latent import Denoiser, LatentTask
from tests.latte_denoiser import CLIPS, VAE, batch, built, config, rng, stored, task, vae_export
from utils.config import from_dict
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng
from utils.weights import write_export

ROOT = Path(__file__).resolve().parent.parent
JOINT = dataclasses.replace(CLIPS, images=2)


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vae_export(tmp_path_factory.mktemp("ae"))


def latent_clips(ae: Path, clips: ClipInfo = CLIPS, **changes: Any) -> ClipInfo:
    """The same clips, as the latent set of this autoencoder describes them."""
    made = task(ae).space
    assert isinstance(made, FrameSpace)
    described = {"system": "latte", **made.autoencoder}
    spread = {"mean": 0.25, "std": 0.5, "scale": 2.0, "shift": 0.25}
    held = StoredLatents({"moments": (8, 4, 6)}, torch.float32, described, "LATENTS", True, spread)
    return dataclasses.replace(clips, latents=dataclasses.replace(held, **changes))


# ---- latents


@pytest.mark.parametrize("clips", [CLIPS, JOINT], ids=["clips", "joint"])
@pytest.mark.parametrize("scale", ["1", "2.5"])
def test_pixels_and_their_latents_give_the_same_loss(ae: Path, clips: ClipInfo, scale: str) -> None:
    argv = ["--latent-scale", scale, "--latent-shift", "0.1"]
    pixels, latents = task(ae, *argv, clips=clips), task(None, *argv, clips=latent_clips(ae, clips))
    assert latents.networks().keys() == {"model"}, "latents need no autoencoder"
    networks, samples = built(pixels), batch(4, clips)
    held = stored(networks, samples)
    assert "video" not in held and held["moments"].shape == (4, 8, 4, 4, 6)
    encoded = pixels.loss("model", networks, samples, rng(samples))
    read = latents.loss("model", {"model": networks["model"]}, held, rng(samples))
    assert read.total.item() == pytest.approx(encoded.total.item(), rel=1e-5)
    for name, (value, _) in encoded.metrics.items():
        assert read.metrics[name][0].item() == pytest.approx(value.item(), rel=1e-5), name


def test_latents_are_addressed_posterior_samples_brought_to_unit_variance(ae: Path) -> None:
    made = task(ae, "--latent-scale", "3", "--latent-shift", "0.5", clips=JOINT)
    networks, samples = built(made), batch(3, JOINT)
    found, told = made.space.latents(networks, samples, rng(samples))
    assert not told
    mean, std = networks["vae"].moments(to_float(samples["video"])).chunk(2, dim=1)
    expected = (mean + std * rng(samples).normal("vae", (4, 4, 4, 6)) - 0.5) * 3
    assert found.shape == (3, 4, 4 + 2, 4, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, :, :4], expected)
    images = networks["vae"].moments(to_float(samples["images"])).chunk(2, dim=1)
    assert not torch.allclose(found[:, :, 4:], (images[0] - 0.5) * 3), "images are drawn too"
    drawn = (expected / 3 + 0.5)[:, :, :4]
    ready = {"sample": drawn, "label": samples["label"], "index": samples["index"]}
    torch.testing.assert_close(made.space.latents({}, ready, rng(samples))[0], expected)
    shown = made.space.show(networks, expected)
    torch.testing.assert_close(shown, networks["vae"].decode_raw(drawn))


def test_normalisation_is_given_or_the_sets_or_stable_diffusions(ae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(*argv: str, clips: ClipInfo = CLIPS) -> dict[str, Any]:
        found = task(ae, *argv, clips=clips).state()
        return {name: found[name] for name in ("latent_scale", "latent_shift")}

    automatic = ["--latent-scale", "0"]
    assert state(*automatic, clips=latent_clips(ae)) == {"latent_scale": 2.0, "latent_shift": 0.25}
    assert state("--latent-scale", "4", clips=latent_clips(ae)) == {"latent_scale": 4.0, "latent_shift": 0.0}
    with pytest.raises(ConfigError, match="give --latent-scale"):
        state(*automatic, clips=latent_clips(ae, statistics={}))

    def as_stable_diffusion(*argv: Any) -> Any:
        codec, card = opened(*argv)
        codec.kind = "sd"
        return codec, card | {"kind": "sd"}

    opened = frame_latents.open_codec
    monkeypatch.setattr(frame_latents, "open_codec", as_stable_diffusion)
    assert state(*automatic) == {"latent_scale": SD_SCALE, "latent_shift": 0.0}
    assert state(*automatic, clips=latent_clips(ae)) == {"latent_scale": SD_SCALE, "latent_shift": 0.0}, "as from pixels"
    given = {"mean": 0.25, "std": 0.5, "scale": 3.0, "shift": 0.0}
    assert state(*automatic, clips=latent_clips(ae, statistics=given)) == {"latent_scale": 3.0, "latent_shift": 0.0}
    with pytest.raises(ConfigError, match="give --latent-scale"):  # such as sets that were given a scale each
        state(*automatic, clips=latent_clips(ae, statistics={}))


def test_a_run_keeps_the_normalisation_that_it_began_with(ae: Path) -> None:
    made = task(ae, "--latent-scale", "4")
    made.load_state(made.state() | {"latent_scale": 2.0, "latent_shift": 0.5})
    assert made.state() == task(ae).state() | {"latent_scale": 2.0, "latent_shift": 0.5}
    assert made.card()["latent"] == {"scale": 2.0, "shift": 0.5}
    made.load_state({"latent_scale": 3.0, "latent_shift": 0.25})  # of a checkpoint that does not name its autoencoder
    assert made.state() == task(ae).state() | {"latent_scale": 3.0, "latent_shift": 0.25}


@pytest.mark.parametrize("held", ["pixels", "latents"])
def test_a_run_does_not_go_on_with_another_autoencoder(tmp_path: Path, held: str) -> None:
    """Trained further in its folder, or latents made anew with another: the settings are the same, the space is not."""

    def made(seed: int) -> LatentTask:
        where = vae_export(tmp_path / "run", seed)
        return task(where) if held == "pixels" else task(None, clips=latent_clips(where))

    began, other = made(0).state(), made(1)
    with pytest.raises(UserError, match=r"began with other weights .*--resume none$") as error:
        other.load_state(began)
    assert "\n" not in str(error.value)
    assert str(error.value).count("...") == 2 and str(tmp_path / "run") in str(error.value)
    made(0).load_state(began)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": {"sha256": "f" * 64, "path": "/other/run", "weights": "ema"}}, r"of the autoencoder /other/run \(ffffffffffff"),
        ({"tensors": {"moments": (8, 2, 3)}}, "latents of 4x2x3 a frame, the autoencoder gives 4x4x6"),
        ({"tensors": {"content": (8, 4, 6), "motion": (2, 3)}}, "not the moments or samples of single frames"),
        ({"framewise": False}, "whole clips at once"),
    ],
)
def test_latents_of_something_else_are_refused_in_one_line(ae: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        task(ae, clips=latent_clips(ae, **changes))
    assert "\n" not in str(error.value)


def test_latents_that_are_older_than_their_autoencoder_are_stale(tmp_path: Path) -> None:
    old = latent_clips(vae_export(tmp_path / "run"))
    vae_export(tmp_path / "run", seed=1)
    with pytest.raises(ConfigError, match=r"LATENTS is stale: .*run preprocess.py latents again"):
        task(tmp_path / "run" / "export", clips=old)
    with pytest.raises(ConfigError, match=r"ema weights\), not of .*model weights\): give that one"):
        task(tmp_path / "run", "--ae.weights", "model", clips=old)


def test_pixels_need_an_autoencoder_and_frames_that_fit_it(ae: Path) -> None:
    with pytest.raises(ConfigError, match="which autoencoder"):
        task(None)
    with pytest.raises(UserError, match="multiples of 4"):
        task(ae, clips=dataclasses.replace(CLIPS, image_size=(16, 18)))


# ---- images beside clips


class Spy(nn.Module):
    """Says what a denoiser was called with."""

    def __init__(self, out_channels: int = 8) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, **given})
        return x.repeat(1, self.out_channels // x.shape[1], *[1] * (x.ndim - 2))


def test_images_go_behind_the_frames_with_the_clips_time_and_labels_of_their_own(ae: Path) -> None:
    made = task(ae, "--num-classes", "3", "--condition.dropout", "0.5", clips=JOINT)
    networks, samples = built(made), batch(64, JOINT)
    spy = Spy()
    made.loss("model", {**networks, "model": spy}, samples, rng(samples))
    (seen,) = spy.calls
    assert seen["x"].shape == (64, 4, 6, 4, 6) and seen["t"].shape == (64,) and seen["images"] == 2
    assert torch.equal(seen["y"], samples["label"]) and torch.equal(seen["image_y"], samples["image_label"])
    drops = torch.cat([seen["drop"][:, None], seen["image_drop"]], dim=1)
    assert drops.shape == (64, 3) and len(drops.unique(dim=0)) == 8, "each label is dropped on its own"
    assert torch.equal(seen["drop"], rng(samples).uniform("condition-dropout") < 0.5)
    made.evaluate({**networks, "model": spy}, samples, rng(samples))
    assert not {"drop", "image_drop"} & spy.calls[1].keys(), "evaluation drops nothing"
    plain = task(ae, clips=JOINT)
    plain.loss("model", {**networks, "model": spy}, samples, rng(samples))
    assert not {"y", "image_y", "drop", "image_drop"} & spy.calls[2].keys() and spy.calls[2]["images"] == 2


@pytest.mark.parametrize("argv", [[], ["--num-classes", "3", "--condition.dropout", "0.5"]], ids=["plain", "classes"])
def test_loss_of_a_joint_batch_is_the_sum_over_its_parts(ae: Path, argv: list[str]) -> None:
    made = task(ae, *argv, clips=JOINT)
    networks, samples = built(made), batch(4, JOINT)
    whole = made.loss("model", networks, samples, rng(samples))
    parts = [{name: value[part] for name, value in samples.items()} for part in (slice(0, 1), slice(1, 4))]
    split = [made.loss("model", networks, part, rng(part)) for part in parts]
    assert sum(out.total.item() for out in split) == pytest.approx(whole.total.item(), rel=1e-5)
    for name, (value, count) in whole.metrics.items():
        assert sum(out.metrics[name][0].item() for out in split) == pytest.approx(value.item(), rel=1e-5), name
        assert sum(out.metrics[name][1] for out in split) == count == 4
    other = made.loss("model", networks, samples, rng(samples, seed=1))
    assert other.total.item() != whole.total.item()


# ---- each option with each of its values

OPTIONS: dict[str, tuple[list[str], ClipInfo]] = {
    "no condition": ([], CLIPS),
    "classes": (["--num-classes", "3"], CLIPS),
    "classes never dropped": (["--num-classes", "-1", "--condition.dropout", "0"], CLIPS),
    "text": (["--use-text-embed"], dataclasses.replace(CLIPS, cond_dim=5)),
    "text and images": (["--use-text-embed"], dataclasses.replace(JOINT, cond_dim=5)),
    "images and classes": (["--num-classes", "3"], JOINT),
    "fixed small": (["--diffusion.variance", "fixed_small"], CLIPS),
    "fixed large": (["--diffusion.variance", "fixed_large"], CLIPS),
    "learned range": (["--diffusion.variance", "learned_range"], JOINT),
    "v prediction": (["--diffusion.predict", "v", "--diffusion.variance", "fixed_small"], CLIPS),
    "min-SNR": (["--loss-weighting", "min_snr", "--diffusion.variance", "fixed_small"], CLIPS),
    "flow": (["--process", "flow"], JOINT),
    "late blocks": (["--model.block_layout", "late"], JOINT),
    "the tutorial's orders": (
        ["--model.time_embed_order", "sin_cos", "--model.pos_embed_order", "hw", "--model.time_embed_dim", "32"],
        CLIPS,
    ),
    "free heads": (["--model.head_dim", "8", "--model.mlp_ratio", "2"], CLIPS),
    "patches of one": (["--model.patch_size", "1"], CLIPS),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_and_shows(ae: Path, option: str) -> None:
    argv, clips = OPTIONS[option]
    made = task(ae, *argv, clips=clips)
    networks, samples = built(made), batch(4, clips)
    assert isinstance(networks["model"], Latte)
    assert networks["model"].config.learn_sigma == (not {"fixed_small", "fixed_large", "flow"} & set(argv))
    out = made.loss("model", networks, samples, rng(samples))
    assert out.total.isfinite() and out.count == 4
    out.total.backward()
    without = [name for name, value in networks["model"].named_parameters() if value.grad is None]
    assert not without
    assert all(value.grad is None for value in networks["vae"].parameters())
    assert made.evaluate(networks, samples, rng(samples))["loss"][0].isfinite()
    with torch.no_grad():
        shown = made.preview(networks, samples, rng(samples))["samples"]
        again = made.preview(networks, samples, rng(samples))["samples"]
    assert shown.shape == (8, 3, 4, 16, 24) and shown.abs().max() <= 1 and torch.equal(shown, again)


def test_variance_channels_follow_the_process(ae: Path) -> None:
    """The release always builds the learned-range process, so that without variance channels training fails."""
    for variance, channels in (("learned_range", 8), ("fixed_small", 4), ("fixed_large", 4)):
        made = task(ae, "--diffusion.variance", variance)
        model = built(made)["model"]
        assert model(torch.zeros(1, 4, 4, 4, 6), torch.zeros(1, dtype=torch.int64)).shape[1] == channels
        out = made.loss("model", {**built(made), "model": model}, batch(2), rng(batch(2)))
        assert ("vb" in out.metrics) == (variance == "learned_range")


def test_the_average_may_be_off(ae: Path) -> None:
    assert task(ae).networks()["model"].ema is not None
    assert task(ae, "--ema-decay", "0").networks()["model"].ema is None


def test_a_batch_spec_runs_on_the_meta_device(ae: Path) -> None:
    text = dataclasses.replace(JOINT, cond_dim=5)
    for made in (task(ae, "--use-text-embed", clips=text), task(None, "--num-classes", "3", clips=latent_clips(ae, JOINT))):
        networks = {name: network.module.to("meta") for name, network in made.networks().items()}
        spec = made.batch_spec(3)
        out = made.loss("model", networks, spec, SampleRng(0, spec["index"], "meta"))
        assert out.total.is_meta and out.count == 3


def test_previews_of_latents_alone_show_the_latents(ae: Path) -> None:
    made = task(None, clips=latent_clips(ae))
    networks = built(made)
    shown = made.preview(networks, {"label": torch.zeros(4, dtype=torch.int64)}, rng(batch(4)))["samples"]
    assert shown.shape == (8, 3, 4, 4, 6) and shown.abs().max() <= 1


# ---- what is handed on


def test_the_card_rebuilds_the_network_and_names_its_autoencoder(ae: Path) -> None:
    made = task(ae, "--num-classes", "3", "--model.block_layout", "late")
    card = made.card()
    assert (card["system"], card["stage"], made.name) == ("latte", "denoiser", "latte-denoiser")
    rebuilt = Latte(from_dict(LatteConfig, card["model"], "card"))
    rebuilt.load_state_dict(built(made)["model"].state_dict())
    assert rebuilt.config == made.denoiser.config and rebuilt.config.n_frames == 4
    assert from_dict(DiffusionConfig, card["diffusion"], "card") == DiffusionConfig()
    assert card["ae"].keys() >= {"sha256", "weights", "path", "kind"} and card["ae"]["kind"] == "latte"
    read = task(None, clips=latent_clips(ae)).card()
    assert read["ae"] == card["ae"] and read["latent"] == {"scale": 1.0, "shift": 0.0}


def test_weights_of_an_image_dit_start_a_run(ae: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = LatteConfig(input_size=(4, 6), n_frames=4, hidden_size=32, depth=2, num_heads=2)
    source = Latte(config)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    official = export_official(source.state_dict(), config)
    state = {name: value for name, value in official.items() if name != "temp_embed"}
    torch.save({"ema": state}, tmp_path / "dit.pt")
    network = task(ae, "--init-from-dit", str(tmp_path / "dit.pt")).networks()["model"].module
    for name, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    with pytest.raises(UserError, match="cannot start this run"):
        task(ae, "--model.hidden_size", "64", "--init-from-dit", str(tmp_path / "dit.pt")).networks()


def test_weights_of_another_latte_start_a_run(ae: Path, tmp_path: Path) -> None:
    """An export, or the official release's checkpoint; here without its classes, in the tutorial's order of the step embedding."""
    old = task(ae, "--num-classes", "3")
    source = built(old)["model"]
    assert isinstance(source, Latte)
    write_export(tmp_path / "run" / "export", {"model": source.state_dict()}, old.card())
    same = task(ae, "--num-classes", "3", "--init-from", str(tmp_path / "run")).networks()["model"].module
    for name, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    torch.save({"ema": export_official(source.state_dict(), source.config)}, tmp_path / "latte.pt")
    argv = ["--init-from", str(tmp_path / "latte.pt"), "--model.time_embed_order", "sin_cos"]
    other = task(ae, *argv)
    start = other.networks()["model"].module
    x, t = torch.randn(2, 4, 4, 4, 6), torch.tensor([3, 700])
    assert torch.equal(start.state_dict()["blocks.1.attn.qkv.weight"], source.state_dict()["blocks.1.attn.qkv.weight"])
    torch.testing.assert_close(start.t_embedder(t), source.t_embedder(t))
    assert start(x, t).shape == (2, 8, 4, 4, 6)
    with pytest.raises(UserError, match="trained with block_layout interleaved, the model has late"):
        task(ae, "--init-from", str(tmp_path / "run"), "--model.block_layout", "late").networks()


# ---- other systems


class Planes:
    """A space without frames: vectors along a row, of a first stage that is a constant factor."""

    shape = (4, 10)

    def networks(self) -> dict[str, Network]:
        return {}

    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        return batch["planes"], {"before": batch["planes"] + 1}

    def after(self, latents: Tensor) -> dict[str, Tensor]:
        return {"before": latents}

    def starts(self, networks: Networks, batch: Batch) -> dict[str, dict[str, Tensor]]:
        return {}

    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        return latents[:, :3, None, None].clamp(-1, 1)

    def state(self) -> dict[str, int | float]:
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        pass

    def card(self) -> dict[str, Any]:
        return {"ae": {"kind": "planes"}}


def test_another_system_brings_its_space_and_its_network() -> None:
    setting = config("--diffusion.variance", "fixed_small")
    made = LatentTask(setting, CLIPS, Planes(), Condition(), Denoiser(VAE, lambda: Spy(4)))
    samples = {"planes": torch.randn(2, 4, 10), "label": torch.zeros(2, dtype=torch.int64), "index": torch.arange(2)}
    networks: dict[str, Any] = {name: network.module for name, network in made.networks().items()}
    out = made.loss("model", networks, samples, rng(samples))
    spy = networks["model"]
    assert torch.equal(spy.calls.pop()["before"], samples["planes"] + 1), "the network is told what the space says"
    process = build(setting.diffusion)
    t, noise = process.sample_timesteps(rng(samples)), rng(samples).normal("noise", (4, 10))
    expected = (process.q_sample(samples["planes"], t, noise) - noise).square().mean() * 2
    assert out.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert made.preview(networks, samples, rng(samples))["samples"].shape == (8, 3, 2, 1, 10), "a clip, and the one after it"
    assert ["before" in call for call in spy.calls] == [False, False, True, True]
    assert made.card()["ae"] == {"kind": "planes"}
