"""Latte end to end: clips to the latents of their frames and back, and new clips from noise (spec, latte.md sections 1 to 3)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffusion import build
from diffusion.replacement import Replacement
from pipelines.image_vae import SD_SCALE, ImageVae, open_codec
from pipelines.loading import Loaded, Weights, diffusion_of, is_official, load_frame_vae, load_latte, understood
from pipelines.sampling import Sampling, in_groups, sample
from pipelines.saved import Saveable
from utils.errors import UserError
from utils.rng import SampleRng
from utils.weights import read_card

LATTE_SAMPLING = Sampling(steps=250, sampler="ddpm")
"""The official release's, without guidance; it uses a scale of 7 for UCF-101 with classes."""

Watch = Callable[[list[int], int, Tensor, Tensor], None]
"""(positions in the request, step k, latents x after it, estimate x0 of the clean latents), latents b C t h' w'."""


class LattePipeline(Saveable):
    """A frame-wise autoencoder and, for generation, a denoiser of its latents."""

    system: ClassVar[str] = "latte"

    def __init__(
        self,
        codec: ImageVae,
        autoencoder: Mapping[str, Any],
        denoiser: Loaded | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """`autoencoder`: what identifies the codec (sha256, weights, path, kind), as `open_codec` gives it. Raises UserError when the
        denoiser was not trained on its latents."""
        self.codec, self.autoencoder, self.denoiser = codec, dict(autoencoder), denoiser
        self.device = torch.device(device)
        self.precision = precision
        codec.to(self.device)
        known = {"scale": SD_SCALE if codec.kind == "sd" else 1.0, "shift": 0.0}
        if denoiser is not None:
            _check_family(denoiser, codec, self.autoencoder)
            denoiser.module.to(self.device)
            known |= denoiser.card.get("latent", {})
        self.scale, self.shift = float(known["scale"]), float(known["shift"])
        """Latents are (posterior sample - shift) * scale."""

    @classmethod
    def from_exports(
        cls,
        denoiser: str | Path = "",
        ae: str | Path = "",
        *,
        vae: str | Path = "",
        weights: Weights = "ema",
        ae_weights: Weights = "ema",
        image_size: tuple[int, int] | None = None,
        num_heads: int = 0,
        chunk: int = 16,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> "LattePipeline":
        """From exports, run folders or released checkpoints (.pt, .pth). `ae` or `vae` (a diffusers folder) may be left out where the
        denoiser's export names one that is still there.

        `weights` (ema or model) counts for the denoiser; the autoencoder's are those that it was trained on, or `ae_weights` when the
        autoencoder stands alone. `image_size`: of the clips, for other than trained, and for the tutorial's checkpoint, which does not
        say it. `num_heads`: for a released checkpoint of no named size. Raises UserError or ConfigError.
        """
        card = read_card(denoiser).get("ae", {}) if denoiser and not is_official(denoiser) else {}
        if not ae and not vae and card.get("path"):
            if not Path(card["path"]).exists():
                raise UserError(f"the autoencoder of {denoiser} was {card['path']}, which is not there: give --ae or --vae")
            ae, vae = ("", card["path"]) if card.get("kind") == "sd" else (card["path"], "")
        codec, autoencoder = open_codec(str(ae), card.get("weights") or ae_weights, str(vae), chunk)
        size = None if image_size is None else codec.latent_shape((1, 3, 1, *image_size))[3:]
        model = None
        if denoiser:
            model = load_latte(denoiser, weights, input_size=size, in_channels=codec.channels, num_heads=num_heads)  # type: ignore[arg-type]
        return cls(codec, autoencoder, model, device=device, precision=precision)

    def networks(self) -> dict[str, Loaded]:
        """Stage -> network; a frame VAE of ours is read once more."""
        ours = {"autoencoder": load_frame_vae(self.autoencoder["path"], self.autoencoder["weights"])} if self.codec.kind == "latte" else {}
        return ours | ({"denoiser": self.denoiser} if self.denoiser is not None else {})

    def image_vae(self) -> ImageVae | None:
        """Where the frames' autoencoder is none of ours."""
        return self.codec if self.codec.kind == "sd" else None

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that are generated. The autoencoder alone takes any."""
        if self.denoiser is None:
            raise UserError("a frame-wise autoencoder has no clip size of its own")
        height, width = self.denoiser.config.input_size
        return self.denoiser.config.n_frames, height * self.codec.factor, width * self.codec.factor

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0: none."""
        return self.denoiser.config.num_classes if self.denoiser is not None else 0

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where the training data had any."""
        return list(self._data().get("classes", []))

    @property
    def fps(self) -> float:
        """Frame rate of the training clips."""
        return float(self._data().get("fps", 8.0))

    def identity(self) -> dict[str, Any]:
        """What ties stored latents to their autoencoder: plain values."""
        return {"system": "latte"} | self.autoencoder

    def encode_moments(self, video: Tensor) -> Tensor:
        """b 3 t h w in [-1, 1] -> b 2C t h' w' float32: means of the frames' posteriors, then their standard deviations."""
        return self.codec.moments(video)

    def encode(self, video: Tensor, rng: SampleRng | None = None) -> Tensor:
        """b 3 t h w in [-1, 1] -> scaled latents b C t h' w': posterior samples as in training, or the means without `rng`."""
        mean, std = self.codec.moments(video).chunk(2, dim=1)
        if rng is not None:
            mean = mean + std * rng.normal("vae", tuple(mean.shape[1:]))
        return (mean - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents b C t h' w' -> clips b 3 t h w in [-1, 1]."""
        return self.codec.decode_raw(latents.float() / self.scale + self.shift).clamp(-1, 1)

    def reconstruct(self, video: Tensor, rng: SampleRng | None = None) -> Tensor:
        """b 3 t h w in [-1, 1] -> the same clips through the autoencoder."""
        return self.decode(self.encode(video, rng))

    def generate(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: Sampling = LATTE_SAMPLING,
        cond: Tensor | None = None,
        n_frames: int = 0,
        exact: bool = True,
        watch: Watch | None = None,
    ) -> Tensor:
        """Clips b 3 t h w in [-1, 1]: sample number `indices[i]` of class `labels[i]`, or of the condition vector `cond[i]`.

        A sample is a function of (seed, its number, its condition). With `exact` to the last bit: each one goes through the networks
        alone, because a matrix product may round differently in a larger batch. Without, all go together: faster on a GPU, equal to
        rounding. `n_frames` 0: as many as in training; the network takes any number, but has seen no other. `watch` sees every step.
        Raises UserError for a class that the model does not know.
        """
        if self.denoiser is None:
            raise UserError("generation needs a denoiser, not the autoencoder alone")
        shape = self._shape(n_frames)
        groups = in_groups(indices, labels, cond, seed=seed, num_classes=self.num_classes, exact=exact, device=self.device)
        clips = []
        for group, rng, given in groups:
            seen = None if watch is None else _for_group(watch, group)
            clips.append(self.decode(self._latents(shape, rng, understood(self.denoiser, given, sampling.guidance), sampling, seen)))
        return torch.cat(clips)

    def generate_latents(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: Sampling = LATTE_SAMPLING,
        cond: Tensor | None = None,
        n_frames: int = 0,
        exact: bool = True,
        clip: int = 0,
        known: Tensor | None = None,
    ) -> Tensor:
        """Scaled latents b C t h' w' of such clips, the first k frames of which are `known` (b C k h' w'): they are held fixed while the
        others are sampled. Each `clip` of a long video has noise of its own."""
        if self.denoiser is None:
            raise UserError("generation needs a denoiser, not the autoencoder alone")
        shape = self._shape(n_frames)
        groups = in_groups(indices, labels, cond, seed=seed, num_classes=self.num_classes, exact=exact, device=self.device)
        latents = []
        for group, rng, given in groups:
            fixed = None if known is None else known[group].to(self.device)
            understands = understood(self.denoiser, given, sampling.guidance)
            latents.append(self._latents(shape, rng, understands, sampling, None, f"denoiser/clip-{clip}" if clip else "denoiser", fixed))
        return torch.cat(latents)

    def _latents(
        self,
        shape: tuple[int, ...],
        rng: SampleRng,
        given: Mapping[str, Tensor],
        sampling: Sampling,
        callback: Callable[[int, Tensor, Tensor], None] | None,
        stream: str = "denoiser",
        known: Tensor | None = None,
    ) -> Tensor:
        """Scaled latents b C t h' w' from noise, whose first frames are `known`."""
        assert self.denoiser is not None
        process = diffusion_of(self.denoiser)
        model: Callable[..., Tensor] = self.denoiser.module
        if known is not None:
            noise = rng.normal(f"{stream}/known", tuple(known.shape[1:]))
            model = Replacement(model, build(process), known, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            made = sample(model, process, shape, rng, stream, sampling, condition=given, callback=callback)
        return made if known is None else torch.cat([known.to(made), made[:, :, known.shape[2] :]], dim=2)

    def _shape(self, n_frames: int) -> tuple[int, ...]:
        """C t h' w' of a clip; `n_frames` 0: of as many as in training."""
        assert self.denoiser is not None
        return self.codec.channels, n_frames or self.clip_shape[0], *self.denoiser.config.input_size

    def _data(self) -> Mapping[str, Any]:
        return self.denoiser.card.get("data", {}) if self.denoiser is not None else {}


def _for_group(watch: Watch, group: list[int]) -> Callable[[int, Tensor, Tensor], None]:
    return lambda k, x, x0: watch(group, k, x, x0)


def _check_family(denoiser: Loaded, codec: ImageVae, autoencoder: Mapping[str, Any]) -> None:
    """Raises UserError when the denoiser was trained on the latents of another autoencoder, or on latents of another size."""
    trained = denoiser.card.get("ae", {}).get("sha256") or codec.sha256
    if trained != codec.sha256:
        raise UserError(
            f"the denoiser {denoiser.path} was trained on another autoencoder ({trained[:12]}...) "
            f"than {autoencoder.get('path')} ({codec.sha256[:12]}...)"
        )
    if denoiser.config.in_channels != codec.channels:
        raise UserError(
            f"the denoiser {denoiser.path} makes latents of {denoiser.config.in_channels} channels, "
            f"the autoencoder {autoencoder.get('path')} has {codec.channels}"
        )
