"""Official CMD checkpoints <-> our state dicts (spec, cmd.md sections 3.4, 5 and 13).

Training checkpoints {autoenc | mdiff_model | cdiff_model, ema, opt, args} and bare state dicts are read; of a diffusion model the EMA
weights where there are any, as generation uses them. Both directions are exact: export after import gives the official tensors back.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from models.autoencoders.cmd import CMDAEConfig
from models.official.checkpoint import State, check_names, depth_of, unwrap
from models.official.dit import CONDITIONS, dit_config, dit_names, dit_settings
from models.transformers.dit import DiTConfig
from models.transformers.motion_dit import MotionDiTConfig

_LAYER = {
    "0.norm": "time.norm",
    "0.fn.qkv": "time.attn.qkv",
    "0.fn.proj": "time.attn.proj",
    "1.norm": "space.norm",
    "1.fn.qkv": "space.attn.qkv",
    "1.fn.proj": "space.attn.proj",
    "2.norm": "ff.norm",
    "2.fn.net.0": "ff.up",
    "2.fn.net.3": "ff.down",
}
_HEADS = {
    "encoder.to_patch_embedding": "patch_in",
    "to_logit.1": "to_weights",
    "to_output.1": "to_pixels",
    "to_patch_embedding_xy": "content_in",
    "pre_xt": "columns_out",
    "pre_yt": "rows_out",
    "post_xt": "columns_in",
    "post_yt": "rows_in",
}
_POINTWISE = ("pre_xt.weight", "pre_yt.weight", "post_xt.weight", "post_yt.weight")
"""Weights of 1x1 convolutions, which are linears of ours."""


def import_autoencoder(checkpoint: Mapping[str, Any]) -> State:
    """State dict of CMDAutoencoder (to be built with rotary "none"). Raises ValueError naming unknown and missing tensors."""
    state = unwrap(checkpoint, "autoenc")
    names = _autoencoder_names(depth_of(state, "encoder.layers."))
    check_names(state, names, _unused_buffers())
    return {ours: state[theirs].flatten(1) if theirs in _POINTWISE else state[theirs] for theirs, ours in names.items()}


def export_autoencoder(state: State) -> State:
    """Official state dict of CMDAutoencoder's, with the buffers that the release stores and never uses."""
    names = _autoencoder_names(depth_of(state, "encoder."))
    check_names(state, names.values())
    official = {theirs: state[ours][:, :, None, None] if theirs in _POINTWISE else state[ours] for theirs, ours in names.items()}
    return official | _unused_buffers()


def import_content(checkpoint: Mapping[str, Any]) -> State:
    """State dict of ContentDiT. Raises ValueError naming unknown and missing tensors."""
    return _checked_dit(unwrap(checkpoint, "ema", "cdiff_model"))


def export_content(state: State) -> State:
    """Official state dict of ContentDiT's."""
    return _checked_dit(state)


def import_motion(checkpoint: Mapping[str, Any]) -> State:
    """State dict of MotionDiT. Raises ValueError naming unknown and missing tensors."""
    return _checked_dit(unwrap(checkpoint, "ema", "mdiff_model"), motion=True)


def export_motion(state: State) -> State:
    """Official state dict of MotionDiT's."""
    return _checked_dit(state, motion=True)


def autoencoder_config(
    state: State, image_size: tuple[int, int] = (64, 64), n_frames: int = 16, mode: Literal["pixel", "latent"] = "pixel", heads: int = 8
) -> CMDAEConfig:
    """Config of the CMDAutoencoder that an official state dict fits; what its tensors do not tell must be given."""
    dim, channels, patch, _ = state["to_logit.1.weight"].shape
    return CMDAEConfig(
        dim=dim,
        image_size=image_size,
        patch_size=patch,
        channels=channels,
        n_frames=n_frames,
        embed_dim=state["pre_xt.weight"].shape[0],
        depth=depth_of(state, "encoder.layers."),
        heads=heads,
        mode=mode,
        rotary="none",
    )


def content_config(state: State, input_size: tuple[int, int] | None = None, num_heads: int = 0) -> DiTConfig:
    """Config of the ContentDiT that an official state dict fits; `num_heads`: for a width of no named size."""
    return dit_config(state, input_size, num_heads)


def motion_config(state: State, input_size: tuple[int, int], keyframe_size: tuple[int, int], num_heads: int = 0) -> MotionDiTConfig:
    """Config of the MotionDiT that an official state dict fits; the sizes of latent and content frame must be given."""
    _, channels, patch, _ = state["keyframe_embedder.proj.weight"].shape
    told = dit_settings(state, num_heads)
    return MotionDiTConfig(
        input_size=input_size, keyframe_size=keyframe_size, keyframe_channels=channels, keyframe_patch_size=patch, **told
    )


def _autoencoder_names(depth: int) -> dict[str, str]:
    """Official name -> ours."""
    layers = dict(_HEADS)
    for stack in ("encoder", "decoder"):
        for i in range(depth):
            layers |= {f"{stack}.layers.{i}.{theirs}": f"{stack}.{i}.{ours}" for theirs, ours in _LAYER.items()}
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}


def _unused_buffers() -> dict[str, Tensor]:
    """The release's rotary buffers: built for heads of 64, saved, and never read."""
    inv_freqs = 1.0 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)
    scales = torch.logspace(0.0, math.log2(5.0), 16, base=2.0)
    tables = {"frame_rot_emb.inv_freqs": inv_freqs, "image_rot_emb.scales": scales}
    return {f"{stack}.{name}": table.clone() for stack in ("encoder", "decoder") for name, table in tables.items()}


def _checked_dit(state: State, motion: bool = False) -> State:
    more = ("keyframe_embedder.proj",) if motion else ()
    names = [*dit_names(depth_of(state, "blocks."), *more), *(["keyframe_pos_embed"] if motion else [])]
    check_names(state, names, CONDITIONS)
    return dict(state)
