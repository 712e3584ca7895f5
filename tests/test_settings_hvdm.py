"""Settings of HVDM's denoiser: every option trains, what is tied to a run, what is refused, where it starts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from models.layers.tables import FROM_CLIP, FROM_IMAGE, NO_TASK
from models.transformers.volume_dit import VolumeDiT
from models.unets.volume_unet import VolumeUNet
from pipelines.hvdm import HVDMPipeline
from tasks.hvdm_config import HVDMRunConfig
from tests.hvdm_denoiser import (
    CLIPS,
    DIT,
    FRAMES,
    LATENT,
    SIDE,
    SINGLE,
    UNET,
    Spy,
    batch,
    built,
    config,
    latent_clips,
    moving,
    rng,
    space_of,
    task,
)
from tests.hvdm_exports import AE, export_autoencoder, official
from utils.config import to_dict
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng
from utils.weights import write_export


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_autoencoder(tmp_path_factory.mktemp("hvdm") / "ae")


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
    "model.name": "HVDM-L",
    "model.tasks": False,
    "model.dynamics_bins": 0,
    "cond_prob": 0.3,
    "img_prob": 0.0,
    "frame_strides": (),
    "data.frame_interval": 1,
}


def test_defaults_are_the_releases() -> None:
    found = HVDMRunConfig()
    for name, value in RELEASE.items():
        at: Any = found
        for part in name.split("."):
            at = getattr(at, part)
        assert at == value, name
    size = found.denoiser_size(latent_res=(32, 32), latent_frames=16, in_channels=4)
    assert (size.model_channels, size.channel_mult, size.num_res_blocks, size.conditional) == (192, (1, 2, 4, 4), 2, True)
    assert not (size.tasks or size.dynamics_bins or size.strides)


def test_pictures_bring_the_table_of_tasks() -> None:
    assert config("--img-prob", "0.2").model.tasks and not config().model.tasks and config("--model.tasks").model.tasks


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "as released": ([], UNET),
    "classes": (["--num-classes", "2"], UNET),
    "all go on": (["--cond-prob", "1"], UNET),
    "none goes on": (["--cond-prob", "0"], UNET),
    "not conditional": (["--cond-prob", "0", "--no-model.conditional"], UNET),
    "pictures": (["--img-prob", "0.5"], UNET),
    "pictures alone": (["--cond-prob", "0", "--img-prob", "0.9"], UNET),
    "told of its task": (["--model.tasks"], UNET),
    "motion": (["--dynamics-bins", "4"], UNET),
    "motion, not conditional": (["--cond-prob", "0", "--no-model.conditional", "--dynamics-bins", "4"], UNET),
    "all": (["--img-prob", "0.3", "--dynamics-bins", "10", "--num-classes", "2"], UNET),
    "l1, x0": (["--diffusion.loss", "l1", "--diffusion.predict", "x0"], UNET),
    "flow": (["--process", "flow", "--img-prob", "0.3"], UNET),
    "strided convolutions": (["--no-model.resblock_updown"], UNET),
    "no scale-shift": (["--no-model.use_scale_shift_norm"], UNET),
    "transformer": ([], DIT),
    "transformer, all": (["--img-prob", "0.3", "--dynamics-bins", "10", "--num-classes", "2", "--process", "flow"], DIT),
    "transformer, learned variance": (["--diffusion.variance", "learned_range"], DIT),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_and_shows(ae: Path, option: str) -> None:
    """Also that of convolutions between the levels, with which the release fails on volumes."""
    argv, model = OPTIONS[option]
    made = task(ae, *argv, model=model)
    networks, samples = built(made), moving(4)
    assert isinstance(networks["model"], VolumeDiT if model is DIT else VolumeUNet)
    out = made.loss("model", networks, samples, rng(samples))
    assert out.total.isfinite() and out.count == 4
    out.total.backward()
    assert not [name for name, value in networks["model"].named_parameters() if value.grad is None]
    assert all(value.grad is None for value in networks["ae"].parameters())
    with torch.no_grad():
        assert made.evaluate(networks, samples, rng(samples))["loss"][0].isfinite()
        shown = made.preview(networks, samples, rng(samples))
        again = made.preview(networks, samples, rng(samples))
    frames = FRAMES if "0" in argv else 2 * FRAMES  # a clip, and the one that goes on after it
    assert ("from_pictures" in shown) == ("--img-prob" in argv) and ("by_motion" in shown) == ("--dynamics-bins" in argv)
    assert all(clips.shape == (2, 3, FRAMES, SIDE, SIDE) for name, clips in shown.items() if name != "samples")
    assert all(clips.abs().max() <= 1 and torch.equal(clips, again[name]) for name, clips in shown.items())
    assert shown["samples"].shape == (2, 3, frames, SIDE, SIDE)


def test_previews_begin_at_pictures_and_show_the_classes_of_motion(ae: Path) -> None:
    argv = ["--img-prob", "0.3", "--dynamics-bins", "5", "--preview.samples", "5", "--num-classes", "2"]
    pipeline = HVDMPipeline.from_exports(ae=ae, pairs=True)
    pipeline.stills = True
    samples = moving(3)
    held = pipeline.encode_latents(to_float(samples["video"])) | {name: samples[name] for name in ("label", "index")}
    for made, given in ((task(ae, *argv), samples), (task(None, *argv, clips=latent_clips(ae)), held)):
        spy = Spy()
        made.preview({**({"ae": built(made)["ae"]} if "video" in given else {}), "model": spy}, given, rng(given))
        calls = {call["task"][0].item() if "task" in call else NO_TASK: call for call in spy.calls if "dynamics" not in call}
        assert calls.keys() == {NO_TASK, FROM_CLIP, FROM_IMAGE}
        expected = held["still"][[0, 1, 2, 0, 1]]
        torch.testing.assert_close(calls[FROM_IMAGE]["previous"], expected)
        assert torch.equal(calls[FROM_IMAGE]["y"], samples["label"][[0, 1, 2, 0, 1]]), "pictures of their classes"
        assert [call["dynamics"].tolist() for call in spy.calls if "dynamics" in call] == [[0, 1, 2, 3, 4]] * 2
        assert "previous" not in next(call for call in spy.calls if "dynamics" in call)


def test_other_sizes_are_the_autoencoders(tmp_path: Path) -> None:
    """Not square, of another number of frames and channels; the release knows one size."""
    sizes = dataclasses.replace(AE, image_size=(16, 24), n_frames=6, embed_dim=3)
    where = export_autoencoder(tmp_path / "ae", sizes)
    made = task(where, "--cond-prob", "1", clips=dataclasses.replace(CLIPS, n_frames=6, image_size=(16, 24)))
    networks = built(made)
    assert space_of(made).shape == (3, 6, 4, 6) == networks["model"].config.latent_shape
    samples = {"video": torch.zeros(2, 3, 12, 16, 24, dtype=torch.uint8), "label": torch.zeros(2, dtype=torch.int64)}
    samples |= {"index": torch.arange(2), "has_previous": torch.ones(2, dtype=torch.bool)}
    assert made.loss("model", networks, samples, rng(samples)).total.isfinite()


def test_a_batch_spec_runs_on_the_meta_device(ae: Path) -> None:
    argv = ["--img-prob", "0.5", "--dynamics-bins", "4"]
    for made in (
        task(ae),
        task(ae, *argv),
        task(ae, "--cond-prob", "0", clips=SINGLE),
        task(None, *argv, clips=latent_clips(ae)),
        task(ae, *argv, "--frame-strides", "1", "2", clips=dataclasses.replace(CLIPS, strides=(1, 2))),
    ):
        networks = {name: network.module.to("meta") for name, network in made.networks().items()}
        spec = made.batch_spec(3)
        out = made.loss("model", networks, spec, SampleRng(0, spec["index"], "meta"))
        assert out.total.is_meta and out.count == 3


def test_frames_at_drawn_distances_are_told(ae: Path) -> None:
    """But for a share, so that samples of no distance in particular can be asked for."""
    clips = dataclasses.replace(CLIPS, strides=(1, 2, 4))
    made, samples = task(ae, "--frame-strides", "1", "2", "4", clips=clips), batch(200)
    samples["stride"] = torch.arange(200) % 3
    networks = {"ae": built(made)["ae"], "model": Spy()}
    made.loss("model", networks, samples, rng(samples))
    found = networks["model"].calls[0]["stride"]
    dropped = found == 3
    assert torch.equal(found[~dropped], samples["stride"][~dropped]) and dropped.float().mean().item() == pytest.approx(0.15, abs=0.08)
    assert made.denoiser.config.strides == 3 and made.card()["data"]["frame_strides"] == [1, 2, 4]


# ---- what it is tied to


def test_edges_are_kept_with_the_run_and_its_export(ae: Path) -> None:
    began, made = task(ae, "--dynamics-bins", "3"), task(ae, "--dynamics-bins", "3")
    dynamics = space_of(began).told.dynamics
    assert dynamics is not None
    dynamics.edges = (0.125, 0.3)
    made.load_state(began.state())
    assert made.card()["dynamics"] == {"edges": [0.125, 0.3]} and made.card() == began.card()
    assert all(isinstance(value, int | float) for value in began.state().values())
    plain = task(ae).card()
    assert "dynamics" not in plain and "img_prob" not in plain and task(ae, "--img-prob", "0.2").card()["img_prob"] == 0.2


def test_a_run_does_not_go_on_with_another_autoencoder(ae: Path, tmp_path: Path) -> None:
    other = export_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"began with other weights .*--resume none$"):
        task(other).load_state(task(ae).state())


def test_what_does_not_fit_is_refused_in_one_line(ae: Path) -> None:
    def refused(message: str, *argv: str, ae: Path | None = ae, clips: Any = CLIPS) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            task(ae, *argv, clips=clips)
        assert "\n" not in str(error.value)

    refused(r"which autoencoder\? give --ae RUN \(an HVDM autoencoder", ae=None)
    refused(r"takes clips of 4x16x16 .*these are 4x16x32", clips=dataclasses.replace(CLIPS, image_size=(16, 32)))
    refused(r"--cond-prob 0.3: toy holds single clips.*--pairs.*--cond-prob 0$", clips=latent_clips(ae, pairs=False))
    refused(r"--img-prob 0.2: toy holds no latents 'still'; run .* --stills", "--img-prob", "0.2", clips=latent_clips(ae, stills=False))
    held = latent_clips(ae)
    assert held.latents is not None
    tensors = {name: shape for name, shape in held.latents.tensors.items() if "dynamics" not in name}
    refused("--dynamics-bins: toy holds no latents 'dynamics'", "--dynamics-bins", "4", clips=latent_clips(ae, tensors=tensors))
    pvdm = {"system": "pvdm", "sha256": "f" * 64}
    refused("latents of the system 'pvdm'; this stage takes those of HVDM's", clips=latent_clips(ae, autoencoder=pvdm))
    refused("not latents of 4x4x4x4", clips=latent_clips(ae, tensors={"latent": (4, 48)}))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--img-prob", "1.5"], "--img-prob 1.5: a share"),
        (["--cond-prob", "0.7", "--img-prob", "0.4"], "together at most 1"),
        (["--cond-prob", "0", "--img-prob", "0.4", "--no-model.conditional"], "no clip starts from a picture"),
        (["--no-model.conditional"], "with model.conditional off"),
        (["--cond-prob", "0", "--model.tasks", "--no-model.conditional"], "no condition to tell the kind of"),
        (["--cond-prob", "0", "--model.tasks"], "no condition to tell the kind of; drop it"),
        (["--dynamics-bins", "1"], "2 or more, or 0"),
        (["--dynamics-bins", "-1"], "2 or more, or 0"),
        (["--dynamics-bins", "10", "--dynamics-clips", "5"], "at least one for each of the 10"),
        (["--dynamics-dropout", "1"], "a share"),
        (["--frame-strides", "1", "0"], "1 or more"),
        (["--frame-strides", "2", "2"], "different"),
        (["--frame-strides", "1", "2", "--frame-interval", "2"], "give one of them"),
        (["--diffusion.variance", "learned_range"], "the UNet HVDM-S has no channels for it; use fixed_small, or a VolumeDiT"),
        (["--model", "HVDM-XL"], "HVDM-L"),
        (["--model.hidden_size", "32"], "has no setting 'hidden_size'"),
        (["--use-text-embed"], "HVDM's denoisers take class labels, no vectors"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config(*argv)
    assert "\n" not in str(error.value)


# ---- where it starts


def test_it_starts_from_one_without_tables(ae: Path, tmp_path: Path) -> None:
    """What the tables add is zero, so it is the same network."""
    plain = task(ae)
    first = built(plain)["model"]
    write_export(tmp_path / "export", {"model": first.state_dict()}, plain.card() | {"model": to_dict(first.config)})
    made = task(ae, "--img-prob", "0.2", "--dynamics-bins", "4", "--init-from", str(tmp_path))
    second = made.networks()["model"].module
    x, t = torch.randn(2, *LATENT), torch.tensor([3, 500])
    told = {"task": torch.tensor([1, 2]), "dynamics": torch.tensor([0, 3])}
    torch.testing.assert_close(second(x, t, previous=-x, **told), first(x, t, previous=-x), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"its model_channels is 32, that of the run 64") as error:
        task(ae, "--model.model_channels", "64", "--init-from", str(tmp_path)).networks()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"it is a VolumeUNet, the run trains a VolumeDiT$"):
        task(ae, "--init-from", str(tmp_path), model=DIT).networks()


def test_it_starts_from_a_released_one(ae: Path, tmp_path: Path) -> None:
    """Which knows neither pictures nor motion."""
    released = official(tmp_path)["denoiser"]
    expected = HVDMPipeline.from_exports(denoiser=released, ae=ae).denoiser
    found = task(ae, "--img-prob", "0.2", "--dynamics-bins", "4", "--init-from", str(released)).networks()["model"].module.state_dict()
    assert expected is not None
    for name, value in expected.module.state_dict().items():
        assert torch.equal(found.pop(name), value), name
    assert found.keys() == {"task_emb.weight", "dynamics_emb.weight"} and not any(value.any() for value in found.values())
