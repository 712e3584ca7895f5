"""PVDM's released diffusion checkpoints <-> PlaneUNet's state dicts (spec, pvdm.md sections 3, 5.2 and 8). Exact both ways."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.official.checkpoint import State
from models.official.unets import PREFIX, ZEROS, attended, bare_names, check_state, export_state, import_state, settings
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig

_STAGES = ("input_blocks", "output_blocks")
_HEADS = ("time_embed", "input_attns", "output_attns", "mid_attn", "middle_block", *_STAGES, "out")
_IMPORT = (
    (r"time_embed\.", "t_embedder.mlp."),
    (r"(input|output)_attns\.(\d+)\.", r"\1_blocks.\2.across."),
    (r"mid_attn\.", "middle_block.across."),
    (r"(input|output)_blocks\.(\d+)\.(\d)\.", r"\1_blocks.\2.layers.\3."),
    (r"middle_block\.(\d)\.", r"middle_block.layers.\1."),
    (r"out\.0\.", "out.norm."),
    (r"out\.2\.", "out.conv."),
)
_EXPORT = (
    (r"t_embedder\.mlp\.", "time_embed."),
    (r"(input|output)_blocks\.(\d+)\.across\.", r"\1_attns.\2."),
    (r"middle_block\.across\.", "mid_attn."),
    (r"(input|output)_blocks\.(\d+)\.layers\.(\d)\.", r"\1_blocks.\2.\3."),
    (r"middle_block\.layers\.(\d)\.", r"middle_block.\1."),
    (r"out\.norm\.", "out.0."),
    (r"out\.conv\.", "out.2."),
)


def load(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, PlaneUNetConfig]:
    """State dict and config of PlaneUNet.

    `known`: settings that the tensors do not tell: num_heads (default 8, the release's), and latent_res and latent_frames, of which the
    stored zeros tell one when the other is known (frames: default 16), for square frames. Raises ValueError naming unknown and missing
    tensors.
    """
    official = unwrap_unet(checkpoint)
    zeros = official.pop(ZEROS, None)
    state = import_state(official, _IMPORT)
    told = settings(state, zeros, _EXPORT)
    config = PlaneUNetConfig(**told | {"attention_resolutions": attended(state, told)} | _latents(zeros, known) | known)
    check_state(state, lambda: PlaneUNet(config), _EXPORT)
    return state, config


def is_unet(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's tensors are those of a plane UNet, by their names."""
    try:
        state = unwrap_unet(checkpoint)
    except ValueError:
        return False
    return any(name.startswith("input_attns.") for name in state)


def export_unet(state: State, config: PlaneUNetConfig) -> State:
    """Official state dict of PlaneUNet's. Raises ValueError for a model with labels, which the release's network has no place for."""
    if config.num_classes:
        raise ValueError(f"num_classes {config.num_classes}: the release's network has no labels")
    official = export_state(state, _EXPORT)
    if config.conditional:
        official[ZEROS] = torch.zeros(1, config.in_channels, config.length)
    return {PREFIX + name: value for name, value in official.items()}


def unwrap_unet(checkpoint: Mapping[str, Any]) -> State:
    """The tensors under the release's names without the prefix, of either form."""
    return bare_names(checkpoint, _HEADS, _STAGES)


def _latents(zeros: Tensor | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the planes, from the length of the stored zeros and the frames or the side that are known."""
    if zeros is None or {"latent_res", "latent_frames"} <= known.keys():
        return {}
    length = zeros.shape[2]
    if "latent_res" in known:
        rows, columns = known["latent_res"]
        frames, rest = divmod(length - rows * columns, rows + columns)
        if rest or frames < 1:
            raise ValueError(f"latent_res {rows} x {columns}: no number of frames makes latents of {length} positions")
        return {"latent_frames": frames}
    frames = known.get("latent_frames", PlaneUNetConfig.latent_frames)
    side = math.isqrt(frames**2 + length) - frames
    if side < 1 or side * (side + 2 * frames) != length:
        raise ValueError(f"latents of {length} positions are no square planes of {frames} frames: give latent_res or latent_frames")
    return {"latent_res": (side, side), "latent_frames": frames}
