"""Latte's first stage: a VAE of single frames; squared error, KL, LPIPS and a patch discriminator (spec, latte.md section 4.3)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from engine.config import OptimConfig
from engine.task import Batch, LossOutput, Made, Network, Scored
from launch.env import Env
from losses import perceptual
from losses.adversarial import discriminator_loss, generator_loss
from losses.reconstruction import kl_to_standard, l1, mse
from metrics.frames import SSIM_WINDOW, psnr, ssim
from models.autoencoders.frame_vae import FrameVAE, sample
from models.discriminators import FrameDiscriminator
from tasks.clips import ClipInfo, Networks, empty_batch, open_clips, units
from tasks.frame_vae_config import FrameVAERunConfig
from tasks.reconstruction import given_back
from utils.config import to_dict
from utils.errors import ConfigError
from utils.media import to_channels, to_float, to_rgb
from utils.rng import SampleRng


class FrameVAETask:
    """Trains `ae` with a frozen `perceptual` and, from the start step on, against `disc`."""

    name = "latte-autoencoder"

    def __init__(self, config: FrameVAERunConfig, clips: ClipInfo) -> None:
        self.config = config
        self.clips = clips
        self.disc_config = config.discriminator()
        try:
            self.latent_shape = (config.model.z_channels, *config.model.latent_size(*clips.image_size))
            if self.disc_config is not None:
                self.disc_config.logits_size(*clips.image_size)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        self._made: dict[tuple[int, int], Tensor] = {}

    def networks(self) -> dict[str, Network]:
        """`ae`, then what its loss needs."""
        config = self.config
        ema = config.ema if config.ema.decay > 0 else None
        nets = {"ae": Network(FrameVAE(config.model), optim=config.optim, ema=ema, units=units, methods=("moments", "decode"))}
        setting = config.loss.perceptual
        if setting.kind != "none" and setting.weight > 0:
            net = perceptual.build(setting.kind, setting.weights, setting.on_missing)
            if net is not None:
                nets["perceptual"] = Network(net, "frozen")
        if self.disc_config is not None:
            adversarial = config.loss.adversarial
            optim = OptimConfig(lr=adversarial.lr or config.optim.lr, betas=adversarial.betas)
            # Whole on every rank: batch norm's running statistics cannot be sharded.
            nets["disc"] = Network(FrameDiscriminator(self.disc_config), "ddp", optim=optim)
        return nets

    def phases(self, step: int) -> tuple[str, ...]:
        """The autoencoder; from the start step on also the discriminator."""
        return ("ae", "disc") if self.disc_config is not None and step >= self.config.loss.adversarial.start_step else ("ae",)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Loss of the autoencoder, or the discriminator's on what the autoencoder made in its turn."""
        frames = self._frames(batch)
        if phase == "disc":
            return self._discriminator_loss(networks, frames, rng)
        recon, mean, logvar = networks["ae"](frames, self._noise(rng))
        recon = recon.float()
        self._keep(recon.detach(), rng)
        terms = {"mse": (1.0, mse(frames, recon)), "kl": (self.config.loss.kl_weight, kl_to_standard(mean, logvar))}
        if "perceptual" in networks:
            distance = networks["perceptual"](to_rgb(frames), to_rgb(recon))
            terms["perceptual"] = (self.config.loss.perceptual.weight, distance.float())
        if "disc" in self.phases(self._step(rng)):
            fooled = generator_loss(networks["disc"](recon).float(), "lsgan")
            terms["adversarial"] = (self.config.loss.adversarial.weight, fooled)
        total = torch.stack([weight * value.sum() for weight, value in terms.values()]).sum()
        count = len(frames)
        return LossOutput(total, count, {name: (value.detach().sum(), count) for name, (_, value) in terms.items()})

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """Mean absolute error, PSNR and SSIM of the frames; mean and standard deviation of the latents' posterior samples.

        The deviation is that within a micro-batch.
        """
        frames = self._frames(batch)
        z = self._latents(networks, frames, rng)
        clips, made = frames[:, :, None], networks["ae"].decode(z).float().clamp(-1, 1)[:, :, None]
        count = len(frames)
        values = {"l1": l1(clips, made).sum(), "psnr": psnr(clips, made).sum()}
        if min(frames.shape[-2:]) >= SSIM_WINDOW:
            values["ssim"] = ssim(clips, made).sum()
        values |= {"latent_mean": count * z.mean(), "latent_std": count * z.std(correction=0)}
        return {name: (value, count) for name, value in values.items()}

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Each frame above its reconstruction."""
        found = self.make(networks, batch, rng)
        assert found.originals is not None
        return {"reconstruction": torch.cat([found.originals, found.videos], dim=2)}

    def scored(self) -> Scored:
        """Reconstructions of single frames."""
        return given_back(self.clips)

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """The reconstruction of each frame."""
        frames = self._frames(batch)
        made = networks["ae"].decode(self._latents(networks, frames, rng)).float().clamp(-1, 1)
        return Made(to_rgb(made), to_rgb(frames))

    def state(self) -> dict[str, int | float]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing of its own."""

    def card(self) -> dict[str, Any]:
        """What later stages need to rebuild and use the autoencoder."""
        return {"system": "latte", "stage": "autoencoder", "model": to_dict(self.config.model), "data": self.clips.card()}

    def _frames(self, batch: Batch) -> Tensor:
        """The batch's frames as the VAE takes them, (b, channels, h, w) float32 in [-1, 1]."""
        return to_channels(to_float(batch["video"])[:, :, 0], self.config.model.channels)

    def _noise(self, rng: SampleRng) -> Tensor:
        return rng.normal("vae", self.latent_shape)

    def _latents(self, networks: Networks, frames: Tensor, rng: SampleRng) -> Tensor:
        """Posterior samples (b, Z, h', w')."""
        mean, logvar = networks["ae"].moments(frames)
        return sample(mean, logvar, self._noise(rng))

    def _step(self, rng: SampleRng) -> int:
        """Optimiser step that the samples belong to."""
        return int(rng.index[0]) // self.config.train.global_batch_size

    def _keep(self, recon: Tensor, rng: SampleRng) -> None:
        """Holds a micro-batch's reconstructions for the discriminator's turn of the same step."""
        step = self._step(rng)
        others = {key: value for key, value in self._made.items() if key[0] == step}
        self._made = others | {(step, int(rng.index[0])): recon}

    def _discriminator_loss(self, networks: Networks, frames: Tensor, rng: SampleRng) -> LossOutput:
        """Loss of the discriminator; no gradient reaches the autoencoder.

        The reconstructions are those of the autoencoder's turn, before its update, as in the release; without such a turn they are made.
        """
        recon = self._made.pop((self._step(rng), int(rng.index[0])), None)
        if recon is None:
            with torch.no_grad():
                recon = networks["ae"](frames, self._noise(rng))[0].float()
        # One pass each: batch norm must not mix the real with the made.
        fake, real = networks["disc"](recon).float(), networks["disc"](frames).float()
        loss = discriminator_loss(real, fake, "lsgan").sum()
        count = len(frames)
        metrics = {"disc": loss, "disc_real": _mean_logit(real), "disc_fake": _mean_logit(fake)}
        return LossOutput(self.config.loss.adversarial.weight * loss, count, {k: (v.detach(), count) for k, v in metrics.items()})


def _mean_logit(logits: Tensor) -> Tensor:
    """Sum over samples of the mean over patches."""
    return logits.flatten(1).mean(1).sum()


def build(config: FrameVAERunConfig, env: Env) -> tuple[FrameVAETask, ClipSource, ClipSource | None]:
    """Task, training frames and (with `data.val_path`) validation frames."""
    clips, source, valid = open_clips(config, dataclasses.replace(config.data, n_frames=1), env, latents=False)
    return FrameVAETask(config, clips), source, valid
