"""CMD end to end: clips to content frames and motion latents and back, and new clips from noise (CMD sections 3.2 and 3.3)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from models.autoencoders.cmd import CMDAutoencoder
from pipelines.image_vae import ImageVae, vae_of
from pipelines.loading import Loaded, Weights, diffusion_of, load_autoencoder, load_content, load_motion, understood
from pipelines.sampling import Sampling, in_groups, sample
from pipelines.saved import Saveable
from utils.config import to_dict
from utils.errors import UserError
from utils.rng import SampleRng

CONTENT_SAMPLING = Sampling(steps=50, guidance=4.0, clip=True)
"""The paper's, for class-conditional UCF-101; x_0 is clipped as in the release's validation."""
MOTION_SAMPLING = Sampling(steps=100, guidance=4.0)


class CMDPipeline(Saveable):
    """The trained networks of CMD. `content` and `motion` may be missing when only the autoencoder is used."""

    system: ClassVar[str] = "cmd"

    def __init__(
        self,
        ae: Loaded,
        content: Loaded | None = None,
        motion: Loaded | None = None,
        vae: ImageVae | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        _check_family(ae, content, motion)
        self.ae, self.content, self.motion, self.vae = ae, content, motion, vae
        self.device = torch.device(device)
        self.precision = precision
        for module in (part.module if isinstance(part, Loaded) else part for part in (ae, content, motion, vae)):
            if module is not None:
                module.to(self.device)

    @classmethod
    def from_exports(
        cls,
        ae: str | Path,
        content: str | Path = "",
        motion: str | Path = "",
        *,
        vae: str = "",
        scale_factor: float = 0.18215,
        weights: Weights = "ema",
        ae_weights: Weights = "ema",
        n_frames: int = 16,
        image_size: tuple[int, int] = (64, 64),
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> "CMDPipeline":
        """From exports, run folders or official checkpoints (.pt; `n_frames` and `image_size` are read for those only).

        `weights` (ema or model) counts for the content and the motion model; the autoencoder is the one that they were trained on,
        or `ae_weights` when it stands alone. Raises UserError when something is missing or does not belong together.
        """
        first = load_autoencoder(ae, ae_weights, n_frames=n_frames, image_size=image_size)
        second = load_content(content, first.config, weights) if content else None
        third = load_motion(motion, first.config, weights) if motion else None
        trained_on = next((part.card["ae"]["weights"] for part in (second, third) if part is not None and "ae" in part.card), ae_weights)
        if trained_on != ae_weights:
            first = load_autoencoder(ae, trained_on, n_frames=n_frames, image_size=image_size)
        return cls(first, second, third, vae_of(first.card, vae, scale_factor), device=device, precision=precision)

    def networks(self) -> dict[str, Loaded]:
        """Stage -> network."""
        parts = {"autoencoder": self.ae, "content": self.content, "motion": self.motion}
        return {stage: part for stage, part in parts.items() if part is not None}

    def image_vae(self) -> ImageVae | None:
        """In latent mode."""
        return self.vae

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for, known to each model that is conditioned on a class; 0: none is."""
        known = (part.config.num_classes for part in (self.content, self.motion) if part is not None)
        return min((number for number in known if number), default=0)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where the training data had any."""
        cards = [part.card for part in (self.content, self.motion, self.ae) if part is not None]
        return next((list(card["data"]["classes"]) for card in cards if "data" in card), [])

    @property
    def fps(self) -> float:
        """Frame rate of the training clips."""
        return float(self.ae.card.get("data", {}).get("fps", 8.0))

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that the autoencoder is made for."""
        config, factor = self.ae.config, self.vae.factor if self.vae is not None else 1
        return config.n_frames, config.image_size[0] * factor, config.image_size[1] * factor

    def identity(self) -> dict[str, Any]:
        """What ties stored latents to their autoencoder: plain values."""
        vae = {} if self.vae is None else {"vae": {"sha256": self.vae.sha256, "scale_factor": self.vae.scale_factor}}
        own = {"system": "cmd", "sha256": self.ae.sha256, "weights": self.ae.weights, "path": str(Path(self.ae.path).absolute())}
        return own | {"model": to_dict(self.ae.config)} | vae

    def encode_latents(self, video: Tensor) -> dict[str, Tensor]:
        """b 3 t h w in [-1, 1] -> what a latent set stores: `content` b C h w and `motion` b D t W'+H' (of the posterior's mean)."""
        content, motion = self.encode(video)
        return {"content": content, "motion": motion}

    @torch.no_grad()
    def encode(self, video: Tensor, rng: SampleRng | None = None) -> tuple[Tensor, Tensor]:
        """b 3 t h w in [-1, 1] -> content frames b C h w, motion latents b D t W'+H'.

        In latent mode `rng` draws from the image VAE's posterior as in training; without it the posterior's mean is taken.
        """
        if self.vae is not None:
            shape = self.vae.latent_shape(video.shape)
            video = self.vae.encode(video, torch.zeros(shape, device=video.device) if rng is None else rng.normal("vae", shape[1:]))
        with self._autocast():
            content, motion = cast(CMDAutoencoder, self.ae.module).encode(video)
        return content.float(), motion.float()

    @torch.no_grad()
    def decode(self, content: Tensor, motion: Tensor) -> Tensor:
        """Content frames b C h w and motion latents b D t W'+H' -> clips b 3 t h w in [-1, 1]."""
        with self._autocast():
            clips = cast(CMDAutoencoder, self.ae.module).decode(content, motion).float()
        return (clips if self.vae is None else self.vae.decode(clips)).clamp(-1, 1)

    def reconstruct(self, video: Tensor, rng: SampleRng | None = None) -> Tensor:
        """b 3 t h w in [-1, 1] -> the same clips through the autoencoder."""
        return self.decode(*self.encode(video, rng))

    def generate(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        content: Sampling = CONTENT_SAMPLING,
        motion: Sampling = MOTION_SAMPLING,
        cond: Tensor | None = None,
        exact: bool = True,
    ) -> Tensor:
        """Clips b 3 t h w in [-1, 1]: sample number `indices[i]` of class `labels[i]`, or of the condition vector `cond[i]`.

        A sample is a function of (seed, its number, its condition). With `exact` to the last bit: each one goes through the networks
        alone, because a matrix product may round differently in a larger batch. Without, all go together: faster on a GPU, equal
        to rounding. Raises UserError for a class that the models do not know.
        """
        if self.content is None or self.motion is None:
            raise UserError("generation needs a content and a motion model, not the autoencoder alone")
        groups = in_groups(indices, labels, cond, seed=seed, num_classes=self.num_classes, exact=exact, device=self.device)
        return torch.cat([self._generate(rng, given, content, motion) for _, rng, given in groups])

    def _generate(self, rng: SampleRng, given: Mapping[str, Tensor], content: Sampling, motion: Sampling) -> Tensor:
        assert self.content is not None
        ae = self.ae.config
        content = dataclasses.replace(content, clip=content.clip and self.vae is None)
        with self._autocast():
            frame = sample(
                self.content.module,
                diffusion_of(self.content),
                (ae.channels, *ae.image_size),
                rng,
                "content",
                content,
                condition=understood(self.content, given, content.guidance),
            )
        return self.decode(frame, self._motion(rng, given, motion, frame))

    def animate(
        self,
        content: Tensor,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        motion: Sampling = MOTION_SAMPLING,
        cond: Tensor | None = None,
        exact: bool = True,
    ) -> Tensor:
        """Clips b 3 t h w in [-1, 1] of given content frames b C h w, of which only the motion is generated: with the noise that
        `generate` draws the motion of sample number `indices[i]` from. Classes, vectors, `exact` and errors as there."""
        if self.motion is None:
            raise UserError("generated motion needs a motion model, not the autoencoder alone")
        groups = in_groups(indices, labels, cond, seed=seed, num_classes=self.num_classes, exact=exact, device=self.device)
        clips = []
        for group, rng, given in groups:
            frame = content[group].to(self.device)
            clips.append(self.decode(frame, self._motion(rng, given, motion, frame)))
        return torch.cat(clips)

    def _motion(self, rng: SampleRng, given: Mapping[str, Tensor], sampling: Sampling, frame: Tensor) -> Tensor:
        """Motion latents b D t W'+H' of content frames."""
        assert self.motion is not None
        ae = self.ae.config
        with self._autocast():
            return sample(
                self.motion.module,
                diffusion_of(self.motion),
                (ae.embed_dim, *ae.latent_size),
                rng,
                "motion",
                sampling,
                condition=understood(self.motion, given, sampling.guidance),
                always={"keyframe": frame},
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _check_family(ae: Loaded, content: Loaded | None, motion: Loaded | None) -> None:
    """Raises UserError when a model was trained on the latents of another autoencoder, or has not their size."""
    config = ae.config
    for stage, part in (("content", content), ("motion", motion)):
        if part is None:
            continue
        trained = part.card.get("ae", {}).get("sha256", ae.sha256)
        if trained != ae.sha256:
            raise UserError(
                f"the {stage} model {part.path} was trained on another autoencoder ({trained[:12]}...) than {ae.path} ({ae.sha256[:12]}...)"
            )
        model = part.config
        takes = (model.in_channels, *model.input_size)
        wanted = (config.channels, *config.image_size) if stage == "content" else (config.embed_dim, *config.latent_size)
        if takes != wanted:
            raise UserError(
                f"the {stage} model {part.path} makes {takes} (channels, height, width), the autoencoder {ae.path} takes {wanted}"
            )
