"""The PVDM autoencoder: what each plane keeps, sizes that are refused, splits, its options, units, and reduced precision."""

import pytest
import torch

from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.layers.planes import PlaneProjection, ProjectionLayer, join_planes, plane_shapes, split_planes, spread_planes
from models.layers.rotary import rotate, time_tables

CPU = torch.device("cpu")


def tiny(**changes) -> PVDMAutoencoder:
    torch.manual_seed(0)
    defaults = {"dim": 32, "image_size": (16, 24), "patch_size": 4, "n_frames": 5, "embed_dim": 3, "depth": 1, "heads": 2, "head_dim": 8}
    defaults |= {"plane_depth": 2, "plane_heads": 2, "plane_mlp_dim": 24}
    return PVDMAutoencoder(PVDMAEConfig(**(defaults | changes))).eval()


def clip(model: PVDMAutoencoder, batch: int = 2) -> torch.Tensor:
    c = model.config
    return torch.rand(batch, c.channels, c.n_frames, *c.image_size) * 2 - 1


@torch.no_grad()
def test_shapes_and_ranges():
    model = tiny()
    x = clip(model)
    z = model.encode(x)
    assert (
        model.config.grid == (4, 6) and model.config.latent_size == 24 + 30 + 20 and model.config.plane_shapes == ((4, 6), (5, 6), (5, 4))
    )
    assert z.shape == (2, 3, 74) and z.abs().max() < 1 and z.is_contiguous()
    recon = model(x)
    assert recon.shape == x.shape and recon.abs().max() < 1 and recon.is_contiguous()
    assert torch.equal(model.decode(z), recon)
    assert [plane.shape for plane in model.planes(z)] == [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 4)]


@torch.no_grad()
def test_what_each_plane_keeps():
    """Without an encoder a patch is seen by the cells of its row and column, its frame and column, and its frame and row alone."""
    model = tiny(depth=0)
    x = clip(model, 1)
    changed = x.clone()
    changed[:, :, 3, 4:8, 8:12] += 0.5  # frame 3, row 1, column 2
    before, after = (model.planes(model.encode(video)) for video in (x, changed))
    places = [(old != new).any(1)[0].nonzero().tolist() for old, new in zip(before, after, strict=True)]
    assert places == [[[1, 2]], [[3, 2]], [[3, 1]]]


@torch.no_grad()
def test_planes_spread_over_the_clip():
    xy, yt, xt = torch.randn(2, 4, 6, 7), torch.randn(2, 5, 6, 7), torch.randn(2, 5, 4, 7)
    expected = xy[:, None] + yt[:, :, None] + xt[:, :, :, None]  # b t h w d
    torch.testing.assert_close(spread_planes(xy, yt, xt), expected.transpose(0, 1).flatten(2, 3))


def test_flat_latents_there_and_back():
    shapes = plane_shapes(5, (4, 6))
    x = torch.arange(2 * 3 * 74).reshape(2, 3, 74)
    planes = split_planes(x, shapes)
    assert [plane.shape[2:] for plane in planes] == [*shapes] and torch.equal(join_planes(*planes), x)
    assert planes[1][0, 0, 2, 1] == 24 + 2 * 6 + 1 and planes[0].data_ptr() == x.data_ptr()
    for wrong in (torch.zeros(2, 3, 73), torch.zeros(2, 3, 75), torch.zeros(3, 74)):
        with pytest.raises(ValueError, match=r"4 x 6, 5 x 6, 5 x 4 make \(b, c, 74\), not"):
            split_planes(wrong, shapes)


@torch.no_grad()
def test_splits_are_clips_of_their_own():
    """In the encoder as in the whole: half of a clip has the latent that it has by itself."""
    model = tiny(n_frames=6, splits=2)
    x = clip(model)
    z = model.encode(x)
    assert model.config.clip_frames == 3 and z.shape == (4, 3, 24 + 18 + 12)
    halves = [model.encode(half) for half in x.chunk(2, dim=2)]
    torch.testing.assert_close(z, torch.stack(halves, 1).flatten(0, 1))
    recon = model(x)
    torch.testing.assert_close(recon, torch.cat([model(half) for half in x.chunk(2, dim=2)], dim=2))
    assert recon.shape == x.shape and model.decode(z).shape == (4, 3, 3, 16, 24)


@pytest.mark.parametrize("frames", [4, 6, 10])
def test_another_number_of_frames_is_refused(frames):
    model = tiny()
    with pytest.raises(ValueError, match=rf"\(b, 3, 5, 16, 24\), not \(1, 3, {frames}, 16, 24\)"):
        model.encode(torch.zeros(1, 3, frames, 16, 24))
    with pytest.raises(ValueError, match=r"\(b, 3, 2 or 4, 16, 24\)"):
        tiny(n_frames=4, splits=2).encode(torch.zeros(1, 3, 6, 16, 24))


