"""VIDM's released checkpoints <-> state dicts of its two generators (spec, vidm.md sections 4 and 10). Exact both ways.

A file is {"iters", "state_dict", "ema_state_dict", "optimizer"}; names begin with "module.". The averages are what is read. The motion
generator's has tables of coordinates, which are not weights: they tell the diffusion steps, the frame indices and the pictures' size.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.layers.spynet import MEAN, STD
from models.official.checkpoint import State, unwrap
from models.official.unets import attended, check_state, ends, export_state, import_state, layout, multiples, scales
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig

PREFIX = "module."
_CACHES = ("coords", "new_coords")
"""Last parts of the names of the tables."""
_CONSTANT = "input.input"
_FIRST = "input_blocks.0.layers.0.weight"
IMPORT = (
    (r"(encoder\.|unet\.)?(input|output)_blocks\.(\d+)\.(\d)\.", r"\1\2_blocks.\3.layers.\4."),
    (r"(unet\.)?middle_block\.(\d)\.", r"\1middle_block.layers.\2."),
    (r"(unet\.)?out\.0\.", r"\1out.norm."),
    (r"(unet\.)?out\.2\.", r"\1out.conv."),
    (r"(spynet\.)?basic_module\.(\d+)\.basic_module\.(\d+)\.conv\.", r"\1levels.\2.convs.\3."),
    (r"(?:dt|time)_embed\.", "t_embedder.mlp."),
    (r"label_emb\.", "y_embedder.embedding_table."),
    (r"input\.input$", "constant"),
)
EXPORT = (
    (r"(encoder\.|unet\.)?(input|output)_blocks\.(\d+)\.layers\.(\d)\.", r"\1\2_blocks.\3.\4."),
    (r"(unet\.)?middle_block\.layers\.(\d)\.", r"\1middle_block.\2."),
    (r"(unet\.)?out\.norm\.", r"\1out.0."),
    (r"(unet\.)?out\.conv\.", r"\1out.2."),
    (r"(spynet\.)?levels\.(\d+)\.convs\.(\d+)\.", r"\1basic_module.\2.basic_module.\3.conv."),
    (r"t_embedder\.mlp\.", "dt_embed."),
    (r"y_embedder\.embedding_table\.", "label_emb."),
    (r"constant$", "input.input"),
)
"""Ours <-> the release's, of whole networks and of their parts alone."""


def load_motion(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, MotionUNetConfig]:
    """State dict and config of MotionUNet, whose flow network is given pictures in [-1, 1], as in the release.

    `known`: settings that the tensors do not tell: num_heads, num_head_channels and new_attention_order (default: the release's); and
    video_timesteps, diffusion_timesteps (default 1000) and image_size where the file has no tables of coordinates. Raises ValueError
    naming unknown and missing tensors, where a table says otherwise than `known`, and where nothing says video_timesteps.
    """
    official = _unwrapped(checkpoint)
    told = _tables(official, known)
    constants = ("spynet.mean", "spynet.std")
    weights = {name: value for name, value in official.items() if not _is_cache(name) and name not in constants}
    state = import_state(weights, IMPORT)
    first, last = ends(state, ("encoder.input_blocks.0.layers.0.weight", "unet.out.conv.weight"), EXPORT)
    told |= _stages(state, "unet.") | _output(first.shape[1], len(last))
    config = MotionUNetConfig(**{"flow_input": "minus_one_one"} | told | known)
    check_state(state, lambda: MotionUNet(config), EXPORT)
    return state, config


def load_content(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, ContentUNetConfig]:
    """State dict and config of ContentUNet, from VIDM's checkpoint or from one of an image model of guided-diffusion or P2 weighting.

    Such an image model gets a constant, drawn from a fixed seed, that its first convolution pays no heed to yet; it computes the same.
    `known`: settings that the tensors do not tell: num_heads, num_head_channels, new_attention_order, dropout, and image_size of an
    image model (default: the release's). Raises ValueError naming unknown and missing tensors.
    """
    official = _unwrapped(checkpoint)
    state = import_state(official, IMPORT)
    first, last, step = ends(state, (_FIRST, "out.conv.weight", "t_embedder.mlp.0.weight"), EXPORT)
    plain = _CONSTANT not in official and "time_embed.0.weight" in official
    channels = first.shape[1] if plain else first.shape[1] // 2
    told = _stages(state, "", step.shape[1]) | _output(channels, len(last))
    told["use_scale_shift_norm"] = scales(state, int(told["model_channels"] * told["channel_mult"][0]), EXPORT)
    if "y_embedder.embedding_table.weight" in state:
        told["num_classes"] = len(state["y_embedder.embedding_table.weight"])
    if _CONSTANT in official:
        told["image_size"] = tuple(official[_CONSTANT].shape[2:])
    config = ContentUNetConfig(**told | known)
    if plain:
        state[_FIRST] = torch.cat([first, torch.zeros_like(first)], dim=1)
        state["constant"] = torch.randn(1, channels, *config.image_size, generator=torch.Generator().manual_seed(0))
    check_state(state, lambda: ContentUNet(config), EXPORT)
    return state, config


