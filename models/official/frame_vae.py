"""Checkpoints of the tutorial release's frame VAE and its discriminator <-> our state dicts (spec, latte.md section 4).

The release saves bare state dicts (vae_autoencoder_ckpt.pth, vae_discriminator_ckpt.pth) under names that are ours too, so both directions
only check: every name and every shape must be that of the network whose config the shapes tell.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig
from models.discriminators import FrameDiscriminator, FrameDiscriminatorConfig
from models.official.checkpoint import State, check_names, depth_of, unwrap

_ENTRIES = ("model", "state_dict")


def load(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, FrameVAEConfig]:
    """State dict and config of FrameVAE. `known`: settings that shapes do not tell, or that must be what is said here.

    Those are norm_channels (default: 32, as in the release's recipes), and with attention num_heads, which has no default then.
    Raises ValueError naming what is missing, unknown or of another shape.
    """
    state = unwrap(checkpoint, *_ENTRIES)
    config = _autoencoder_config(state, known)
    return _checked(state, FrameVAE, config), config


def export(state: State, config: FrameVAEConfig) -> State:
    """The release's state dict of a FrameVAE's. Raises ValueError."""
    return _checked(state, FrameVAE, config)


def load_discriminator(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, FrameDiscriminatorConfig]:
    """State dict and config of FrameDiscriminator. `known`: strides and paddings, where they are not the release's. Raises ValueError."""
    state = unwrap(checkpoint, *_ENTRIES)
    shapes = [_shape(state, f"layers.{k}.0.weight") for k in range(depth_of(state, "layers."))]
    told: dict[str, Any] = {
        "channels": shapes[0][1],
        "conv_channels": tuple(shape[0] for shape in shapes[:-1]),
        "kernels": tuple(shape[2] for shape in shapes),
        "strides": (*(2,) * (len(shapes) - 1), 1),
        "paddings": (1,) * len(shapes),
        "norm": "batch" if any(name.endswith("running_mean") for name in state) else "group",
    }
    config = FrameDiscriminatorConfig(**(told | known))
    return _checked(state, FrameDiscriminator, config), config


def export_discriminator(state: State, config: FrameDiscriminatorConfig) -> State:
    """The release's state dict of a FrameDiscriminator's. Raises ValueError."""
    return _checked(state, FrameDiscriminator, config)


def _autoencoder_config(state: State, known: Mapping[str, Any]) -> FrameVAEConfig:
    levels = [f"encoder_layers.{k}" for k in range(depth_of(state, "encoder_layers."))]
    mids = [name for name in state if name.startswith("encoder_mids.")]
    blocks = [f"encoder_mids.{k}" for k in range(depth_of(mids, "encoder_mids."))] if mids else []
    widths = [_width(state, level) for level in levels]
    told: dict[str, Any] = {
        "channels": _shape(state, "encoder_conv_in.weight")[1],
        "z_channels": _shape(state, "post_quant_conv.weight")[0],
        "down_channels": (_shape(state, "encoder_conv_in.weight")[0], *widths),
        "mid_channels": (widths[-1], *(_width(state, block) for block in blocks)),
        "down_sample": tuple(f"{level}.down_sample_conv.weight" in state for level in levels),
        "attn_down": tuple(f"{level}.attention_norms.0.weight" in state for level in levels),
        "num_down_layers": _units(state, levels[0]),
        "num_up_layers": _units(state, "decoder_layers.0"),
    }
    if blocks:
        told["num_mid_layers"] = _units(state, blocks[0]) - 1
    if (told.get("num_mid_layers") or any(told["attn_down"])) and "num_heads" not in known:
        raise ValueError("this frame VAE has attention, and its weights do not tell the number of heads: say num_heads")
    return FrameVAEConfig(**(told | dict(known)))


def _units(state: State, block: str) -> int:
    return depth_of(state, f"{block}.residual_input_conv.")


def _width(state: State, block: str) -> int:
    return _shape(state, f"{block}.residual_input_conv.0.weight")[0]


def _shape(state: State, name: str) -> tuple[int, ...]:
    """Shape of a convolution's weight."""
    if name not in state:
        raise ValueError(f"the state dict does not fit: nothing is called {name}")
    if state[name].ndim != 4:
        raise ValueError(f"the state dict does not fit: {name} has shape {tuple(state[name].shape)}, expected 4 axes")
    return tuple(state[name].shape)


def _checked(state: State, network: type[nn.Module], config: Any) -> State:
    """The same tensors, if they are those of the network."""
    with torch.device("meta"):
        expected = network(config).state_dict()
    check_names(state, expected)
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(f"the state dict does not fit: {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}")
    return dict(state)
