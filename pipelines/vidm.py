"""VIDM end to end: first frames from noise, and every other frame from the first one and the one before it (spec, vidm.md section 9).

Letters: b videos, N frames that the motion generator was trained on, V frame indices that it has.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.unets.vidm_motion import MotionUNet
from pipelines.loading import Loaded, Weights, diffusion_of
from pipelines.sampling import Sampling, sample
from pipelines.saved import Saveable
from pipelines.vidm_frame import FrameDenoiser, one_by_one
from pipelines.vidm_loading import load_vidm_content, load_vidm_motion
from utils.errors import UserError
from utils.media import to_float
from utils.rng import SampleRng

RELEASED = Sampling(steps=100, sampler="ddpm", clip=True, respacing="ddim100")
"""Of both generators, as the release samples them."""


@dataclasses.dataclass(frozen=True)
class FrameOrder:
    """The frame index of every position of a video, and where its first frame changes."""

    length: int | None = None
    """Positions that have a first frame in common; the last of them is the first frame of what follows, and indices begin again at 1.
    None: all of them."""
    release: bool = False
    """Indices from 0, and the first frame itself is no part of the video: what the released script does, though index 0 was never
    trained."""

    def index(self, position: int) -> int:
        """Frame index of a position that is generated."""
        return position if self.release or self.length is None else (position - 1) % (self.length - 1) + 1

    def begins(self, position: int) -> bool:
        """Whether the frame before this position is the first frame from now on."""
        return position > 1 and self.index(position) == 1


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How videos are drawn."""

    order: FrameOrder = dataclasses.field(default_factory=FrameOrder)
    content: Sampling = RELEASED
    motion: Sampling = RELEASED
    seed: int = 0
    exact: bool = True
    """Each video alone through the networks, so that it is the same to the last bit whatever is made with it."""


