"""Latte checkpoints of both releases <-> our state dicts (spec, latte.md sections 2.4 and 2.5).

Official: {"model", "ema"} or a bare state dict, of a compiled model too; of both the EMA weights, as generation uses them.
Tutorial: a bare state dict. Each convention is a setting of ours (time_embed_order, pos_embed_order), so reading is exact; writing
turns the weights into what the release expects. Position tables are not stored by us: stored ones are checked and left out.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from models import SIZES
from models.layers.embeddings import GridOrder, TimeOrder, sincos_1d, sincos_2d
from models.official.checkpoint import State, check_names, depth_of, unwrap
from models.official.dit import dit_names
from models.transformers.latte import LatteConfig

Release = Literal["official", "tutorial"]

_TABLES = ("pos_embed", "temp_embed")
_LABELS = "y_embedder.embedding_table.weight"
_TEXT = {f"text_embedding_projection.1.{kind}": f"cond_embedder.proj.{kind}" for kind in ("weight", "bias")}
_PATCH, _TIME = "x_embedder.proj.weight", "t_embedder.mlp.0.weight"
_TUTORIAL = {
    "patch_embed_layer.patch_embed.0": "x_embedder.proj",
    "t_proj.0": "t_embedder.mlp.0",
    "t_proj.2": "t_embedder.mlp.2",
    "adaptive_norm_layer.1": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_TUTORIAL_BLOCK = {
    "attn_block.qkv_proj": "attn.qkv",
    "attn_block.output_proj.0": "attn.proj",
    "mlp_block.0": "mlp.fc1",
    "mlp_block.2": "mlp.fc2",
    "adaptive_norm_layer.1": "adaLN_modulation.1",
}
_OFFICIAL_TIME = 256
"""Width of the official step embedding, which is no setting there."""
_SAME_TABLE = 1e-2
"""Stored tables may be half precision, or the averages of a constant."""


def release_of(checkpoint: Mapping[str, Any]) -> Release:
    """Which release wrote a checkpoint. Raises ValueError when it is neither's."""
    state = _unwrap(checkpoint)
    if any(name.startswith("patch_embed_layer.") for name in state):
        return "tutorial"
    if _PATCH in state and any(name.startswith("blocks.") for name in state):
        return "official"
    raise ValueError(f"not a Latte checkpoint: it has neither {_PATCH} (official) nor patch_embed_layer.patch_embed.0.weight (tutorial)")


def load(checkpoint: Mapping[str, Any], **known: Any) -> tuple[State, LatteConfig]:
    """State dict and config of Latte, of either release's checkpoint; `known`: settings that the tensors do not tell.

    Raises ValueError naming what is missing.
    """
    if release_of(checkpoint) == "official":
        return import_official(checkpoint), official_config(checkpoint, **known)
    config = tutorial_config(checkpoint, **known)
    return import_tutorial(checkpoint, config.in_channels), config


def import_official(checkpoint: Mapping[str, Any]) -> State:
    """State dict of Latte, in the official conventions (LatteConfig's defaults). Raises ValueError naming unknown and missing tensors."""
    state = _unwrap(checkpoint)
    _check_official(state)
    _grid_and_order(state)
    return {_TEXT.get(name, name): value for name, value in state.items() if name not in _TABLES}


def export_official(state: State, config: LatteConfig) -> State:
    """Official state dict of Latte's, whatever its conventions: it stores the position tables, which the release loads.

    Raises ValueError for a model that the release's network cannot be.
    """
    _check_layout(config)
    if config.time_embed_dim != _OFFICIAL_TIME:
        raise ValueError(f"time_embed_dim {config.time_embed_dim}: the official step embedding has {_OFFICIAL_TIME}")
    if config.head_dim not in (0, config.hidden_size / config.num_heads):
        raise ValueError(f"head_dim {config.head_dim}: the official heads have hidden_size / num_heads, which is not that")
    if config.cond_dim and config.cond_in_final:
        raise ValueError("cond_in_final: the official final layer does not see the text, a model trained with it cannot be written")
    names = {ours: theirs for theirs, ours in _TEXT.items()}
    official = {names.get(name, name): value for name, value in _reordered(state, config, "cos_sin").items()}
    like = official[_PATCH]
    grid = sincos_2d(config.hidden_size, config.grid, order=config.pos_embed_order)
    time = sincos_1d(torch.arange(config.n_frames), config.hidden_size)
    official |= {"pos_embed": grid[None].to(like.device), "temp_embed": time[None].to(like.device, torch.float32)}
    _check_official(official)
    return official


