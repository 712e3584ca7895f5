"""VIDM's generators: sizes, fresh weights, what sampling may share, sides, precision, settings."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from engine.shard import unit_policy
from models import MODELS
from models.layers.spynet import SpyNet
from models.unets.adm import AttentionBlock, group_norm
from models.unets.positional import Place, PosGN
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig
from tests.vidm_networks import MOTION, SMALL, content, motion, pictures, randomised, times


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_official_sizes() -> None:
    with torch.device("meta"):
        first, following = (MODELS[f"VIDM-{stage}"].network(MODELS[f"VIDM-{stage}"].config) for stage in ("content", "motion"))
    assert count(first) == 131_765_894 and count(following) == 194_178_226
    assert [count(following.get_submodule(name)) for name in ("encoder", "unet", "spynet")] == [44_122_880, 148_615_046, 1_440_300]
    assert sum(isinstance(module, PosGN) for module in following.modules()) == 59
    for unet in (first, following.unet):
        assert len(unet.input_blocks) == len(unet.output_blocks) == 18
        attending = [k for k, stage in enumerate(unet.input_blocks) if any(isinstance(layer, AttentionBlock) for layer in stage.layers)]
        assert attending == [13, 14]  # 8 x 8 of 128 x 128: the setting is a rate, not a side
    assert following.unet.input_blocks[0].layers[0].in_channels == 5 and first.input_blocks[0].layers[0].in_channels == 6


def test_fresh_networks_begin_at_zero() -> None:
    torch.manual_seed(0)
    first, following = ContentUNet(ContentUNetConfig(**SMALL)), MotionUNet(MotionUNetConfig(**MOTION))
    (x, previous, start), (t, frame) = pictures(), times()
    assert not first(x, t).any() and not following(x, t, frame, previous, start).any()
    assert 0.8 < float(first.constant.detach().std()) < 1.2
    zeros = [module.out_rest[1] for module in following.modules() if isinstance(module, PosGN)]
    zeros += [module.proj_out for module in following.modules() if isinstance(module, AttentionBlock)]
    assert not any(parameter.any() for module in zeros for parameter in module.parameters())


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"resblock_updown": False},
    {"new_attention_order": True},
    {"num_head_channels": -1, "num_heads": 4},
    {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (1, 4), "image_size": (12, 8)},
    {"channel_mult": (2,)},
    {"model_channels": 64, "channel_mult": (0.5, 1)},
    {"learn_sigma": False},
]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_every_layout_computes(changes: dict[str, Any]) -> None:
    first, following = content(**changes), motion(**changes)
    size = first.config.image_size
    (x, previous, start), (t, frame) = pictures(size=size), times()
    shape = (2, 3 if changes == {"learn_sigma": False} else 6, *size)
    for out in (first(x, t), following(x, t, frame, previous, start)):
        assert out.shape == shape and out.is_contiguous() and bool(out.isfinite().all()) and bool(out.any())
    units = [{id(p) for p in unit.parameters()} for unit in following.units()]
    assert sum(map(len, units)) == len(set().union(*units)) == len(list(following.parameters()))


def test_the_constant_is_beside_the_noise() -> None:
    model, (x, *_), (t, _) = content(), pictures(), times()
    out = model(x, t)
    assert not torch.equal(model(x + 0.1, t), out)
    with torch.no_grad():
        model.constant[0, 0, 0, 0] += 1
    assert not torch.equal(model(x, t), out)


# ---- what sampling shares


@torch.no_grad()
def test_the_parts_are_the_whole() -> None:
    model, (x, previous, first), (t, frame) = motion(), pictures(), times()
    flow, maps = model.flow(first, previous), model.maps(t, frame, (8, 12))
    assert torch.equal(model.denoise(x, flow, maps, model.encode(first, maps)), model(x, t, frame, previous, first))


@torch.no_grad()
def test_maps_of_one_step_and_frame_serve_every_video() -> None:
    model, (x, previous, first) = motion(), pictures(3)
    t, frame = torch.tensor([500]), torch.tensor([7])
    whole = model(x, t.expand(3), frame.expand(3), previous, first)
    maps = model.maps(t, frame, (8, 12))
    assert all(part.shape[0] == 1 for stages in maps for found in stages for pair in found for part in pair)
    flow = model.flow(first, previous)
    shared = model.denoise(x, flow, maps, model.encode(first, maps))
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
    alone = [model.denoise(x[i : i + 1], flow[i : i + 1], maps, model.encode(first[i : i + 1], maps)) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), shared, rtol=0, atol=1e-6 * float(whole.abs().max()))


@torch.no_grad()
def test_features_of_the_first_frame_are_of_their_step_and_frame() -> None:
    """Why they are worked out again at each: the spec's conditioning allows no reuse."""
    model, (_, _, first) = motion(), pictures()

    def features(t: int, frame: int) -> torch.Tensor:
        return model.encode(first, model.maps(torch.tensor([t]), torch.tensor([frame]), (8, 12)))[-1]

    here = features(500, 7)
    assert torch.equal(features(500, 7), here)
    for other in (features(501, 7), features(500, 8)):
        assert float((other - here).abs().max()) > 1e-5 * float(here.abs().max())