class VIDMPipeline(Saveable):
    """The generator of all frames after the first, and, for videos from nothing, that of the first."""

    system: ClassVar[str] = "vidm"

    def __init__(
        self,
        motion: Loaded,
        content: Loaded | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Raises UserError when the two make frames of different sizes, and for a content generator that must be told a class."""
        if content is not None and content.config.image_size != motion.config.image_size:
            sizes = " and ".join("{}x{}".format(*part.config.image_size) for part in (content, motion))
            raise UserError(f"the content generator {content.path} and the motion generator {motion.path} make frames of {sizes}")
        if content is not None and content.config.num_classes:
            raise UserError(f"the content generator {content.path} knows {content.config.num_classes} classes, and nothing tells it which")
        self.motion, self.content = motion, content
        self.device = torch.device(device)
        self.precision = precision
        for part in self.parts.values():
            part.module.to(self.device)
        assert isinstance(motion.module, MotionUNet)
        self.network = motion.module

    @classmethod
    def from_exports(
        cls,
        motion: str | Path,
        content: str | Path | None = None,
        *,
        weights: Weights = "ema",
        video_timesteps: int | None = None,
        **how: Any,
    ) -> "VIDMPipeline":
        """From exports, run folders or official checkpoints. `video_timesteps`: V, of a checkpoint that does not say it; where it does
        they must agree. `how`: as the constructor takes it. Raises UserError."""
        first = load_vidm_content(content, weights) if content else None
        size = None if first is None else first.config.image_size
        return cls(load_vidm_motion(motion, weights, video_timesteps, size), first, **how)

    @property
    def parts(self) -> dict[str, Loaded]:
        """The networks by their stages."""
        return {"motion": self.motion} | ({"content": self.content} if self.content is not None else {})

    def networks(self) -> dict[str, Loaded]:
        """Stage -> network."""
        return self.parts

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the frames."""
        height, width = self.motion.config.image_size
        return height, width

    @property
    def video_timesteps(self) -> int:
        """V."""
        return int(self.motion.config.video_timesteps)

    @property
    def n_frames(self) -> int:
        """N; V where the export does not say it."""
        return min(int(self.motion.card.get("data", {}).get("n_frames", self.video_timesteps)), self.video_timesteps)

    @property
    def fps(self) -> float:
        """Frame rate of what the motion generator was trained on."""
        data = self.motion.card.get("data", {})
        return float(data.get("fps", 10.0)) / data.get("frame_interval", 1)

    def generate(self, indices: Sequence[int], n_frames: int = 0, *, drawing: Drawing | None = None, first: Tensor | None = None) -> Tensor:
        """Videos b 3 t h w in [-1, 1] of `n_frames` frames (0: N), number `indices[i]` each, beginning at `first[i]`, b 3 h w, or at a
        frame from noise."""
        return torch.stack(list(self.frames(indices, n_frames or self.n_frames, drawing or Drawing(), first)), dim=2)

    def frames(self, indices: Sequence[int], n_frames: int, drawing: Drawing, first: Tensor | None = None) -> Iterator[Tensor]:
        """Their frames b 3 h w one after the other; two of them are held at a time."""
        state: Tensor | None = None
        for position in range(n_frames):
            state = self.advance(indices, position, state, drawing, first)
            yield state[:, :, 1]

    def advance(self, indices: Sequence[int], position: int, state: Tensor | None, drawing: Drawing, first: Tensor | None = None) -> Tensor:
        """b 3 2 h w: the first frames of some videos, and their frames at `position`; `state` is what this gave for the position before.

        At position 0 there is none, and the videos begin at `first` b 3 h w, or at frames from noise. Everything is a function of
        (seed, the number of the video, its first frame). Raises UserError for a position whose index the network does not have.
        """
        if state is None:
            anchor = last = self.first_frames(indices, drawing) if first is None else first.to(self.device)
            if not drawing.order.release:
                return torch.stack([anchor, last], dim=2)
        else:
            anchor, last = state.unbind(2)
        if drawing.order.begins(position):
            anchor = last
        return torch.stack([anchor, self.next_frames(indices, anchor, last, position, drawing)], dim=2)

    def first_frames(self, indices: Sequence[int], drawing: Drawing) -> Tensor:
        """Frames b 3 h w in [-1, 1] from noise. Raises UserError without a content generator."""
        content = self.content
        if content is None:
            raise UserError("first frames need a content generator (--content), or pictures (--image)")
        model = one_by_one(content.module) if drawing.exact else content.module
        return self._draw(model, content, indices, "content", drawing.seed, drawing.content)

    def next_frames(self, indices: Sequence[int], first: Tensor, previous: Tensor, position: int, drawing: Drawing) -> Tensor:
        """The frames b 3 h w in [-1, 1] at `position` of videos with these first and previous frames, b 3 h w."""
        index = drawing.order.index(position)
        if not 0 <= index < self.video_timesteps:
            raise UserError(f"frame index {index}: the motion generator {self.motion.path} has {self.video_timesteps} of them, from 0")
        with self._autocast():
            model = FrameDenoiser(self.network, index, first, previous, exact=drawing.exact)
        return self._draw(model, self.motion, indices, f"motion/frame-{position}", drawing.seed, drawing.motion)

    @torch.no_grad()
    def _draw(
        self, model: Callable[..., Tensor], part: Loaded, indices: Sequence[int], stream: str, seed: int, sampling: Sampling
    ) -> Tensor:
        """All videos take their steps together; what is done outside of the networks is done to each number for itself."""
        rng = SampleRng(seed, torch.tensor(list(indices)), self.device)
        with self._autocast():
            return sample(model, diffusion_of(part), (3, *self.image_size), rng, stream, sampling).clamp(-1, 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def released_pixels(frames: Tensor) -> Tensor:
    """[-1, 1] -> uint8 as the release stores it, without rounding (spec, vidm.md section 9)."""
    return (255 * (frames / 2 + 0.5)).clamp(0, 255).to(torch.uint8)


def as_released(frames: Tensor) -> Tensor:
    """Frames in [-1, 1] -> those that are stored as the release stores these."""
    return to_float(released_pixels(frames))
