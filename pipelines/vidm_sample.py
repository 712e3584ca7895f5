"""What `sample.py` needs to know of VIDM: its settings, and how sample number i and every frame of it are made."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion import DiffusionConfig
from pipelines.jobs import Mode, SampleConfig, Strip, numbered
from pipelines.loading import diffusion_of
from pipelines.pictures import find_pictures, hash_picture, read_picture
from pipelines.runs import find_family
from pipelines.sampling import Sampler, Sampling, count_steps
from pipelines.vidm import RELEASED, Drawing, FrameOrder, VIDMPipeline, as_released
from utils.config import flag, to_dict
from utils.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class VIDMSampleConfig(SampleConfig):
    """Generates videos frame after frame with VIDM."""

    modes: ClassVar[tuple[str, ...]] = ("short", "long", "image")
    lacks: ClassVar[Mapping[str, str]] = {
        "classes": "VIDM knows no classes",
        "guidance_scale": "its generators know no condition that could be left out",
    }

    system: str = "vidm"
    """Which of the toolkit's systems."""
    mode: Mode = "long"
    """All are made frame after frame, whatever their length. short: no more frames than in training. image: beginning at --image."""
    num_frames: int = flag(0, "frames")
    """Frames of a video; 0: as many as in training. For more than the motion generator has indices add --reanchor."""
    content: str = ""
    """Content generator in place of that in --run: an export or run folder, or an official checkpoint (.pth, .pt)."""
    motion: str = ""
    """Motion generator in place of that in --run."""
    image: tuple[str, ...] = flag((), "content-dir")
    """Pictures (PNG, JPEG, ...) at which the videos begin, of any size (the centre is cut out and resized), or folders of them, in place
    of the content generator; sample number i takes picture i, again from the first when there are no more."""
    steps: int | None = None
    """Denoising steps of every frame; none: as many as the release takes (100)."""
    content_steps: int | None = flag(None, "content.steps")
    """Steps of the first frame, where they are others."""
    motion_steps: int | None = flag(None, "motion.steps")
    """Steps of the frames after it, where they are others."""
    sampler: Sampler = "auto"
    """ddpm (ancestral), ddim or dpm++ (DPM-Solver++(2M)), which need fewer steps. auto: ddpm, the release's."""
    content_sampler: Sampler | None = flag(None, "content.sampler")
    """Sampler of the first frame, where it is another."""
    motion_sampler: Sampler | None = flag(None, "motion.sampler")
    """Sampler of the frames after it, where it is another."""
    eta: float = 0.0
    """DDIM: share of fresh noise; 0 is deterministic."""
    reanchor: bool = False
    """Go on beyond the frames of training: the last frame becomes the first, and frame indices begin again at 1."""
    release_frame_order: bool = False
    """Videos as the released script makes them: frame indices from 0, which no training saw, the first frame left out, and pixels cut off
    rather than rounded to 8 bits."""
    video_timesteps: int | None = None
    """Frame indices that an official checkpoint was trained with, where its own record of them is missing; an error where they differ."""
    keep_latents: bool = False
    """Keep the frames as they were before they were stored, in <out>/latents, of finished videos too: a video can then be made longer
    without making it again. 400 kB a frame of 128 x 128."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.run and not (self.motion and (self.content or self.image)):
            raise ConfigError(
                "what to sample from? give --run FOLDER (the --results-dir of training), or --motion, and --content or --image"
            )
        if self.content and self.image:
            raise ConfigError("--content and --image: videos begin at generated frames or at pictures, give one of them")
        self.at_least(1, "content_steps", "motion_steps")
        self.at_least(2, "video_timesteps")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: between 0 and 1")
        for name in ("content_steps", "content_sampler"):
            if self.image and getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: no first frame is generated with --image")
        if self.reanchor and self.release_frame_order:
            raise ConfigError("--reanchor and --release-frame-order: the released script has no frames beyond those of training, give one")

    def check_length(self) -> None:
        """Videos of any mode may leave their length to that of training."""

    @property
    def long(self) -> bool:
        """Always: frame after frame."""
        return True

    @property
    def recorded_mode(self) -> str:
        """One for all, which differ in nothing else that is recorded."""
        return "long"

    @property
    def together(self) -> int | None:
        """Videos of a batch have work in common even when each goes through the networks alone."""
        return self.asked_batch


class VIDMSampleJob:
    """Makes sample number i, frame after frame. What it makes is a function of `settings()` alone."""

    endings = ("",)
    draws = 1

    def __init__(self, config: VIDMSampleConfig, device: torch.device, pipeline: VIDMPipeline | None = None) -> None:
        """`pipeline`: networks that are there already, of the same settings. Raises UserError or ConfigError in one line."""
        self.config = config
        self.pipeline = pipeline = pipeline or _pipeline(config, device)
        self.order = FrameOrder(pipeline.n_frames if config.reanchor else None, config.release_frame_order)
        self.samplings = {stage: _sampling(config, diffusion_of(part), stage) for stage, part in pipeline.parts.items()}
        self.drawing = Drawing(self.order, seed=config.seed, exact=config.exact, **self.samplings)
        self.labels: list[int] = []
        self.fps = config.fps or pipeline.fps
        self.n_frames = config.num_frames or pipeline.n_frames
        self.notes: list[str] = []
        self._check_length()
        self.pictures = find_pictures(config.image)
        self.images_sha256 = list(map(hash_picture, self.pictures))
        for index in range(min(len(self.pictures), config.num_videos)):
            self.picture(index)  # what cannot be read is told before anything is made

    def label(self, index: int) -> int | None:
        """None: there are no classes."""
        return None

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""
        return numbered(index, None)

    def class_name(self, label: int | None) -> str:
        """Empty: there are no classes."""
        return ""

    def picture(self, index: int) -> Tensor:
        """The picture 3 h w in [-1, 1] at which a sample begins."""
        path = self.pictures[index % len(self.pictures)]
        return read_picture(path, self.pipeline.image_size, antialias=self.pipeline.motion.antialias).to(self.pipeline.device)

    def generate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Whole videos b 3 t h w in [-1, 1]."""
        frames = self.pipeline.frames(indices, self.n_frames, self.drawing, self._begin(indices))
        return {"": torch.stack(list(map(self._stored, frames)), dim=2)}

    def new_frames(self, clip: int) -> int:
        """A clip of a video is one frame."""
        return 1

    def sample_clip(self, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        """b 3 2 h w: the first frames of these samples and their frames at position `clip`, after what this gave for the one before."""
        first = self._begin(indices) if previous is None else None
        return self.pipeline.advance(indices, clip, previous, self.drawing, first)

    def decode_clip(self, latents: Tensor, clip: int) -> Tensor:
        """The frame that is new, b 3 1 h w in [-1, 1]."""
        return self._stored(latents[:, :, 1:])

    def strip(self) -> Strip | None:
        """None: film.png shows how videos go on."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        config, pipeline = self.config, self.pipeline
        processes = {stage: diffusion_of(part) for stage, part in pipeline.parts.items()}
        # Where all indices were trained, no video is another for going on beyond them.
        segment = pipeline.n_frames if pipeline.n_frames == pipeline.video_timesteps else self.order.length
        return {
            "system": pipeline.system,
            "seed": config.seed,
            "weights": config.weights,
            "sha256": {stage: part.sha256 for stage, part in pipeline.parts.items()},
            "model": {stage: to_dict(part.config) for stage, part in pipeline.parts.items()},
            "diffusion": {stage: to_dict(process) for stage, process in processes.items()},
            "sampling": {stage: self.samplings[stage].settings(process) for stage, process in processes.items()},
            "segment": segment,
            "release_frame_order": config.release_frame_order,
            **({"images_sha256": self.images_sha256} if self.pictures else {}),
            "exact": config.exact,
            "precision": config.precision,
            "device": pipeline.device.type,
            "fps": self.fps,
        }

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""
        return {stage: part.path for stage, part in self.pipeline.parts.items()}

    def _begin(self, indices: Sequence[int]) -> Tensor | None:
        """The pictures b 3 h w at which these samples begin, where there are any."""
        return torch.stack([self.picture(index) for index in indices]) if self.pictures else None

    def _stored(self, frames: Tensor) -> Tensor:
        return as_released(frames) if self.config.release_frame_order else frames

    def _check_length(self) -> None:
        """Raises UserError for videos that have more frames than there are indices."""
        wanted, pipeline = self.n_frames, self.pipeline
        trained, known = pipeline.n_frames, pipeline.video_timesteps
        if self.config.mode == "short" and wanted > trained:
            raise ConfigError(f"--num-frames {wanted}: videos of training have {trained}; for longer ones add --mode long")
        if self.config.reanchor:
            return
        if wanted > known:
            raise UserError(
                f"--num-frames {wanted}: the motion generator {pipeline.motion.path} has {known} frame indices (--video-timesteps of its "
                "training); --reanchor goes on from the last frame as if it were the first"
            )
        if wanted > trained:
            self.notes.append(f"note: frames from number {trained} on have indices that the motion generator was not trained on")


def _pipeline(config: VIDMSampleConfig, device: torch.device) -> VIDMPipeline:
    """The networks that are named, or those of a results folder. Raises UserError."""
    without = [stage for stage in ("content", "motion") if getattr(config, stage) or (stage == "content" and config.image)]
    found = find_family(config.run, "vidm", without=without) if config.run and len(without) < 2 else {}
    return VIDMPipeline.from_exports(
        config.motion or found["motion"],
        config.content or found.get("content"),
        weights=config.weights,
        video_timesteps=config.video_timesteps,
        device=device,
        precision=config.precision,
    )


def _sampling(config: VIDMSampleConfig, process: DiffusionConfig, stage: str) -> Sampling:
    """How the generator of a stage is sampled: as is said of it, else of both, else as the release does. Raises ConfigError when it does
    not suit the process."""
    steps = getattr(config, f"{stage}_steps") or config.steps or min(RELEASED.steps, process.steps)
    asked = getattr(config, f"{stage}_sampler") or config.sampler
    sampler = "ddpm" if asked == "auto" else asked
    sampling = Sampling(steps=steps, sampler=sampler, eta=config.eta, clip=True).resolved(process)
    if sampling.sampler == "ddpm" and process.steps % steps == 0:
        sampling = dataclasses.replace(sampling, respacing=f"ddim{steps}")  # the name of the spacing, and no more than that
    elif sampling.sampler == "ddim":
        sampling = dataclasses.replace(sampling, respacing=f"trailing{steps}")
    count_steps(process, sampling)
    return sampling
