"""Networks that videos are compared through, from files: TorchScript, as StyleGAN-V uses, or weights of our I3D."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metrics.fvd import preprocess
from metrics.i3d import SIZE
from utils.errors import UserError
from utils.files import sha256_file


class Detector:
    """uint8 videos b 3 t h w -> rows (b, dim), in float32 without gradients.

    A TorchScript network gets pixels 0..255 and, as far as it knows them, `rescale`, `resize` and `return_features`: it scales and
    resizes itself. A network of weights (i3d_pretrained_400.pt) gets frames stretched to its size, in [-1, 1]. With `fit` frames are
    resized here, for either kind. `unit_range` gives pixels in [0, 1] and tells the network not to rescale them: VIDM's scripts do so, to
    networks that were trained on [-1, 1].
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        *,
        features: bool,
        unit_range: bool = False,
        fit: Literal["network", "stretch", "crop"] = "network",
        weights: Callable[[Path], nn.Module] | None = None,
    ) -> None:
        """`features`: what is asked for, features or else classes. `weights`: opens a file that is no TorchScript; None: none is taken.

        Raises UserError for a file that is no network of the kind.
        """
        self.path, self.device, self.unit_range = Path(path), torch.device(device), unit_range
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; a TorchScript network is wanted")
        self.scripted = is_torchscript(self.path)
        if not self.scripted and weights is None:
            raise UserError(f"{path} is not a TorchScript network{'' if features else '; one that classifies videos (C3D) is wanted'}")
        self.fit = fit if self.scripted or fit != "network" else "stretch"
        self.net = load_script(self.path, self.device) if weights is None or self.scripted else weights(self.path).to(self.device).eval()
        self.sha256 = sha256_file(self.path)
        own = self.fit == "network"
        wanted = {"rescale": own and not unit_range, "resize": own, "return_features": features}
        known = parameters(self.net)
        self.options = {name: value for name, value in wanted.items() if name in known}

    def identity(self) -> dict[str, Any]:
        """Plain values: which file, what it is, how it is called."""
        fits = {"network": "by the network", "stretch": f"stretched to {SIZE} x {SIZE}", "crop": f"shorter side to {SIZE}, centre crop"}
        called = {"options": self.options} if self.scripted else {}
        pixels = "[0, 1]" if self.unit_range else "0..255" if self.fit == "network" else "[-1, 1]"
        kind = "torchscript" if self.scripted else type(self.net).__name__.lower()
        resize = fits[self.fit] + ("" if self.fit == "network" else ", bilinear without antialias")
        return {"file": self.path.name, "sha256": self.sha256, "kind": kind, "pixels": pixels, "resize": resize} | called

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Raises UserError where the network does not take such videos, or gives no rows of finite numbers."""
        try:
            # TF32, which torch takes for convolutions on its own, has three digits; what is kept must not depend on a choice of algorithm.
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
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
        if self.fit == "network":
            return self.net(videos.float() / 255 if self.unit_range else videos, **self.options)
        seen = preprocess(videos, fit=self.fit)
        return self.net((seen + 1) / 2 if self.unit_range else seen, **self.options)


def is_torchscript(path: Path) -> bool:
    """Whether a file holds code beside its tensors, as TorchScript archives do."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def parameters(net: nn.Module) -> set[str]:
    """Names of what a TorchScript network's forward takes; none of another network."""
    if not isinstance(net, torch.jit.ScriptModule):
        return set()
    forward: Any = net.forward
    return {argument.name for argument in forward.schema.arguments}


def load_script(path: Path, device: torch.device) -> nn.Module:
    """A TorchScript network in evaluation mode. UserError for a damaged file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would rather have another format, the published files have this
            net: nn.Module = torch.jit.load(path, map_location=device)  # constants in its code go there too, which `to` leaves
        return net.eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _size(videos: Tensor) -> str:
    return "{} frames, {} x {}".format(*videos.shape[2:])
