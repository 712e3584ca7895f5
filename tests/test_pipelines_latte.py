"""Latte's pipeline: the same sample in any company, to the bit; which networks belong together; checkpoints of both releases."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion import DiffusionConfig
from models.autoencoders.frame_vae import FrameVAE
from models.official import latte as official
from models.transformers.latte import Latte, LatteConfig
from pipelines.encoders import ENCODERS, EncoderOptions, FrameEncoder, system_of
from pipelines.image_vae import ImageVae, open_codec
from pipelines.latte import LattePipeline
from pipelines.loading import diffusion_of, load_frame_vae, load_latte
from pipelines.runs import find_family, systems_in
from pipelines.sampling import Sampling
from tests.latte_exports import LATTE, VAE, FakeKL, export_denoiser, export_vae, family, identity, randomised, sd_folder
from utils.errors import ConfigError, UserError
from utils.media import to_channels
from utils.rng import SampleRng

SAMPLING = Sampling(steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pipeline(runs: dict[str, Path]) -> LattePipeline:
    return LattePipeline.from_exports(runs["denoiser"], runs["ae"])


def video(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def clips(pipeline: LattePipeline, indices: list[int], **changes: object) -> torch.Tensor:
    return pipeline.generate(indices, [i % 3 for i in indices], **({"seed": 5, "sampling": SAMPLING} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_sample_is_the_same_bits_in_any_batch(pipeline: LattePipeline, sampler: str, size: int) -> None:
    sampling = dataclasses.replace(SAMPLING, sampler=sampler, eta=0.5 if sampler == "ddim" else 0.0)
    whole = clips(pipeline, list(range(6)), sampling=sampling)
    parts = [clips(pipeline, list(range(6))[i : i + size], sampling=sampling) for i in range(0, 6, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(clips(pipeline, [4, 1], sampling=sampling), whole[[4, 1]])


def test_together_is_the_same_to_rounding(pipeline: LattePipeline) -> None:
    assert torch.allclose(clips(pipeline, [0, 1, 2], exact=False), clips(pipeline, [0, 1, 2]), atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_flows_are_sampled_too(tmp_path: Path, sampler: str) -> None:
    made = family(tmp_path, DiffusionConfig(process="flow"))
    flow = LattePipeline.from_exports(made["denoiser"])
    sampling = dataclasses.replace(SAMPLING, sampler=sampler)
    whole = clips(flow, [0, 1], sampling=sampling)
    assert torch.equal(clips(flow, [1], sampling=sampling), whole[1:]) and whole.isfinite().all()
    with pytest.raises(ConfigError, match="euler, heun"):
        clips(flow, [0], sampling=dataclasses.replace(SAMPLING, sampler="ddpm"))


def test_seed_number_class_and_guidance_make_the_sample(pipeline: LattePipeline) -> None:
    base = clips(pipeline, [0])
    assert base.shape == (1, 3, 4, 8, 12) and base.abs().max() <= 1
    assert not torch.equal(base, clips(pipeline, [3]))
    assert not torch.equal(base, clips(pipeline, [0], seed=6))
    assert not torch.equal(base, pipeline.generate([0], [1], seed=5, sampling=SAMPLING))
    assert not torch.equal(base, clips(pipeline, [0], sampling=dataclasses.replace(SAMPLING, guidance=1.0)))
    with pytest.raises(UserError, match="no class 3"):
        pipeline.generate([0], [3])


def test_a_class_model_without_label_or_guidance_generates(pipeline: LattePipeline) -> None:
    """The official release crashes there (no label is handed on)."""
    assert pipeline.generate([0], sampling=Sampling(steps=2)).isfinite().all()


def test_latents_are_scaled_as_the_denoiser_was_trained(pipeline: LattePipeline) -> None:
    clip = video(1, 3, 2, 8, 12)
    mean, std = pipeline.encode_moments(clip).chunk(2, dim=1)
    assert torch.equal(pipeline.encode(clip), (mean - 0.1) * 0.5)
    rng = SampleRng(3, torch.tensor([7]))
    drawn = pipeline.encode(clip, rng)
    assert torch.allclose(drawn, (mean + std * rng.normal("vae", (4, 2, 4, 6)) - 0.1) * 0.5)
    assert torch.allclose(pipeline.decode(pipeline.encode(clip)), pipeline.codec.decode_raw(mean).clamp(-1, 1), atol=1e-5)


def test_any_number_of_frames_and_any_size(runs: dict[str, Path], pipeline: LattePipeline) -> None:
    assert clips(pipeline, [0], n_frames=7).shape == (1, 3, 7, 8, 12)
    larger = LattePipeline.from_exports(runs["denoiser"], image_size=(12, 16))
    assert larger.clip_shape == (4, 12, 16) and clips(larger, [0]).shape == (1, 3, 4, 12, 16)
    with pytest.raises(UserError, match="multiple"):
        LattePipeline.from_exports(runs["denoiser"], image_size=(13, 16))
    with pytest.raises(UserError, match="multiple of patch_size"):
        LattePipeline.from_exports(runs["denoiser"], image_size=(14, 16))


def test_every_step_is_watched(pipeline: LattePipeline) -> None:
    seen: list[tuple[list[int], int]] = []
    last: dict[int, torch.Tensor] = {}

    def watch(rows: list[int], k: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        seen.append((rows, k))
        last[rows[0]] = x

    made = clips(pipeline, [4, 9], watch=watch)
    assert seen == [([0], 0), ([0], 1), ([0], 2), ([1], 0), ([1], 1), ([1], 2)]
    assert torch.equal(pipeline.decode(last[1]), made[1:])


def test_moments_are_those_of_the_frames(runs: dict[str, Path]) -> None:
    """Frame by frame whatever the chunk, mean before deviation; nothing is scaled."""
    codec, card = open_codec(str(runs["ae"]))
    assert (codec.kind, codec.channels, codec.factor, card["kind"], card["sha256"]) == ("latte", 4, 2, "latte", codec.sha256)
    clip = video(2, 3, 5, 8, 12)
    network = load_frame_vae(runs["ae"]).module
    assert isinstance(network, FrameVAE)
    mean, logvar = network.moments(clip[1, :, 3][None])
    moments = codec.moments(clip)
    assert moments.shape == (2, 8, 5, 4, 6)
    assert torch.allclose(moments[1, :, 3], torch.cat([mean, torch.exp(logvar / 2)], dim=1)[0], atol=1e-5)
    assert torch.allclose(open_codec(str(runs["ae"]), chunk=3)[0].moments(clip), moments, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 2"):
        codec.moments(video(1, 3, 1, 7, 12))
    with pytest.raises(ConfigError, match=r"vae.chunk 0"):
        open_codec(str(runs["ae"]), chunk=0)


def test_gray_autoencoders_see_luma_and_give_rgb(tmp_path: Path) -> None:
    run = export_vae(tmp_path / "ae", dataclasses.replace(VAE, channels=1))
    codec, _ = open_codec(str(run))
    clip = video(1, 3, 2, 8, 12)
    gray = to_channels(clip, 1).expand(-1, 3, -1, -1, -1)
    assert torch.allclose(codec.moments(clip), codec.moments(gray), atol=1e-5)
    made = codec.decode_raw(codec.moments(clip)[:, :4])
    assert made.shape == (1, 3, 2, 8, 12) and torch.equal(made[:, 0], made[:, 2])


def test_a_stable_diffusion_vae_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sd_folder(tmp_path / "vae", monkeypatch)
    codec, card = open_codec("", vae=str(folder))
    assert (codec.kind, card["kind"], card["path"]) == ("sd", "sd", str(folder))
    assert torch.allclose(codec.moments(video(1, 3, 2, 8, 12))[:, 4:], torch.tensor(0.1))
    pipeline = LattePipeline(codec, card)
    assert (pipeline.scale, pipeline.shift) == (0.18215, 0.0)
    denoiser = export_denoiser(tmp_path / "runs" / "000-latte-denoiser", card, latent={"scale": 0.18215, "shift": 0.0})
    assert find_family(tmp_path / "runs", "latte") == {"denoiser": denoiser}
    again = LattePipeline.from_exports(denoiser)
    assert again.codec.kind == "sd" and clips(again, [0]).shape == (1, 3, 4, 8, 12)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="another autoencoder"):
        LattePipeline.from_exports(denoiser)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="AutoencoderKL"):
        open_codec("", vae=str(folder))


def test_one_autoencoder_is_wanted(runs: dict[str, Path]) -> None:
    for ae, vae in (("", ""), (str(runs["ae"]), "vae")):
        with pytest.raises(ConfigError, match="which autoencoder"):
            open_codec(ae, vae=vae)


def test_the_encoder_of_latent_sets(runs: dict[str, Path]) -> None:
    encoder = ENCODERS["latte"](EncoderOptions(str(runs["ae"])))
    assert isinstance(encoder, FrameEncoder) and not isinstance(ENCODERS["cmd"], FrameEncoder)
    assert encoder.identity() == {"system": "latte"} | identity(runs["ae"])
    assert encoder.encode_moments(video(1, 3, 3, 8, 12)).shape == (1, 8, 3, 4, 6)


def test_networks_that_do_not_belong_together_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    other = export_vae(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match=r"was trained on another autoencoder .* than .*other"):
        LattePipeline.from_exports(runs["denoiser"], other)
    wide = export_vae(tmp_path / "wide", dataclasses.replace(VAE, z_channels=3))
    denoiser = export_denoiser(tmp_path / "denoiser", identity(wide))
    with pytest.raises(UserError, match=r"latents of 4 channels, the autoencoder .* has 3"):
        LattePipeline.from_exports(denoiser, wide)
    with pytest.raises(UserError, match="is an export of 'latte autoencoder', a 'latte denoiser' is wanted"):
        LattePipeline.from_exports(runs["ae"], runs["ae"])
    with pytest.raises(UserError, match="without dropping its condition"):
        never = export_denoiser(tmp_path / "never", identity(runs["ae"]), dataclasses.replace(LATTE, class_dropout_prob=0.0))
        clips(LattePipeline.from_exports(never), [0])
    gone = export_denoiser(tmp_path / "gone", identity(runs["ae"]) | {"path": str(tmp_path / "moved")})
    with pytest.raises(UserError, match="moved, which is not there: give --ae or --vae"):
        LattePipeline.from_exports(gone)


def test_the_newest_denoiser_and_its_own_autoencoder_are_found(tmp_path: Path) -> None:
    made = family(tmp_path)
    export_vae(tmp_path / "002-latte-autoencoder", seed=5)
    assert find_family(tmp_path, "latte") == {"autoencoder": made["ae"], "denoiser": made["denoiser"]}
    assert systems_in(tmp_path) == ["latte"]
    with pytest.raises(UserError, match="no finished run in it"):
        find_family(tmp_path, "cmd")
    alone = tmp_path / "alone"
    export_vae(alone / "000-latte-autoencoder")
    assert systems_in(alone) == ["latte"]
    with pytest.raises(UserError, match=r"no finished denoiser run in it .* give --ae, --denoiser"):
        find_family(alone, "latte")


# Checkpoints of the releases.


def tutorial_files(folder: Path) -> tuple[Path, Path, FrameVAE, Latte]:
    """What the tutorial's training leaves, and the networks that are in it."""
    vae = randomised(FrameVAE(VAE))
    latte = randomised(
        Latte(dataclasses.replace(LATTE, num_classes=0, learn_sigma=False, time_embed_order="sin_cos", pos_embed_order="hw")), 1
    )
    assert isinstance(vae, FrameVAE) and isinstance(latte, Latte)
    paths = folder / "vae_autoencoder_ckpt.pth", folder / "dit_ckpt.pth"
    torch.save(vae.state_dict(), paths[0])
    torch.save(official.export_tutorial(latte.state_dict(), latte.config), paths[1])
    (folder / "vae_autoencoder_ckpt.yaml").write_text("autoencoder_params: {norm_channels: 4, num_heads: 16, codebook_size: 20}\n")
    return *paths, vae, latte


