"""The clips that are measured: chosen by a protocol, read ahead on threads unless they are made, named by their content."""

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.protocols import Protocol, Role, Size
from evaluation.videos import VideoSet
from launch.env import Env
from utils.errors import UserError
from utils.rng import hash_indices

T = TypeVar("T")


class AgreedError(UserError):
    """What one rank or more have found, raised by all at the same place: who catches it goes on together with the others."""


@dataclass(frozen=True)
class Look:
    """What is seen of a clip without a network."""

    change: float
    """Mean absolute difference of consecutive frames, on [0, 1]; 0 of one frame."""
    static: float
    """Share of pixel values that are within one grey level of the frame before; 1 of one frame."""
    mark: int
    """64 bits of a hash of its pixels."""


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

    def see(self, place: int) -> tuple[Tensor, Look]:
        """The clip of that place, and what is seen of it."""
        clip = self.read(place)
        return clip, look(clip.permute(1, 2, 3, 0).numpy())

    def batches(self, batches: Sequence[Sequence[int]], threads: int) -> Iterator[tuple[list[Look], Tensor]]:
        """(what is seen of each clip, uint8 b 3 t h w) of batches of places; the one after is read ahead, of videos that are not made.

        Raises UserError where lengths differ.
        """
        if self.videos.made:
            # In the caller's thread: a network that looks at clips sets flags of the whole process, under which none may make any.
            for wanted in batches:
                yield self.batch([self.see(place) for place in wanted], wanted)
            return
        with ThreadPoolExecutor(max_workers=threads) as pool:
            waiting: deque[Future[tuple[Tensor, Look]]] = deque()
            ahead = iter([place for batch in batches for place in batch])
            try:
                for wanted in batches:
                    while len(waiting) < 2 * len(wanted) and (place := next(ahead, None)) is not None:
                        waiting.append(pool.submit(self.see, place))
                    yield self.batch([waiting.popleft().result() for _ in wanted], wanted)
            finally:
                for future in waiting:
                    future.cancel()

    def batch(self, seen: Sequence[tuple[Tensor, Look]], places: Sequence[int]) -> tuple[list[Look], Tensor]:
        """Clips of these places as one of `batches`. Raises UserError where lengths differ."""
        clips, looks = zip(*seen, strict=True)
        for clip, place in zip(clips, places, strict=True):
            if clip.shape != clips[0].shape:
                found = [f"{self.videos.name(self.numbers[one])} gives {len(self.picks[one])} frames" for one in (places[0], place)]
                raise UserError(f"{found[1]}, {found[0]}: this protocol takes what there is, which only -b 1 can batch")
        return list(looks), torch.stack(list(clips))

    def contents(self, env: Env) -> list[str | None]:
        """Digests of the videos. To be called by all ranks: each reads its share. Raises AgreedError where a video cannot be read."""
        return shared(self.videos.digest, self.numbers, env)

    def digest(self, digests: Sequence[str | None]) -> str | None:
        """SHA-256 of `contents`, of which frames are taken and what is done to them; None where a video has no digest."""
        if any(digest is None for digest in digests):
            return None
        parts = [list(digests), self.picks, list(self.size), self.protocol.resized]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def look(frames: np.ndarray) -> Look:
    """Of frames (t, h, w, 3) uint8."""
    frames = np.ascontiguousarray(frames)
    mark = int.from_bytes(hashlib.blake2b(frames.data, digest_size=8).digest(), "little", signed=True)
    if len(frames) < 2:
        return Look(0.0, 1.0, mark)
    change = static = 0
    for before, after in pairwise(frames):
        apart = np.maximum(before, after) - np.minimum(before, after)
        change += int(apart.sum(dtype=np.uint32))
        static += int(np.count_nonzero(apart <= 1))
    values = (len(frames) - 1) * frames[0].size
    return Look(change / values / 255, static / values, mark)


