"""PVDM end to end: clips to the latents of their three planes and back, and new clips from noise (spec, pvdm.md).

Letters: e channels and L positions of a clip's latent.
"""

from pathlib import Path
from typing import Literal

import torch

from models.autoencoders.pvdm import PVDMAEConfig
from models.transformers.plane_dit import PlaneDiTConfig
from models.unets.plane_unet import PlaneUNetConfig
from pipelines.clip import ClipPipeline, autoencoder_of
from pipelines.loading import Weights
from pipelines.pvdm_loading import load_pvdm_autoencoder, load_pvdm_denoiser
from pipelines.sampling import Sampling


class PVDMPipeline(ClipPipeline):
    """An autoencoder of three planes and, for generation, a denoiser of its latents."""

    system = "pvdm"
    usual = Sampling(eta=1.0, clip=True, keep_eps=True, respacing="trailing400")

    @classmethod
    def from_exports(
        cls,
        denoiser: str | Path = "",
        ae: str | Path = "",
        *,
        weights: Weights = "ema",
        ae_weights: Weights = "ema",
        image_size: tuple[int, int] | None = None,
        num_heads: int = 8,
        pairs: bool = False,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> "PVDMPipeline":
        """From exports, run folders or official checkpoints (model_last.pth, ema_model_<it>.pth). `ae` may be left out where the
        denoiser's export names one that is still there.

        `weights` (ema or model) counts for the denoiser; the autoencoder's are those that it was trained on, or `ae_weights` when the
        autoencoder stands alone. `image_size` and `num_heads` count for official checkpoints (`pipelines.pvdm_loading`).
        Raises UserError when something is missing or does not belong together.
        """
        first = load_pvdm_autoencoder(*autoencoder_of(denoiser, ae, ae_weights), image_size)
        second = load_pvdm_denoiser(denoiser, first.config, weights, num_heads=num_heads) if denoiser else None
        return cls(first, second, pairs=pairs, device=device, precision=precision)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(e, L) of a clip."""
        return self.ae.config.embed_dim, self.ae.config.latent_size

    @staticmethod
    def told_latents(config: PVDMAEConfig | PlaneUNetConfig | PlaneDiTConfig) -> str:
        """Channels and planes of an autoencoder's or a denoiser's latents."""
        channels = config.embed_dim if isinstance(config, PVDMAEConfig) else config.in_channels
        return f"{channels} channels on planes of {', '.join(f'{rows}x{columns}' for rows, columns in config.plane_shapes)}"
