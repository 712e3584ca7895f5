"""Networks: tensors in, tensors out. `MODELS` has the named sizes, `resolve` a size with some of its settings changed."""

import dataclasses
import difflib
from typing import Any, NamedTuple

from torch import nn

from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.latte import Latte, LatteConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.transformers.volume_dit import VolumeDiT, VolumeDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig


class Model(NamedTuple):
    """A named size: `network(config)` builds it."""

    network: type[nn.Module]
    config: Any


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth, heads."""

_FAMILIES = {
    "DiT": Model(ContentDiT, DiTConfig(input_size=(32, 32), in_channels=4, num_classes=1000)),
    "ContentDiT": Model(ContentDiT, DiTConfig()),
    "MotionDiT": Model(MotionDiT, MotionDiTConfig()),
    "Latte": Model(Latte, LatteConfig()),
    "PlaneDiT": Model(PlaneDiT, PlaneDiTConfig()),
    "VolumeDiT": Model(VolumeDiT, VolumeDiTConfig()),
}
_PATCHES = {"PlaneDiT": (1, 2, 4), "VolumeDiT": (1, 2, 4)}
"""Families whose named sizes have other patches than 2, 4, 8."""

MODELS = {
    f"{family}-{size}/{patch}": Model(
        base.network, dataclasses.replace(base.config, hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    )
    for family, base in _FAMILIES.items()
    for size, (width, depth, heads) in SIZES.items()
    for patch in _PATCHES.get(family, (2, 4, 8))
} | {
    "PVDM-S": Model(PlaneUNet, PlaneUNetConfig(model_channels=128)),
    "PVDM-L": Model(PlaneUNet, PlaneUNetConfig(model_channels=256)),
    "HVDM-S": Model(VolumeUNet, VolumeUNetConfig(model_channels=96)),
    "HVDM-L": Model(VolumeUNet, VolumeUNetConfig(model_channels=192)),
    "VIDM-content": Model(ContentUNet, ContentUNetConfig()),
    "VIDM-motion": Model(MotionUNet, MotionUNetConfig()),
}


def resolve(name: str, family: str | None = None, **overrides: Any) -> Any:
    """Config of the model called `name` ("MotionDiT-B/2"), with fields replaced by `overrides`.

    With `family` the size alone or DiT's name for it will do, as on the CMD release's command line: "B/2" and "DiT-B/2" are
    "MotionDiT-B/2" for family "MotionDiT". Raises ValueError with the nearest valid name, or for a bad field.
    """
    size = name.removeprefix("DiT-")
    full = f"{family}-{size}" if family and size.partition("/")[0] in SIZES else name
    names = [known for known in MODELS if family is None or known.startswith(f"{family}-")]
    if full not in names:
        nearest = difflib.get_close_matches(full, names, n=1, cutoff=0.0)[0]
        kin = [known for known in names if known.partition("-")[0] == nearest.partition("-")[0]]
        raise ValueError(f"no model is called {name!r}; the nearest is {nearest!r} (there are {', '.join(kin)})")
    config = MODELS[full].config
    known = {field.name for field in dataclasses.fields(config)}
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"{full} has no setting {key!r}; the nearest is {nearest!r}")
    return dataclasses.replace(config, **overrides)
