"""One frame of VIDM's videos, with nothing computed twice that does not change (spec, vidm.md section 9).

Of what the motion generator computes at a denoising step
- the flow from the first to the previous frame knows no step: it is computed once a frame;
- the maps of scale and shift know the step and the frame index alone: once for all videos;
- the features of the first frame know all three, first frame, step and frame index: once for videos that begin at the same picture, and
  never for another step or another frame.

Letters: b videos.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.unets.vidm_motion import MotionUNet


def one_by_one(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that each picture of a batch goes through alone, because a matrix product may round differently in a larger batch."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(*alone) for alone in zip(x.split(1), t.split(1), strict=True)])

    return call


class FrameDenoiser:
    """The denoiser of the frames with one index, of some videos."""

    def __init__(self, network: MotionUNet, frame: int, first: Tensor, previous: Tensor, *, exact: bool = False) -> None:
        """`frame`: the index. `first`, `previous` b 3 h w in [-1, 1]: the first frames of the videos, and the frames before this one.

        `exact`: each video goes through the network alone, and comes out the same to the last bit whatever goes through after it.
        """
        self._network = network
        self._frame = torch.tensor([frame], device=first.device)
        alike = len(first) > 1 and bool((first == first[:1]).all())
        self._same = first[:1] if alike else None
        rows = 1 if exact else len(first)
        self._first = first.split(rows)
        self._flows = [network.flow(*pair) for pair in zip(self._first, previous.split(rows), strict=True)]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x b 3 h w at the step t (b,), the same for all -> b out_channels h w."""
        network = self._network
        maps = network.maps(t[:1], self._frame, (x.shape[2], x.shape[3]))
        shared = None if self._same is None else network.encode(self._same, maps)
        made = []
        for part, first, flow in zip(x.split(len(self._first[0])), self._first, self._flows, strict=True):
            made.append(network.denoise(part, flow, maps, network.encode(first, maps) if shared is None else shared))
        return torch.cat(made)
