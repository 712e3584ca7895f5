"""One frame of VIDM's videos, with nothing computed twice that does not change (spec, vidm.md section 9).

Of what the motion generator computes at a denoising step
- the flow from the first to the previous frame knows no step: it is computed once a frame;
- the maps of scale and shift know the step and the frame index alone: once for all videos;
- the features of the first frame know all three, first frame, step and frame index: once for videos that begin at the same picture, and
  never for another step or another frame.

Letters: b videos.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.unets.vidm_motion import MotionUNet


class SharedSteps:
    """What the videos have in common in the steps of one frame; kept for the next of them while there is room."""

    def __init__(self, network: MotionUNet, frame: int, first: Tensor | None = None, room: int = 0) -> None:
        """`frame`: its index. `first` 1 3 h w: where all videos begin at the same picture. `room`: bytes that may be kept; 0 for videos
        that go through the network together, which share without."""
        self.network, self.first, self._room = network, first, room
        self._frame = torch.tensor([frame], device=next(network.parameters()).device)
        self._kept: dict[int, tuple[Any, Any]] = {}

    def at(self, step: int, t: Tensor, size: tuple[int, int]) -> tuple[Any, Any]:
        """The maps of a step, and the features of the first frame where it is the same (None where not). `t`: its number, (b,)."""
        if step in self._kept:
            return self._kept[step]
        maps = self.network.maps(t[:1], self._frame, size)
        made = maps, None if self.first is None else self.network.encode(self.first, maps)
        needed = _size(made)
        if needed <= self._room:
            self._room -= needed
            self._kept[step] = made
        return made


class FrameDenoiser:
    """The denoiser of one frame of some videos, to be asked once for each step, in their order."""

    def __init__(self, shared: SharedSteps, first: Tensor, previous: Tensor) -> None:
        """`first`, `previous` b 3 h w in [-1, 1]: the first frames of the videos, and the frames before this one."""
        self._shared, self._first = shared, first
        self._flow = shared.network.flow(first, previous)
        self._step = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x b 3 h w at the step number t (b,), the same for all -> b 6 h w."""
        network = self._shared.network
        maps, features = self._shared.at(self._step, t, (x.shape[-2], x.shape[-1]))
        self._step += 1
        if features is None:
            features = network.encode(self._first, maps)
        return network.denoise(x, self._flow, maps, features)


def _size(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
