"""Official HVDM checkpoints of the autoencoder <-> our state dicts (spec, hvdm.md sections 4 and 10).

model_last.pth, model_<it>.pth and net_init.pth hold it, a bare state dict with or without the prefix "module.". Both directions are exact:
export after import gives the official tensors back. The criterion's file is in models/official/criterion.py.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.autoencoders.hvdm import HVDMAEConfig
from models.official.checkpoint import State, check_names, depth_of, unwrap
from models.official.token_autoencoder import (
    CROSS_ATTENTION,
    buffer_names,
    buffers,
    official_depths,
    parameter_names,
    released,
    stack_modules,
    token_names,
    token_sizes,
)

RELEASE: dict[str, Any] = {"frame_rotary": "release", "readout": "first", "wavelet_time": "tile"}
"""What the released weights were trained with."""
_STACKS = ("encoder", "interaction", "decoder")
_STEM_STEP = 3
"""Places of a convolution, its norm and its tanh in the release's stems."""


def import_autoencoder(checkpoint: Mapping[str, Any]) -> State:
    """State dict of HVDMAutoencoder. Raises ValueError naming unknown and missing tensors."""
    state = unwrap(checkpoint, "model", "state_dict")
    names = _official_names(state)
    return {ours: _squeezed(theirs, state[theirs]) for theirs, ours in names.items()}


def export_autoencoder(state: State, config: HVDMAEConfig) -> State:
    """Official state dict of HVDMAutoencoder's, with the buffers that the release saves.

    Raises ValueError for settings that the release does not have: it would load the weights and compute something else.
    """
    released(config, RELEASE)
    depths = (config.depth, config.plane_depth, config.fusion_depth, len(config.freq_widths))
    names = _autoencoder_names(*depths)
    check_names(state, names.values())
    return {theirs: _spread(theirs, state[ours]) for theirs, ours in names.items()} | buffers(config, _STACKS)


def autoencoder_config(
    checkpoint: Mapping[str, Any], image_size: tuple[int, int] | None = None, *, plane_heads: int = 4, head_dim: int = 64
) -> HVDMAEConfig:
    """Config of the HVDMAutoencoder that an official checkpoint fits, whole with its buffers.

    Tensors do not tell the heads of the projections: `plane_heads`, by default the release's. `head_dim` counts where the rotary buffers
    have been left out. Raises ValueError where it is not for `image_size`.
    """
    state = unwrap(checkpoint, "model", "state_dict")
    _official_names(state)
    widths = tuple(state[f"low_freq.{_STEM_STEP * k}.weight"].shape[0] for k in range(_stem_convolutions(state)))
    return HVDMAEConfig(
        embed_dim=state["pre_freq.weight"].shape[0],
        fusion_depth=depth_of(state, "interaction.layers."),
        freq_widths=widths,
        **token_sizes(state, image_size, plane_heads, head_dim),
        **RELEASE,
    )


def fusion_names(depth: int, theirs: str = "interaction", ours: str = "fusion") -> dict[str, str]:
    """Official name -> ours of the parameters of the cross-attention."""
    return parameter_names(stack_modules(theirs, ours, depth, CROSS_ATTENTION))


def _official_names(state: State) -> dict[str, str]:
    """Official name -> ours for the depths of a checkpoint, all of whose names must be known."""
    names = _autoencoder_names(*official_depths(state), depth_of(state, "interaction.layers."), _stem_convolutions(state))
    check_names(state, names, buffer_names(_STACKS))
    return names


def _stem_convolutions(state: State) -> int:
    """How many come before the two that go to the width of the tokens."""
    return depth_of(state, "low_freq.") // _STEM_STEP + 1


def _autoencoder_names(depth: int, plane_depth: int, fusion_depth: int, convolutions: int) -> dict[str, str]:
    """Official name -> ours."""
    modules = {"pre_freq": "to_latent", "post_freq": "from_latent"}
    for band in ("low", "high"):
        places = [f"{band}_freq.{_STEM_STEP * k}" for k in range(convolutions)] + [f"{band}_freq_mid.{_STEM_STEP * k}" for k in range(2)]
        for k, place in enumerate(places):
            part, _, number = place.rpartition(".")
            modules |= {place: f"{band}_bands.convs.{k}", f"{part}.{int(number) + 1}": f"{band}_bands.norms.{k}"}
    return token_names(depth, plane_depth) | fusion_names(fusion_depth) | parameter_names(modules)


def _squeezed(name: str, value: Tensor) -> Tensor:
    """An official tensor without the time axis of its kernel, and a pointwise convolution as the linear that it is."""
    if name in ("pre_freq.weight", "post_freq.weight"):
        return value.flatten(1)
    return value.squeeze(2) if value.dim() == 5 else value


def _spread(name: str, value: Tensor) -> Tensor:
    """The reverse of `_squeezed`."""
    if name in ("pre_freq.weight", "post_freq.weight"):
        return value[:, :, None, None, None]
    return value.unsqueeze(2) if "_freq" in name and value.dim() == 4 else value
