"""PVDM's released diffusion checkpoints <-> PlaneUNet's state dicts (spec, pvdm.md sections 3, 5.2 and 8).

model_*.pth and ema_model_*.pth are state dicts whose names begin with "diffusion_model."; the release's object for averages (LitEma)
keeps them without their dots, beside two counters. Both are read; written are names with dots, and the buffer of zeros. Exact both ways.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.official.checkpoint import State, check_names, depth_of, unwrap
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig

PREFIX = "diffusion_model."
_ZEROS = "zeros"
"""The release's buffer for a clip without another before it, (1, channels, positions)."""
_COUNTERS = ("decay", "num_updates")
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
_UNDOTTED = re.compile(
    r"(?P<head>time_embed|input_attns|output_attns|mid_attn|middle_block|input_blocks|output_blocks|out)"
    r"(?P<numbers>\d*)(?P<layer>(?:in_layers|emb_layers|out_layers|skip_connection|norm|qkv|proj_out|op|conv)?)(?P<index>\d?)"
    r"(?P<kind>weight|bias)"
)
_POINTWISE = ("qkv.weight", "proj_out.weight")
"""Ends of the names of weights of 1x1 convolutions, which are linears of ours."""


def load(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, PlaneUNetConfig]:
    """State dict and config of PlaneUNet.

    `known`: settings that the tensors do not tell: num_heads (default 8, the release's), and latent_res and latent_frames, of which the
    stored zeros tell one when the other is known (frames: default 16), for square frames. Raises ValueError naming unknown and missing
    tensors.
    """
    official = unwrap_unet(checkpoint)
    zeros = official.pop(_ZEROS, None)
    state = {_renamed(name, _IMPORT): value.flatten(1) if name.endswith(_POINTWISE) else value for name, value in official.items()}
    config = PlaneUNetConfig(**_settings(state, zeros) | _latents(zeros, known) | known)
    with torch.device("meta"):
        expected = {name: value.shape for name, value in PlaneUNet(config).state_dict().items()}
    check_names((_renamed(name, _EXPORT) for name in state), (_renamed(name, _EXPORT) for name in expected))
    for name, shape in expected.items():
        if state[name].shape != shape:
            found = tuple(state[name].shape)
            raise ValueError(f"{_renamed(name, _EXPORT)} is {found}, where the network that the other tensors tell of has {tuple(shape)}")
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
    official = {_renamed(name, _EXPORT): value[..., None] if name.endswith(_POINTWISE) else value for name, value in state.items()}
    if config.conditional:
        official[_ZEROS] = torch.zeros(1, config.in_channels, config.length)
    return {PREFIX + name: value for name, value in official.items()}


def unwrap_unet(checkpoint: Mapping[str, Any]) -> State:
    """The tensors under the release's names without the prefix, of either form."""
    state = {name: value for name, value in unwrap(checkpoint, "state_dict", "model", "ema").items() if name not in _COUNTERS}
    bare = {name.removeprefix(PREFIX).removeprefix(PREFIX[:-1]): value for name, value in state.items()}
    return bare if any("." in name for name in bare) else {_dotted(name): value for name, value in bare.items()}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return new
    return name


def _dotted(name: str) -> str:
    """ "input_blocks100in_layers2weight" -> "input_blocks.10.0.in_layers.2.weight": the last number of a block is one digit."""
    found = _UNDOTTED.fullmatch(name)
    if found is None:
        return name
    head, numbers = found["head"], found["numbers"]
    places = [numbers[:-1], numbers[-1:]] if head in ("input_blocks", "output_blocks") else [numbers]
    return ".".join(part for part in (head, *places, found["layer"], found["index"], found["kind"]) if part)


def _settings(state: State, zeros: Tensor | None) -> dict[str, Any]:
    """What the tensors, under our names, tell of the network. Only a conditional one has `zeros`, which averages leave out."""
    first, last = state.get("input_blocks.0.layers.0.weight"), state.get("out.conv.weight")
    step = state.get("t_embedder.mlp.0.weight")
    if first is None or last is None or step is None:
        raise ValueError("the state dict does not fit: it lacks input_blocks.0.0.weight, out.2.weight or time_embed.0.weight")
    stages = depth_of(state, "output_blocks.")
    ups = [j for j in range(stages) if any(f"output_blocks.{j}.layers.{k}.{what}" in state for k in (1, 2) for what in _UP)]
    blocks = ups[0] if ups else stages - 1
    starts = [1 + level * (blocks + 1) for level in range(len(ups) + 1)]
    convolutions = [f"input_blocks.{i}.layers.0.out_layers.3.weight" for i in starts]
    if missing := [name for name in convolutions if name not in state]:
        raise ValueError(f"the state dict does not fit: missing {_renamed(missing[0], _EXPORT)}")
    widths, channels = [len(state[name]) for name in convolutions], step.shape[1]
    attended = [2**level for level, i in enumerate(starts) if f"input_blocks.{i}.layers.1.norm.weight" in state]
    conditional = zeros is not None or first.shape[1] == 2 * len(last)
    inputs = first.shape[1] // (2 if conditional else 1)
    return {
        "in_channels": inputs,
        "out_channels": 0 if inputs == len(last) else len(last),
        "model_channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": blocks,
        "attention_resolutions": tuple(reversed(attended)),
        "use_scale_shift_norm": len(state["input_blocks.1.layers.0.emb_layers.1.weight"]) == 2 * widths[0],
        "resblock_updown": not any(name.endswith(".op.weight") for name in state),
        "conditional": conditional,
    }


_UP = ("in_layers.2.weight", "conv.weight")
"""What a second layer that doubles the sides has: a residual block, or a convolution."""


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
