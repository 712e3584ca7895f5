"""HVDM's released diffusion checkpoints <-> VolumeUNet's state dicts (spec, hvdm.md sections 6, 8 and 10). Exact both ways.

The release's network has no attention, but places for it: at the levels of its `attention_resolutions` what doubles the sides comes one
number later. Tables of ours keep their names among the release's; where a checkpoint has none, they are zeros.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.layers.tables import Table
from models.official.checkpoint import State
from models.official.unets import PREFIX, ZEROS, bare_names, check_state, renamed, settings
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig

ATTENTION_RESOLUTIONS = (4, 2, 1)
"""The release's: levels, by how often smaller their sides are, where what doubles the sides has the number 2 instead of 1."""
_STAGES = ("input_conv_blocks", "output_conv_blocks")
_HEADS = ("time_embed", "middle_conv_block", *_STAGES, "out_freq", "task_emb", "dynamics_emb", "stride_emb")
_IMPORT = (
    (r"time_embed\.", "t_embedder.mlp."),
    (r"input_conv_blocks\.(\d+)\.0\.", r"input_blocks.\1.layers.0."),
    (r"output_conv_blocks\.(\d+)\.0\.", r"output_blocks.\1.layers.0."),
    (r"output_conv_blocks\.(\d+)\.[12]\.", r"output_blocks.\1.layers.1."),
    (r"middle_conv_block\.0\.", "middle_block.layers.0."),
    (r"middle_conv_block\.2\.", "middle_block.layers.1."),
    (r"out_freq\.0\.", "out.norm."),
    (r"out_freq\.2\.", "out.conv."),
)
_EXPORT = (
    (r"t_embedder\.mlp\.", "time_embed."),
    (r"(input|output)_blocks\.(\d+)\.layers\.(\d)\.", r"\1_conv_blocks.\2.\3."),
    (r"middle_block\.layers\.0\.", "middle_conv_block.0."),
    (r"middle_block\.layers\.1\.", "middle_conv_block.2."),
    (r"out\.norm\.", "out_freq.0."),
    (r"out\.conv\.", "out_freq.2."),
)


def load(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, VolumeUNetConfig]:
    """State dict and config of VolumeUNet.

    `known`: settings that the tensors do not tell: dropout, and latent_res and latent_frames, of which the stored zeros tell one when the
    other is known (frames: default 16), for square frames; and tables to add (`tasks`, `dynamics_bins`, `strides`), as zeros. Raises
    ValueError naming unknown and missing tensors.
    """
    official = unwrap_unet(checkpoint)
    zeros = official.pop(ZEROS, None)
    state = {renamed(name, _IMPORT): value for name, value in official.items()}
    config = VolumeUNetConfig(**settings(state, zeros, _EXPORT) | _told(state) | _latents(zeros, known) | known)
    state |= _tables(state, config)
    check_state(state, lambda: VolumeUNet(config), (*_shifted(config, set(ATTENTION_RESOLUTIONS)), *_EXPORT))
    return state, config


def is_unet(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's tensors are those of a volume UNet, by their names."""
    try:
        state = unwrap_unet(checkpoint)
    except ValueError:
        return False
    return any(name.startswith("input_conv_blocks.") for name in state)


def export_unet(state: State, config: VolumeUNetConfig, attention_resolutions: Iterable[int] = ATTENTION_RESOLUTIONS) -> State:
    """Official state dict of VolumeUNet's. Raises ValueError for a model with labels, which the release's network has no place for."""
    if config.num_classes:
        raise ValueError(f"num_classes {config.num_classes}: the release's network has no labels")
    rules = (*_shifted(config, set(attention_resolutions)), *_EXPORT)
    official = {renamed(name, rules): value for name, value in state.items()}
    if config.conditional:
        official[ZEROS] = torch.zeros(1, config.in_channels, math.prod(config.latent_shape[1:]))
    return {PREFIX + name: value for name, value in official.items()}


def unwrap_unet(checkpoint: Mapping[str, Any]) -> State:
    """The tensors under the release's names without the prefix, of either form."""
    return bare_names(checkpoint, _HEADS, _STAGES)


def _shifted(config: VolumeUNetConfig, attention_resolutions: set[int]) -> list[tuple[str, str]]:
    """Rules for the layers that come after a place for attention. Output block j is of level L - 1 - j // (blocks + 1)."""
    blocks, levels = config.num_res_blocks + 1, len(config.channel_mult)
    last = {level: (levels - level) * blocks - 1 for level in range(1, levels) if 2**level in attention_resolutions}
    return [(rf"output_blocks\.{j}\.layers\.1\.", f"output_conv_blocks.{j}.2.") for j in last.values()]


def _told(state: State) -> dict[str, Any]:
    """The tables that a state dict has."""
    rows = {name: len(state[f"{name}_emb.weight"]) - 1 for name in ("dynamics", "stride") if f"{name}_emb.weight" in state}
    return {"tasks": "task_emb.weight" in state, "dynamics_bins": rows.get("dynamics", 0), "strides": rows.get("stride", 0)}


def _tables(state: State, config: VolumeUNetConfig) -> State:
    """Zeros for the tables that it does not have."""
    with torch.device("meta"):
        modules = dict(VolumeUNet(config).named_children())
    shapes = {f"{name}.weight": module.weight.shape for name, module in modules.items() if isinstance(module, Table)}
    return {name: torch.zeros(shape) for name, shape in shapes.items() if name not in state}


def _latents(zeros: Tensor | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the latents, from the length of the stored zeros and the frames or the sides that are known."""
    if zeros is None or {"latent_res", "latent_frames"} <= known.keys():
        return {}
    length = zeros.shape[2]
    if "latent_res" in known:
        rows, columns = known["latent_res"]
        frames, rest = divmod(length, rows * columns)
        if rest or frames < 1:
            raise ValueError(f"latent_res {rows} x {columns}: no number of frames makes latents of {length} positions")
        return {"latent_frames": frames}
    frames = known.get("latent_frames", VolumeUNetConfig.latent_frames)
    side = math.isqrt(length // frames)
    if side < 1 or side * side * frames != length:
        raise ValueError(f"latents of {length} positions are no {frames} square frames: give latent_res or latent_frames")
    return {"latent_res": (side, side), "latent_frames": frames}
