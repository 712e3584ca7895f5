"""The CMD autoencoder: shapes, what its latents are equivariant to, sizes, units, and that it works without storage and in bfloat16."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.layers import attention
from models.layers.rotary import grid_tables, rotate, time_tables


def tiny(**changes) -> CMDAutoencoder:
    torch.manual_seed(0)
    defaults = {"dim": 32, "image_size": (8, 12), "n_frames": 4, "depth": 1, "embed_dim": 3, "heads": 4}
    model = CMDAutoencoder(CMDAEConfig(**(defaults | changes)))
    for layer in model.units():  # library defaults keep attention so flat that positions hardly show
        for part in (layer.time, layer.space):
            part.attn.qkv.weight.data.mul_(3.0)
    return model.eval()


def clip(model: CMDAutoencoder, batch: int = 2) -> torch.Tensor:
    c = model.config
    return torch.rand(batch, c.channels, c.n_frames, *c.image_size) * 2 - 1


@torch.no_grad()
def test_shapes_and_ranges():
    model = tiny()
    x = clip(model)
    recon, z_c, z_m = model(x)
    assert recon.shape == x.shape and z_c.shape == (2, 3, 8, 12) and z_m.shape == (2, 3, 4, 6 + 4)
    assert model.config.latent_size == (4, 10)
    assert recon.abs().max() < 1 and z_m.abs().max() < 1
    assert (z_c <= x.amax(2) + 1e-6).all() and (z_c >= x.amin(2) - 1e-6).all()
    weights = model.frame_weights(model.tokens(x))
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 3, 8, 12))


@torch.no_grad()
def test_frames_are_read_as_clips():
    model = tiny()
    x = clip(model)
    frames = x.transpose(1, 2).flatten(0, 1)
    for ours, expected in zip(model(frames), model(x), strict=True):
        assert torch.equal(ours, expected)


@torch.no_grad()
def test_motion_columns_come_first():
    """The plane of means over rows knows the columns: a change of one column of pixels moves it in that place most."""
    model = tiny(rotary="none", depth=0)
    x = clip(model, 1)
    changed = x.clone()
    changed[..., 4:6] += 0.5
    difference = (model.encode(changed)[1] - model.encode(x)[1]).abs().amax((0, 1, 2))
    columns, rows = difference[:6], difference[6:]
    assert columns[2] > 0 and columns[[0, 1, 3, 4, 5]].max() == 0 and rows.min() > 0


@torch.no_grad()
def test_latent_mode_is_unbounded():
    model = tiny(mode="latent", channels=4)
    assert model.decode(50 * torch.randn(1, 4, 8, 12), torch.zeros(1, 3, 4, 10)).abs().max() > 1


def equivariance_errors(model: CMDAutoencoder) -> tuple[float, float, float]:
    """How far permuted frames are from permuting z_m and from leaving z_c, and a shifted clip from shifting z_c."""
    x = clip(model)
    z_c, z_m = model.encode(x)
    order = torch.tensor([2, 0, 3, 1])
    p_c, p_m = model.encode(x[:, :, order])
    shift = {"shifts": (2 * model.config.patch_size, model.config.patch_size), "dims": (-2, -1)}
    s_c, _ = model.encode(x.roll(**shift))
    return tuple(float((a - b).abs().max()) for a, b in ((p_m, z_m[:, :, order]), (p_c, z_c), (s_c, z_c.roll(**shift))))


@torch.no_grad()
def test_without_rotary_positions_mean_nothing():
    assert max(equivariance_errors(tiny(rotary="none", depth=2))) < 1e-5


@torch.no_grad()
def test_rotary_gives_positions():
    motion, content, shift = equivariance_errors(tiny(rotary="axial", depth=2))
    assert motion > 1e-3 and content > 1e-3 and shift > 1e-3


def test_rotation_keeps_lengths_and_knows_distances_in_time():
    q, k = torch.randn(2, 8)
    tables = time_tables(16, 8, q.device)
    turned_q, turned_k = (rotate(v.expand(16, 8), tables) for v in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(16))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 7):
        torch.testing.assert_close(scores.diagonal(distance), scores[0, distance].expand(16 - distance))


def test_rotation_passes_the_rest_of_an_odd_head_through():
    x = torch.randn(6, 7)
    turned = rotate(x, grid_tables(2, 3, 7, x.device))
    assert torch.equal(turned[:, 4:], x[:, 4:]) and not torch.equal(turned[:, :4], x[:, :4])


@pytest.mark.parametrize(("depth", "count"), [(8, 47_359_510), (12, 71_023_126)])
def test_parameter_count_is_the_release_s(depth, count):
    with torch.device("meta"):
        model = CMDAutoencoder(CMDAEConfig(depth=depth))
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.units()) == 2 * depth and not list(model.buffers())


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = CMDAutoencoder(CMDAEConfig())
        recon, z_c, z_m = model(torch.empty(2, 3, 16, 64, 64))
    assert recon.shape == (2, 3, 16, 64, 64) and z_c.shape == (2, 3, 64, 64) and z_m.shape == (2, 8, 16, 64)


def test_units_compile_whole():
    """A unit is one graph: nothing in it leaves the compiler."""
    model = tiny()
    x, ropes = torch.randn(4, 2, 24, 32), (time_tables(4, 8, torch.device("cpu")), grid_tables(4, 6, 8, torch.device("cpu")))
    compiled = torch.compile(model.units()[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *ropes), model.units()[0](x, *ropes))


@torch.no_grad()
def test_bfloat16_weights_take_float32_clips():
    model = tiny()
    x = clip(model)
    expected = model(x)
    z_c_before = model.encode(x)[0]
    for ours, reference in zip(model.bfloat16()(x), expected, strict=True):
        assert (ours.float() - reference).abs().max() < 0.1
    assert model.encode(x)[0].dtype == z_c_before.dtype == torch.float32


def test_large_attention_batches_are_split(monkeypatch):
    monkeypatch.setattr(attention, "_SHORT", 0)
    q, k, v = torch.randn(3, 7, 2, 4, 8)
    whole = attention.sdpa(q, k, v)
    calls = []
    original = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "_MAX_BATCH", 3)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a: calls.append(len(a[0])) or original(*a))
    torch.testing.assert_close(attention.sdpa(q, k, v), whole)
    assert calls == [3, 3, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (9, 12)}, "patch_size"),
        ({"dim": 30}, "heads"),
        ({"dim": 8}, "rotary"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_wrong_clip_size_is_named():
    with pytest.raises(ValueError, match=r"\(b, 3, t, 8, 12\), not \(2, 3, 4, 8, 8\)"):
        tiny()(torch.zeros(2, 3, 4, 8, 8))


class CountedCopies(TorchDispatchMode):
    """Counts the operators that only move data."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("clone", "copy_", "contiguous", "_to_copy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_short_attention_on_a_cpu_is_the_kernels(monkeypatch, dtype, tolerance):
    qkv = torch.randn(3, 2, 4, 16, 8).to(dtype)
    results = []
    for short in (16, 0):
        monkeypatch.setattr(attention, "_SHORT", short)
        leaf = qkv.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attention.sdpa(*leaf)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    assert results[0][0].grad_fn.name() != results[1][0].grad_fn.name()
    torch.testing.assert_close(results[0], results[1], atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_attention_over_either_axis_copies_nothing(monkeypatch):
    monkeypatch.setattr(attention, "_SHORT", 0)
    x, width = torch.randn(4, 2, 24, 32), 8
    for ropes in ((None, None), (time_tables(4, width, x.device), grid_tables(4, 6, width, x.device))):
        with CountedCopies() as copies:
            assert tiny().units()[0](x, *ropes).is_contiguous()
        assert copies.count == 0
