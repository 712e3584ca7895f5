"""Checks of the training of PVDM's autoencoder: its losses, and whose turn it is."""

import copy

import torch
from torch import Tensor

from losses.reconstruction import pick_frame
from models.discriminators import DiscriminatorConfig, Discriminators
from tasks.reconstruction import adversarial_terms, discriminators_output, is_adversarial, reconstruction_terms, summed, turns
from tasks.reconstruction_config import AdversarialConfig
from tests.parity.case import Case, adapter

REL, ABS = 1e-5, 1e-6
GRADIENT = 1e-3
"""Norms of gradients, relative."""


def stub(a: Tensor, b: Tensor) -> Tensor:
    """The distance in the place of the perceptual network."""
    return (a - b).square().flatten(1).mean(1)


def gradient_norms(module: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> gradient; 0 where the loss did not reach, as in the release, which multiplies by 0 what we leave out."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


@adapter("pvdm", "first_stage_loss")
def check_first_stage_loss(case: Case) -> None:
    real, recon, frame = case.input("real"), case.input("recon").requires_grad_(), case.input("frame_idx")
    assert real.shape[2] == case.config("timesteps", real.shape[2])
    ndf, layers = case.config("disc_ndf", 64), case.config("disc_num_layers", 3)
    setting = AdversarialConfig(
        enabled=True,
        start_step=case.config("disc_start"),
        loss=case.config("disc_loss", "hinge"),
        weight=case.config("disc_weight", 1.0),
        feature_matching=case.config("feature_weight", 4.0),
    )
    disc = Discriminators(DiscriminatorConfig(channels=real.shape[1], ndf=ndf, n_layers=layers))
    disc.load_state_dict(case.state())
    disc.train(case.config("train_mode", True))
    expect_stages(case, copy.deepcopy(disc), real, recon.detach(), frame)

    nets = {"disc": disc, "perceptual": stub}
    factors = {"l1": case.config("pixelloss_weight", 4.0), "perceptual": case.config("perceptual_weight", 4.0)}
    terms = reconstruction_terms(nets, factors, real, recon, frame)
    for name, ours in (("rec", "l1"), ("perceptual", "perceptual")):
        factor, values = terms.get(ours, (0.0, torch.zeros(1)))  # what counts nothing is not computed
        case.expect(name, factor * values.mean().reshape(1), REL, ABS)
    # The release runs the discriminators before they count too: their running statistics move.
    extra = adversarial_terms(nets, setting, real, recon, frame)
    active = is_adversarial(setting, case.config("global_step"))
    if active:
        terms |= extra
    total = summed(terms, 1).total / len(real)
    case.expect("g_total", total.reshape(1), REL, ABS)
    total.backward()
    case.expect("grad_recon", recon.grad, REL, 1e-8)
    case.expect_grad_norms(gradient_norms(disc), "grad_norm/g_step", GRADIENT, ABS)
    state = disc.state_dict()
    for name in case.names("out/after_g/"):
        value = state[name.removeprefix("out/after_g/")]
        case.compare(name, value.reshape(case.tensor(name).shape), REL, ABS)  # counts are stored as (1,)

    disc.zero_grad()
    loss = int(active) * discriminators_output(nets, setting, real, recon.detach(), frame).total / len(real)
    case.expect("d_total", loss.reshape(1), REL, ABS)
    loss.backward()
    case.expect_grad_norms(gradient_norms(disc), "grad_norm/d_step", GRADIENT, ABS)


def expect_stages(case: Case, disc: Discriminators, real: Tensor, recon: Tensor, frame: Tensor) -> None:
    """Logits and means of every stage, of originals and reconstructions."""
    for side, clips in (("real", real), ("fake", recon)):
        for dims, stages in zip(("2d", "3d"), disc(pick_frame(clips, frame), clips), strict=True):
            case.expect(f"logits_{side}_{dims}", stages[-1], REL, ABS)
            for number, features in enumerate(stages):
                case.expect(f"feat_mean_{side}_{dims}_{number}", features.mean().reshape(1), REL, ABS)
                case.expect(f"feat_absmean_{side}_{dims}_{number}", features.abs().mean().reshape(1), REL, ABS)


@adapter("pvdm", "first_stage_schedule")
def check_turns(case: Case) -> None:
    start, accumulation = case.config("disc_start"), case.config("accum_iter")
    count = len(case.tensor("out/phase"))
    # The release's start is compared with optimiser steps for the turns, with micro-iterations for the factor; ours with steps for both.
    setting = AdversarialConfig(enabled=True, turns="alternate", start_step=max(start, 0))
    phases = [turns(setting, it // accumulation) for it in range(count)]
    assert all(len(phase) == 1 for phase in phases)
    case.expect("phase", torch.tensor([("ae", "disc").index(phase[0]) for phase in phases]))
    case.expect("zero_grad", torch.tensor([it % accumulation == 0 for it in range(count)]).long())
    case.expect("optimizer_step", torch.tensor([it % accumulation == accumulation - 1 for it in range(count)]).long())
    case.expect("disc_factor", torch.tensor([float(is_adversarial(setting, it)) for it in range(count)]))