def choose_clips(
    videos: VideoSet, protocol: Protocol, role: Role, env: Env, *, count: int, frames: int, size: Size | None, seed: int, stride: int = 1
) -> Clips:
    """`count` videos, or as many as there are long enough; the ranks look at them together. `size` None: that of the first one.

    Raises UserError where no video is long enough.
    """
    order = np.arange(len(videos))
    if role == "real" and protocol.drawn:
        order = np.argsort(hash_indices(seed, f"{role} order", order), kind="stable")
    lengths, dropped = _long_enough(videos, order, count, 0 if protocol.spread else (frames - 1) * stride + 1, env)
    if not lengths:
        span = (
            f"{frames} frames (-n)" if stride == 1 or protocol.spread else f"{(frames - 1) * stride + 1} frames ({frames}, {stride} apart)"
        )
        raise UserError(f"none of {len(videos)} videos is long enough: {videos.name(0)} and all others have fewer than {span}")
    numbers, picks = _picked(videos, protocol, role, lengths, frames, seed, stride)
    if size is None:
        height, width = videos.read(numbers[0], picks[0][:1]).shape[1:3]
        size = (height, width)
    return Clips(videos, protocol, role, size, numbers, picks, dropped)


def other_clips(clips: Clips, env: Env, *, count: int, frames: int, seed: int, stride: int = 1) -> Clips | None:
    """`count` drawn clips of the same set and settings, of other videos than these; None where there are not so many.

    To be called by all ranks. Raises AgreedError where a video that is looked at cannot be read.
    """
    looked = len(clips) + clips.dropped
    if len(clips.videos) - looked < count:
        return None
    order = np.argsort(hash_indices(seed, f"{clips.role} order", np.arange(len(clips.videos))), kind="stable")
    lengths, dropped = _long_enough(clips.videos, order[looked:], count, (frames - 1) * stride + 1, env)
    if len(lengths) < count:
        return None
    numbers, picks = _picked(clips.videos, clips.protocol, clips.role, lengths, frames, seed, stride)
    return dataclasses.replace(clips, numbers=numbers, picks=picks, dropped=dropped)


def _long_enough(videos: VideoSet, order: np.ndarray, count: int, span: int, env: Env) -> tuple[dict[int, int], int]:
    """Frames of the first `count` videos, in this order, of at least `span`; and how many shorter ones were passed over."""
    lengths: dict[int, int] = {}
    looked = 0
    while len(lengths) < count and looked < len(order):
        block = order[looked : looked + count - len(lengths)].tolist()
        looked += len(block)
        found = zip(block, totals(videos, block, env), strict=True)
        lengths |= {number: total for number, total in found if total >= span}
    return lengths, looked - len(lengths)


def _picked(
    videos: VideoSet, protocol: Protocol, role: Role, lengths: dict[int, int], frames: int, seed: int, stride: int
) -> tuple[list[int], list[list[int]]]:
    """The videos in order, and the numbers of the frames that are taken of each."""
    numbers = sorted(lengths)
    draws = hash_indices(seed, f"{role} window", np.arange(len(videos)))
    return numbers, [protocol.picks(role, lengths[n], frames, int(draws[n]), videos.is_pictures(n), stride) for n in numbers]


def totals(videos: VideoSet, numbers: list[int], env: Env) -> list[int]:
    """Frames of each of the videos; each rank looks at its share. To be called by all ranks. Raises AgreedError for one it cannot read."""
    return shared(videos.total, numbers, env)


def shared(work: Callable[[int], T], numbers: Sequence[int], env: Env) -> list[T]:
    """What `work` gives of each number, of which each rank does its share. To be called by all ranks.

    A UserError of one rank is raised by all, as AgreedError.
    """
    mine: list[T] = []
    wrong: UserError | None = None
    try:
        mine = [work(number) for number in numbers[env.rank :: env.world_size]]
    except UserError as error:
        wrong = error
    raise_together(wrong, env)
    return joined(mine, len(numbers), env)


def raise_together(error: UserError | None, env: Env) -> None:
    """Raises AgreedError on all ranks where one has an error, that of the first one. To be called by all ranks."""
    found = joined([None if error is None else str(error)], env.world_size, env)
    for text in filter(None, found):
        raise AgreedError(text) from None


def joined(mine: list[Any], count: int, env: Env) -> list[Any]:
    """What each rank has of every world_size-th of `count` things, in their order."""
    if env.world_size == 1:
        return mine
    gathered: list[list[Any]] = [[] for _ in range(env.world_size)]
    dist.all_gather_object(gathered, mine)
    return [gathered[place % env.world_size][place // env.world_size] for place in range(count)]
