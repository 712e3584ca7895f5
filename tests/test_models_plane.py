"""Denoisers of three-plane latents: blocks on sheets, the UNet and the DiT, their inputs, settings that cannot be, checkpoints."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pvdm_step import PlainUNet
from engine.shard import _compile
from models import MODELS, resolve
from models.layers.planes import split_planes
from models.official.pvdm_unet import export_unet, is_unet, load
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.unets.adm import AttentionBlock, Downsample, Resample, ResBlock, Upsample, conv, conv_each, group_norm, norm_each
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig

MANIFEST = Path(__file__).parent / "parity/data/pvdm_statedict_manifest.json"
UNET: dict[str, Any] = {
    "latent_res": (4, 4),
    "latent_frames": 2,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "num_heads": 2,
}
DIT: dict[str, Any] = {"latent_res": (4, 4), "latent_frames": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}


def randomised(module: nn.Module) -> Any:
    """Random weights everywhere: fresh ones give zeros."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def unet(**changes: Any) -> PlaneUNet:
    return randomised(PlaneUNet(PlaneUNetConfig(**UNET | changes)))


def dit(**changes: Any) -> PlaneDiT:
    return randomised(PlaneDiT(PlaneDiTConfig(**DIT | changes)))


def latents(config: Any, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, previous = (torch.randn(count, config.in_channels, config.length, generator=generator) for _ in range(2))
    return x, torch.arange(count) * 300 + 7, previous


# ---- blocks


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["", "down", "up"])
def test_pictures_of_a_sheet_are_as_if_alone(dims: int, kind: Resample) -> None:
    """Heights 4, 2, 2 on one sheet: blocks, convolutions of stride 1 and 2, norms and attention do not look across."""
    rows, rest = (4, 2, 2), (4,) * (dims - 1)
    parts = [torch.randn(2, 32, height, *rest) * (k + 1) for k, height in enumerate(rows)]
    sheet, emb = torch.cat(parts, dim=2), torch.randn(2, 8)

    def same(whole: Tensor, alone: list[Tensor]) -> None:
        torch.testing.assert_close(whole, torch.cat(alone, dim=2), rtol=1e-4, atol=1e-4)

    block = randomised(ResBlock(32, 64, 8, dims, kind=kind))
    same(block(sheet, emb, rows), [block(part, emb) for part in parts])
    assert block.rows_after(rows) == tuple(block(part, emb).shape[2] for part in parts)
    assert not torch.allclose(block(sheet, emb), block(sheet, emb, rows), atol=1e-2)
    other: Any = randomised(Upsample(32, dims) if kind == "up" else Downsample(32, dims))
    same(other(sheet, rows), [other(part) for part in parts])
    attention = randomised(AttentionBlock(32, 4))
    same(attention(sheet, rows), [attention(part) for part in parts])
    layer, norm = conv(dims, 32, 8), group_norm(32)
    same(conv_each(layer, sheet, rows), [layer(part) for part in parts])
    same(norm_each(norm, sheet, rows), [norm(part) for part in parts])


def test_residual_block_may_leave_an_axis_alone_and_add_the_step() -> None:
    block = randomised(ResBlock(32, 32, 8, 3, kind="down", factors=(1, 2, 2), scale_shift=False))
    x, emb = torch.randn(1, 32, 3, 4, 4), torch.randn(1, 8)
    assert block(x, emb).shape == (1, 32, 3, 2, 2)
    assert block.emb_layers[1].out_features == 32 and not torch.allclose(block(x, emb), block(x, emb + 1))
    fresh = ResBlock(32, 32, 8)
    picture = torch.randn(1, 32, 4, 4)
    assert torch.equal(fresh(picture, emb), picture) and torch.equal(AttentionBlock(32, 2)(picture), picture)


# ---- UNet


def test_published_sizes() -> None:
    for name, parameters in (("PVDM-L", 528_273_412), ("PVDM-S", 132_163_588)):
        config = resolve(name)
        with torch.device("meta"):
            model = MODELS[name].network(config)
            assert sum(p.numel() for p in model.parameters()) == parameters
            names = export_unet(model.state_dict(), config)
            assert model(torch.empty(1, 4, 2048), torch.empty(1)).shape == (1, 4, 2048)
        assert len(names) == 559 and len(model.units()) == 26
        if name == "PVDM-L":
            assert {key: list(value.shape) for key, value in names.items()} == json.loads(MANIFEST.read_text())["diffusion"]