def official_config(checkpoint: Mapping[str, Any], **known: Any) -> LatteConfig:
    """Config of the Latte that an official checkpoint fits. `known`: settings, of which num_heads is needed for a width of no named size.

    Raises ValueError when something can be told neither from the tensors nor from `known`.
    """
    state = _unwrap(checkpoint)
    _check_official(state)
    _, channels, patch, _ = state[_PATCH].shape
    found = _settings(state, channels, patch, known)
    if "pos_embed" in state:
        grid, found["pos_embed_order"] = _grid_and_order(state)
        found["input_size"] = grid[0] * patch, grid[1] * patch
    if "temp_embed" in state:
        found["n_frames"] = state["temp_embed"].shape[1]
    if _LABELS in state:
        found["num_classes"] = len(state[_LABELS]) - (known.get("class_dropout_prob") != 0)  # without dropping there is no null row
    if "text_embedding_projection.1.weight" in state:
        found |= {"cond_dim": state["text_embedding_projection.1.weight"].shape[1], "cond_in_final": False}
    return LatteConfig(**found | known)


def import_tutorial(checkpoint: Mapping[str, Any], in_channels: int = 4) -> State:
    """State dict of Latte with time_embed_order sin_cos and pos_embed_order hw. Raises ValueError naming unknown and missing tensors."""
    state = _unwrap(checkpoint)
    names = _tutorial_names(depth_of(state, "layers."))
    check_names(state, names)
    _check_axes(state)
    ours = {names[name]: value for name, value in state.items()}
    patch = _patch_of(ours[_PATCH], in_channels)
    return ours | {_PATCH: rearrange(ours[_PATCH], "d (p q c) -> d c p q", p=patch, q=patch)}


def export_tutorial(state: State, config: LatteConfig, *, foreign_positions: bool = False) -> State:
    """The tutorial's state dict of Latte's. Raises ValueError for a model that the tutorial's network cannot be.

    It computes row-first positions when it runs and stores none, so weights trained with column-first ones (pos_embed_order wh) give
    other outputs there, and it has no channels for a learned variance; `foreign_positions` writes both nevertheless, for a reader that is
    told of them.
    """
    _check_layout(config)
    if config.pos_embed_order != "hw" and not foreign_positions:
        raise ValueError("pos_embed_order 'wh': the tutorial's network computes 'hw' positions itself, which are wrong for these weights")
    if config.num_classes or config.cond_dim:
        raise ValueError("the tutorial's network has no class and no text condition")
    if config.mlp_ratio != 4:
        raise ValueError(f"mlp_ratio {config.mlp_ratio}: the tutorial's network has 4")
    if config.learn_sigma and not foreign_positions:
        raise ValueError("learn_sigma: the tutorial's network has no channels for the variance")
    ours = _reordered(state, config, "sin_cos")
    names = _tutorial_names(depth_of(ours, "blocks."))
    check_names(ours, names.values())
    ours[_PATCH] = rearrange(ours[_PATCH], "d c p q -> d (p q c)")
    return {theirs: ours[name] for theirs, name in names.items()}


def tutorial_config(checkpoint: Mapping[str, Any], *, in_channels: int = 4, **known: Any) -> LatteConfig:
    """Config of the Latte that the tutorial's checkpoint fits; input_size, n_frames and heads of no named size are not in the tensors."""
    state = import_tutorial(checkpoint, in_channels)
    found = _settings(state, in_channels, state[_PATCH].shape[2], known)
    return LatteConfig(**{"time_embed_order": "sin_cos", "pos_embed_order": "hw"} | found | known)


def reorder_time(state: State, config: LatteConfig, order: TimeOrder) -> tuple[State, LatteConfig]:
    """The same network with the step embedding in another order: state dict and config."""
    return _reordered(state, config, order), dataclasses.replace(config, time_embed_order=order)


def init_from_dit(checkpoint: Mapping[str, Any], config: LatteConfig | None = None) -> State:
    """The part of Latte's state dict that a DiT checkpoint has: all but the labels and the positions. Load it with strict=False.

    With `config` it is made to fit: the order of the step embedding, and a final layer without variance. Raises ValueError when it
    cannot be.
    """
    state = _unwrap(checkpoint)
    depth = depth_of(state, "blocks.")
    wanted = [name for name in dit_names(depth) if name != "pos_embed"]
    check_names(state, wanted, ("pos_embed", _LABELS))
    _check_axes(state)
    state = {name: state[name] for name in wanted}
    if config is None:
        return state
    if not config.learn_sigma:
        state |= _without_variance(state, config)
    width, channels, patch, _ = state[_PATCH].shape
    found = (width, channels, patch, depth, state["blocks.0.mlp.fc1.weight"].shape[0], state[_TIME].shape[1])
    hidden = int(config.hidden_size * config.mlp_ratio)
    fits = (config.hidden_size, config.in_channels, config.patch_size, config.depth, hidden, config.time_embed_dim)
    if found != fits or config.head_dim not in (0, width // config.num_heads):
        what = "hidden_size, in_channels, patch_size, depth, MLP width, time_embed_dim"
        raise ValueError(f"init_from_dit: the DiT checkpoint has {what} {found}, the model {fits}; they must be equal, head_dim 0")
    return _reordered(state, dataclasses.replace(config, time_embed_order="cos_sin"), config.time_embed_order)


def _unwrap(checkpoint: Mapping[str, Any]) -> State:
    """The tensors under the names of a network that is neither wrapped nor compiled, as a whole or block by block."""
    state = unwrap(checkpoint, "ema", "model")
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}


