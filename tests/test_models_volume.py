"""Denoisers of latent volumes: the UNet and the transformer, what they are told, settings that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import MODELS, resolve
from models.layers.convolution import Conv3d
from models.layers.tables import Table
from models.official.hvdm_unet import export_unet
from models.transformers.volume_dit import VolumeDiT, VolumeDiTConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig
from tests.volume_denoisers import DIT, TABLES, UNET, dit, latents, unet

MANIFEST = Path(__file__).parent / "parity/data/hvdm_release_manifest.json"


def fresh(make: Any, **changes: Any) -> Any:
    """As it is before training, with an output that is not zero."""
    torch.manual_seed(2)
    model = VolumeUNet(VolumeUNetConfig(**UNET | changes)) if make is unet else VolumeDiT(VolumeDiTConfig(**DIT | changes))
    last = model.out.conv if isinstance(model, VolumeUNet) else model.final_layer.linear
    nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(3))
    return model.eval()


# ---- sizes


def test_published_sizes() -> None:
    for name, parameters in (("HVDM-L", 673_895_812), ("HVDM-S", 168_525_508)):
        config = resolve(name)
        with torch.device("meta"):
            model = MODELS[name].network(config)
            assert sum(p.numel() for p in model.parameters()) == parameters
            names = export_unet(model.state_dict(), config)
            assert model(torch.empty(1, 4, 16, 32, 32), torch.empty(1)).shape == (1, 4, 16, 32, 32)
        if name == "HVDM-L":
            assert {key: list(value.shape) for key, value in names.items()} == json.loads(MANIFEST.read_text())["unet"]
    assert set(MODELS) >= {f"VolumeDiT-{size}/{side}" for size in ("S", "B", "L", "XL") for side in (1, 2, 4)}


def test_convolutions_are_those_with_right_gradients() -> None:
    kinds = {type(module) for module in unet().modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    assert kinds == {Conv3d}
    weights = torch.randn(8, 4, 3, 3, 3, dtype=torch.float64)
    layer = Conv3d(4, 8, 3, padding=1, bias=False).double()
    layer.load_state_dict({"weight": weights})
    x = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)
    assert layer(x).dtype == torch.float64 and torch.equal(layer(x), nn.functional.conv3d(x, weights, padding=1))


@pytest.mark.parametrize("make", [unet, dit])
def test_every_frame_reaches_every_frame(make: Any) -> None:
    """Of the UNet those two frames and more apart: it has no attention, but convolutions over time at every level."""
    model = make()
    x, t, _ = latents(model.config, 1)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, t)[0, 0, 0, 0, 0], x)
    assert bool((grad != 0).flatten(3).any(dim=3).all())


@pytest.mark.parametrize("updown", [True, False])
def test_levels_halve_rows_and_columns_and_keep_all_frames(updown: bool) -> None:
    model = unet(resblock_updown=updown, latent_res=(8, 12), channel_mult=(1, 2, 2))
    shapes: list[tuple[int, ...]] = []
    for unit in model.units():
        unit.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    x, t, _ = latents(model.config, 1)
    model(x, t)
    levels = [(32, 3, 8, 12), (64, 3, 4, 6), (64, 3, 2, 3)]
    downs = [levels[0], levels[0], (32, *levels[1][1:]), levels[1], (64, *levels[2][1:]), levels[2]]
    ups = [levels[2], levels[1], levels[1], (64, *levels[0][1:]), levels[0], levels[0]]
    assert shapes == [*downs, levels[2], *ups, (4, 3, 8, 12)]


@pytest.mark.parametrize("make", [unet, dit])
def test_gradients_lie_in_memory_as_their_weights_do(make: Any) -> None:
    """DDP would copy others at every step, and warn."""
    model = make(**TABLES)
    x, t, previous = latents(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, t, previous).square().sum()
    loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or weight.grad.stride() != weight.stride()] == []


@pytest.mark.parametrize("make", [unet, dit])
def test_bfloat16_changes_little(make: Any) -> None:
    model = make()
    x, t, previous = latents(model.config)
    exact = model(x, t, previous)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, t, previous).float() - exact).abs().max() < 0.05 * exact.abs().max()


# ---- what both are told


@pytest.mark.parametrize("make", [unet, dit])
def test_latent_before_and_labels(make: Any) -> None:
    model = make(num_classes=3)
    x, t, previous = latents(model.config)
    out = model(x, t, previous, torch.tensor([0, 2]))
    assert out.shape == x.shape and out.is_contiguous()
    assert torch.equal(model(x, t, None), model(x, t, torch.zeros_like(x)))
    assert not torch.allclose(out, model(x, t, None, torch.tensor([0, 2])))
    assert not torch.allclose(out, model(x, t, previous, torch.tensor([1, 2])))
    null = model(x, t, previous)
    assert torch.equal(null, model(x, t, previous, torch.tensor([3, 3])))
    assert torch.equal(null, model(x, t, previous, torch.tensor([0, 2]), torch.tensor([True, True])))
    assert not torch.allclose(model(x, t.float() + 0.5), model(x, t))
    with pytest.raises(ValueError, match=r"latents: the model takes \(2, 4, 3, 4, 6\), not \(2, 4, 4, 4, 6\)"):
        model(torch.zeros(2, 4, 4, 4, 6), t)
    with pytest.raises(ValueError, match="previous: the model takes"):
        model(x, t, previous[:1])
    bare = make(conditional=False)
    assert bare(x, t).shape == x.shape
    with pytest.raises(ValueError, match="not conditional"):
        bare(x, t, previous)


@pytest.mark.parametrize("make", [unet, dit])
def test_a_network_with_tables_begins_as_the_one_without(make: Any) -> None:
    plain, told = fresh(make), fresh(make, **TABLES)
    x, t, previous = latents(plain.config)
    out = plain(x, t, previous)
    assert out.abs().max() > 0.1
    said = {"task": torch.tensor([1, 2]), "dynamics": torch.tensor([0, 9]), "stride": torch.tensor([2, 0])}
    assert torch.equal(out, told(x, t, previous)) and torch.equal(out, told(x, t, previous, **said))
    assert {type(module) for name, module in told.named_children() if name.endswith("_emb")} == {Table}


@pytest.mark.parametrize("make", [unet, dit])
def test_a_checkpoint_without_tables_loads_as_zeros(make: Any) -> None:
    plain, told = make(), make(**TABLES)
    assert told.task_emb.weight.abs().min() > 0
    told.load_state_dict(plain.state_dict())
    x, t, previous = latents(plain.config)
    assert torch.equal(plain(x, t, previous), told(x, t, previous, task=torch.tensor([1, 2])))
    shapes = {name: tuple(value.shape) for name, value in told.state_dict().items() if name.endswith("_emb.weight")}
    width = 128 if make is unet else 32
    assert shapes == {"task_emb.weight": (3, width), "dynamics_emb.weight": (11, width), "stride_emb.weight": (4, width)}
    with pytest.raises(RuntimeError, match="Unexpected"):
        plain.load_state_dict(told.state_dict())
    with torch.device("meta"):
        empty = type(told)(told.config)
    empty.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(plain(x, t, previous), empty(x, t, previous))


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize(("name", "null"), [("task", 0), ("dynamics", 10), ("stride", 3)])
def test_tables_tell(make: Any, name: str, null: int) -> None:
    """Each row counts, for its own sample; the row of what is not told is that of nothing at all."""
    model = make(**TABLES)
    x, t, previous = latents(model.config)
    other = 1
    nothing = model(x, t, previous)
    assert torch.equal(nothing, model(x, t, previous, **{name: torch.tensor([null, null])}))
    said = model(x, t, previous, **{name: torch.tensor([null, other])})
    assert torch.allclose(said[0], nothing[0], atol=1e-6) and not torch.allclose(said[1], nothing[1], atol=1e-3)
    with pytest.raises(ValueError, match=f"{name}: the model has no table for it"):
        make()(x, t, previous, **{name: torch.tensor([null, null])})


@pytest.mark.parametrize("make", [unet, dit])
def test_a_fresh_network_gives_zeros(make: Any) -> None:
    config = make().config
    x, t, previous = latents(config)
    assert (VolumeUNet if make is unet else VolumeDiT)(config)(x, t, previous).abs().max() == 0


def test_transformer_has_a_place_for_every_patch_and_frame() -> None:
    """Of equal patches everywhere it makes different ones everywhere."""
    model = dit(patch_size=1, learn_sigma=True)
    out = model(torch.ones(1, 4, 3, 4, 6), torch.tensor([5]))
    assert out.shape == (1, 8, 3, 4, 6)
    places = out[0].flatten(1).t()
    assert len(torch.unique(places, dim=0)) == len(places) == 72


# ---- settings


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, words in (
        ({"latent_res": (4, 6), "channel_mult": (1, 1, 1)}, "latent_res 4 x 6 cannot be halved 2 times: use multiples of 4, or fewer"),
        ({"model_channels": 48}, "model_channels 48 x 1 is not a multiple of 32"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks 0: at least 1"),
        ({"latent_frames": 0}, "latent_frames 0: at least 1"),
        ({"out_channels": -1}, "out_channels -1: at least 0"),
        ({"dropout": 1.5}, "dropout 1.5: a share"),
        ({"dynamics_bins": -1}, "dynamics_bins -1: at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            VolumeUNetConfig(**UNET | changes)
    for changes, words in (
        ({"latent_res": (4, 5)}, "latent_res 4 x 5 is not a multiple of patch_size 2"),
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
        ({"depth": 3}, "depth 3 is odd: .*; use 4"),
        ({"depth": 0}, "depth 0: at least 1"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio 0\.01"),
        ({"strides": -1}, "strides -1: at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            VolumeDiTConfig(**DIT | changes)
    with pytest.raises(ValueError, match="the nearest is 'HVDM-"):
        resolve("HVDM-M")