# ---- sides and batches


def test_sizes_change_from_call_to_call_and_nothing_is_kept() -> None:
    """The release cached its tables of coordinates in buffers: another batch or size raised, and checkpoints carried them."""
    model = motion()
    names = set(model.state_dict())
    for number, size in ((2, (8, 12)), (3, (16, 8)), (1, (8, 12))):
        (x, previous, first), (t, frame) = pictures(number, size), times(number)
        assert model(x, t, frame, previous, first).shape == (number, 6, *size)
    assert set(model.state_dict()) == names and not list(model.buffers()) and not list(content().buffers())


def test_a_clip_is_the_same_in_any_batch() -> None:
    model, (x, previous, first), (t, frame) = motion(), pictures(3), times(3)
    together = model(x, t, frame, previous, first)
    for i in range(3):
        alone = model(*(value[i : i + 1] for value in (x, t, frame, previous, first)))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


def test_coordinates_reach_from_minus_one_to_one() -> None:
    module = PosGN(32, 1000, 128)
    found = module.coordinates(Place(torch.tensor([0, 999]), torch.tensor([127, 64])), (3, 5))
    assert found.shape == (2, 3, 5, 4)
    assert found[0, 0, 0].tolist() == [-1, 1, -1, -1] and found[1, 2, 4].tolist()[0::2] == [1, 1]
    assert found[1, 1, 2].tolist()[1:] == pytest.approx([-1 + 2 * 64 / 127, 0, 0], abs=1e-6)
    single = PosGN(32, 1, 1).coordinates(Place(torch.tensor([0]), torch.tensor([0])), (1, 1))
    assert single.flatten().tolist() == [-1] * 4


# ---- precision and gradients


@torch.no_grad()
def test_coordinates_and_flow_stay_in_float32() -> None:
    model, (x, previous, first), (t, frame) = motion(), pictures(), times()
    model.spynet = randomised(SpyNet())
    flow, maps, out = model.flow(first, previous), model.maps(t, frame, (8, 12)), model(x, t, frame, previous, first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.flow(first, previous), flow) and flow.dtype == torch.float32
        again = model.maps(t, frame, (8, 12))
        rounded = model(x, t, frame, previous, first)
    for ours, theirs in zip(maps.encoder + maps.unet, again.encoder + again.unet, strict=True):
        assert all(torch.equal(a, b) for pair, other in zip(ours, theirs, strict=True) for a, b in zip(pair, other, strict=True))
    assert 0 < float((rounded - out).abs().max() / out.abs().max()) < 0.1
    kept = copy.deepcopy(model.spynet).bfloat16()  # weights that were rounded compute in float32 all the same
    assert kept(first, previous).dtype == torch.float32


@pytest.mark.parametrize("sides", [(5, 3), (2, 5, 3), (7,)])
def test_rounded_features_are_normalised_as_torch_does(sides: tuple[int, ...]) -> None:
    """The quick way gives the same numbers, and lays them out as convolutions on a CPU want them."""
    norm = randomised(group_norm(64))
    x = torch.randn(2, *sides, 64, generator=torch.Generator().manual_seed(0)).bfloat16().movedim(-1, 1)  # channels last
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        quick, plain = norm(x), nn.GroupNorm.forward(norm, x)
    assert torch.equal(quick, plain) and quick.is_contiguous()


def test_sharding_leaves_the_weights_of_posgn_whole() -> None:
    """What its MLP computes in float32 must not begin with rounded weights."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in motion().units():
        exact = any(isinstance(module, PosGN) for module in unit.modules())
        assert not exact or unit_policy(unit, policy).param_dtype is None


def test_the_flow_network_is_trained_with_the_rest() -> None:
    model, (x, previous, first), (t, frame) = motion(), pictures(), times()
    model(x, t, frame, previous, first).square().mean().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_what_is_given_to_the_flow_network() -> None:
    """Ours gives it pictures in [0, 1], for which it was made; the release's weights are used to [-1, 1]."""
    _, previous, first = pictures()
    ours, theirs = motion(), motion(flow_input="minus_one_one")
    assert MotionUNetConfig().flow_input == "zero_one"
    apart = ours.flow(first, previous)
    assert not torch.allclose(apart, theirs.flow(first, previous))
    torch.testing.assert_close(theirs.flow(first / 2 + 0.5, previous / 2 + 0.5), apart)


