"""Official PVDM checkpoints of the first stage <-> our state dicts (spec, pvdm.md sections 2.3, 5.1 and 8).

model_last.pth, model_<it>.pth and net_init.pth hold the autoencoder, loss_last.pth the criterion: both discriminators and LPIPS. All are
bare state dicts, with or without the prefix "module.". Both directions are exact: export after import gives the official tensors back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.autoencoders.pvdm import PVDMAEConfig
from models.layers.planes import PLANES
from models.layers.rotary import grid_scales, time_rates
from models.official.checkpoint import State, check_names, depth_of, unwrap

_STACK_LAYER = {
    "0.norm": "time.norm",
    "0.fn.to_qkv": "time.attn.qkv",
    "0.fn.to_out.0": "time.attn.proj",
    "1.norm": "space.norm",
    "1.fn.to_qkv": "space.attn.qkv",
    "1.fn.to_out.0": "space.attn.proj",
    "2.norm": "ff.norm",
    "2.fn.net.0": "ff.up",
    "2.fn.net.3": "ff.down",
}
_PLANE_LAYER = {
    "0.norm": "attn_norm",
    "0.fn.to_qkv": "attn.qkv",
    "0.fn.to_out.0": "attn.proj",
    "1.norm": "ff_norm",
    "1.fn.net.0": "up",
    "1.fn.net.3": "down",
}
VGG_CONVOLUTIONS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
"""Slice of LPIPS's trunk -> places in torchvision's VGG16."""


def import_autoencoder(checkpoint: Mapping[str, Any]) -> State:
    """State dict of PVDMAutoencoder. Raises ValueError naming unknown and missing tensors."""
    state = unwrap(checkpoint, "model", "state_dict")
    names = _autoencoder_names(depth_of(state, "encoder.layers."), depth_of(state, "xy_quant_attn.layers."))
    check_names(state, names, _BUFFERS)
    return {ours: state[theirs].flatten(1) if _is_pointwise(theirs) else state[theirs] for theirs, ours in names.items()}


def export_autoencoder(state: State, config: PVDMAEConfig) -> State:
    """Official state dict of PVDMAutoencoder's, with the buffers that the release saves.

    Raises ValueError for settings that the release does not have: it would load the weights and compute something else.
    """
    if config.frame_rotary != "release" or config.readout != "first":
        told = f"frame_rotary {config.frame_rotary!r} and readout {config.readout!r}"
        raise ValueError(f"the release cannot run this autoencoder: it has {told}, not 'release' and 'first'")
    names = _autoencoder_names(depth_of(state, "encoder."), depth_of(state, "projections.xy.layers."))
    check_names(state, names.values())
    official = {theirs: state[ours][:, :, None, None] if _is_pointwise(theirs) else state[ours] for theirs, ours in names.items()}
    return official | _buffers(config)


def autoencoder_config(
    checkpoint: Mapping[str, Any], image_size: tuple[int, int] | None = None, *, splits: int = 1, plane_heads: int = 4, head_dim: int = 64
) -> PVDMAEConfig:
    """Config of the PVDMAutoencoder that an official checkpoint fits, whole with its buffers.

    Tensors do not tell the parts of a training clip and the heads of the projections: `splits` and `plane_heads`, by default the
    release's. `head_dim` counts where the rotary buffers have been left out. Raises ValueError where it is not for `image_size`.
    """
    state = unwrap(checkpoint, "model", "state_dict")
    check_names(state, _autoencoder_names(depth_of(state, "encoder.layers."), depth_of(state, "xy_quant_attn.layers.")), _BUFFERS)
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
    return PVDMAEConfig(
        dim=dim,
        image_size=size,
        patch_size=patch,
        n_frames=frames * splits,
        splits=splits,
        embed_dim=state["pre_xy.weight"].shape[0],
        channels=channels,
        depth=depth_of(state, "encoder.layers."),
        heads=heads,
        head_dim=head_dim,
        plane_depth=depth_of(state, "xy_quant_attn.layers."),
        plane_heads=plane_heads,
        plane_head_dim=0 if plane_width == plane_heads * (dim // 8) else plane_width // plane_heads,
        plane_mlp_dim=state["xy_quant_attn.layers.0.1.fn.net.0.weight"].shape[0],
    )


class Criterion(NamedTuple):
    """What loss_last.pth holds."""

    discriminators: State
    """State dict of Discriminators: the names are the release's."""
    trunk: State
    """VGG16 under torchvision's names (features.*): what --perceptual-weights takes."""
    heads: State
    """LPIPS's heads, as in the lpips package."""


