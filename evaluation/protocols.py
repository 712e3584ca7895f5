"""Named ways to turn sets of videos into what a network sees: which videos, which of their frames, how large, in which numbers."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from datasets.frames import last_start, spread, strided
from datasets.transforms import resize_clip

Role = Literal["real", "generated"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """What a figure's name stands for. Numbers of different protocols do not compare."""

    name: str
    network: str = "i3d"
    """Kind of the network (`evaluation.extractors`)."""
    figure: str = "fvd"
    """What the distance is called."""
    frames: int = 16
    """Of each video, where nobody says how many."""
    side: int = 0
    """Of the square that frames become, where nobody says it; 0: the size of the generated videos."""
    drawn: bool = True
    """Of real videos, whether they and the offsets of their windows are drawn; else the first by name, from frame 0 on."""
    spread: bool = False
    """Frames are spread over the whole video, a shorter one gives what it has, and a folder of pictures all; else every stride-th frame."""
    squash: bool = False
    """Frames become the size as a whole, bicubic; else their centre, bilinear with antialias."""
    fit: Literal["network", "stretch", "crop"] = "network"
    """How frames become the network's size: as it does it itself, squeezed, or their shorter side, then the middle (both bilinear)."""
    unit_range: bool = False
    """The network gets [0, 1]; else 0..255 where it scales itself, or [-1, 1], which I3D and C3D were trained on."""
    unbiased: bool = False
    """Covariances over n - 1; else over n."""
    shuffled: bool = True
    """Videos are shuffled before they are split (VIS)."""
    scores: bool = True
    """Whether VIS has a meaning."""
    note: str = ""
    """What a reader of its figures has to know."""

    def picks(self, role: Role, total: int, count: int, draw: int, is_pictures: bool, stride: int = 1) -> list[int]:
        """Numbers of the frames that are taken of `total`. `draw`: a random number, the place of a real video's window."""
        if self.spread:
            return list(range(total)) if is_pictures else spread(total, count)
        start = draw % (last_start(total, count, stride) + 1) if role == "real" and self.drawn else 0
        return strided(start, count, stride)

    def resize(self, frames: np.ndarray, size: Size) -> np.ndarray:
        """Frames (t, h, w, 3) uint8 -> (t, *size, 3)."""
        if not self.squash:
            return resize_clip(frames, size, "crop")
        width_height = (size[1], size[0])
        return np.stack([np.asarray(Image.fromarray(frame).resize(width_height, Image.Resampling.BICUBIC)) for frame in frames])

    def describe(self, role: Role, seed: int, stride: int = 1) -> dict[str, Any]:
        """In words: which videos and frames of them, how far apart."""
        drawn = role == "real" and self.drawn
        frames = "consecutive frames" if stride == 1 else f"every {stride}th frame"
        window = f"{frames}, {f'random offset (seed {seed})' if drawn else 'from frame 0'}"
        return {
            "which": f"drawn (seed {seed})" if drawn else "the first by name",
            "window": "spread over the whole video: int(i T / n); folders of pictures: all" if self.spread else window,
        } | ({} if self.spread else {"stride": stride})

    @property
    def resized(self) -> str:
        """In words, what is done to frames that are not of the size."""
        return "squashed, bicubic, uint8" if self.squash else "centre crop to the aspect, bilinear with antialias, rounded to uint8"

    @property
    def covariance(self) -> str:
        """In words, what covariances divide by."""
        return "unbiased, 1/(n-1)" if self.unbiased else "population, 1/n"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("stylegan-v"),
        Protocol("pvdm", fit="crop", unbiased=True, scores=False),
        Protocol("videomae", network="videomae", fit="stretch", unit_range=True, scores=False),
        Protocol(
            "release",
            frames=128,
            side=256,
            drawn=False,
            spread=True,
            squash=True,
            unit_range=True,
            unbiased=True,
            shuffled=False,
            note="the protocol of VIDM's scripts, errors included: the figure compares with no published one",
        ),
    )
}
"""stylegan-v: what most published numbers are measured by. pvdm: PVDM, HVDM and CMD. videomae: content-debiased, of another network.
release: VIDM's scripts as they are; their numbers compare with no others."""


def figure_name(figure: str, videos: int, frames: int, stride: int) -> str:
    """As published figures are called: fvd2048_16f, fvd2048_128f_subsample8f."""
    length = f"{frames}f" if stride == 1 else f"{frames * stride}f_subsample{stride}f"
    return f"{figure}{'_' if figure[-1].isdigit() else ''}{videos}_{length}"


@dataclass(frozen=True)
class Preset:
    """What the name of a published figure says of the clips: how many of a side, frames of each and the distance between two."""

    videos: int
    frames: int
    stride: int = 1


PRESETS = {
    "fvd2048_16f": Preset(2048, 16),
    "fvd2048_128f": Preset(2048, 128),
    "fvd2048_128f_subsample8f": Preset(2048, 16, 8),
    "fvd10000_16f": Preset(10000, 16),
    "fvd256_16f": Preset(256, 16),
}
"""fvd256_16f is for machines without a GPU; more about each in docs/evaluation.md."""