def is_motion(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's tensors are those of the motion generator, by their names."""
    return any(name.startswith("encoder.input_blocks.") for name in _names(checkpoint))


def is_content(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's tensors are those of the content generator or of an image model that can start it, by their names."""
    names = _names(checkpoint)
    return {"dt_embed.0.weight", "time_embed.0.weight"} & names != set() and "input_blocks.0.0.weight" in names


def export_motion(state: Mapping[str, Tensor], config: MotionUNetConfig) -> State:
    """Official tensors of MotionUNet's state dict, without tables of coordinates: the release works its own out.

    They go into a file's "state_dict" or "ema_state_dict". Raises ValueError for a model whose flow network is given pictures in [0, 1].
    """
    if config.flow_input != "minus_one_one":
        raise ValueError(f"flow_input {config.flow_input}: the release gives its flow network pictures in [-1, 1]")
    official = export_state(state, EXPORT)
    official |= {f"spynet.{name}": torch.tensor(values).reshape(1, 3, 1, 1) for name, values in (("mean", MEAN), ("std", STD))}
    return {PREFIX + name: value for name, value in official.items()}


def export_content(state: Mapping[str, Tensor]) -> State:
    """Official tensors of ContentUNet's state dict."""
    return {PREFIX + name: value for name, value in export_state(state, EXPORT).items()}


def _unwrapped(checkpoint: Mapping[str, Any]) -> State:
    """Tensors under the release's names without the prefix, in float32."""
    return {name: value.float() for name, value in unwrap(checkpoint, "ema_state_dict", "state_dict").items()}


def _names(checkpoint: Mapping[str, Any]) -> set[str]:
    try:
        return set(unwrap(checkpoint, "ema_state_dict", "state_dict"))
    except ValueError:
        return set()


def _is_cache(name: str) -> bool:
    return name.rpartition(".")[2] in _CACHES


def _tables(official: State, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables of coordinates tell: (D, V, 1, 1, 2) and (b, h, w, 2)."""
    times = {tuple(value.shape[:2]) for name, value in official.items() if name.endswith("new_coords")}
    if len(times) > 1:
        raise ValueError(f"the tables of coordinates tell several numbers of steps and frames: {sorted(times)}")
    told: dict[str, Any] = {}
    for steps, frames in times:
        told = {"diffusion_timesteps": int(steps), "video_timesteps": int(frames)}
    first = official.get("encoder.input_blocks.1.0.emb_layers.coords")
    if first is not None and first.dim() != 4:
        raise ValueError(f"the table of coordinates has the shape {tuple(first.shape)}: (batch, height, width, 2) was expected")
    if first is not None:
        told["image_size"] = tuple(first.shape[1:3])
    for name in ("diffusion_timesteps", "video_timesteps"):
        if name in told and known.get(name, told[name]) != told[name]:
            raise ValueError(f"{name} {known[name]}: the checkpoint was trained with {told[name]}")
    if not times and "video_timesteps" not in known:
        raise ValueError("the checkpoint has no table that tells its frame indices: give video_timesteps (128 in the release's training)")
    return told


def _stages(state: State, prefix: str, channels: int = 0) -> dict[str, Any]:
    """Settings of the stages; `channels`: model_channels; 0: what divides all widths, where no other tensor tells it."""
    widths, told = layout(state, EXPORT, prefix)
    channels = channels or math.gcd(*widths)
    told |= {"model_channels": channels, "channel_mult": multiples(widths, channels)}
    return told | {"attention_resolutions": attended(state, told, prefix)}


def _output(channels: int, out: int) -> dict[str, Any]:
    return {"in_channels": int(channels), "learn_sigma": out == 2 * channels}
