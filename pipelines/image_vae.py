"""Frozen VAEs that see one frame at a time: a pretrained diffusers AutoencoderKL read from a local folder, or a frame VAE of ours."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from models.autoencoders.frame_vae import FrameVAE
from models.official.released import SD_SCALE
from pipelines.loading import Weights, load_frame_vae
from utils.errors import ConfigError, UserError
from utils.files import sha256_file
from utils.media import to_channels, to_rgb

__all__ = ["SD_SCALE", "FrameCoder", "ImageVae", "load_image_vae", "open_codec", "vae_of"]


def exact(device: torch.device) -> AbstractContextManager[object]:
    """float32 arithmetic whatever the run's precision. The meta device, on which FLOPs are counted, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class ImageVae(nn.Module):
    """Frames of a clip to latents and back, float32, `chunk` frames at a time.

    `autoencoder` has diffusers' interface: `encode(x).latent_dist` with `mean` and `std`, `decode(z).sample`; x b 3 h w.
    """

    def __init__(
        self,
        autoencoder: Any,
        *,
        channels: int,
        factor: int,
        scale_factor: float,
        chunk: int = 16,
        sha256: str = "",
        kind: Literal["sd", "latte"] = "sd",
        path: str = "",
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ConfigError(f"vae.chunk {chunk}: at least 1 frame at a time")
        self.autoencoder = autoencoder.float().eval().requires_grad_(False)
        self.channels = channels
        self.factor = factor
        self.scale_factor = scale_factor
        self.chunk = chunk
        self.sha256 = sha256
        self.kind = kind
        """sd: diffusers' AutoencoderKL; latte: a frame VAE of ours."""
        self.path = path
        """Where it was read."""

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
        with exact(video.device):
            posteriors = [self.autoencoder.encode(f).latent_dist for f in frames]
        latents = torch.cat([p.mean + p.std * n for p, n in zip(posteriors, draws, strict=True)])
        return rearrange(latents * self.scale_factor, "(b t) c h w -> b c t h w", b=len(video))

    @torch.no_grad()
    def moments(self, video: Tensor) -> Tensor:
        """b 3 t h w in [-1, 1] -> b 2C t h' w' float32: the posterior's mean, then its standard deviation; nothing is scaled."""
        self.latent_shape(video.shape)
        frames = rearrange(video.float(), "b c t h w -> (b t) c h w").split(self.chunk)
        with exact(video.device):
            posteriors = [self.autoencoder.encode(f).latent_dist for f in frames]
        both = torch.cat([torch.cat([p.mean, p.std], dim=1) for p in posteriors])
        return rearrange(both, "(b t) c h w -> b c t h w", b=len(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents b C t h' w' -> clip b 3 t h w, about [-1, 1]."""
        return self.decode_raw(latents.float() / self.scale_factor)

    @torch.no_grad()
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Latents b C t h' w' as the VAE itself has them -> clip b 3 t h w, about [-1, 1]."""
        frames = rearrange(latents.float(), "b c t h w -> (b t) c h w").split(self.chunk)
        with exact(latents.device):
            decoded = torch.cat([self.autoencoder.decode(f).sample for f in frames])
        return rearrange(decoded, "(b t) c h w -> b c t h w", b=len(latents))


class FrameCoder(nn.Module):
    """A frame VAE of ours with diffusers' interface. One of gray frames is shown their luma, and its gray is given back as RGB."""

    def __init__(self, network: FrameVAE) -> None:
        super().__init__()
        self.network = network

    def encode(self, frames: Tensor) -> SimpleNamespace:
        """Frames b 3 h w -> the posterior: `latent_dist` with `mean` and `std`, each b C h' w'."""
        mean, logvar = self.network.moments(to_channels(frames, self.network.config.channels))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.exp(0.5 * logvar)))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Latents b C h' w' -> `sample`, frames b 3 h w."""
        return SimpleNamespace(sample=to_rgb(self.network.decode(latents)))


def open_codec(ae: str, weights: Weights = "ema", vae: str = "", chunk: int = 16) -> tuple[ImageVae, dict[str, Any]]:
    """The frame-wise VAE of `ae` or of `vae`, and what ties latents and exports to it: sha256, weights, path, kind.

    `ae`: an export or run folder of ours, or the tutorial release's checkpoint (.pth). `vae`: folder of a diffusers AutoencoderKL, for
    want of `ae`. Latents are not scaled here (`moments`, `decode_raw`). Raises UserError or ConfigError in one line.
    """
    if bool(ae) == bool(vae):
        raise ConfigError(f"which autoencoder? give {'one of ' * bool(ae)}--ae (a frame VAE of train_ae.py) or --vae (a diffusers folder)")
    if vae:
        image_vae = load_image_vae(vae, SD_SCALE, chunk)
        return image_vae, {"sha256": image_vae.sha256, "weights": "model", "path": str(Path(vae).absolute()), "kind": "sd"}
    loaded = load_frame_vae(ae, weights)
    config = loaded.config
    image_vae = ImageVae(
        FrameCoder(cast(FrameVAE, loaded.module)),
        channels=config.z_channels,
        factor=config.factor,
        scale_factor=1.0,
        chunk=chunk,
        sha256=loaded.sha256,
        kind="latte",
    )
    return image_vae, {"sha256": loaded.sha256, "weights": loaded.weights, "path": str(Path(ae).absolute()), "kind": "latte"}


def load_image_vae(path: str, scale_factor: float, chunk: int = 16) -> ImageVae:
    """The VAE of a local diffusers folder. Raises UserError when the folder or the package is missing."""
    folder = Path(path)
    if not path or not (folder / "config.json").is_file():
        raise UserError(f"an image VAE is needed: --vae FOLDER with a diffusers AutoencoderKL (config.json and weights), not '{path}'")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"image VAEs are read with diffusers, which does not import ({error}): pip install diffusers") from None
    weights = next(
        (f for f in sorted(folder.iterdir()) if f.name.startswith("diffusion_pytorch_model") and f.suffix in (".safetensors", ".bin")), None
    )
    if weights is None:
        raise UserError(f"{folder}: no diffusion_pytorch_model.safetensors beside config.json")
    try:
        autoencoder = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    except Exception as error:  # of many kinds: of the JSON, the weights' file, the network's shapes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be read as a diffusers AutoencoderKL ({reason}): copy the folder again") from None
    settings = autoencoder.config
    return ImageVae(
        autoencoder,
        channels=settings.latent_channels,
        factor=2 ** (len(settings.block_out_channels) - 1),
        scale_factor=scale_factor,
        chunk=chunk,
        sha256=sha256_file(weights),
        path=path,
    )


def vae_of(card: Mapping[str, Any], path: str, scale_factor: float, chunk: int = 16) -> ImageVae | None:
    """The image VAE that the autoencoder with this card was trained behind; None in pixel mode. Raises UserError for another one.

    Without `path` it is the one that the card names, as that of a saved folder does. Raises ConfigError for one in pixel mode.
    """
    if card["model"]["mode"] == "pixel":
        if path:
            raise ConfigError(f"--vae {path}: the autoencoder takes pixels (--mode pixel), no latents of an image VAE; drop the flag")
        return None
    trained = card.get("vae", {})
    if not path and "path" in trained:
        path, scale_factor = trained["path"], trained["scale_factor"]
    vae = load_image_vae(path, scale_factor, chunk)
    if trained.get("sha256", vae.sha256) != vae.sha256:
        raise UserError(f"--vae {path} is not the image VAE that the autoencoder was trained with (sha256 {trained['sha256'][:12]}...)")
    if trained.get("scale_factor", scale_factor) != scale_factor:
        raise UserError(f"--scale-factor {scale_factor}: the autoencoder was trained with {trained['scale_factor']}")
    return vae