def test_the_tutorials_checkpoints_generate_what_its_networks_would(tmp_path: Path) -> None:
    vae_path, latte_path, vae, latte = tutorial_files(tmp_path)
    pipeline = LattePipeline.from_exports(latte_path, vae_path, image_size=(8, 12), num_heads=2)
    assert (pipeline.scale, pipeline.shift, pipeline.num_classes) == (1.0, 0.0, 0)
    assert pipeline.denoiser is not None and diffusion_of(pipeline.denoiser) == DiffusionConfig(variance="fixed_small")
    loaded = load_latte(latte_path, input_size=(4, 6), num_heads=2)
    assert "input_size" not in loaded.card["model"], "so no size is other than trained"
    assert loaded.config == latte.config or dataclasses.replace(loaded.config, n_frames=4) == latte.config
    x, t = torch.randn(1, 4, 4, 4, 6), torch.tensor([7])
    assert torch.allclose(loaded.module(x, t), latte(x, t), atol=1e-5)
    assert torch.allclose(pipeline.codec.decode_raw(x)[:, :, 1], vae.decode(x[:, :, 1]), atol=1e-5)
    assert pipeline.generate([0], sampling=Sampling(steps=2, sampler="ddpm"), n_frames=4).shape == (1, 3, 4, 8, 12)


