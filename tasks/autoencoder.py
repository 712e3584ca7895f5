"""The CMD autoencoder: a clip to a content frame and a motion latent and back (CMD section 3.1; spec systems/cmd.md sections 3 and 4)."""

from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from engine.task import Batch, LossOutput, Made, Network, Scored
from launch.env import Env
from losses.reconstruction import mse
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from pipelines.image_vae import ImageVae, load_image_vae
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.clips import ClipInfo, Networks, empty_batch, input_clips, open_clips, units
from tasks.reconstruction import (
    adversarial_terms,
    discriminators_output,
    given_back,
    is_adversarial,
    loss_frame,
    loss_networks,
    measures,
    reconstruction_terms,
    step_of,
    summed,
    turns,
)
from utils.config import to_dict
from utils.errors import ConfigError
from utils.media import to_float
from utils.rng import SampleRng


class CMDAutoencoderTask:
    """Trains `ae`: in pixel mode with a frozen `perceptual` and, when enabled, against `disc`; in latent mode behind a frozen `vae`."""

    name = "cmd-autoencoder"

    def __init__(self, config: CMDAutoencoderConfig, clips: ClipInfo, vae: ImageVae | None = None) -> None:
        self.config = config
        self.clips = clips
        self.vae = vae
        channels, (height, width) = 3, clips.image_size
        if vae is not None:
            _, channels, _, height, width = vae.latent_shape((1, 3, clips.n_frames, height, width))
        m = config.model
        try:
            self.model_config = CMDAEConfig(
                dim=m.dim,
                image_size=(height, width),
                patch_size=m.patch_size,
                channels=channels,
                n_frames=clips.n_frames,
                embed_dim=m.embed_dim,
                depth=m.depth,
                heads=m.heads,
                mode=m.mode,
                rotary=m.rotary,
            )
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None

    def networks(self) -> dict[str, Network]:
        """`ae`, then what its loss needs."""
        config = self.config
        ema = config.ema if config.ema.decay > 0 else None
        nets = {"ae": Network(CMDAutoencoder(self.model_config), optim=config.optim, ema=ema, units=units, methods=("encode", "decode"))}
        if self.vae is not None:
            nets["vae"] = Network(self.vae, "frozen", methods=("encode", "decode"))
            return nets
        return nets | loss_networks(config.loss.perceptual, config.loss.adversarial, config.optim)

    def phases(self, step: int) -> tuple[str, ...]:
        """The autoencoder; from the start step on also the discriminators."""
        return turns(self.config.loss.adversarial, step)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Reconstruction loss of the autoencoder, or the discriminators' loss on its detached output."""
        clips = input_clips(networks, batch, rng)
        frame, loss = loss_frame(rng, clips.shape[2]), self.config.loss
        if phase == "disc":
            with torch.no_grad():
                recon = networks["ae"](clips)[0].float()
            return discriminators_output(networks, loss.adversarial, clips, recon, frame)
        recon, content, _ = networks["ae"](clips)
        recon = recon.float()
        if self.vae is not None:
            return summed({"l2": (loss.latent_l2, mse(clips, recon))}, len(clips))
        factors = {"l1": loss.l1, "l2": loss.l2, "perceptual": loss.perceptual.weight}
        terms = reconstruction_terms(networks, factors, clips, recon, frame)
        if loss.content_mean > 0:
            terms["content_mean"] = (loss.content_mean, mse(clips.mean(dim=2), content.float()))
        if is_adversarial(loss.adversarial, step_of(rng, self.config.train.global_batch_size)):
            terms |= adversarial_terms(networks, loss.adversarial, clips, recon, frame)
        return summed(terms, len(clips))

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """Mean absolute error, PSNR, SSIM and the perceptual distance of the reconstruction in pixels."""
        clips, recon = self._pixels(networks, batch, rng)[:2]
        return measures(networks, clips, recon, loss_frame(rng, clips.shape[2]))

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Each original above its reconstruction, and the content frames."""
        clips, recon, content = self._pixels(networks, batch, rng)
        return {"reconstruction": torch.cat([clips, recon], dim=3), "content_frame": content}

    def scored(self) -> Scored:
        """Reconstructions."""
        return given_back(self.clips)

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """The reconstruction of each clip."""
        return Made(self._pixels(networks, batch, rng)[1], to_float(batch["video"]))

    def state(self) -> dict[str, int | float]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing of its own."""

    def card(self) -> dict[str, Any]:
        """What later stages need to rebuild and use the autoencoder."""
        card: dict[str, Any] = {"system": "cmd", "stage": "autoencoder", "model": to_dict(self.model_config), "data": self.clips.card()}
        if self.vae is not None:
            card["vae"] = {"scale_factor": self.vae.scale_factor, "sha256": self.vae.sha256}
        return card

    def _pixels(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, Tensor, Tensor]:
        """Clips and reconstructions b 3 t h w, content frames b 3 h w, as seen on a screen."""
        clips = input_clips(networks, batch, rng)
        recon, content, _ = (v.float() for v in networks["ae"](clips))
        if self.vae is None:
            return clips, recon.clamp(-1, 1), content.clamp(-1, 1)
        original, recon, content = (networks["vae"].decode(v).clamp(-1, 1) for v in (clips, recon, content[:, :, None]))
        return original, recon, content[:, :, 0]


def build(config: CMDAutoencoderConfig, env: Env) -> tuple[CMDAutoencoderTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False)
    vae = load_image_vae(config.vae.path, config.vae.scale_factor, config.vae.chunk) if config.model.mode == "latent" else None
    return CMDAutoencoderTask(config, clips, vae), source, valid
