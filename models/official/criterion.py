"""Official checkpoints of PVDM's and HVDM's criterion of the first stage <-> its parts (spec, pvdm.md section 5.1, hvdm.md section 5).

loss_last.pth is a bare state dict of both discriminators and LPIPS, with or without the prefix "module.". Both directions are exact.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from models.official.checkpoint import State, check_names, unwrap

VGG_CONVOLUTIONS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
"""Slice of LPIPS's trunk -> places in torchvision's VGG16."""


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


def _perceptual_names() -> tuple[dict[str, str], dict[str, str]]:
    """Official names of LPIPS -> torchvision's of the trunk, and the lpips package's of the heads."""
    places = [(stage, place, kind) for stage, group in VGG_CONVOLUTIONS.items() for place in group for kind in ("weight", "bias")]
    trunk = {f"perceptual_loss.net.slice{stage}.{place}.{kind}": f"features.{place}.{kind}" for stage, place, kind in places}
    return trunk, {f"perceptual_loss.lin{k}.model.1.weight": f"lin{k}.model.1.weight" for k in range(5)}


def _scaling_layer() -> State:
    """LPIPS's constants, which the release saves."""
    constants = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}
    return {f"perceptual_loss.scaling_layer.{name}": Tensor(values).view(1, 3, 1, 1) for name, values in constants.items()}
