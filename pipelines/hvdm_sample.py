"""What `sample.py` needs to know of HVDM: its settings and its exports, how a video begins at a picture, and how its motion is chosen."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pipelines.clip_sample import ClipSampleConfig, ClipSampleJob
from pipelines.hvdm import HVDMPipeline
from pipelines.loading import Loaded
from pipelines.pictures import find_pictures, hash_picture, read_picture
from utils.config import flag
from utils.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class HVDMSampleConfig(ClipSampleConfig):
    """Generates clips, or videos of any length, with HVDM: from noise, from pictures, with as much motion as is asked for."""

    usual_steps: ClassVar[dict[str, int]] = {"ddpm": 100, "flow": 50}
    modes: ClassVar[tuple[str, ...]] = ("short", "long", "image")
    lacks: ClassVar[Mapping[str, str]] = {}

    system: str = "hvdm"
    """Which of the toolkit's systems."""
    condition: Literal["reencoded", "latent"] = "reencoded"
    """What the next clip of a video is told of the one before: the latent of its decoded frames (the release), or the latent that was
    sampled, which saves decoding and encoding."""
    anchor: bool = True
    """--mode image: hold the latent of the first frame at the picture's while the others are sampled. Off: the picture is only the
    condition, and the first frame as near to it as the denoiser has learnt."""
    dynamics: int | None = None
    """How much motion: a class from 0 (the stillest training clips) to the last (the liveliest). Of models that were trained with
    --dynamics-bins; none: they are not told."""
    dynamics_percentile: float | None = None
    """The same as a place among the training clips, from 0 (the stillest) to 100."""
    dynamics_guidance: float = 1.0
    """Guidance from any motion towards the class that is asked for, eps_any + s (eps_class - eps_any); 1: none. It doubles the cost."""
    frame_stride: int | None = flag(None, "stride")
    """Frames of the source between two of the video: one of those that the model was trained with (--frame-strides)."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if self.image and self.mode != "image":
            raise ConfigError("--image goes with --mode image: other videos begin at no picture")
        if not self.anchor and self.mode != "image":
            raise ConfigError("--no-anchor goes with --mode image: other videos begin at no picture")
        if self.condition != "reencoded" and self.mode == "short":
            raise ConfigError(f"--condition {self.condition}: only --mode long has a clip that goes on after another")
        if self.dynamics is not None and self.dynamics_percentile is not None:
            raise ConfigError(f"--dynamics {self.dynamics} and --dynamics-percentile {self.dynamics_percentile:g}: give one of them")
        if self.dynamics_percentile is not None and not 0 <= self.dynamics_percentile <= 100:
            raise ConfigError(f"--dynamics-percentile {self.dynamics_percentile:g}: from 0 (the stillest clips) to 100")
        if not math.isfinite(self.dynamics_guidance):
            raise ConfigError(f"--dynamics-guidance {self.dynamics_guidance}: a number, 1 for none")
        if self.dynamics_guidance != 1 and self.dynamics is None and self.dynamics_percentile is None:
            raise ConfigError(f"--dynamics-guidance {self.dynamics_guidance:g}: towards which motion? give --dynamics N")


class HVDMSampleJob(ClipSampleJob):
    """Makes sample number i, and the clips of long ones, with HVDM."""

    config: HVDMSampleConfig
    pipeline: HVDMPipeline

    def __init__(self, config: HVDMSampleConfig, device: torch.device, pipeline: HVDMPipeline | None = None) -> None:
        """`pipeline`: networks that are there already, of the same settings. Raises UserError or ConfigError in one line."""
        pipeline = pipeline or HVDMPipeline.from_exports(**config.networks(), device=device)
        super().__init__(config, pipeline)
        self.told = self._told()
        self.fps = config.fps or pipeline.fps / (config.frame_stride or 1)
        self.pictures = find_pictures(config.image)
        self.images_sha256 = list(map(hash_picture, self.pictures))
        for index in range(min(len(self.pictures), config.num_videos)):
            self.picture(index)  # what cannot be read is told before anything is made

    def check_goes_on(self, denoiser: Loaded) -> None:
        """Raises UserError for a denoiser that makes no clip after another, or after a picture."""
        super().check_goes_on(denoiser)
        config, from_pictures, from_clips = self.config, denoiser.card.get("img_prob"), denoiser.card.get("cond_prob") != 0
        if config.mode == "image" and not from_clips and not from_pictures:
            raise UserError(
                f"--mode image: the denoiser {denoiser.path} was trained without pictures and without clips before "
                "(--img-prob, --cond-prob)"
            )
        if config.mode == "image" and not from_clips and config.num_frames > self.n_frames:
            raise UserError(
                f"--num-frames {config.num_frames}: the denoiser {denoiser.path} was trained on single clips (--cond-prob 0), "
                f"so that videos have {self.n_frames}"
            )
        if config.mode == "image" and not from_pictures:
            self.notes.append(
                "note: the denoiser was not trained to begin at a picture (--img-prob): it goes on from a clip that stands still"
            )

    def sample_clip(self, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        """Latents b e S R_h R_w of clip number `clip` of these samples, after the one with the latents `previous`, or the picture."""
        exact, image = self.config.exact, bool(self.pictures) and clip == 0
        if image:
            previous = torch.cat([self.pipeline.encode_still(self.picture(index)[None]) for index in indices])
        elif previous is not None and self.config.condition == "reencoded":
            previous = self.pipeline.encode_each(self.pipeline.decode_each(previous, exact), exact)
        return self.pipeline.generate_latents(
            indices,
            self.labels_of(indices),
            seed=self.config.seed,
            sampling=self.following if clip else self.first,
            exact=exact,
            clip=clip,
            previous=previous,
            image=image,
            anchor=self.config.anchor,
            dynamics=self.told.get("dynamics"),
            dynamics_guidance=self.config.dynamics_guidance,
            stride=self.told.get("stride"),
        )

    def picture(self, index: int) -> Tensor:
        """The picture 3 h w in [-1, 1] at which a sample begins."""
        height, width = self.pipeline.clip_shape[1:]
        path = self.pictures[index % len(self.pictures)]
        return read_picture(path, (height, width), antialias=self.pipeline.ae.antialias).to(self.pipeline.device)

    def seen_picture(self, index: int) -> Tensor:
        """The same through the autoencoder: the first frame of a still clip of it."""
        return self.pipeline.decode(self.pipeline.encode_still(self.picture(index)[None]))[0, :, 0]

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        config = self.config
        return {
            **super().settings(),
            **({"condition": config.condition} if config.long else {}),
            **({"images_sha256": self.images_sha256, "anchor": config.anchor} if self.pictures else {}),
            **({"frame_stride": config.frame_stride} if config.frame_stride is not None else {}),
            **({"dynamics": self.told["dynamics"], "dynamics_guidance": config.dynamics_guidance} if "dynamics" in self.told else {}),
        }

    def _told(self) -> dict[str, int]:
        """Classes that the denoiser is told, by the names of its inputs. Raises UserError or ConfigError in one line."""
        found = {"dynamics": self._class_of_motion(), "stride": self._stride()}
        return {name: number for name, number in found.items() if number is not None}

    def _class_of_motion(self) -> int | None:
        """The class that is asked for, by number or by place."""
        config, denoiser = self.config, self.pipeline.denoiser
        assert denoiser is not None
        chosen, bins = config.dynamics, denoiser.config.dynamics_bins
        if chosen is None and config.dynamics_percentile is None:
            return None
        if not bins:
            name = "--dynamics" if chosen is not None else "--dynamics-percentile"
            raise UserError(f"{name}: the denoiser {denoiser.path} was trained without classes of motion (--dynamics-bins)")
        if chosen is None:
            assert config.dynamics_percentile is not None
            chosen = min(int(config.dynamics_percentile / 100 * bins), bins - 1)  # classes are of equally many training clips each
        if not 0 <= chosen < bins:
            raise ConfigError(f"--dynamics {chosen}: the denoiser knows 0 (the stillest) to {bins - 1}")
        edges = denoiser.card.get("dynamics", {}).get("edges", [])
        if edges:
            low = f"above {edges[chosen - 1]:.4g}" if chosen else ""
            high = f"up to {edges[chosen]:.4g}" if chosen < len(edges) else ""
            self.notes.append(f"note: class {chosen} of motion are training clips of {' and '.join(filter(None, (low, high)))}")
        return chosen

    def _stride(self) -> int | None:
        """Which of the distances between frames is asked for."""
        asked, denoiser = self.config.frame_stride, self.pipeline.denoiser
        assert denoiser is not None
        known = list(denoiser.card.get("data", {}).get("frame_strides", []))
        if asked is None or asked in known:
            return None if asked is None else known.index(asked)
        what = f"the denoiser knows {', '.join(map(str, known))}" if known else "the denoiser was trained with one only"
        raise UserError(f"--frame-stride {asked}: {what} (--frame-strides)")
