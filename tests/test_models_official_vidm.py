"""Released checkpoints of VIDM's generators: every layout there and back, what tables of coordinates tell, image models as a start."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from models.official import hvdm_unet, pvdm_unet
from models.official.vidm import export_content, export_motion, is_content, is_motion, load_content, load_motion
from models.unets.positional import PosGN
from models.unets.vidm_content import ContentUNet
from models.unets.vidm_motion import MotionUNet
from tests.vidm_networks import content, motion, pictures, times

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"resblock_updown": False},
    {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (4, 1), "image_size": (8, 16)},
    {"channel_mult": (1, 1, 2, 2), "attention_resolutions": (), "image_size": (8, 8)},
    {"channel_mult": (2, 3), "attention_resolutions": (2,)},
    {"learn_sigma": False},
]
NARROW = {"model_channels": 64, "channel_mult": (0.5, 1, 1.5), "image_size": (8, 8), "attention_resolutions": ()}
"""Levels narrower than model_channels, which of the content network alone the tensors tell."""
UNTOLD = {"num_head_channels": 32}


def tables(model: MotionUNet, batch: int = 1) -> dict[str, Tensor]:
    """The tables of coordinates that the release keeps as buffers, by its names."""
    config, found = model.config, {}
    names = {name.removesuffix(".linear_0.bias") for name in export_motion(model.state_dict(), config) if name.endswith("linear_0.bias")}
    assert len(names) == sum(isinstance(module, PosGN) for module in model.modules())
    for name in names:
        rows, columns = config.image_size if ".input_blocks.1.0." in name else (1, 1)
        found[f"{name}.coords"] = torch.zeros(batch, rows, columns, 2)
        found[f"{name}.new_coords"] = torch.zeros(config.diffusion_timesteps, config.video_timesteps, 1, 1, 2)
    return found


def small(**changes: Any) -> MotionUNet:
    """With few steps, so that tables are small."""
    return motion(**{"flow_input": "minus_one_one", "diffusion_timesteps": 20} | changes)


def released(state: dict[str, Tensor]) -> dict[str, Any]:
    """A file of the release: raw weights beside the averages."""
    return {"iters": 400_000, "state_dict": {name: value + 1 for name, value in state.items()}, "ema_state_dict": state, "optimizer": {}}


@pytest.mark.parametrize("changes", LAYOUTS)
def test_every_layout_of_the_motion_network_is_told_by_its_checkpoint(changes: dict[str, Any]) -> None:
    model = small(**changes)
    official = export_motion(model.state_dict(), model.config)
    state, config = load_motion(released(official | tables(model)), **UNTOLD)
    assert config == model.config and config.video_timesteps == 16
    again = MotionUNet(config)
    again.load_state_dict(state)
    (x, previous, first), (t, frame) = pictures(size=config.image_size), (torch.tensor([3, 19]), times()[1])
    assert torch.equal(again.eval()(x, t, frame, previous, first), model(x, t, frame, previous, first))
    assert export_motion(again.state_dict(), config).keys() == official.keys()


def test_names_of_the_motion_network() -> None:
    model = small(channel_mult=(1, 2), attention_resolutions=(2,))
    official = export_motion(model.state_dict(), model.config)
    for name, shape in {
        "module.encoder.input_blocks.0.0.weight": (32, 3, 3, 3),
        "module.unet.input_blocks.0.0.weight": (32, 5, 3, 3),
        "module.unet.input_blocks.2.0.emb_layers.linear_1.2.weight": (64, 64),
        "module.unet.input_blocks.3.0.emb_layers.out_rest.1.weight": (64, 64, 3, 3),
        "module.unet.input_blocks.3.0.skip_connection.weight": (64, 32, 1, 1),
        "module.unet.input_blocks.3.1.qkv.weight": (192, 64, 1),
        "module.unet.middle_block.1.proj_out.weight": (64, 64, 1),
        "module.unet.output_blocks.1.2.in_layers.2.weight": (64, 64, 3, 3),
        "module.unet.out.2.weight": (6, 32, 3, 3),
        "module.spynet.basic_module.5.basic_module.4.conv.weight": (2, 16, 7, 7),
        "module.spynet.mean": (1, 3, 1, 1),
    }.items():
        assert tuple(official[name].shape) == shape
    assert not any("layers.0.layers" in name or name.endswith("coords") for name in official)


def test_frame_indices_are_read_and_a_mismatch_is_an_error() -> None:
    """The release built its generator with 64 frame indices for weights trained with 128, and nothing failed."""
    model = small(video_timesteps=12)
    bare = export_motion(model.state_dict(), model.config)
    checkpoint = released(bare | tables(model, batch=5))
    assert load_motion(checkpoint, **UNTOLD)[1].video_timesteps == 12
    with pytest.raises(ValueError, match="video_timesteps 6: the checkpoint was trained with 12"):
        load_motion(checkpoint, video_timesteps=6, **UNTOLD)
    with pytest.raises(ValueError, match="diffusion_timesteps 1000: the checkpoint was trained with 20"):
        load_motion(checkpoint, diffusion_timesteps=1000, **UNTOLD)
    with pytest.raises(ValueError, match="give video_timesteps"):
        load_motion(bare, **UNTOLD)
    assert load_motion(bare, video_timesteps=6, image_size=(8, 12), **UNTOLD)[1].diffusion_timesteps == 1000


def test_released_flow_networks_are_given_what_they_are_used_to() -> None:
    model = small()
    _, config = load_motion(released(export_motion(model.state_dict(), model.config) | tables(model)), **UNTOLD)
    assert config.flow_input == "minus_one_one"
    with pytest.raises(ValueError, match="flow_input zero_one: the release gives"):
        export_motion(model.state_dict(), motion().config)


def test_tensors_that_do_not_fit_are_named() -> None:
    """The release loaded with strict=False."""
    model = small()
    whole = export_motion(model.state_dict(), model.config) | tables(model)
    lacking = {name: value for name, value in whole.items() if name != "module.unet.output_blocks.0.0.emb_layers.linear_0.bias"}
    with pytest.raises(ValueError, match=r"missing unet\.output_blocks\.0\.0\.emb_layers\.linear_0\.bias"):
        load_motion(lacking, **UNTOLD)
    with pytest.raises(ValueError, match=r"unknown unet\.time_embed\.0\.weight"):
        load_motion(whole | {"module.unet.time_embed.0.weight": torch.zeros(2)}, **UNTOLD)
    with pytest.raises(ValueError, match=r"encoder\.input_blocks\.1\.0\.in_layers\.2\.bias is \(7,\)"):
        load_motion(whole | {"module.encoder.input_blocks.1.0.in_layers.2.bias": torch.zeros(7)}, **UNTOLD)
    with pytest.raises(ValueError, match=r"lacks encoder\.input_blocks\.0\.0\.weight or unet\.out\.2\.weight"):
        load_motion(export_content(content().state_dict()), video_timesteps=4)


@pytest.mark.parametrize("changes", [*LAYOUTS, NARROW, {"use_scale_shift_norm": False}, {"num_classes": 4}])
def test_every_layout_of_the_content_network_is_told_by_its_checkpoint(changes: dict[str, Any]) -> None:
    model = content(**changes)
    official = export_content(model.state_dict())
    state, config = load_content(released(official), **UNTOLD)
    assert config == model.config
    again = ContentUNet(config)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert {"module.input.input", "module.dt_embed.0.weight", "module.input_blocks.0.0.weight"} <= official.keys()


@pytest.mark.parametrize("missing", ["input.input", "input_blocks.1.0.emb_layers.1.weight", "output_blocks.0.0.out_layers.3.bias"])
def test_a_content_checkpoint_that_lacks_a_tensor_is_no_other_model(missing: str) -> None:
    """Without its constant it is no image model of six channels."""
    official = export_content(content().state_dict())
    del official[f"module.{missing}"]
    with pytest.raises(ValueError, match=f"missing {re.escape(missing)}"):
        load_content(released(official), **UNTOLD)


def image_model(model: ContentUNet) -> dict[str, Tensor]:
    """A checkpoint of guided-diffusion: without a constant, bare names."""
    official = {name.removeprefix("module."): value for name, value in export_content(model.state_dict()).items()}
    del official["input.input"]
    official["input_blocks.0.0.weight"] = official["input_blocks.0.0.weight"][:, :3]
    return {name.replace("dt_embed", "time_embed"): value for name, value in official.items()}


def test_an_image_model_is_a_start() -> None:
    """It computes what it computed: the constant is there to be learned, and is not looked at yet."""
    plain = content()
    with torch.no_grad():
        plain.input_blocks[0].layers[0].weight[:, 3:] = 0
    state, config = load_content(image_model(plain), image_size=(8, 12), **UNTOLD)
    assert config == plain.config
    model = ContentUNet(config)
    model.load_state_dict(state)
    x, t = pictures()[0], times()[0]
    assert torch.equal(model.eval()(x, t), plain(x, t))
    assert 0.8 < float(model.constant.detach().std()) < 1.2
    model(x, t).square().mean().backward()
    grad = model.input_blocks[0].layers[0].weight.grad
    assert grad is not None and bool(grad[:, 3:].any())
    again = load_content(image_model(plain), image_size=(8, 12), **UNTOLD)[0]
    assert torch.equal(again["constant"], state["constant"])  # on every rank


def test_checkpoints_are_told_apart() -> None:
    first, following = export_content(content().state_dict()), export_motion(small().state_dict(), small().config)
    assert is_content(first) and is_content(image_model(content())) and is_content(released(first)) and not is_motion(first)
    assert is_motion(following) and is_motion(released(following)) and not is_content(following)
    for other in (first, following):
        assert not pvdm_unet.is_unet(other) and not hvdm_unet.is_unet(other)
    assert not is_content({}) and not is_motion({"weight": torch.zeros(1)})
