"""PVDM's autoencoder: a clip to three planes of latents and back, then against discriminators (spec, pvdm.md sections 2 and 5.1)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from engine.task import Batch, LossOutput, Network
from launch.env import Env
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from pipelines.pvdm_loading import load_pvdm_autoencoder
from tasks.clips import ClipInfo, Networks, empty_batch, open_clips, units
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig
from tasks.reconstruction import (
    adversarial_terms,
    discriminators_output,
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
from utils.errors import UserError
from utils.media import to_float
from utils.rng import SampleRng


class PVDMAutoencoderTask:
    """Trains `ae` with a frozen `perceptual` and, when enabled, against `disc`."""

    name = "pvdm-autoencoder"

    def __init__(self, config: PVDMAutoencoderConfig, clips: ClipInfo) -> None:
        self.config = config
        self.clips = clips
        self.model_config = config.model.of(clips)

    def networks(self) -> dict[str, Network]:
        """`ae`, then what its loss needs."""
        config, loss = self.config, self.config.loss
        ema = config.ema if config.ema.decay > 0 else None
        ae = PVDMAutoencoder(self.model_config)
        if config.model.init_from:
            # A dry run builds it on the meta device.
            start = trained(config.model.init_from, self.model_config)
            ae.load_state_dict({name: value.to(ae.patch_in.weight.device) for name, value in start.items()})
        nets = {"ae": Network(ae, optim=config.optim, ema=ema, units=units, methods=("encode", "decode"))}
        return nets | loss_networks(loss.perceptual, loss.adversarial, config.optim)

    def phases(self, step: int) -> tuple[str, ...]:
        """The autoencoder; from the start step on, with it or by turns with it, the discriminators."""
        return turns(self.config.loss.adversarial, step)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Reconstruction loss of the autoencoder, or the discriminators' loss on its detached output."""
        clips, loss = to_float(batch["video"]), self.config.loss
        frame = loss_frame(rng, clips.shape[2])
        if phase == "disc":
            with torch.no_grad():
                recon = networks["ae"](clips).float()
            return discriminators_output(networks, loss.adversarial, clips, recon, frame)
        recon = networks["ae"](clips).float()
        factors = {"l1": loss.l1, "l2": loss.l2, "perceptual": loss.perceptual.weight}
        terms = reconstruction_terms(networks, factors, clips, recon, frame)
        if is_adversarial(loss.adversarial, step_of(rng, self.config.train.global_batch_size)):
            terms |= adversarial_terms(networks, loss.adversarial, clips, recon, frame)
        return summed(terms, len(clips))

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """Mean absolute error, PSNR, SSIM and the perceptual distance of the reconstruction."""
        clips = to_float(batch["video"])
        return measures(networks, clips, networks["ae"](clips).float(), loss_frame(rng, clips.shape[2]))

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Each original above its reconstruction."""
        clips = to_float(batch["video"])
        return {"reconstruction": torch.cat([clips, networks["ae"](clips).float()], dim=3)}

    def state(self) -> dict[str, int | float]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing of its own."""

    def card(self) -> dict[str, Any]:
        """What later stages need to rebuild and use the autoencoder."""
        return {"system": "pvdm", "stage": "autoencoder", "model": to_dict(self.model_config), "data": self.clips.card()}


def trained(path: str, wanted: PVDMAEConfig) -> dict[str, Tensor]:
    """Weights of a trained autoencoder (export, run or released checkpoint), of its average where there is one, for a run on `wanted`.

    Raises UserError where the two differ in more than the number of parts that a training clip is cut into.
    """
    loaded = load_pvdm_autoencoder(path, splits=wanted.splits, plane_heads=wanted.plane_heads)
    for (name, have), want in zip(_sizes(loaded.config).items(), _sizes(wanted).values(), strict=True):
        if have != want:
            raise UserError(f"--init-from {path} cannot start this run: its {name} is {have}, that of the run {want}")
    return loaded.module.state_dict()


def _sizes(config: PVDMAEConfig) -> dict[str, Any]:
    """What decides the weights and what they mean, by name."""
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in ("n_frames", "splits")}
    return known | {"clip_frames": config.clip_frames, "plane_head_dim": config.plane_head_dim or config.dim // 8}


def build(config: PVDMAutoencoderConfig, env: Env) -> tuple[PVDMAutoencoderTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False)
    return PVDMAutoencoderTask(config, clips), source, valid