def official_file(folder: Path, **changes: object) -> tuple[Path, LatteConfig]:
    config = LatteConfig(input_size=(4, 4), hidden_size=32, depth=2, num_heads=2, num_classes=3, **changes)  # type: ignore[arg-type]
    states = [official.export_official(randomised(Latte(config), seed).state_dict(), config) for seed in (1, 2)]
    torch.save({"model": states[0], "ema": {f"_orig_mod.{name}": value for name, value in states[1].items()}}, folder / "0150000.pt")
    return folder / "0150000.pt", config


def test_a_damaged_stable_diffusion_vae_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sd_folder(tmp_path / "vae", monkeypatch)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Error while deserializing header: invalid\nand a second line")

    monkeypatch.setattr(FakeKL, "from_pretrained", broken)
    with pytest.raises(UserError, match=r"vae cannot be read as a diffusers AutoencoderKL \(Error .* invalid\): copy the folder"):
        open_codec("", vae=str(folder))


def test_a_file_of_averages_has_no_other_weights(tmp_path: Path) -> None:
    path, config = official_file(tmp_path)
    torch.save({"ema": torch.load(path, weights_only=True)["ema"]}, path)
    assert load_latte(path, num_heads=2).config == config
    with pytest.raises(UserError, match="use --weights ema"):
        load_latte(path, "model", num_heads=2)