def test_blocks_are_traced_whole() -> None:
    """No break in the graph of a block of either part, of the flow network or of the output: what is compiled is compiled as one."""
    model, (x, previous, first), (t, frame) = motion(), pictures(), times()
    with torch.no_grad():
        expected = model(x, t, frame, previous, first)
        torch._dynamo.reset()
        for unit in (model.spynet, model.encoder.input_blocks[1], model.unet.input_blocks[2], model.unet.output_blocks[1], model.unet.out):
            unit.compile(backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(model(x, t, frame, previous, first), expected)


# ---- settings


def test_new_attention_order_is_the_same_weights_in_another_order() -> None:
    legacy, new = randomised(AttentionBlock(64, 2)), randomised(AttentionBlock(64, 2, new_order=True))
    new.load_state_dict(legacy.state_dict())
    x = torch.randn(2, 64, 3, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(new(x), legacy(x))
    with torch.no_grad():
        for parameter in new.qkv.parameters():  # head, then q, k, v -> q, k, v, then head
            parameter.copy_(parameter.unflatten(0, (2, 3, 32)).transpose(0, 1).flatten(0, 2))
    torch.testing.assert_close(new(x), legacy(x))


def test_settings_of_the_content_network_do_something() -> None:
    """The release's motion network took dropout, scale_shift and checkpointing and paid no heed: ours has no such settings there."""
    x, t = pictures()[0], times()[0]
    model = content(dropout=0.5)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))
    assert count(content(use_scale_shift_norm=False)) < count(model)
    for name in ("dropout", "use_scale_shift_norm", "use_checkpoint"):
        with pytest.raises(TypeError, match=name):
            MotionUNetConfig(**{name: True})


def test_labels() -> None:
    model, x, t = content(num_classes=3), pictures()[0], times()[0]
    assert not torch.equal(model(x, t, torch.tensor([0, 1])), model(x, t, torch.tensor([2, 1])))
    with pytest.raises(ValueError, match="3 classes, and none"):
        model(x, t)
    with pytest.raises(ValueError, match="0 classes, and some"):
        content()(x, t, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": (8, 13)}, "image_size 8 x 13 cannot be halved"),
        ({"model_channels": 48}, "not a multiple of 32"),
        ({"num_head_channels": 48}, "not a multiple of num_head_channels 48"),
        ({"num_head_channels": 0}, "num_head_channels 0: at least 1, or -1"),
        ({"num_head_channels": -1, "num_heads": 3}, "not a multiple of num_heads 3"),
        ({"attention_resolutions": (12,)}, "attention_resolutions 12"),
        ({"num_res_blocks": 0}, "num_res_blocks 0"),
    ],
)
def test_impossible_settings_of_either(changes: dict[str, Any], said: str) -> None:
    for kind, base in ((ContentUNetConfig, SMALL), (MotionUNetConfig, MOTION)):
        with pytest.raises(ValueError, match=said):
            kind(**base | changes)  # type: ignore[operator]


def test_impossible_settings_and_inputs() -> None:
    for changes, said in (
        ({"video_timesteps": 0}, "video_timesteps"),
        ({"flow_input": "uint8"}, "flow_input"),
        ({"in_channels": 1}, "flow"),
    ):
        with pytest.raises(ValueError, match=said):
            MotionUNetConfig(**MOTION | changes)
    with pytest.raises(ValueError, match="dropout"):
        ContentUNetConfig(dropout=1.0)
    (x, previous, first), (t, frame) = pictures(), times()
    with pytest.raises(ValueError, match=r"x: the model takes \(b, 3, 8, 12\), not \(2, 3, 12, 8\)"):
        content()(x.transpose(2, 3), t)
    with pytest.raises(ValueError, match=r"previous: the model takes \(b, 3, 8, 12\)"):
        motion()(x, t, frame, previous[..., :8], first)
    with pytest.raises(ValueError, match="frames 7 x 12 cannot be halved"):
        motion()(*(value[:, :, :7] if value.dim() == 4 else value for value in (x, t, frame, previous, first)))
