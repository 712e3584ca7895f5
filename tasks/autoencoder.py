"""The CMD autoencoder: a clip to a content frame and a motion latent and back (CMD section 3.1; spec systems/cmd.md sections 3 and 4)."""

from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from engine.config import OptimConfig
from engine.task import Batch, LossOutput, Network
from launch.env import Env
from losses import perceptual
from losses.adversarial import discriminator_loss, feature_matching, generator_loss
from losses.reconstruction import l1, mse, pick_frame
from losses.reconstruction import perceptual as perceptual_distance
from metrics.frames import SSIM_WINDOW, psnr, ssim
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.discriminators import DiscriminatorConfig, Discriminators
from pipelines.image_vae import ImageVae, load_image_vae
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.clips import ClipInfo, Networks, empty_batch, input_clips, open_clips, units
from utils.config import to_dict
from utils.errors import ConfigError
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
        setting = config.loss.perceptual
        if setting.kind != "none" and setting.weight > 0:
            net = perceptual.build(setting.kind, setting.weights, setting.on_missing)
            if net is not None:
                nets["perceptual"] = Network(net, "frozen")
        adversarial = config.loss.adversarial
        if adversarial.enabled:
            disc = Discriminators(DiscriminatorConfig(ndf=adversarial.ndf, n_layers=adversarial.n_layers))
            nets["disc"] = Network(disc, "ddp", optim=OptimConfig(lr=adversarial.disc_lr, betas=adversarial.disc_betas))
        return nets

    def phases(self, step: int) -> tuple[str, ...]:
        """The autoencoder; from the start step on also the discriminators."""
        adversarial = self.config.loss.adversarial
        return ("ae", "disc") if adversarial.enabled and step >= adversarial.start_step else ("ae",)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Reconstruction loss of the autoencoder, or the discriminators' loss on its detached output."""
        clips = input_clips(networks, batch, rng)
        frame = rng.integers("loss-frame", clips.shape[2])
        if phase == "disc":
            return self._discriminator_loss(networks, clips, frame)
        recon, content, _ = networks["ae"](clips)
        recon = recon.float()
        if self.vae is not None:
            terms = {"l2": (self.config.loss.latent_l2, mse(clips, recon))}
        else:
            terms = self._pixel_terms(networks, clips, recon, frame)
            if self.config.loss.content_mean > 0:
                terms["content_mean"] = (self.config.loss.content_mean, mse(clips.mean(dim=2), content.float()))
            if len(self.phases(self._step(rng))) > 1:
                terms |= self._adversarial_terms(networks, clips, recon, frame)
        total = sum((weight * value.sum() for weight, value in terms.values()), torch.zeros((), device=recon.device))
        count = len(clips)
        metrics = {name: (value.detach().sum(), count) for name, (_, value) in terms.items()}
        return LossOutput(total, count, metrics)

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """Mean absolute error, PSNR and SSIM of the reconstruction in pixels."""
        clips, recon = self._pixels(networks, batch, rng)[:2]
        values = {"l1": l1(clips, recon), "psnr": psnr(clips, recon)}
        if min(clips.shape[-2:]) >= SSIM_WINDOW:
            values["ssim"] = ssim(clips, recon)
        return {name: (value.sum(), len(value)) for name, value in values.items()}

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Each original above its reconstruction, and the content frames."""
        clips, recon, content = self._pixels(networks, batch, rng)
        return {"reconstruction": torch.cat([clips, recon], dim=3), "content_frame": content}

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

    def _step(self, rng: SampleRng) -> int:
        """Optimiser step that the samples belong to."""
        return int(rng.index[0]) // self.config.train.global_batch_size

    def _pixel_terms(self, networks: Networks, clips: Tensor, recon: Tensor, frame: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Name -> (factor, value per sample)."""
        loss = self.config.loss
        terms = {"l1": (loss.l1, l1(clips, recon)), "l2": (loss.l2, mse(clips, recon))}
        if "perceptual" in networks:
            distance = perceptual_distance(networks["perceptual"], clips, recon, frame)
            terms["perceptual"] = (loss.perceptual.weight, distance.float())
        return {name: term for name, term in terms.items() if term[0] > 0}

    def _adversarial_terms(self, networks: Networks, clips: Tensor, recon: Tensor, frame: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Name -> (factor, value per sample) of fooling both discriminators and of matching their features."""
        setting = self.config.loss.adversarial
        fake = networks["disc"](pick_frame(recon, frame), recon)
        with torch.no_grad():
            real = networks["disc"](pick_frame(clips, frame), clips)
        fooled = torch.stack([generator_loss(stages[-1].float()) for stages in fake]).sum(0)
        matched = torch.stack([feature_matching(r, f).float() for r, f in zip(real, fake, strict=True)]).sum(0)
        return {"adversarial": (setting.weight, fooled), "feature_matching": (setting.weight * setting.feature_matching, matched)}

    def _discriminator_loss(self, networks: Networks, clips: Tensor, frame: Tensor) -> LossOutput:
        """Loss of both discriminators; no gradient reaches the autoencoder."""
        with torch.no_grad():
            recon = networks["ae"](clips)[0].float()
        real = networks["disc"](pick_frame(clips, frame), clips)
        fake = networks["disc"](pick_frame(recon, frame), recon)
        kind = self.config.loss.adversarial.loss
        losses = [discriminator_loss(r[-1].float(), f[-1].float(), kind) for r, f in zip(real, fake, strict=True)]
        count = len(clips)
        metrics = {name: (value.detach().sum(), count) for name, value in zip(("disc_2d", "disc_3d"), losses, strict=True)}
        return LossOutput(torch.stack(losses).sum(), count, metrics)


def build(config: CMDAutoencoderConfig, env: Env) -> tuple[CMDAutoencoderTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False)
    vae = load_image_vae(config.vae.path, config.vae.scale_factor, config.vae.chunk) if config.model.mode == "latent" else None
    return CMDAutoencoderTask(config, clips, vae), source, valid
