"""Latent mode's image VAE: a pretrained diffusers AutoencoderKL that is read from a local folder and never trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from utils.errors import ConfigError, UserError
from utils.files import sha256_file


class ImageVae(nn.Module):
    """Frames of a clip to scaled latents and back, float32, `chunk` frames at a time.

    `autoencoder` has diffusers' interface: `encode(x).latent_dist` with `mean` and `std`, `decode(z).sample`.
    """

    def __init__(self, autoencoder: Any, *, channels: int, factor: int, scale_factor: float, chunk: int = 16, sha256: str = "") -> None:
        super().__init__()
        self.autoencoder = autoencoder.float().eval().requires_grad_(False)
        self.channels = channels
        self.factor = factor
        self.scale_factor = scale_factor
        self.chunk = chunk
        self.sha256 = sha256

    def latent_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape b c t h w of a clip -> shape of its latents. Raises UserError when the frame is not a multiple of the factor."""
        b, _, t, h, w = shape
        if h % self.factor or w % self.factor:
            raise UserError(f"frames of {h}x{w} do not fit the image VAE: height and width must be multiples of {self.factor}")
        return b, self.channels, t, h // self.factor, w // self.factor

    @torch.no_grad()
    def encode(self, video: Tensor, noise: Tensor) -> Tensor:
        """b 3 t h w in [-1, 1] and standard normal noise b C t h' w' -> scaled posterior samples b C t h' w'."""
        frames = rearrange(video.float(), "b c t h w -> (b t) c h w").split(self.chunk)
        draws = rearrange(noise, "b c t h w -> (b t) c h w").split(self.chunk)
        with torch.autocast(video.device.type, enabled=False):
            posteriors = [self.autoencoder.encode(f).latent_dist for f in frames]
        latents = torch.cat([p.mean + p.std * n for p, n in zip(posteriors, draws, strict=True)])
        return rearrange(latents * self.scale_factor, "(b t) c h w -> b c t h w", b=len(video))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents b C t h' w' -> clip b 3 t h w, about [-1, 1]."""
        frames = rearrange(latents.float() / self.scale_factor, "b c t h w -> (b t) c h w").split(self.chunk)
        with torch.autocast(latents.device.type, enabled=False):
            decoded = torch.cat([self.autoencoder.decode(f).sample for f in frames])
        return rearrange(decoded, "(b t) c h w -> b c t h w", b=len(latents))


def load_image_vae(path: str, scale_factor: float, chunk: int = 16) -> ImageVae:
    """The VAE of a local diffusers folder. Raises UserError when the folder or the package is missing."""
    folder = Path(path)
    if not path or not (folder / "config.json").is_file():
        raise UserError(
            f"latent mode needs an image VAE: --vae FOLDER with a diffusers AutoencoderKL (config.json and weights), not '{path}'"
        )
    if chunk < 1:
        raise ConfigError(f"vae.chunk {chunk}: at least 1 frame at a time")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"latent mode reads its image VAE with diffusers, which does not import ({error}): pip install diffusers") from None
    weights = next(
        (f for f in sorted(folder.iterdir()) if f.name.startswith("diffusion_pytorch_model") and f.suffix in (".safetensors", ".bin")), None
    )
    if weights is None:
        raise UserError(f"{folder}: no diffusion_pytorch_model.safetensors beside config.json")
    autoencoder = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    settings = autoencoder.config
    return ImageVae(
        autoencoder,
        channels=settings.latent_channels,
        factor=2 ** (len(settings.block_out_channels) - 1),
        scale_factor=scale_factor,
        chunk=chunk,
        sha256=sha256_file(weights),
    )


def vae_of(card: Mapping[str, Any], path: str, scale_factor: float, chunk: int = 16) -> ImageVae | None:
    """The image VAE that the autoencoder with this card was trained behind; None in pixel mode. Raises UserError for another one."""
    if card["model"]["mode"] == "pixel":
        return None
    vae = load_image_vae(path, scale_factor, chunk)
    trained = card.get("vae", {})
    if trained.get("sha256", vae.sha256) != vae.sha256:
        raise UserError(f"--vae {path} is not the image VAE that the autoencoder was trained with (sha256 {trained['sha256'][:12]}...)")
    if trained.get("scale_factor", scale_factor) != scale_factor:
        raise UserError(f"--scale-factor {scale_factor}: the autoencoder was trained with {trained['scale_factor']}")
    return vae
