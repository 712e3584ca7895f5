"""Networks that videos are compared through, from files: TorchScript, as StyleGAN-V uses, or weights of our I3D."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metrics.fvd import preprocess
from metrics.i3d import load_i3d
from utils.errors import UserError
from utils.files import sha256_file


class Detector:
    """uint8 videos b 3 t h w -> rows (b, dim), in float32 without gradients.

    A TorchScript network gets pixels 0..255 and, as far as it knows them, `rescale`, `resize` and `return_features`: it scales and
    resizes itself. Weights of the I3D (i3d_pretrained_400.pt) get frames stretched to its size. `unit_range` gives pixels in [0, 1] and
    tells the network not to rescale them: VIDM's scripts do so, to networks that were trained on [-1, 1].
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, features: bool, unit_range: bool = False) -> None:
        """`features`: what is asked for, features or else classes. Raises UserError for a file that is no network of the kind."""
        self.path, self.device, self.unit_range = Path(path), torch.device(device), unit_range
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; a TorchScript network is wanted")
        self.scripted = _is_torchscript(self.path)
        if not self.scripted and not features:
            raise UserError(f"{path} is not a TorchScript network; one that classifies videos (C3D) is wanted")
        self.net = _load_script(self.path, self.device) if self.scripted else load_i3d(self.path).to(self.device).eval()
        self.sha256 = sha256_file(self.path)
        wanted = {"rescale": not unit_range, "resize": True, "return_features": features}
        known = _parameters(self.net)
        self.options = {name: value for name, value in wanted.items() if name in known}

    def identity(self) -> dict[str, Any]:
        """Plain values: which file, what it is, how it is called."""
        called = {"options": self.options} if self.scripted else {"fit": "stretch to 224 x 224"}
        pixels = "[0, 1]" if self.unit_range else "0..255" if self.scripted else "[-1, 1]"
        return {"file": self.path.name, "sha256": self.sha256, "kind": "torchscript" if self.scripted else "i3d", "pixels": pixels} | called

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Raises UserError where the network does not take such videos, or gives no rows of finite numbers."""
        try:
            rows = self._forward(videos.to(self.device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
            raise UserError(f"{self.path.name} cannot take videos of {_size(videos)}: {reason[:300]}") from None
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(videos):
            found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise UserError(f"{self.path.name} gives {found} for {len(videos)} videos of {_size(videos)}: one row for each is wanted")
        if not rows.isfinite().all():
            raise UserError(f"{self.path.name} gives numbers that are not finite for videos of {_size(videos)}: it is broken")
        return rows.float()

    def _forward(self, videos: Tensor) -> Tensor:
        if not self.scripted:
            seen = preprocess(videos, fit="stretch")
            return self.net((seen + 1) / 2 if self.unit_range else seen)
        return self.net(videos.float() / 255 if self.unit_range else videos, **self.options)


def _is_torchscript(path: Path) -> bool:
    """Whether a file holds code beside its tensors, as TorchScript archives do."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _parameters(net: nn.Module) -> set[str]:
    """Names of what a TorchScript network's forward takes; none of another network."""
    if not isinstance(net, torch.jit.ScriptModule):
        return set()
    forward: Any = net.forward
    return {argument.name for argument in forward.schema.arguments}


def _load_script(path: Path, device: torch.device) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would rather have another format, the published files have this
            net: nn.Module = torch.jit.load(path, map_location=device)  # constants in its code go there too, which `to` leaves
        return net.eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _size(videos: Tensor) -> str:
    return "{} frames, {} x {}".format(*videos.shape[2:])