def _check_official(state: State) -> None:
    wanted = [name for name in dit_names(depth_of(state, "blocks.")) if name != "pos_embed"]
    text = tuple(_TEXT) if any(name in state for name in _TEXT) else ()
    check_names(state, (*wanted, *text), (*_TABLES, _LABELS))
    _check_axes(state)


def _check_axes(state: State) -> None:
    """Raises ValueError for a tensor with another number of axes than the release's of that name."""
    for name, value in state.items():
        axes = 3 if name in _TABLES else 1 if name.endswith(".bias") else 4 if name == _PATCH else 2
        if value.ndim != axes:
            raise ValueError(f"the state dict does not fit: {name} has shape {tuple(value.shape)}, expected {axes} axes")


def _check_layout(config: LatteConfig) -> None:
    if config.block_layout != "interleaved":
        raise ValueError(
            f"block_layout {config.block_layout!r}: both releases interleave their blocks and would run these in another order"
        )


def _grid_and_order(state: State) -> tuple[tuple[int, int], GridOrder]:
    """Grid of the tokens and order of its axes that a stored position table was made for. Raises ValueError for tables of no grid."""
    if "temp_embed" in state:
        table = state["temp_embed"][0].float().cpu()
        if not _close(table, sincos_1d(torch.arange(len(table)), table.shape[1]).float()):
            raise ValueError("temp_embed is not the fixed sine-cosine table of frames 0, 1, ...: no network of ours has a trained one")
    if "pos_embed" not in state:
        return (0, 0), "wh"
    table = state["pos_embed"][0].float().cpu()
    count, width = table.shape
    rows = sorted((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - math.sqrt(count)))
    orders: tuple[GridOrder, ...] = ("wh", "hw")
    for grid in ((n, count // n) for n in rows):
        for order in orders:
            if _close(table, sincos_2d(width, grid, order=order)):
                return grid, order
    raise ValueError(f"pos_embed is not the fixed sine-cosine table of any grid of {count} tokens: no network of ours has a trained one")


def _close(table: Tensor, expected: Tensor) -> bool:
    return table.shape == expected.shape and torch.allclose(table, expected, rtol=0, atol=_SAME_TABLE)


def _settings(state: State, channels: int, patch: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """What tensors under our names tell in either convention. Raises ValueError when the heads cannot be told."""
    width = state[_PATCH].shape[0]
    heads = known.get("num_heads") or {size[0]: size[2] for size in SIZES.values()}.get(width)
    if not heads:
        raise ValueError(f"the number of heads cannot be told from width {width}, which is of no named size: give num_heads")
    total = state["blocks.0.attn.qkv.weight"].shape[0] // 3
    if total % heads:
        raise ValueError(f"num_heads {heads}: the attention is {total} wide, which is no multiple of it")
    return {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth_of(state, "blocks."),
        "num_heads": heads,
        "head_dim": 0 if total == width else total // heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        "time_embed_dim": state[_TIME].shape[1],
    }


def _tutorial_names(depth: int) -> dict[str, str]:
    """The tutorial's name -> ours."""
    layers = dict(_TUTORIAL)
    for k in range(depth):
        layers |= {f"layers.{k}.{theirs}": f"blocks.{k}.{ours}" for theirs, ours in _TUTORIAL_BLOCK.items()}
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in layers.items() for kind in ("weight", "bias")}


def _patch_of(weight: Tensor, in_channels: int) -> int:
    """Side of a patch, from the tutorial's patch weight (D, p p c)."""
    patch = math.isqrt(weight.shape[1] // in_channels)
    if patch**2 * in_channels != weight.shape[1]:
        raise ValueError(f"a patch has {weight.shape[1]} numbers, which is no square of {in_channels} channels: give in_channels")
    return patch


def _reordered(state: State, config: LatteConfig, order: TimeOrder) -> State:
    """A copy of the dict, the first weight's columns of the step MLP in the wanted order."""
    if config.time_embed_order == order:
        return dict(state)
    return state | {_TIME: torch.cat(state[_TIME].chunk(2, dim=1)[::-1], dim=1)}


def _without_variance(state: State, config: LatteConfig) -> State:
    """The final layer's rows of the noise, where a checkpoint has those of the variance as well."""
    rows, channels = config.patch_size**2, config.in_channels
    final = {name: state[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    if len(final["final_layer.linear.bias"]) != 2 * rows * channels:
        return {}
    return {name: value.unflatten(0, (rows, 2 * channels))[:, :channels].flatten(0, 1) for name, value in final.items()}
