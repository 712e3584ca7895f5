"""Autoencoders of whole clips: against pixels and a perceptual network, then against discriminators too (spec, pvdm.md section 5.1).

A system brings its network. What it adds to the loss is a distance of its own (`ClipLossConfig.distances`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.task import Batch, LossOutput, Made, Network, Scored
from pipelines.loading import Loaded
from tasks.clip_autoencoder_config import ClipAutoencoderRunConfig
from tasks.clips import ClipInfo, Networks, empty_batch, units
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
from utils.errors import UserError
from utils.media import to_float
from utils.rng import SampleRng


@dataclasses.dataclass(frozen=True)
class ClipAutoencoder:
    """The network of a system: clips b 3 t h w to reconstructions of the same shape, with methods `encode` and `decode`."""

    config: Any
    """Of the network."""
    build: Callable[[Any], nn.Module]
    """config -> network with fresh weights."""
    load: Callable[[str], Loaded]
    """Path -> a trained one (export, run or released checkpoint)."""
    init_from: str = ""
    """Path of the trained one whose weights the run starts from; empty: a fresh start."""


class ClipAutoencoderTask:
    """Trains `ae` with a frozen `perceptual` and, when enabled, against `disc`."""

    def __init__(self, config: ClipAutoencoderRunConfig, clips: ClipInfo, autoencoder: ClipAutoencoder) -> None:
        self.name = f"{config.system}-autoencoder"
        self.config = config
        self.clips = clips
        self.autoencoder = autoencoder
        self.model_config = autoencoder.config

    def networks(self) -> dict[str, Network]:
        """`ae`, then what its loss needs."""
        config, loss = self.config, self.config.loss
        ema = config.ema if config.ema.decay > 0 else None
        nets = {"ae": Network(first_weights(self.autoencoder), optim=config.optim, ema=ema, units=units, methods=("encode", "decode"))}
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
        factors = loss.distances() | {"perceptual": loss.perceptual.weight}
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

    def scored(self) -> Scored:
        """Reconstructions."""
        return given_back(self.clips)

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """The reconstruction of each clip."""
        clips = to_float(batch["video"])
        return Made(networks["ae"](clips).float().clamp(-1, 1), clips)

    def state(self) -> dict[str, int | float]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing of its own."""

    def card(self) -> dict[str, Any]:
        """What later stages need to rebuild and use the autoencoder."""
        model = to_dict(self.model_config)
        return {"system": self.config.system, "stage": "autoencoder", "model": model, "data": self.clips.card()}


def first_weights(autoencoder: ClipAutoencoder) -> nn.Module:
    """The network with fresh weights, or those of the trained one (of its average where there is one) that the run starts from.

    Raises UserError where the two differ in more than how many parts of a training clip are encoded by themselves.
    """
    network, path, wanted = autoencoder.build(autoencoder.config), autoencoder.init_from, autoencoder.config
    if not path:
        return network
    loaded = autoencoder.load(path)
    for (name, have), want in zip(_sizes(loaded.config).items(), _sizes(wanted).values(), strict=True):
        if have != want:
            raise UserError(f"--init-from {path} cannot start this run: its {name} is {have}, that of the run {want}")
    device = next(network.parameters()).device  # a dry run builds it on the meta device
    network.load_state_dict({name: value.to(device) for name, value in loaded.module.state_dict().items()})
    return network


def _sizes(config: Any) -> dict[str, Any]:
    """What decides the weights and what they mean, by name."""
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in ("n_frames", "splits")}
    return known | {"clip_frames": config.clip_frames, "plane_head_dim": config.plane_head_dim or config.dim // 8}
