"""Official PVDM checkpoints of the first stage <-> our state dicts (spec, pvdm.md sections 2.3, 5.1 and 8).

model_last.pth, model_<it>.pth and net_init.pth hold the autoencoder, a bare state dict with or without the prefix "module.".
Both directions are exact: export after import gives the official tensors back. The criterion's file is in models/official/criterion.py.
"""

from collections.abc import Mapping
from typing import Any

from models.autoencoders.pvdm import PVDMAEConfig
from models.layers.planes import PLANES
from models.official.checkpoint import State, check_names, depth_of, unwrap
from models.official.token_autoencoder import (
    buffer_names,
    buffers,
    official_depths,
    parameter_names,
    released,
    token_names,
    token_sizes,
)

_STACKS = ("encoder", "decoder")


def import_autoencoder(checkpoint: Mapping[str, Any]) -> State:
    """State dict of PVDMAutoencoder. Raises ValueError naming unknown and missing tensors."""
    state = unwrap(checkpoint, "model", "state_dict")
    names = _autoencoder_names(*official_depths(state))
    check_names(state, names, buffer_names(_STACKS))
    return {ours: state[theirs].flatten(1) if _is_pointwise(theirs) else state[theirs] for theirs, ours in names.items()}


def export_autoencoder(state: State, config: PVDMAEConfig) -> State:
    """Official state dict of PVDMAutoencoder's, with the buffers that the release saves.

    Raises ValueError for settings that the release does not have: it would load the weights and compute something else.
    """
    released(config, {"frame_rotary": "release", "readout": "first"})
    names = _autoencoder_names(depth_of(state, "encoder."), depth_of(state, "projections.xy.layers."))
    check_names(state, names.values())
    official = {theirs: state[ours][:, :, None, None] if _is_pointwise(theirs) else state[ours] for theirs, ours in names.items()}
    return official | buffers(config, _STACKS)


def autoencoder_config(
    checkpoint: Mapping[str, Any], image_size: tuple[int, int] | None = None, *, splits: int = 1, plane_heads: int = 4, head_dim: int = 64
) -> PVDMAEConfig:
    """Config of the PVDMAutoencoder that an official checkpoint fits, whole with its buffers.

    Tensors do not tell the parts of a training clip and the heads of the projections: `splits` and `plane_heads`, by default the
    release's. `head_dim` counts where the rotary buffers have been left out. Raises ValueError where it is not for `image_size`.
    """
    state = unwrap(checkpoint, "model", "state_dict")
    check_names(state, _autoencoder_names(*official_depths(state)), buffer_names(_STACKS))
    sizes = token_sizes(state, image_size, plane_heads, head_dim)
    frames = sizes.pop("n_frames") * splits
    return PVDMAEConfig(n_frames=frames, splits=splits, embed_dim=state["pre_xy.weight"].shape[0], **sizes)


def _autoencoder_names(depth: int, plane_depth: int) -> dict[str, str]:
    """Official name -> ours."""
    modules: dict[str, str] = {}
    for axis in PLANES:
        modules |= {f"pre_{axis}": f"to_latent.{axis}", f"post_{axis}": f"from_latent.{axis}"}
    return token_names(depth, plane_depth) | parameter_names(modules)


def _is_pointwise(name: str) -> bool:
    """Whether a tensor is the weight of a 1x1 convolution, which is a linear of ours."""
    return name.startswith(("pre_", "post_")) and name.endswith(".weight")
