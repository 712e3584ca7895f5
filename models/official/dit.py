"""Official DiT checkpoints ({model, ema, opt, args}, or a bare state dict) <-> ContentDiT. Both use these names (cmd.md section 7)."""

import math
from collections.abc import Mapping
from typing import Any

from models import SIZES
from models.official.checkpoint import State, check_names, depth_of, unwrap
from models.transformers.dit import DiTConfig

_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
_REST = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
CONDITIONS = ("y_embedder.embedding_table.weight", "cond_embedder.proj.weight", "cond_embedder.proj.bias", "cond_embedder.null")


def dit_names(depth: int, *more: str) -> list[str]:
    """Names of a DiT's tensors without its optional conditions; `more` are further layers with weight and bias."""
    layers = [*_REST, *more, *(f"blocks.{i}.{layer}" for i in range(depth) for layer in _BLOCK)]
    return ["pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))]


def import_dit(checkpoint: Mapping[str, Any]) -> State:
    """State dict of ContentDiT, the EMA weights where there are any. Raises ValueError naming unknown and missing tensors."""
    state = unwrap(checkpoint, "ema", "model")
    check_names(state, dit_names(depth_of(state, "blocks.")), CONDITIONS)
    return state


def export_dit(state: State) -> State:
    """State dict of the official DiT."""
    check_names(state, dit_names(depth_of(state, "blocks.")), CONDITIONS)
    return dict(state)


def dit_settings(state: State, num_heads: int = 0) -> dict[str, Any]:
    """The settings of a DiT that its tensors tell, the label table read as having a null row, heads by the named sizes.

    Raises ValueError for a width that is none of them: then `num_heads` must be given.
    """
    _, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    width = state["pos_embed"].shape[2]
    heads = {size[0]: size[2] for size in SIZES.values()}
    if not num_heads and width not in heads:
        raise ValueError(
            f"the number of heads cannot be told from width {width}: it is none of the named sizes {sorted(heads)}; give num_heads"
        )
    labels = state.get("y_embedder.embedding_table.weight")
    vectors = state.get("cond_embedder.proj.weight")
    return {
        "in_channels": in_channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth_of(state, "blocks."),
        "num_heads": num_heads or heads[width],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch**2,
        "num_classes": 0 if labels is None else len(labels) - 1,
        "cond_dim": 0 if vectors is None else vectors.shape[1],
    }


def dit_config(state: State, input_size: tuple[int, int] | None = None, num_heads: int = 0) -> DiTConfig:
    """Config of the ContentDiT that an official state dict fits. `input_size` None: a square with the position table's tokens."""
    settings = dit_settings(state, num_heads)
    side = math.isqrt(state["pos_embed"].shape[1]) * settings["patch_size"]
    return DiTConfig(input_size=input_size or (side, side), **settings)
