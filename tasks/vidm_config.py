"""Settings of VIDM's two stages (spec, vidm.md sections 5 to 7)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import models
from diffusion import DiffusionConfig, learned_variance
from engine.config import EmaConfig, OptimConfig, ParallelConfig, TrainConfig
from tasks.diffusion_checks import check_process
from tasks.diffusion_task import DrawConfig
from tasks.latent_config import NamedSizeConfig, SpaceRunConfig
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FrameModelConfig(NamedSizeConfig):
    """A named size, and changes to it: 0 or empty keeps what the size has. A stage's own names its size."""

    model_channels: int = 0
    """Width that channel_mult multiplies, a multiple of 32."""
    channel_mult: tuple[int, ...] = ()
    """Width of each level, in model_channels; each level but the first has half the sides."""
    num_res_blocks: int = 0
    """Residual blocks of a level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = ()
    """Levels with attention, by how often smaller their sides are; the middle always has it."""
    num_heads: int = 0
    """Attention heads, where num_head_channels is -1."""
    num_head_channels: int = 0
    """Width of a head, which decides their number; -1: num_heads does."""
    resblock_updown: bool = True
    """Residual blocks change the resolution; off: a convolution does."""
    new_attention_order: bool = False
    """Channels of attention are cut into queries, keys and values first and into heads then; off: heads first."""
    init_from: str = flag("", "init-from")
    """Export, run or released checkpoint whose weights the run starts from; empty: a fresh start."""


@dataclasses.dataclass(frozen=True)
class ContentModelConfig(FrameModelConfig):
    """The generator of first frames. It may start from an image model of guided-diffusion's layout, too."""

    name: str = flag("VIDM-content", "model", "model-name")
    """Size: VIDM-content, the release's."""
    use_scale_shift_norm: bool = True
    """The step scales and shifts features after their norm; off: it is added before."""
    dropout: float = 0.0
    """Inside residual blocks."""


@dataclasses.dataclass(frozen=True)
class MotionModelConfig(FrameModelConfig):
    """The generator of every next frame."""

    name: str = flag("VIDM-motion", "model", "model-name")
    """Size: VIDM-motion, the release's."""
    video_timesteps: int = flag(0, "video-timesteps")
    """Frame indices that the network can tell apart, V; 0: as many as the frames of a clip. Videos can have so many frames."""
    flow_input: Literal["zero_one", "minus_one_one"] = flag("zero_one", "spynet-input")
    """Range of the pictures that the flow network sees: zero_one, which it was made for; minus_one_one, as in the release's weights."""
    spynet: str = flag("", "spynet")
    """Weights of a SPyNet (spynet_20210409-c6c1bd09.pth) that the flow network starts from; empty: a fresh start."""

    apart: ClassVar[tuple[str, ...]] = ("name", "init_from", "video_timesteps", "spynet")


@dataclasses.dataclass(frozen=True)
class VideoPreviewConfig(DrawConfig):
    samples: int = 4
    """Next frames drawn for a preview, and videos."""
    steps: int = 100
    """Steps of the sampler of a preview."""
    frames: int = 8
    """Frames of its videos, or as many as the network can tell apart; 0: no videos."""


@dataclasses.dataclass(frozen=True)
class VIDMRunConfig(SpaceRunConfig):
    """What both stages set, by the release. A stage's own adds `stage` and `model`."""

    system: str = "vidm"
    """Which of the toolkit's systems."""
    train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(global_batch_size=48))
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(lr=2e-5, weight_decay=0.01, clip_norm=1.0))
    ema: EmaConfig = dataclasses.field(default_factory=lambda: EmaConfig(decay=0.999))
    parallel: ParallelConfig = dataclasses.field(default_factory=lambda: ParallelConfig(precision="fp32"))
    diffusion: DiffusionConfig = dataclasses.field(default_factory=lambda: DiffusionConfig(weighting="p2"))
    model: FrameModelConfig = dataclasses.field(default_factory=FrameModelConfig)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        if self.diffusion.process != "ddpm":
            raise ConfigError(f"diffusion.process {self.diffusion.process}: VIDM's networks are told the number of a step; use ddpm")
        check_process(self.preview, self.diffusion, self.best)
        self.network_size(image_size=(1024, 1024))  # the frames are not known yet

    def network_size(self, **overrides: object) -> Any:
        """Config of the network that the settings name. Raises ConfigError with the nearest name, or for sizes that cannot be."""
        try:
            changed = self.model.changes() | {"learn_sigma": learned_variance(self.diffusion)}
            default = type(self.model)().name
            kind, found = (type(models.resolve(name, "VIDM")) for name in (default, self.model.name))
            if kind is not found:
                raise ValueError(f"{self.model.name} is of the other stage; this one trains {default}")
            return models.resolve(self.model.name, "VIDM", **changed | overrides)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None


@dataclasses.dataclass(frozen=True)
class VIDMContentConfig(VIDMRunConfig):
    """Trains VIDM's generator of first frames."""

    stage: str = "content"
    """Which of its stages."""
    model: ContentModelConfig = dataclasses.field(default_factory=ContentModelConfig)
    preview: DrawConfig = dataclasses.field(default_factory=lambda: DrawConfig(samples=16, steps=100))


@dataclasses.dataclass(frozen=True)
class VIDMMotionConfig(VIDMRunConfig):
    """Trains VIDM's generator of every next frame."""

    stage: str = "motion"
    """Which of its stages."""
    model: MotionModelConfig = dataclasses.field(default_factory=MotionModelConfig)
    preview: VideoPreviewConfig = dataclasses.field(default_factory=VideoPreviewConfig)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        steps, frames, model = self.model.video_timesteps, self.preview.frames, self.model
        if steps < 0 or (steps and steps < self.data.n_frames):
            raise ConfigError(f"--video-timesteps {steps}: at least --n-frames {self.data.n_frames}, whose frames it tells apart")
        if frames < 0 or frames == 1:
            raise ConfigError(f"preview.frames {frames}: 2 or more, or 0 for no videos")
        if model.spynet and model.init_from:
            raise ConfigError("--spynet and --init-from: a trained generator brings its flow network along; give one of them")
        if model.spynet and not Path(model.spynet).is_file():
            raise ConfigError(f"--spynet {model.spynet}: no such file; it is mmediting's spynet_20210409-c6c1bd09.pth")
