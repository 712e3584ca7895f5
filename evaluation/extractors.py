"""Networks that videos are compared through, by the kind that a protocol names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evaluation.protocols import Protocol as Rules
from metrics.detectors import Detector
from metrics.i3d import load_i3d
from metrics.videomae import FILE, load_videomae
from utils.errors import UserError
from utils.files import sha256_file


class Extractor(Protocol):
    """Turns videos into rows of numbers."""

    def identity(self) -> dict[str, Any]:
        """Plain values: which file with which sha256, what it is, how it is called. Equal identities give equal rows."""

    def __call__(self, videos: Tensor) -> Tensor:
        """uint8 b 3 t h w -> float32 rows (b k, dim), k of each video in the videos' order. UserError where it cannot take them."""


def _i3d(path: Path, rules: Rules, device: torch.device) -> Extractor:
    return Detector(path, device, features=True, unit_range=rules.unit_range, fit=rules.fit, weights=load_i3d)


def _videomae(path: Path, rules: Rules, device: torch.device) -> Extractor:
    return Detector(path, device, features=True, unit_range=rules.unit_range, fit=rules.fit, weights=load_videomae)


def _classifier(path: Path, rules: Rules, device: torch.device) -> Extractor:
    return Detector(path, device, features=False, unit_range=rules.unit_range, fit=rules.fit)


LOADERS: dict[str, Callable[[Path, Rules, torch.device], Extractor]] = {"i3d": _i3d, "videomae": _videomae, "c3d": _classifier}
"""Kind of a network -> what opens its file."""

NETWORKS = {
    "i3d": "StyleGAN-V's TorchScript I3D (i3d_torchscript.pt) or the I3D of PVDM, HVDM and CMD (i3d_pretrained_400.pt)",
    "videomae": f"VideoMAE's ViT-g/14 ({FILE}, 1.0 billion weights), or a TorchScript of it",
    "c3d": "the TorchScript C3D of UCF-101 (c3d_ucf101.pt)",
}
"""Kind of a network -> which file that is, for messages."""


def open_extractor(kind: str, path: str, flag: str, rules: Rules, device: torch.device, sha256: str = "") -> Extractor:
    """The network of a file. `sha256`: what the file's must begin with. Raises UserError for another file, and one that is none."""
    place = Path(path)
    if not place.is_file():
        expected = f" with sha256 {sha256}" if sha256 else ""
        raise UserError(f"{flag} {path}: no such file; wanted is {NETWORKS[kind]}{expected}, of which no copy comes with Kinoform")
    if sha256 and not (found := sha256_file(place)).startswith(sha256.lower()):
        raise UserError(f"{flag} {path} is another file than expected: its sha256 is {found}, {flag}-sha256 says {sha256}")
    return LOADERS[kind](place, rules, device)
