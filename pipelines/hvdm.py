"""HVDM end to end: clips to latent volumes and back, and new clips from noise, after another clip, from a picture, or of a chosen amount
of motion (spec, hvdm.md sections 6 and 8).

Letters: S frames of a clip, e channels and R_h R_w sides of its latent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from models.autoencoders.hvdm import HVDMAEConfig
from models.layers.motion import motion_energy, still_clip
from models.layers.tables import FROM_CLIP, FROM_IMAGE, NO_TASK
from models.transformers.volume_dit import VolumeDiTConfig
from models.unets.volume_unet import VolumeUNetConfig
from pipelines.clip import ClipPipeline, autoencoder_of
from pipelines.hvdm_loading import load_hvdm_autoencoder, load_hvdm_denoiser
from pipelines.loading import Weights
from pipelines.sampling import Sampling
from utils.errors import UserError


class HVDMPipeline(ClipPipeline):
    """An autoencoder of volumes and, for generation, a denoiser of its latents."""

    system = "hvdm"
    usual = Sampling(eta=1.0, clip=True, keep_eps=True, respacing="trailing100")
    stills = False
    """`encode_latents` gives what learning to start from pictures needs."""
    null: ClassVar[Mapping[str, float]] = {"previous": 0.0, "task": NO_TASK}

    @classmethod
    def from_exports(
        cls,
        denoiser: str | Path = "",
        ae: str | Path = "",
        *,
        weights: Weights = "ema",
        ae_weights: Weights = "ema",
        image_size: tuple[int, int] | None = None,
        pairs: bool = False,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> "HVDMPipeline":
        """From exports, run folders or official checkpoints (model_last.pth, ema_model_<it>.pth). `ae` may be left out where the
        denoiser's export names one that is still there.

        `weights` (ema or model) counts for the denoiser; the autoencoder's are those that it was trained on, or `ae_weights` when the
        autoencoder stands alone. `image_size` counts for official checkpoints (`pipelines.hvdm_loading`).
        Raises UserError when something is missing or does not belong together.
        """
        first = load_hvdm_autoencoder(*autoencoder_of(denoiser, ae, ae_weights), image_size)
        second = load_hvdm_denoiser(denoiser, first.config, weights) if denoiser else None
        return cls(first, second, pairs=pairs, device=device, precision=precision)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(e, S, R_h, R_w) of a clip."""
        return self.ae.config.latent_shape

    @staticmethod
    def told_latents(config: HVDMAEConfig | VolumeUNetConfig | VolumeDiTConfig) -> str:
        """Channels and sizes of an autoencoder's or a denoiser's latents."""
        channels, *sizes = config.latent_shape
        return f"{channels} channels of {'x'.join(map(str, sizes))}"

    def encode_latents(self, video: Tensor) -> dict[str, Tensor]:
        """As of any clips, and beside each latent `dynamics` b 1, the motion of its clip; with `stills` also `still`, the latent of its
        first frame as a clip in which nothing moves. What belongs to the first of two clips is `previous_...`."""
        stored = super().encode_latents(video)
        clips = video.split(self.ae.config.clip_frames, dim=2)
        for prefix, clip in zip(("previous_", "") if self.pairs else ("",), clips, strict=True):
            stored[f"{prefix}dynamics"] = motion_energy(clip)[:, None]
            if self.stills:
                stored[f"{prefix}still"] = self.raw(still_clip(clip))[:, 0]
        return stored

    def encode_still(self, images: Tensor) -> Tensor:
        """Pictures b 3 h w in [-1, 1] -> latents b e S R_h R_w of clips in which nothing moves, as the denoiser takes them."""
        return self.encode_each(images[:, :, None].expand(-1, -1, self.ae.config.clip_frames, -1, -1))

    def encode_each(self, video: Tensor, exact: bool = True) -> Tensor:
        """`encode`, with `exact` each clip for itself."""
        return torch.cat([self.encode(part) for part in video.split(1 if exact else len(video))])

    def generate_latents(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        exact: bool = True,
        clip: int = 0,
        previous: Tensor | None = None,
        image: bool = False,
        anchor: bool = True,
        dynamics: int | None = None,
        dynamics_guidance: float = 1.0,
        stride: int | None = None,
    ) -> Tensor:
        """The latents b e S R_h R_w of clips number `clip` of videos, after the clips with the latents `previous` (None: none before).

        `image`: `previous` are those of stills (`encode_still`), at which the clips begin; with `anchor` their first frame is held at the
        still's latent, which is that of any clip with this first frame as far as the autoencoder sees frames apart.
        `dynamics`: the class of motion to make, and `dynamics_guidance` how far to go from any motion towards it (1: not further than the
        network does by itself; else it doubles the cost). `stride`: which of the distances between frames.
        Raises UserError for what the denoiser was not made for.
        """
        told = {} if dynamics is None else {"dynamics": self._row("dynamics_bins", dynamics)}
        if stride is not None:
            told["stride"] = self._row("strides", stride)
        guides = {}
        if "dynamics" in told and dynamics_guidance != 1:
            guides["dynamics"] = (dynamics_guidance, float(self._rows("dynamics_bins")))
        if previous is not None and self._rows("tasks"):
            told["task"] = FROM_IMAGE if image else FROM_CLIP
        return self._drawn(
            indices,
            labels,
            seed=seed,
            sampling=sampling,
            exact=exact,
            clip=clip,
            previous=previous,
            told=told,
            guides=guides,
            known=previous[:, :, :1].to(self.device) if image and anchor and previous is not None else None,
        )

    def _rows(self, table: Literal["tasks", "dynamics_bins", "strides"]) -> int:
        """How many classes the denoiser's table has."""
        return 0 if self.denoiser is None else int(getattr(self.denoiser.config, table))

    def _row(self, table: Literal["dynamics_bins", "strides"], number: int) -> int:
        """The class, if there is one of that number. Raises UserError."""
        rows, what = self._rows(table), {"dynamics_bins": "dynamics", "strides": "frame strides"}[table]
        path = self.denoiser.path if self.denoiser is not None else "(none)"
        if not rows:
            raise UserError(f"the denoiser {path} was trained without {what} (model.{table} is 0), so none can be asked for")
        if not 0 <= number < rows:
            raise UserError(f"there is no class {number} of {what}: the denoiser {path} knows 0 to {rows - 1}")
        return number