@pytest.mark.parametrize("shape", [(1, 3, 73), (1, 3, 75), (1, 3, 148), (1, 4, 74), (3, 74)])
def test_a_latent_of_another_size_is_refused_and_never_cut(shape):
    with pytest.raises(ValueError, match=r"latents \(b, 3, 74\), those of 5 frames of 16 x 24, not"):
        tiny().decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (18, 24)}, "patch_size 4"),
        ({"n_frames": 5, "splits": 2}, "5 cannot be cut into 2"),
        ({"head_dim": 2}, "at least 4"),
        ({"head_dim": 9}, "even"),
        ({"dim": 4}, "plane_head_dim"),
        ({"plane_depth": 0}, "plane_depth 0: at least 1"),
        ({"depth": -1}, "depth -1: at least 0"),
        ({"plane_head_dim": -1}, "plane_head_dim -1: at least 0"),
        ({"patch_size": 0}, "patch_size 0: at least 1"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@torch.no_grad()
@pytest.mark.parametrize(("size", "patch"), [(128, 4), (128, 8), (64, 4)])
def test_the_latent_s_stride_is_the_patch(size, patch):
    """A patch of 4, which the release could not run."""
    model = tiny(image_size=(size, size), patch_size=patch, n_frames=2, depth=0, plane_depth=1)
    side = size // patch
    assert model.encode(clip(model, 1)).shape[2] == side * side + 4 * side and model(clip(model, 1)).shape[3:] == (size, size)


@torch.no_grad()
@pytest.mark.parametrize(("readout", "position"), [("first", 0), ("token", 5)])
def test_a_projection_is_its_whole_transformer_read_at_one_position(readout, position):
    torch.manual_seed(0)
    projection = PlaneProjection("xy", 5, 16, 3, 2, 4, 24, readout)
    tokens = torch.randn(5, 2, 6, 16)
    x = torch.cat([tokens.permute(1, 2, 0, 3).flatten(0, 1), projection.token.expand(12, -1, -1)], dim=1) + projection.positions
    for layer in projection.layers:
        x = layer(x)
    torch.testing.assert_close(projection(tokens, (2, 3)).flatten(0, 2), x[:, position])


@torch.no_grad()
def test_reading_with_biased_queries():
    layer = ProjectionLayer(16, 2, 4, 24)
    layer.attn.qkv.bias = torch.nn.Parameter(torch.randn(24))
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer.read(x, 2), layer(x)[:, 2])


def test_the_release_s_table_is_no_rotation_and_the_corrected_one_is():
    q, k = torch.randn(2, 8)
    for layout, true in (("halves", False), ("pairs", True)):
        turned_q, turned_k = (rotate(v.expand(16, 8), time_tables(16, 8, CPU, layout)) for v in (q, k))
        scores = turned_q @ turned_k.T
        assert torch.allclose(scores.diagonal(3), scores[0, 3].expand(13), atol=1e-5) == true
        assert torch.allclose(turned_q.norm(dim=1), q.norm().expand(16), atol=1e-5) == true


@torch.no_grad()
@pytest.mark.parametrize("option", [{"frame_rotary": "corrected"}, {"readout": "token"}])
def test_corrected_variants_are_options(option):
    model, other = tiny(), tiny(**option)
    other.load_state_dict(model.state_dict())
    x = clip(model)
    assert PVDMAEConfig().frame_rotary == "release" and PVDMAEConfig().readout == "first"
    assert (model.encode(x) - other.encode(x)).abs().max() > 1e-3


@pytest.mark.parametrize("readout", ["first", "token"])
def test_every_weight_learns(readout):
    model = tiny(readout=readout)
    model(clip(model)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_sizes_and_units():
    with torch.device("meta"):
        model = PVDMAutoencoder(PVDMAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 62_064_399 and not list(model.buffers())
    assert len(model.units()) == 8 + 3 + 8
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.projections.items()}
    assert parts == {"xy": 2_763_776 + 18 * 384, "yt": 2_763_776 + 34 * 384, "xt": 2_763_776 + 34 * 384}
    assert model.config.latent_size == 2048 and model(torch.empty(1, 3, 16, 256, 256, device="meta")).shape == (1, 3, 16, 256, 256)


def test_units_compile_whole():
    """A unit is one graph of its own sizes, as in the engine: nothing in it leaves the compiler."""
    model = tiny()
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