@pytest.mark.parametrize("changes", [{}, {"latent_res": (4, 8)}, {"latent_res": (8, 4)}, {"latent_frames": 4}])
def test_planes_on_sheets_are_planes_one_after_the_other(changes: dict[str, Any]) -> None:
    model = unet(**changes, attention_resolutions=(2, 1))
    x, t, _ = latents(model.config)
    out = model(x, t)
    torch.testing.assert_close(out, PlainUNet(model)(x, t), rtol=1e-4, atol=1e-4)
    assert out.shape == x.shape and [len(rows) for rows, _ in model.config.sheets] in ([3], [2, 1], [1, 2])


def test_gradients_lie_in_memory_as_their_weights_do() -> None:
    """DDP would copy others at every step, and warn."""
    model = unet(model_channels=64, latent_res=(8, 8), latent_frames=8)
    x, t, previous = latents(model.config, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, t, previous).square().sum()
    loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or weight.grad.stride() != weight.stride()] == []


class Convolved(TorchDispatchMode):
    """Counts convolutions by the layout of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            last = args[0].is_contiguous(memory_format=torch.channels_last)
            self.layouts["last" if last else "apart" if args[0].is_contiguous() else "neither"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "rounded", "expected"), [("cpu", True, "apart"), ("cpu", False, "last"), ("cuda", False, "last")])
def test_features_lie_as_convolutions_are_quick_with(device: str, rounded: bool, expected: str) -> None:
    """In bf16 on a CPU torch would copy weights and gradients, each several times a step, were channels last."""
    with FakeTensorMode(), torch.device(device):  # a GPU without one
        model = PlaneUNet(PlaneUNetConfig(**UNET | {"attention_resolutions": (2, 1)}))
        last = torch.randn(2, 8, 8, 32).movedim(-1, 1)
        down, up = Downsample(32), Upsample(32)
        with Convolved() as seen, torch.autocast(device, torch.bfloat16, enabled=rounded):
            model(torch.randn(2, model.config.in_channels, model.config.length), torch.zeros(2))
            down(last if rounded else last.contiguous())
            up(last if rounded else last.contiguous(), (4, 4))
    assert set(seen.layouts) == {expected} and seen.layouts[expected] > 10


def test_all_positions_reach_all_planes() -> None:
    model = unet()
    x, t, _ = latents(model.config, 1)
    x.requires_grad_()
    for plane in split_planes(model(x, t), model.config.plane_shapes):
        (grad,) = torch.autograd.grad(plane[0, 0, 0, 0], x, retain_graph=True)
        assert bool((grad != 0).all())


@pytest.mark.parametrize(
    "changes",
    [
        {"resblock_updown": False},
        {"use_scale_shift_norm": False},
        {"head_channels": 16},
        {"attention_resolutions": (2,)},
        {"channel_mult": (2, 2)},
        {"out_channels": 3},
        {"out_channels": 8},  # as many as the first convolution reads of two latents: the stored zeros tell the two apart
    ],
)
def test_every_layout_computes_and_its_checkpoint_tells_it(changes: dict[str, Any]) -> None:
    model = unet(**changes)
    x, t, previous = latents(model.config)
    out = model(x, t, previous)
    assert out.shape == (2, changes.get("out_channels", 4), model.config.length)
    official = export_unet(model.state_dict(), model.config)
    heads: dict[str, Any] = {"num_heads": 2, "head_channels": changes.get("head_channels", 0)}
    state, config = load(official, **heads, latent_frames=2)
    assert config == model.config
    again = PlaneUNet(config)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(x, t, previous), out)


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, words in (
        ({"latent_frames": 3}, r"latent_frames 3 cannot be halved 1 times: use multiples of 2, or fewer entries in channel_mult"),
        ({"latent_res": (4, 6), "channel_mult": (1, 1, 1)}, "latent_res 4 x 6 cannot be halved 2 times"),
        ({"model_channels": 48}, "model_channels 48 x 1 is not a multiple of 32"),
        ({"num_heads": 3}, "the width 32 of level 0 is not a multiple of num_heads 3"),
        ({"head_channels": 24}, "not a multiple of head_channels 24"),
        ({"attention_resolutions": (3,)}, "attention_resolutions 3"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks 0: at least 1"),
        ({"dropout": 1.5}, "dropout 1.5: a share"),
    ):
        with pytest.raises(ValueError, match=words):
            PlaneUNetConfig(**UNET | changes)
    for changes, words in (
        ({"latent_frames": 3}, "latent_frames 3 is not a multiple of patch_size 2"),
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
        ({"depth": 0}, "depth 0: at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            PlaneDiTConfig(**DIT | changes)
    with pytest.raises(ValueError, match="the nearest is 'PVDM-"):
        resolve("PVDM-M")


# ---- what both denoisers take


@pytest.mark.parametrize("make", [unet, dit])
def test_previous_clip_and_labels(make: Any) -> None:
    model = make(num_classes=3)
    x, t, previous = latents(model.config)
    out = model(x, t, previous, torch.tensor([0, 2]))
    assert torch.equal(model(x, t, None), model(x, t, torch.zeros_like(x)))
    assert not torch.allclose(out, model(x, t, None, torch.tensor([0, 2])))
    assert not torch.allclose(out, model(x, t, previous, torch.tensor([1, 2])))
    null = model(x, t, previous)
    assert torch.equal(null, model(x, t, previous, torch.tensor([3, 3])))
    assert torch.equal(null, model(x, t, previous, torch.tensor([0, 2]), torch.tensor([True, True])))
    assert not torch.allclose(model(x, t.float() + 0.5), model(x, t))
    with pytest.raises(ValueError, match=r"latents: the model takes \(2, 4, 32\), not \(2, 4, 40\)"):
        model(torch.zeros(2, 4, 40), t)
    with pytest.raises(ValueError, match="previous: the model takes"):
        model(x, t, previous[:1])
    bare = make(conditional=False)
    assert bare(x, t).shape == x.shape
    with pytest.raises(ValueError, match="not conditional"):
        bare(x, t, previous)


@pytest.mark.parametrize("make", [unet, dit])
def test_a_fresh_network_gives_zeros(make: Any) -> None:
    config = make().config
    fresh = (PlaneUNet if make is unet else PlaneDiT)(config)
    x, t, previous = latents(config)
    assert fresh(x, t, previous).abs().max() == 0


@pytest.mark.parametrize("patch", [1, 2])
def test_plane_dit_has_a_place_for_every_patch(patch: int) -> None:
    model = dit(patch_size=patch, latent_res=(4, 8), learn_sigma=True)
    config = model.config
    x, t, previous = latents(config)
    assert sum(rows * columns for rows, columns in config.grids) == config.length // patch**2
    assert model(x, t, previous).shape == (2, 8, config.length)
    tokens = model._embed(torch.zeros(1, 8, config.length))[0]
    assert len(torch.unique(tokens, dim=0)) == len(tokens)
    assert set(MODELS) >= {f"PlaneDiT-{size}/{side}" for size in ("S", "B", "L", "XL") for side in (1, 2, 4)}


# ---- checkpoints


def test_averages_without_dots_are_read() -> None:
    """Ten blocks and more: the names of the release's averages leave out where a number ends."""
    model = unet(channel_mult=(1, 1, 1), num_res_blocks=3, latent_res=(4, 4), latent_frames=4)
    official = export_unet(model.state_dict(), model.config)
    shadow = {name.replace(".", ""): value for name, value in official.items() if not name.endswith("zeros")}
    assert "diffusion_modelinput_blocks100in_layers0weight" in shadow
    shadow |= {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(34000)}
    state, config = load(shadow, num_heads=2, latent_res=(4, 4), latent_frames=4)
    assert config == model.config and is_unet(shadow) and is_unet(official)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    model = unet()
    official = export_unet(model.state_dict(), model.config)
    known = {"num_heads": 2, "latent_frames": 2}
    assert load({f"module.{name}": value for name, value in official.items()}, **known)[1] == model.config
    assert load(official, num_heads=2, latent_res=(4, 4))[1] == model.config
    with pytest.raises(ValueError, match=r"missing mid_attn\.norm\.weight"):
        load({name: value for name, value in official.items() if "mid_attn.norm.weight" not in name}, **known)
    with pytest.raises(ValueError, match=r"unknown extra\.weight"):
        load(official | {"diffusion_model.extra.weight": torch.zeros(2)}, **known)
    with pytest.raises(ValueError, match=r"input_blocks\.2\.0\.in_layers\.0\.weight is \(64,\), where the network .* has \(32,\)"):
        load(official | {"diffusion_model.input_blocks.2.0.in_layers.0.weight": torch.zeros(64)}, **known)
    with pytest.raises(ValueError, match="no square planes of 3 frames"):
        load(official, num_heads=2, latent_frames=3)
    with pytest.raises(ValueError, match="does not fit"):
        load({"encoder.weight": torch.zeros(2)})
    assert not is_unet({"encoder.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="no labels"):
        export_unet({}, PlaneUNetConfig(num_classes=2))


# ---- compilation


class Unit(nn.Linear):
    """A unit of ours: torch 2.11 compiles no module of its own that is called by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


@pytest.mark.slow
def test_units_of_many_sizes_compile_each_for_its_own() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    units = [Unit(size, size) for size in range(1, 11)]
    _compile(units)
    for unit in units:
        x = torch.randn(2, unit.in_features)
        torch.testing.assert_close(unit(x), nn.functional.linear(x, unit.weight, unit.bias))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(units)
