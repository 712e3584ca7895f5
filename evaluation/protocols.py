"""Named ways to turn sets of videos into what a detector sees: which videos, which of their frames, how large."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from datasets.frames import last_start, spread, strided
from datasets.transforms import resize_clip
from launch.env import Env
from evaluation.videos import VideoSet
from utils.errors import UserError
from utils.rng import hash_indices

Role = Literal["real", "generated"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """What a figure's name stands for. Numbers of different protocols do not compare."""

    name: str
    frames: int
    """Of each video, where nobody says how many."""
    side: int
    """Of the square that frames become, where nobody says it; 0: the size of the generated videos."""
    drawn: bool
    """Of real videos, whether they and the offsets of their windows are drawn; else the first by name, from frame 0 on."""
    spread: bool
    """Frames are spread over the whole video, a shorter one gives what it has, and a folder of pictures all; else consecutive frames."""
    squash: bool
    """Frames become the size as a whole, bicubic; else their centre, bilinear with antialias."""
    unit_range: bool
    """The detector gets [0, 1] in place of 0..255 that it scales to [-1, 1], which it was trained on."""
    shuffled: bool
    """Videos are shuffled before they are split (VIS)."""
    note: str = ""
    """What a reader of its figures has to know."""

    def picks(self, role: Role, total: int, count: int, draw: int, is_pictures: bool) -> list[int]:
        """Numbers of the frames that are taken of `total`. `draw`: a random number, the place of a real video's window."""
        if self.spread:
            return list(range(total)) if is_pictures else spread(total, count)
        return strided(draw % (last_start(total, count) + 1) if role == "real" and self.drawn else 0, count)

    def resize(self, frames: np.ndarray, size: Size) -> np.ndarray:
        """Frames (t, h, w, 3) uint8 -> (t, *size, 3)."""
        if not self.squash:
            return resize_clip(frames, size, "crop")
        width_height = (size[1], size[0])
        return np.stack([np.asarray(Image.fromarray(frame).resize(width_height, Image.Resampling.BICUBIC)) for frame in frames])

    def describe(self, role: Role, seed: int) -> dict[str, str]:
        """In words: which videos and frames, and what was done to them."""
        drawn = role == "real" and self.drawn
        window = f"consecutive frames, {f'random offset (seed {seed})' if drawn else 'from frame 0'}"
        return {
            "videos": f"drawn (seed {seed})" if drawn else "the first by name",
            "window": "spread over the whole video: int(i T / n); folders of pictures: all" if self.spread else window,
            "resize": "squashed, bicubic" if self.squash else "centre crop to the aspect, bilinear with antialias",
        }


PROTOCOLS = {
    "stylegan-v": Protocol("stylegan-v", frames=16, side=0, drawn=True, spread=False, squash=False, unit_range=False, shuffled=True),
    "release": Protocol(
        "release",
        frames=128,
        side=256,
        drawn=False,
        spread=True,
        squash=True,
        unit_range=True,
        shuffled=False,
        note="the protocol of VIDM's scripts, errors included: the figure compares with no published one",
    ),
}
"""stylegan-v: what published numbers are measured by. release: VIDM's scripts as they are; their numbers compare with no others."""


@dataclass(frozen=True)
class Clips:
    """The clips of one side of a measurement: the same on all ranks."""

    videos: VideoSet
    protocol: Protocol
    role: Role
    size: Size
    numbers: list[int]
    """Of the videos that are measured."""
    picks: list[list[int]]
    """Of each, the numbers of its frames."""
    dropped: int
    """Videos that are shorter than the window, passed over."""

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, place: int) -> Tensor:
        """uint8 3 t h w: the clip of the video at that place of `numbers`."""
        frames = self.videos.read(self.numbers[place], self.picks[place])
        return torch.from_numpy(np.ascontiguousarray(self.protocol.resize(frames, self.size))).permute(3, 0, 1, 2)

    def batches(self, places: Sequence[int], batch_size: int, threads: int) -> Iterator[tuple[list[int], Tensor]]:
        """(places, uint8 b 3 t h w), read ahead of their use by at most a batch. Raises UserError where lengths differ."""
        with ThreadPoolExecutor(max_workers=threads) as pool:
            waiting: deque[Future[Tensor]] = deque()
            ahead = iter(places)
            try:
                for start in range(0, len(places), batch_size):
                    wanted = places[start : start + batch_size]
                    while len(waiting) < 2 * batch_size and (place := next(ahead, None)) is not None:
                        waiting.append(pool.submit(self.read, place))
                    yield list(wanted), self._stack([waiting.popleft().result() for _ in wanted], wanted)
            finally:
                for future in waiting:
                    future.cancel()

    def _stack(self, clips: list[Tensor], places: Sequence[int]) -> Tensor:
        for clip, place in zip(clips, places, strict=True):
            if clip.shape != clips[0].shape:
                found = [f"{self.videos.name(self.numbers[one])} gives {len(self.picks[one])} frames" for one in (places[0], place)]
                raise UserError(f"{found[1]}, {found[0]}: this protocol takes what there is, which only -b 1 can batch")
        return torch.stack(clips)


def choose_clips(
    videos: VideoSet, protocol: Protocol, role: Role, env: Env, *, count: int, frames: int, size: Size | None, seed: int
) -> Clips:
    """`count` videos, or as many as there are long enough; the ranks look at them together. `size` None: that of the first one.

    Raises UserError where no video is long enough.
    """
    order = np.arange(len(videos))
    draws = hash_indices(seed, f"{role} window", order)
    if role == "real" and protocol.drawn:
        order = np.argsort(hash_indices(seed, f"{role} order", order), kind="stable")
    totals: dict[int, int] = {}
    dropped = looked = 0
    while len(totals) < count and looked < len(order):
        block = order[looked : looked + count - len(totals)].tolist()
        looked += len(block)
        for number, total in zip(block, _totals(videos, block, env), strict=True):
            if total < frames and not protocol.spread:
                dropped += 1
            else:
                totals[number] = total
    if not totals:
        raise UserError(f"{videos.name(0)} and all {len(videos)} videos beside it have fewer than {frames} frames (-n)")
    numbers = sorted(totals)
    picks = [protocol.picks(role, totals[number], frames, int(draws[number]), videos.is_pictures(number)) for number in numbers]
    if size is None:
        height, width = videos.read(numbers[0], picks[0][:1]).shape[1:3]
        size = (height, width)
    return Clips(videos, protocol, role, size, numbers, picks, dropped)


def _totals(videos: VideoSet, numbers: list[int], env: Env) -> list[int]:
    """Frames of each of the videos; each rank looks at its share."""
    mine = [videos.total(number) for number in numbers[env.rank :: env.world_size]]
    if env.world_size == 1:
        return mine
    gathered: list[list[int]] = [[] for _ in range(env.world_size)]
    dist.all_gather_object(gathered, mine)
    return [gathered[place % env.world_size][place // env.world_size] for place in range(len(numbers))]