def test_official_checkpoints_are_read_on_the_image_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = official_file(tmp_path)
    folder = sd_folder(tmp_path / "vae", monkeypatch)
    pipeline = LattePipeline.from_exports(path, vae=folder, num_heads=2)
    assert pipeline.denoiser is not None and pipeline.denoiser.config == config
    assert (pipeline.scale, pipeline.clip_shape, pipeline.num_classes) == (0.18215, (16, 8, 8), 3)
    assert diffusion_of(pipeline.denoiser).variance == "learned_range"
    assert pipeline.generate([0], [1], sampling=Sampling(steps=1, guidance=7.0)).shape == (1, 3, 16, 8, 8)
    x, t = torch.randn(1, 4, 2, 4, 4), torch.tensor([3])
    for weights, seed in (("model", 1), ("ema", 2)):
        ours = load_latte(path, weights, num_heads=2).module  # type: ignore[arg-type]
        assert torch.allclose(ours(x, t), randomised(Latte(config), seed).eval()(x, t), atol=1e-5)


def test_an_official_model_without_variance_has_the_releases_fixed_one(tmp_path: Path) -> None:
    path, _ = official_file(tmp_path, learn_sigma=False)
    assert diffusion_of(load_latte(path, num_heads=2)).variance == "fixed_large"


def test_wrong_checkpoints_are_one_line(tmp_path: Path) -> None:
    vae_path, latte_path, *_ = tutorial_files(tmp_path)
    cases = [
        (lambda: load_latte(vae_path), "is no checkpoint of Latte"),
        (lambda: load_latte(latte_path), "give num_heads"),
        (lambda: load_frame_vae(latte_path), "is no checkpoint of the frame VAE"),
        (lambda: load_frame_vae(tmp_path / "none.pth"), "does not exist"),
        (lambda: load_latte(tmp_path / "nowhere"), "does not exist"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_autoencoder_tells_its_system(tmp_path: Path) -> None:
    vae_path, *_ = tutorial_files(tmp_path)
    torch.save({"autoenc": {"to_logit.1.weight": torch.zeros(1)}}, tmp_path / "cmd.pt")
    assert (system_of(str(vae_path)), system_of(str(tmp_path / "cmd.pt")), system_of("")) == ("latte", "cmd", "latte")
    assert system_of(str(vae_path), "cmd") == "cmd" and system_of(str(export_vae(tmp_path / "run")), "latte") == "latte"
    with pytest.raises(UserError, match="does not exist"):
        system_of(str(tmp_path / "none.pth"))


def test_norm_groups_of_a_tutorial_checkpoint_come_from_beside_it(tmp_path: Path) -> None:
    path, *_ = tutorial_files(tmp_path)
    assert load_frame_vae(path).config == dataclasses.replace(VAE, num_heads=16)
    (tmp_path / "vae_autoencoder_ckpt.yaml").write_text("norm_channels: 2\n")
    assert load_frame_vae(path).config.norm_channels == 2
    (tmp_path / "vae_autoencoder_ckpt.yaml").unlink()
    with pytest.raises(UserError, match=r"norm_channels 32 .*vae_autoencoder_ckpt.yaml"):
        load_frame_vae(path)


def test_a_vae_is_frozen() -> None:
    vae = ImageVae(nn.Sequential(nn.Linear(1, 1)), channels=4, factor=2, scale_factor=1.0)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert FakeKL().encode(video(1, 3, 4, 4)).latent_dist.mean.shape == (1, 4, 2, 2)
