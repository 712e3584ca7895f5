"""What official checkpoints of PVDM's and HVDM's autoencoders have in common: the names of their layers, and the sizes that tensors tell
(spec, pvdm.md sections 2.3 and 8, hvdm.md section 4).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from models.autoencoders.tokens import TokenAEConfig
from models.layers.planes import PLANES
from models.layers.rotary import grid_scales, time_rates
from models.official.checkpoint import State, depth_of

SELF_ATTENTION = {"to_qkv": "attn.qkv", "to_out.0": "attn.proj"}
CROSS_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj"}
"""Official name -> ours, of the parts of an attention."""

_PLANE_LAYER = {
    "0.norm": "attn_norm",
    "0.fn.to_qkv": "attn.qkv",
    "0.fn.to_out.0": "attn.proj",
    "1.norm": "ff_norm",
    "1.fn.net.0": "up",
    "1.fn.net.3": "down",
}
_NO_BIAS = ("to_qkv", "to_q", "to_k", "to_v")


def released(config: TokenAEConfig, wanted: Mapping[str, str]) -> None:
    """Raises ValueError for settings that the release does not have: it would load the weights and compute something else."""
    if any(getattr(config, name) != value for name, value in wanted.items()):
        told = " and ".join(f"{name} {getattr(config, name)!r}" for name in wanted)
        raise ValueError(f"the release cannot run this autoencoder: it has {told}, not {' and '.join(map(repr, wanted.values()))}")


def parameter_names(modules: Mapping[str, str]) -> dict[str, str]:
    """Official name -> ours of parameters, from the same of modules."""
    weights = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in modules.items()}
    return weights | {f"{theirs}.bias": f"{ours}.bias" for theirs, ours in modules.items() if not theirs.endswith(_NO_BIAS)}


def stack_modules(theirs: str, ours: str, depth: int, attention: Mapping[str, str]) -> dict[str, str]:
    """Official name -> ours of the modules of layers over time and space."""
    layer = {"2.norm": "ff.norm", "2.fn.net.0": "ff.up", "2.fn.net.3": "ff.down"}
    for number, axis in enumerate(("time", "space")):
        layer |= {f"{number}.norm": f"{axis}.norm"} | {f"{number}.fn.{part}": f"{axis}.{name}" for part, name in attention.items()}
    prefix = f"{theirs}.layers" if theirs else "layers"
    return {f"{prefix}.{i}.{part}": f"{ours}.{i}.{name}" for i in range(depth) for part, name in layer.items()}


def token_names(depth: int, plane_depth: int) -> dict[str, str]:
    """Official name -> ours of the parameters of a `TokenAutoencoder` alone."""
    modules = {"encoder.to_patch_embedding": "patch_in", "to_pixel.1": "to_pixels"}
    for stack in ("encoder", "decoder"):
        modules |= stack_modules(stack, stack, depth, SELF_ATTENTION)
    names: dict[str, str] = {}
    for axis in PLANES:
        names |= {f"{axis}_token": f"projections.{axis}.token", f"{axis}_pos_embedding": f"projections.{axis}.positions"}
        for i in range(plane_depth):
            layer = f"projections.{axis}.layers.{i}"
            modules |= {f"{axis}_quant_attn.layers.{i}.{theirs}": f"{layer}.{ours}" for theirs, ours in _PLANE_LAYER.items()}
    return names | parameter_names(modules)


def official_depths(state: Iterable[str]) -> tuple[int, int]:
    """Layers of the encoder and of a projection, in an official checkpoint."""
    return depth_of(state, "encoder.layers."), depth_of(state, "xy_quant_attn.layers.")


def buffer_names(stacks: Sequence[str]) -> tuple[str, ...]:
    """Tables that the release saves for these stacks; ours are computed."""
    return "coords", *(f"{stack}.{name}" for stack in stacks for name in ("frame_rot_emb.inv_freqs", "image_rot_emb.scales"))


def buffers(config: TokenAEConfig, stacks: Sequence[str]) -> State:
    """Those tables."""
    cpu = torch.device("cpu")
    tables = {"inv_freqs": time_rates(config.head_dim, cpu), "scales": grid_scales(config.head_dim // 4, cpu)}
    tables["coords"] = torch.linspace(-1.0, 1.0, config.clip_frames)[:, None]
    return {name: tables[name.rpartition(".")[2]].clone() for name in buffer_names(stacks)}


def token_sizes(state: State, image_size: tuple[int, int] | None, plane_heads: int, head_dim: int) -> dict[str, Any]:
    """Fields of `TokenAEConfig` that an official checkpoint fits, n_frames being those of one latent; embed_dim is not among them.

    `head_dim` counts where the rotary buffers have been left out. Raises ValueError where it is not for `image_size`.
    """
    dim, channels, patch, _ = state["to_pixel.1.weight"].shape
    frames, rows, columns = (state[f"{axis}_pos_embedding"].shape[1] - 1 for axis in PLANES)
    if "encoder.frame_rot_emb.inv_freqs" in state:
        head_dim = 2 * state["encoder.frame_rot_emb.inv_freqs"].numel()
    plane_width = state["xy_quant_attn.layers.0.0.fn.to_qkv.weight"].shape[0] // 3
    heads, rest = divmod(state["encoder.layers.0.0.fn.to_qkv.weight"].shape[0] // 3, head_dim)
    if rest or plane_width % plane_heads:
        raise ValueError(f"head_dim {head_dim} or plane_heads {plane_heads} do not divide the widths of the autoencoder's attention")
    size = (rows * patch, columns * patch)
    if image_size not in (None, size):
        raise ValueError(f"the autoencoder is for clips of {size[0]} x {size[1]}, not {image_size[0]} x {image_size[1]}")
    depth, plane_depth = official_depths(state)
    return {
        "dim": dim,
        "image_size": size,
        "patch_size": patch,
        "n_frames": frames,
        "channels": channels,
        "depth": depth,
        "heads": heads,
        "head_dim": head_dim,
        "plane_depth": plane_depth,
        "plane_heads": plane_heads,
        "plane_head_dim": 0 if plane_width == plane_heads * (dim // 8) else plane_width // plane_heads,
        "plane_mlp_dim": state["xy_quant_attn.layers.0.1.fn.net.0.weight"].shape[0],
    }
