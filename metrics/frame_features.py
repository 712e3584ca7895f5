"""Features of single frames: networks for pictures, applied to videos."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from metrics import inception
from metrics.detectors import is_torchscript, load_script, parameters
from utils.errors import UserError
from utils.files import sha256_file

CHUNK = 64
"""Frames that a network sees at a time."""


class FrameFeatures:
    """uint8 videos b 3 t h w -> rows (b t, dim), those of a video's frames in order, in float32 without gradients."""

    def __init__(self, net: Callable[[Tensor], Tensor], identity: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """`net`: uint8 frames (n, 3, h, w) -> (n, dim). `identity`: plain values, which file it is and how it is called."""
        self.net, self.device = net, torch.device(device)
        self._identity = dict(identity)

    def identity(self) -> dict[str, Any]:
        """Plain values: which file, what it is, how it is called."""
        return self._identity

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Raises UserError where the network does not take such frames, or gives no rows of finite numbers."""
        frames = rearrange(videos, "b c t h w -> (b t) c h w")
        name = self._identity["file"]
        try:
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                rows = torch.cat([self.net(chunk.to(self.device)) for chunk in frames.split(CHUNK)])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
            raise UserError(f"{name} cannot take frames of {frames.shape[2]} x {frames.shape[3]}: {reason[:300]}") from None
        if rows.ndim != 2 or len(rows) != len(frames):
            raise UserError(f"{name} gives {list(rows.shape)} for {len(frames)} frames: one row for each is wanted")
        if not rows.isfinite().all():
            raise UserError(f"{name} gives numbers that are not finite: it is broken")
        return rows.float()


def open_inception(given: str = "", device: torch.device | str = "cpu") -> FrameFeatures:
    """FID's Inception, of a file or else of the torch hub cache. Raises UserError, of one line, where it is not there, or another network.

    Weights (pt_inception-2015-12-05-6726825d.pth) are run by `metrics.inception`; a TorchScript (inception-2015-12-05.pt) scales and
    resizes by itself and is asked for its features.
    """
    path = inception.FILE.find(given)
    identity = {"file": path.name, "sha256": sha256_file(path), "features": inception.DIM}
    if not is_torchscript(path):
        net = inception.load_inception(path).to(device)
        how = {
            "kind": "inception-2015-12-05",
            "pixels": "[-1, 1]",
            "resize": "stretched to 299 x 299, bilinear, half-pixel centres, no antialias",
        }
        return FrameFeatures(lambda frames: net(inception.preprocess(frames)), identity | how, device)
    script = load_script(path, torch.device(device))
    if "return_features" not in parameters(script):
        raise UserError(f"{path} is no TorchScript of FID's Inception (inception-2015-12-05.pt): it does not know return_features")
    called: dict[str, Any] = {"kind": "torchscript", "pixels": "0..255", "resize": "by the network", "options": {"return_features": True}}
    return FrameFeatures(lambda frames: script(frames, return_features=True), identity | called, device)
