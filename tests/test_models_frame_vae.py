"""The frame VAE and its discriminator: shapes, sizes of the release, luma, the clamp, wrong settings, checkpoints both ways."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from losses.adversarial import discriminator_loss, generator_loss
from losses.reconstruction import kl_to_standard
from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig, sample
from models.discriminators import FrameDiscriminator, FrameDiscriminatorConfig
from models.official import frame_vae
from utils.media import to_channels, to_float, to_rgb

SMALL = FrameVAEConfig(
    down_channels=(8, 8, 16), mid_channels=(16,), down_sample=(True, True), attn_down=(False, False), norm_channels=4, num_heads=2
)
ATTENDED = dataclasses.replace(
    SMALL, mid_channels=(16, 24, 16), down_sample=(True, False), attn_down=(False, True), num_down_layers=1, num_mid_layers=1
)
MNIST = FrameVAEConfig(
    channels=1,
    down_channels=(32, 64, 128),
    mid_channels=(128,),
    down_sample=(True, True),
    attn_down=(False, False),
    num_heads=16,
    num_down_layers=1,
    num_mid_layers=1,
    num_up_layers=1,
)


def built(config: FrameVAEConfig, seed: int = 0) -> FrameVAE:
    torch.manual_seed(seed)
    return FrameVAE(config)


def frames(config: FrameVAEConfig, size: tuple[int, int] = (16, 24)) -> tuple[Tensor, Tensor]:
    """Frames and noise."""
    generator = torch.Generator().manual_seed(1)
    latent = (2, config.z_channels, *config.latent_size(*size))
    return torch.rand(2, config.channels, *size, generator=generator) * 2 - 1, torch.randn(latent, generator=generator)


@pytest.mark.parametrize("config", [SMALL, ATTENDED, dataclasses.replace(SMALL, channels=1, z_channels=2)])
def test_frames_of_any_shape_come_back(config: FrameVAEConfig) -> None:
    model, (x, noise) = built(config), frames(config)
    recon, mean, logvar = model(x, noise)
    assert recon.shape == x.shape and mean.shape == logvar.shape == noise.shape
    assert torch.equal(recon, model.decode(sample(mean, logvar, noise)))
    assert torch.allclose(sample(mean, logvar, noise), mean + logvar.exp().sqrt() * noise, atol=1e-6)
    blocks = {id(parameter) for unit in model.units() for parameter in unit.parameters()}
    assert 0.9 < sum(p.numel() for p in model.parameters() if id(p) in blocks) / sum(p.numel() for p in model.parameters()) < 1


def test_sizes_are_the_release_s() -> None:
    """Spec, section 2.6: 1.11M (encoder 0.63M) and 41.6M (24.2M); the discriminator has 0.66M."""

    def count(module: torch.nn.Module, *parts: str) -> float:
        return sum(p.numel() for name, p in module.named_parameters() if name.startswith(parts or ("",))) / 1e6

    with torch.device("meta"):
        digits, ucf, disc = FrameVAE(MNIST), FrameVAE(FrameVAEConfig()), FrameDiscriminator(FrameDiscriminatorConfig())
    assert (MNIST.factor, FrameVAEConfig().factor) == (4, 8)
    assert MNIST.latent_size(72, 128) == (18, 32) and FrameVAEConfig().latent_size(256, 256) == (32, 32)
    for model, whole, encoder in ((digits, 1.11, 0.63), (ucf, 41.6, 24.2)):
        assert count(model) == pytest.approx(whole, abs=0.06 if whole > 10 else 0.006)
        assert count(model, "encoder", "pre_quant") == pytest.approx(encoder, abs=0.06 if whole > 10 else 0.006)
    assert count(disc) == pytest.approx(0.66, abs=0.006)
    assert not digits.encoder_mids and not any(isinstance(m, torch.nn.Linear) for m in digits.modules()), "one mid width: no attention"


def test_log_variances_are_clamped_unless_told_not_to() -> None:
    x, _ = frames(SMALL)
    free = built(dataclasses.replace(SMALL, clamp_logvar=False))
    held = built(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(free.moments(x), held.moments(x), strict=True)), "sane weights never get there"
    for model in (free, held):
        torch.nn.init.constant_(model.pre_quant_conv.bias, 100.0)
    assert free.moments(x)[1].min() > 50 and held.moments(x)[1].max() == 20
    for model in (free, held):
        torch.nn.init.constant_(model.pre_quant_conv.bias, -100.0)
    assert free.moments(x)[1].max() < -50 and held.moments(x)[1].min() == -30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_sample": (True,)}, "one entry more"),
        ({"attn_down": (False,) * 3}, "one entry more"),
        ({"mid_channels": (8,)}, "begin and end with"),
        ({"mid_channels": ()}, "begin and end with"),
        ({"norm_channels": 3}, "does not divide the width 8"),
        ({"attn_down": (False, True), "num_heads": 16}, "does not divide the width 8"),
        ({"mid_channels": (16, 12, 16), "num_heads": 8}, "does not divide the width 12"),
        ({"z_channels": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_heads_do_nothing_without_attention() -> None:
    dataclasses.replace(SMALL, num_heads=7)


def test_frames_that_cells_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="18 x 16 do not divide into latent cells of 4 x 4"):
        built(SMALL).moments(torch.zeros(1, 3, 18, 16))


def test_discriminator_patches_and_norms() -> None:
    config = FrameDiscriminatorConfig(conv_channels=(8, 12, 16))
    x = torch.randn(4, 3, 32, 40)
    assert FrameDiscriminator(config)(x).shape == (4, 1, *config.logits_size(32, 40)) == (4, 1, 3, 4)
    with pytest.raises(ValueError, match="too small"):
        config.logits_size(8, 8)
    with pytest.raises(ValueError, match="one entry more"):
        FrameDiscriminatorConfig(conv_channels=(8, 16))
    grouped = FrameDiscriminator(dataclasses.replace(config, norm="group"))
    assert torch.allclose(grouped(x)[:2], grouped(x[:2]), atol=1e-5), "of each frame alone"
    batched = FrameDiscriminator(config)
    assert not torch.allclose(batched(x)[:2], batched(x[:2]), atol=1e-3)


def test_least_squares_and_divergence_are_their_formulas() -> None:
    real, fake = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    assert torch.allclose(generator_loss(fake, "lsgan"), (fake - 1).pow(2).mean((1, 2, 3)))
    expected = ((real - 1).pow(2).mean((1, 2, 3)) + fake.pow(2).mean((1, 2, 3))) / 2
    assert torch.allclose(discriminator_loss(real, fake, "lsgan"), expected)
    mean, logvar = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(kl_to_standard(mean, logvar), kl, rtol=1e-5)


def test_luma_is_pillow_s() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    gray = to_channels(to_float(torch.from_numpy(picture).permute(2, 0, 1)[None]), 1)
    assert gray.shape == (1, 1, 16, 16)
    pillow = torch.from_numpy(np.asarray(Image.fromarray(picture).convert("L")).copy())
    assert ((gray[0, 0] + 1) * 127.5 - pillow).abs().max() <= 1, "Pillow truncates to whole levels"
    video = torch.rand(2, 3, 4, 8, 8)
    assert to_channels(video, 3) is video and to_rgb(video) is video
    assert to_rgb(to_channels(video, 1)).shape == video.shape
    with pytest.raises(ValueError, match="not 2"):
        to_channels(video, 2)


@pytest.mark.parametrize(
    ("config", "known"), [(SMALL, {"norm_channels": 4}), (ATTENDED, {"norm_channels": 4, "num_heads": 2}), (MNIST, {})]
)
def test_checkpoints_there_and_back(config: FrameVAEConfig, known: dict[str, int]) -> None:
    """The config is read from the shapes, but for what shapes do not tell and nothing depends on."""
    state = built(config).state_dict()
    found, read = frame_vae.load({f"module.{name}": value for name, value in state.items()}, **known)
    unread = {"num_heads": config.num_heads, "num_mid_layers": config.num_mid_layers}
    assert dataclasses.replace(read, **unread) == config
    assert all(torch.equal(found[name], value) for name, value in state.items()) and found.keys() == state.keys()
    FrameVAE(read).load_state_dict(frame_vae.export(found, read))


def test_blocks_of_the_middle_may_have_no_attention() -> None:
    config = dataclasses.replace(SMALL, mid_channels=(16, 12, 16), num_mid_layers=0, num_heads=7)
    state = built(config).state_dict()
    assert not [name for name in state if "attention" in name] and "decoder_mids.1.residual_input_conv.0.weight" in state
    assert dataclasses.replace(frame_vae.load(state, norm_channels=4)[1], num_heads=7) == config


def test_discriminator_checkpoints_there_and_back() -> None:
    config = FrameDiscriminatorConfig(channels=1, conv_channels=(8, 16), kernels=(4, 4, 4), strides=(2, 2, 1), paddings=(1, 1, 1))
    for kind in ("batch", "group"):
        expected = dataclasses.replace(config, norm=kind)
        state = FrameDiscriminator(expected).state_dict()
        found, read = frame_vae.load_discriminator(state)
        assert read == expected and found.keys() == state.keys()
        FrameDiscriminator(read).load_state_dict(frame_vae.export_discriminator(found, read))


def test_foreign_checkpoints_are_named() -> None:
    state = built(SMALL).state_dict()
    with pytest.raises(ValueError, match="say num_heads"):
        frame_vae.load(built(ATTENDED).state_dict(), norm_channels=4)
    with pytest.raises(ValueError, match=r"missing decoder_conv_out\.bias"):
        frame_vae.load({name: value for name, value in state.items() if name != "decoder_conv_out.bias"}, norm_channels=4)
    with pytest.raises(ValueError, match="unknown extra"):
        frame_vae.load(state | {"extra": torch.zeros(1)}, norm_channels=4)
    with pytest.raises(ValueError, match=r"pre_quant_conv\.bias has shape"):
        frame_vae.load(state | {"pre_quant_conv.bias": torch.zeros(3)}, norm_channels=4)
    with pytest.raises(ValueError, match="norm_channels 32 does not divide"):
        frame_vae.load(state)
    with pytest.raises(ValueError, match="nothing is called"):
        frame_vae.load({"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder_conv_in\.weight has shape"):
        frame_vae.load(state | {"encoder_conv_in.weight": torch.zeros(3)})