def import_criterion(checkpoint: Mapping[str, Any]) -> Criterion:
    """The parts of a criterion checkpoint. Raises ValueError naming unknown and missing tensors of LPIPS."""
    state = unwrap(checkpoint, "model", "state_dict")
    trunk, heads = _perceptual_names()
    discriminators = {name: value for name, value in state.items() if name.startswith("discriminator_")}
    if not discriminators:
        raise ValueError("the state dict does not fit: no tensor of it is called discriminator_2d.* or discriminator_3d.*")
    check_names(state.keys() - discriminators.keys(), (trunk | heads).keys(), _scaling_layer())
    return Criterion(
        discriminators, {ours: state[name] for name, ours in trunk.items()}, {ours: state[name] for name, ours in heads.items()}
    )


def export_criterion(criterion: Criterion) -> State:
    """The release's state dict of a criterion. Raises ValueError."""
    trunk, heads = _perceptual_names()
    check_names(criterion.trunk, trunk.values())
    check_names(criterion.heads, heads.values())
    perceptual = {name: criterion.trunk[ours] for name, ours in trunk.items()} | {
        name: criterion.heads[ours] for name, ours in heads.items()
    }
    return _scaling_layer() | perceptual | dict(criterion.discriminators)


_BUFFERS = (
    "coords",
    *(f"{stack}.{name}" for stack in ("encoder", "decoder") for name in ("frame_rot_emb.inv_freqs", "image_rot_emb.scales")),
)
"""Tables that the release saves; ours are computed."""


def _buffers(config: PVDMAEConfig) -> State:
    cpu = torch.device("cpu")
    tables = {"inv_freqs": time_rates(config.head_dim, cpu), "scales": grid_scales(config.head_dim // 4, cpu)}
    coords = {"coords": torch.linspace(-1.0, 1.0, config.clip_frames)[:, None]}
    return coords | {name: tables[name.rpartition(".")[2]].clone() for name in _BUFFERS[1:]}


def _autoencoder_names(depth: int, plane_depth: int) -> dict[str, str]:
    """Official name -> ours."""
    modules = {"encoder.to_patch_embedding": "patch_in", "to_pixel.1": "to_pixels"}
    for stack in ("encoder", "decoder"):
        for i in range(depth):
            modules |= {f"{stack}.layers.{i}.{theirs}": f"{stack}.{i}.{ours}" for theirs, ours in _STACK_LAYER.items()}
    names: dict[str, str] = {}
    for axis in PLANES:
        modules |= {f"pre_{axis}": f"to_latent.{axis}", f"post_{axis}": f"from_latent.{axis}"}
        names |= {f"{axis}_token": f"projections.{axis}.token", f"{axis}_pos_embedding": f"projections.{axis}.positions"}
        for i in range(plane_depth):
            layer = f"projections.{axis}.layers.{i}"
            modules |= {f"{axis}_quant_attn.layers.{i}.{theirs}": f"{layer}.{ours}" for theirs, ours in _PLANE_LAYER.items()}
    for theirs, ours in modules.items():
        names[f"{theirs}.weight"] = f"{ours}.weight"
        if not theirs.endswith("to_qkv"):
            names[f"{theirs}.bias"] = f"{ours}.bias"
    return names


def _is_pointwise(name: str) -> bool:
    """Whether a tensor is the weight of a 1x1 convolution, which is a linear of ours."""
    return name.startswith(("pre_", "post_")) and name.endswith(".weight")


def _perceptual_names() -> tuple[dict[str, str], dict[str, str]]:
    """Official names of LPIPS -> torchvision's of the trunk, and the lpips package's of the heads."""
    places = [(stage, place, kind) for stage, group in VGG_CONVOLUTIONS.items() for place in group for kind in ("weight", "bias")]
    trunk = {f"perceptual_loss.net.slice{stage}.{place}.{kind}": f"features.{place}.{kind}" for stage, place, kind in places}
    return trunk, {f"perceptual_loss.lin{k}.model.1.weight": f"lin{k}.model.1.weight" for k in range(5)}


def _scaling_layer() -> State:
    """LPIPS's constants, which the release saves."""
    constants = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}
    return {f"perceptual_loss.scaling_layer.{name}": Tensor(values).view(1, 3, 1, 1) for name, values in constants.items()}
