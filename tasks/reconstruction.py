"""Losses that the autoencoders of clips share: pixels, a perceptual distance on one frame of each clip, and a pair of discriminators.

Spec, cmd.md section 4, pvdm.md section 5.1 and hvdm.md section 5. A task adds terms of its own to those of `reconstruction_terms`.
"""

import torch
from torch import Tensor

from engine.config import OptimConfig
from engine.task import LossOutput, Network, Scored
from losses import perceptual
from losses.adversarial import discriminator_loss, feature_matching, generator_loss
from losses.reconstruction import l1, mse, pick_frame, subbands
from losses.reconstruction import perceptual as perceptual_distance
from metrics.frames import SSIM_WINDOW, psnr, ssim
from models.discriminators import DiscriminatorConfig, Discriminators
from models.official.criterion import import_criterion
from tasks.clips import ClipInfo, Networks
from tasks.reconstruction_config import AdversarialConfig, PerceptualConfig
from utils.errors import UserError
from utils.rng import SampleRng
from utils.weights import load_tensors

Terms = dict[str, tuple[float, Tensor]]
"""Name -> (factor, value per sample)."""


def loss_networks(distance: PerceptualConfig, adversarial: AdversarialConfig, optim: OptimConfig) -> dict[str, Network]:
    """What the loss of an autoencoder trained by `optim` needs: a frozen `perceptual`, and `disc`, as far as they are wanted."""
    nets = {}
    if distance.kind != "none" and distance.weight > 0:
        net = perceptual.build(distance.kind, distance.weights, distance.on_missing)
        if net is not None:
            nets["perceptual"] = Network(net, "frozen")
    if adversarial.enabled:
        disc = _discriminators(adversarial)
        own = OptimConfig(
            lr=adversarial.disc_lr or optim.lr,
            betas=adversarial.disc_betas,
            weight_decay=adversarial.disc_weight_decay,
            clip_norm=adversarial.disc_clip_norm,
        )
        # Whole on every rank: batch norm's running statistics cannot be sharded.
        parts = ("discriminator_2d", "discriminator_3d")
        nets["disc"] = Network(disc, "ddp", optim=own, clip_parts=parts, sync_norms=adversarial.sync_norms)
    return nets


def _discriminators(setting: AdversarialConfig) -> Discriminators:
    """With fresh weights, or with those that the settings name."""
    disc = Discriminators(DiscriminatorConfig(ndf=setting.ndf, n_layers=setting.n_layers))
    if setting.disc_init_from:
        try:
            disc.load_state_dict(import_criterion(load_tensors(setting.disc_init_from)).discriminators)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"--init-disc-from {setting.disc_init_from} cannot start these discriminators: {reason}") from None
    return disc


def is_adversarial(setting: AdversarialConfig, step: int) -> bool:
    """Whether the discriminators' part of the loss counts in optimiser step `step` (from 0)."""
    return setting.enabled and step >= setting.start_step


def turns(setting: AdversarialConfig, step: int) -> tuple[str, ...]:
    """The networks that are updated in optimiser step `step` (from 0)."""
    if not is_adversarial(setting, step):
        return ("ae",)
    if setting.turns == "both":
        return ("ae", "disc")
    return ("disc",) if (step - setting.start_step) % 2 else ("ae",)


def step_of(rng: SampleRng, global_batch_size: int) -> int:
    """Optimiser step that the samples belong to."""
    return int(rng.index[0]) // global_batch_size


def loss_frame(rng: SampleRng, frames: int) -> Tensor:
    """The frame of each clip that the perceptual loss and the 2-D discriminator see, (b,)."""
    return rng.integers("loss-frame", frames)


def reconstruction_terms(networks: Networks, factors: dict[str, float], clips: Tensor, recon: Tensor, frame: Tensor) -> Terms:
    """Distances of `recon` from `clips` (both b 3 t h w): `l1`, `l2` and `subbands` over all, `perceptual` on frame[b] of each, where
    their factor is not 0 and the network is there.
    """
    terms: Terms = {}
    for name, error in (("l1", l1), ("l2", mse), ("subbands", subbands)):
        if factors.get(name):
            terms[name] = (factors[name], error(clips, recon))
    if "perceptual" in networks and factors.get("perceptual"):
        distance = perceptual_distance(networks["perceptual"], clips, recon, frame)
        terms["perceptual"] = (factors["perceptual"], distance.float())
    return terms


def adversarial_terms(networks: Networks, setting: AdversarialConfig, clips: Tensor, recon: Tensor, frame: Tensor) -> Terms:
    """Fooling both discriminators, and matching what their stages see of the original."""
    with torch.no_grad():  # first, as in the release: the order decides what the running statistics are
        real = networks["disc"](pick_frame(clips, frame), clips)
    fake = networks["disc"](pick_frame(recon, frame), recon)
    fooled = torch.stack([generator_loss(stages[-1].float()) for stages in fake]).sum(0)
    matched = torch.stack([feature_matching(r, f).float() for r, f in zip(real, fake, strict=True)]).sum(0)
    return {"adversarial": (setting.weight, fooled), "feature_matching": (setting.feature_matching, matched)}


def discriminators_output(networks: Networks, setting: AdversarialConfig, clips: Tensor, recon: Tensor, frame: Tensor) -> LossOutput:
    """Loss of both discriminators on originals and reconstructions, of which the latter carry no gradient."""
    # One pass each: batch norm must not mix the real with the made.
    real = networks["disc"](pick_frame(clips, frame), clips)
    fake = networks["disc"](pick_frame(recon, frame), recon)
    losses = [discriminator_loss(r[-1].float(), f[-1].float(), setting.loss) for r, f in zip(real, fake, strict=True)]
    count = len(clips)
    metrics = {name: (value.detach().sum(), count) for name, value in zip(("disc_2d", "disc_3d"), losses, strict=True)}
    return LossOutput(torch.stack(losses).sum(), count, metrics)


def summed(terms: Terms, count: int) -> LossOutput:
    """The loss of `count` samples from its terms."""
    total = torch.stack([factor * value.sum() for factor, value in terms.values()]).sum()
    return LossOutput(total, count, {name: (value.detach().sum(), count) for name, (_, value) in terms.items()})


def given_back(clips: ClipInfo) -> Scored:
    """Reconstructions, beside the clips that they are of."""
    return Scored("given back", clips.n_frames, clips.image_size, label="r", originals=True)


def measures(networks: Networks, clips: Tensor, recon: Tensor, frame: Tensor) -> dict[str, tuple[Tensor, int]]:
    """How far reconstructions are from clips (b 3 t h w in [-1, 1]): mean absolute error, PSNR, SSIM where the frames are large enough,
    and the perceptual distance on frame[b] of each clip where its network is there.
    """
    values = {"l1": l1(clips, recon), "psnr": psnr(clips, recon)}
    if min(clips.shape[-2:]) >= SSIM_WINDOW:
        values["ssim"] = ssim(clips, recon)
    if "perceptual" in networks:
        values["perceptual"] = perceptual_distance(networks["perceptual"], clips, recon, frame).float()
    return {name: (value.sum(), len(value)) for name, value in values.items()}
