"""Released checkpoints of HVDM's denoiser: every layout there and back, averages, tables that are added, files that do not fit."""

from typing import Any

import pytest
import torch

from models.official.hvdm_unet import export_unet, is_unet, load
from models.official.pvdm_unet import is_unet as is_plane_unet
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig
from tests.volume_denoisers import TABLES, latents, unet


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resblock_updown": False},  # which the release's own network cannot run: its resampling is of pictures
        {"use_scale_shift_norm": False},
        {"channel_mult": (1, 2, 2), "latent_res": (4, 4), "num_res_blocks": 2},
        {"out_channels": 8},
        {"conditional": False},
        TABLES,
    ],
)
@pytest.mark.parametrize("places", [(4, 2, 1), (1,)])
def test_every_layout_computes_and_its_checkpoint_tells_it(changes: dict[str, Any], places: tuple[int, ...]) -> None:
    model = unet(**changes)
    x, t, previous = latents(model.config)
    previous = previous if model.config.conditional else None
    out = model(x, t, previous)
    assert out.shape == (2, changes.get("out_channels", 4), *x.shape[2:])
    official = export_unet(model.state_dict(), model.config, places)
    last = "in_layers.2.weight" if model.config.resblock_updown else "conv.weight"
    number = 2 if 2 ** (len(model.config.channel_mult) - 1) in places else 1
    assert f"diffusion_model.output_conv_blocks.{model.config.num_res_blocks}.{number}.{last}" in official
    state, config = load(official, latent_res=model.config.latent_res, latent_frames=3)
    assert config == model.config
    again = VolumeUNet(config)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(x, t, previous), out)


def test_tables_can_be_added_to_a_released_network() -> None:
    model = unet()
    state, config = load(export_unet(model.state_dict(), model.config), latent_res=(4, 6), tasks=True, dynamics_bins=4)
    told = VolumeUNet(config).eval()
    told.load_state_dict(state)
    x, t, previous = latents(config)
    assert config.tasks and config.dynamics_bins == 4 and config.latent_frames == 3
    assert torch.equal(told(x, t, previous, task=torch.tensor([2, 2]), dynamics=torch.tensor([0, 4])), model(x, t, previous))


def test_averages_without_dots_are_read() -> None:
    """Ten blocks and more: the names of the release's averages leave out where a number ends."""
    model = unet(channel_mult=(1, 1, 1), num_res_blocks=3, latent_res=(4, 4), **TABLES)
    official = export_unet(model.state_dict(), model.config)
    shadow = {name.replace(".", ""): value for name, value in official.items() if not name.endswith("zeros")}
    assert "diffusion_modelinput_conv_blocks100in_layers0weight" in shadow and "diffusion_modelout_freq2bias" in shadow
    shadow |= {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(34000)}
    state, config = load(shadow, latent_res=(4, 4), latent_frames=3)
    assert config == model.config and is_unet(shadow) and is_unet(official)
    assert not is_plane_unet(shadow) and not is_plane_unet(official)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    model = unet(latent_res=(4, 4))
    official = export_unet(model.state_dict(), model.config)
    known = {"latent_frames": 3}
    assert load({f"module.{name}": value for name, value in official.items()}, **known)[1] == model.config
    assert load(official, latent_res=(4, 4))[1] == model.config
    block = "middle_conv_block.2.out_layers.0.weight"
    with pytest.raises(ValueError, match=f"missing {block}"):
        load({name: value for name, value in official.items() if block not in name}, **known)
    with pytest.raises(ValueError, match=r"unknown extra\.weight"):
        load(official | {"diffusion_model.extra.weight": torch.zeros(2)}, **known)
    with pytest.raises(ValueError, match=r"output_conv_blocks\.1\.2\.in_layers\.0\.weight is \(32,\), where the network .* has \(64,\)"):
        load(official | {"diffusion_model.output_conv_blocks.1.2.in_layers.0.weight": torch.zeros(32)}, **known)
    with pytest.raises(ValueError, match=r"latents of 48 positions are no 16 square frames: give latent_res or latent_frames"):
        load(official)
    with pytest.raises(ValueError, match=r"latent_res 5 x 4: no number of frames makes latents of 48 positions"):
        load(official, latent_res=(5, 4))
    with pytest.raises(ValueError, match=r"it lacks input_conv_blocks\.0\.0\.weight, out_freq\.2\.weight or time_embed\.0\.weight"):
        load({"encoder.weight": torch.zeros(2)})
    assert not is_unet({"encoder.weight": torch.zeros(2)}) and not is_unet({})
    with pytest.raises(ValueError, match="no labels"):
        export_unet({}, VolumeUNetConfig(num_classes=2))
