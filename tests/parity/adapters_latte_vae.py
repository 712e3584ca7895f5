"""Checks of the tutorial release's frame VAE, its discriminator and the losses of both."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from losses.adversarial import discriminator_loss, generator_loss
from losses.reconstruction import kl_to_standard, mse
from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig, sample
from models.discriminators import FrameDiscriminator, FrameDiscriminatorConfig
from tests.parity.case import Case, adapter

REL, ABS = 1e-4, 1e-5
"""What the files allow; the norms of gradients ten times as much."""


def named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The release's settings under our names."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if "im_channels" in values:
        values["channels"] = values.pop("im_channels")
    return values


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """With all of a state dict, whose names are ours."""
    module.load_state_dict(state)
    module.zero_grad()
    return module


def gradients(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Name -> gradient."""
    return {f"{prefix}{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}


@adapter("latte", "expl-vae")
def check_vae(case: Case) -> None:
    model = loaded(FrameVAE(FrameVAEConfig(**named(case.fields), clamp_logvar=False)), case.state())
    mean, logvar = model.moments(case.input("x"))
    moments, z = torch.cat([mean, logvar], 1), sample(mean, logvar, case.input("eps"))
    case.expect("moments", moments, REL, ABS)
    case.expect("z", z, REL, ABS)
    recon = model(case.input("x"), case.input("eps"))[0]
    case.expect("recon", recon, REL, ABS)
    if case.has("in/z"):
        case.expect("decoded", model.decode(case.input("z")), REL, ABS)
    case.expect("kl", kl_to_standard(mean, logvar).mean(), REL, ABS)
    loss = model.decode(z).square().sum() + moments.square().sum()
    case.expect("loss", loss, REL, ABS)
    loss.backward()
    expect_norms(case, gradients(model))


@adapter("latte", "expl-disc")
def check_discriminator(case: Case) -> None:
    model = loaded(FrameDiscriminator(FrameDiscriminatorConfig(**named(case.fields))), case.state())
    case.expect("logits_eval", model.eval()(case.input("x")), REL, ABS)
    logits = model.train()(case.input("x"))
    case.expect("logits_train", logits, REL, ABS)
    case.expect("mse_vs_one", generator_loss(logits, "lsgan").mean(), REL, ABS)
    case.expect("mse_vs_zero", 2 * discriminator_loss(torch.ones_like(logits), logits, "lsgan").mean(), REL, ABS)
    after = model.state_dict()
    for name in case.names("out/buffer_after_train/"):
        case.compare(name, after[name.removeprefix("out/buffer_after_train/")], REL, ABS)
    loss = logits.square().sum()
    case.expect("loss", loss, REL, ABS)
    loss.backward()
    expect_norms(case, gradients(model))


@adapter("latte", "expl-aeloss")
def check_losses(case: Case) -> None:
    assert case.config("perceptual_weight", 0) == 0, "the files have no perceptual term"
    x, steps = case.input("x"), case.config("acc_steps", 1)
    vae = loaded(FrameVAE(FrameVAEConfig(**named(case.config("vae")))), case.state("vae."))
    fields = named(case.config("disc")) | {"channels": x.shape[1]}
    disc = loaded(FrameDiscriminator(FrameDiscriminatorConfig(**fields)), case.state("disc."))
    recon, mean, logvar = vae(x, case.input("eps"))
    case.expect("recon", recon, REL, ABS)
    terms = {"recon": mse(x, recon), "kl": kl_to_standard(mean, logvar), "adv_g": generator_loss(disc(recon), "lsgan")}
    for name, value in terms.items():
        case.expect(f"loss_{name}", value.mean(), REL, ABS)
    weight = case.config("disc_weight")
    total = (terms["recon"] + case.config("kl_weight") * terms["kl"] + weight * terms["adv_g"]).mean() / steps
    case.expect("loss_total_g", total, REL, ABS)
    total.backward()
    leaked = {name: grad.clone() for name, grad in gradients(disc, "disc.").items()}
    disc.zero_grad()
    fake, real = disc(recon.detach()), disc(x)
    case.expect("loss_disc_fake", fake.square().mean(), REL, ABS)
    case.expect("loss_disc_real", generator_loss(real, "lsgan").mean(), REL, ABS)
    loss = weight * discriminator_loss(real, fake, "lsgan").mean()
    case.expect("loss_disc", loss, REL, ABS)
    (loss / steps).backward()
    own = gradients(disc, "disc.")
    expect_norms(case, gradients(vae, "vae.") | own)
    # What the release applies: the same with the generator's gradient left in.
    expect_norms(case, {name: grad + leaked[name] for name, grad in own.items()}, "peer_grad_norm")


def expect_norms(case: Case, grads: Mapping[str, Tensor], group: str = "grad_norm") -> None:
    """Norms of gradients, stored as scalars."""
    for name in case.names(f"{group}/"):
        case.compare(name, grads[name.removeprefix(f"{group}/")].norm(), 10 * REL, ABS)
