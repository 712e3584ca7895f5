"""The HVDM autoencoder: which subband frame a frame reads, sizes, its options, units, and reduced precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.layers.frequency import FrequencyStem, VolumeNorm, stem_strides
from models.layers.planes import spread_planes
from models.layers.rotary import grid_tables, rotate, time_tables
from models.layers.timesformer import CrossAttention
from models.layers.wavelet import haar3d

CPU = torch.device("cpu")


def tiny(**changes) -> HVDMAutoencoder:
    torch.manual_seed(0)
    defaults = {"dim": 32, "image_size": (16, 24), "n_frames": 4, "embed_dim": 3, "depth": 1, "heads": 2, "head_dim": 8}
    defaults |= {"plane_depth": 2, "plane_heads": 2, "plane_mlp_dim": 24, "freq_widths": (4, 6, 8, 10), "fusion_depth": 1}
    return HVDMAutoencoder(HVDMAEConfig(**(defaults | changes))).eval()


def clip(model: HVDMAutoencoder, batch: int = 2) -> torch.Tensor:
    c = model.config
    return torch.rand(batch, c.channels, c.n_frames, *c.image_size) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_frames": 2},
        {"n_frames": 6, "image_size": (24, 16), "channels": 1},
        {"patch_size": 4, "embed_dim": 5},
        {"patch_size": 2, "image_size": (4, 6)},
        {"patch_size": 16, "image_size": (32, 16)},
        {"image_size": (8, 8), "n_frames": 20},
        {"freq_widths": (4, 6)},
        {"depth": 0, "fusion_depth": 0},
    ],
)
def test_shapes_and_ranges(changes):
    """Any size that the patch divides, any even number of frames, also more than pixels: the release has one size."""
    model = tiny(**changes)
    x, c = clip(model), model.config
    z = model.encode(x)
    assert c.latent_shape == (c.embed_dim, c.n_frames, c.image_size[0] // c.patch_size, c.image_size[1] // c.patch_size)
    assert z.shape == (2, *c.latent_shape) and z.abs().max() < 1 and z.is_contiguous() and z.dtype == torch.float32
    recon = model(x)
    assert recon.shape == x.shape and recon.abs().max() < 1 and recon.is_contiguous() and c.clip_frames == c.n_frames
    assert torch.equal(model.decode(z), recon)


@torch.no_grad()
def test_clips_of_a_batch_are_strangers():
    model = tiny()
    x = clip(model, 3)
    torch.testing.assert_close(model.encode(x)[1:2], model.encode(x[1:2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("patch", "strides"), [(2, (1, 1, 1, 1)), (4, (2, 1, 1, 1)), (8, (2, 1, 2, 1)), (16, (2, 2, 2, 1)), (32, (2, 2, 2, 2))]
)
def test_the_strides_follow_the_patch(patch, strides):
    assert stem_strides(patch, 4) == strides


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_frames": 5}, "n_frames 5: .*even"),
        ({"n_frames": 0}, "n_frames 0: .*even"),
        ({"patch_size": 6, "image_size": (12, 12)}, "patch_size 6: .*power of two"),
        ({"patch_size": 1}, "patch_size 1: .*power of two"),
        ({"patch_size": 16, "image_size": (32, 32), "freq_widths": (4, 6)}, "halves the subbands 3 times, and freq_widths has 2"),
        ({"freq_widths": ()}, "freq_widths"),
        ({"freq_widths": (4, 0)}, "freq_widths"),
        ({"fusion_depth": -1}, "fusion_depth -1: at least 0"),
        ({"image_size": (12, 24)}, "not a multiple of patch_size 8"),
        ({"head_dim": 9}, "even"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("shape", [(1, 3, 2, 16, 24), (1, 3, 6, 16, 24), (1, 3, 4, 16, 16), (1, 1, 4, 16, 24)])
def test_clips_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes clips \(b, 3, 4, 16, 24\), not"):
        tiny().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 3), (1, 4, 4, 2, 3), (1, 3, 24), (3, 4, 2, 3)])
def test_latents_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"decodes latents \(b, 3, 4, 2, 3\), not"):
        tiny().decode(torch.zeros(shape))


@torch.no_grad()
@pytest.mark.parametrize(("wavelet_time", "frames"), [("repeat", [2, 3]), ("tile", [1, 4])])
def test_which_subband_frame_a_frame_reads(wavelet_time, frames):
    """Over space alone, the second of three subband frames reaches the frames that it is made of, or those that the release says."""
    torch.manual_seed(0)
    layer = CrossAttention(16, 2, False, 8, wavelet_time)
    x, low, high = torch.randn(6, 2, 4, 16), torch.randn(3, 2, 4, 16), torch.randn(3, 2, 4, 16)
    rope = grid_tables(2, 2, 8, CPU)
    changed = high.clone()
    changed[1] += 1
    moved = (layer(x, low, high, rope) - layer(x, low, changed, rope)).abs().amax(dim=(1, 2, 3))
    assert moved.nonzero().flatten().tolist() == frames


@torch.no_grad()
@pytest.mark.parametrize("wavelet_time", ["repeat", "tile"])
@pytest.mark.parametrize("over_time", [True, False])
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_shared_frames_are_those_frames_written_out(wavelet_time, over_time, slots):
    """Against attention in the open, every frame with its own keys and values."""
    torch.manual_seed(0)
    layer = CrossAttention(16, 2, over_time, 8, wavelet_time)
    x, low, high = torch.randn(6, 2, 4, 16), torch.randn(slots, 2, 4, 16), torch.randn(slots, 2, 4, 16)
    each = 6 // slots
    index = torch.arange(6) // each if wavelet_time == "repeat" else torch.arange(6) % slots
    rope = time_tables(6, 8, CPU) if over_time else grid_tables(2, 2, 8, CPU)
    q, k, v = layer.q(layer.norm(x)), layer.k(low[index]), layer.v(high[index])  # t b s (h e)
    order = (1, 2, 3, 0, 4) if over_time else (0, 1, 3, 2, 4)
    q, k, v = (part.unflatten(-1, (2, 8)).permute(order) for part in (q, k, v))
    q, k = rotate(q, rope), rotate(k, rope)
    out = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(dim=-1) @ v
    out = out.permute(3, 0, 1, 2, 4) if over_time else out.transpose(2, 3)
    torch.testing.assert_close(layer(x, low, high, rope), layer.proj(out.flatten(3)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_the_queries_are_normed():
    layer = CrossAttention(16, 2, False, 8, "repeat")
    x, low, high = (torch.randn(2, 1, 4, 16) for _ in range(3))
    rope = grid_tables(2, 2, 8, CPU)
    out = layer(x, low, high, rope)
    torch.testing.assert_close(layer(3 * x + 1, low, high, rope), out, atol=1e-4, rtol=1e-4)
    twice = layer(x, low, 2 * high, rope) - layer.proj.bias
    torch.testing.assert_close(twice, 2 * (out - layer.proj.bias), atol=1e-5, rtol=1e-5)
    assert (layer(x, 3 * low, high, rope) - out).abs().max() > 1e-3


@torch.no_grad()
def test_stems_are_convolutions_of_one_frame():
    """As 3-D convolutions with kernels 1 x 3 x 3, an instance norm over the volume and tanh behind each."""
    torch.manual_seed(0)
    stem = FrequencyStem(3, (4, 6, 8, 10), (2, 1, 2, 1), 7)
    for norm in stem.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 5, 8, 12)
    expected = x
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        expected = F.conv3d(expected, conv.weight[:, :, None], conv.bias, (1, *conv.stride), (0, 1, 1))
        expected = F.group_norm(expected, expected.shape[1], norm.weight, norm.bias).tanh()
    assert expected.shape == (2, 7, 5, 2, 3)
    torch.testing.assert_close(stem(x), expected.permute(2, 0, 3, 4, 1).flatten(2, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_half_precision_statistics_are_float32(layout):
    norm = VolumeNorm(4)
    x = (100 + torch.randn(6, 4, 16, 16)).bfloat16().to(memory_format=layout)
    out = norm(x, 2)
    exact = norm(x.float(), 2)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out.float(), exact, atol=5e-3, rtol=0)


@pytest.mark.parametrize("widths", [(64, 192, 384, 768), (4, 8, 16, 32)])
def test_gradients_of_the_stems_in_bfloat16(widths):
    """A CPU's bfloat16 gives wrong gradients to some 3-D convolutions: these 2-D ones are not among them."""
    torch.manual_seed(0)
    stem = FrequencyStem(21, widths, (2, 1, 2, 1), 48)
    x = torch.randn(1, 21, 2, 16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(stem(x).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(stem(x).float().square().sum(), x)
    assert (gradient - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("option", [{"frame_rotary": "release"}, {"readout": "first"}, {"wavelet_time": "tile"}])
def test_defaults_are_the_corrected_variants(option):
    """The released ones are options, and each makes another network."""
    model, other = tiny(), tiny(**option)
    c = HVDMAEConfig()
    assert (c.frame_rotary, c.readout, c.wavelet_time) == ("corrected", "token", "repeat")
    other.load_state_dict(model.state_dict())
    x = clip(model)
    assert (model.encode(x) - other.encode(x)).abs().max() > 1e-4


@torch.no_grad()
def test_encode_is_its_parts():
    model = tiny()
    x = clip(model)
    low, high = model.frequencies(x)
    assert low.shape == high.shape == (2, 2, 6, 32)
    torch.testing.assert_close(low, model.low_bands(haar3d(x)[:, 0]))
    fused = model.fuse(spread_planes(*model.project(model.tokens(x))), low, high)
    latent = model.to_latent(fused.tanh()).tanh()
    torch.testing.assert_close(model.encode(x), latent.permute(1, 3, 0, 2).unflatten(3, (2, 3)))


def test_every_weight_learns():
    """But the biases in front of an instance norm, which takes them away again."""
    model = tiny()
    model(clip(model)).square().sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or parameter.grad.abs().max() < 1e-7]
    assert [name for name in idle if ".convs." not in name or not name.endswith(".bias")] == []


def test_sizes_and_units():
    with torch.device("meta"):
        model = HVDMAutoencoder(HVDMAEConfig())
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert round(sum(counts.values()), 2) == 63.51 and not list(model.buffers())
    rounded = {name: round(counts[name], 2) for name in ("low_bands", "high_bands", "fusion", "decoder", "to_pixels")}
    assert rounded == {"low_bands": 7.42, "high_bands": 7.43, "fusion": 6.7, "decoder": 16.74, "to_pixels": 0.07}
    assert len(model.units()) == 5 + 3 + 2 + 2 + 5 and model.config.latent_shape == (4, 16, 32, 32)
    video = torch.empty(1, 3, 16, 256, 256, device="meta")
    assert model.encode(video).shape == (1, 4, 16, 32, 32) and model(video).shape == video.shape


def test_units_compile_whole():
    """A unit is one graph of its own sizes, as in the engine: nothing in it leaves the compiler."""
    model = tiny(plane_depth=1)
    x = clip(model)
    expected = model(x)
    for unit in model.units():
        unit.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=4 * len(model.units())):
        torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_reduced_precision_keeps_latents_and_pixels_in_float32():
    model = tiny()
    x = clip(model)
    recon, z = model(x), model.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        results = [(model(x), model.encode(x))]
    model.bfloat16()
    results.append((model(x), model.encode(x)))
    for ours, latent in results:
        assert ours.dtype == latent.dtype == torch.float32
        assert (ours - recon).abs().max() < 0.1 and (latent - z).abs().max() < 0.1
        assert not torch.equal(latent.bfloat16().float(), latent), "the last step to a latent is made in float32"
