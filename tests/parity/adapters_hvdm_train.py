"""Checks of the training of HVDM's autoencoder: its losses."""

import torch

from models.discriminators import DiscriminatorConfig, Discriminators
from tasks.reconstruction import adversarial_terms, discriminators_output, is_adversarial, reconstruction_terms, summed
from tasks.reconstruction_config import AdversarialConfig
from tests.parity.adapters_pvdm_train import ABS, GRADIENT, REL, gradient_norms, stub
from tests.parity.case import Case, adapter


@adapter("hvdm", "autoencoder_loss")
def check_autoencoder_loss(case: Case) -> None:
    real, recon, frame = case.input("video"), case.input("recon").requires_grad_(), case.input("frame_idx")
    assert real.shape == (case.config("batch"), 3, case.config("frames"), case.config("height"), case.config("width"))
    setting = AdversarialConfig(
        enabled=True,
        start_step=case.config("disc_start"),
        loss=case.config("disc", "hinge"),
        weight=case.config("gan_weight", 1.0),
        feature_matching=case.config("feature_weight", 4.0),
    )
    disc = Discriminators(DiscriminatorConfig(channels=3, ndf=case.config("disc_ndf", 64), n_layers=case.config("disc_layers", 3)))
    missing, unknown = disc.load_state_dict(case.state(), strict=False)  # statistics of batch norm, which training does not read
    assert not unknown and all("running_" in name or "num_batches" in name for name in missing)
    disc.train()

    nets = {"disc": disc, "perceptual": stub}
    factors = {
        "l1": case.config("pixel_weight", 4.0),
        "subbands": case.config("freq_weight", 4.0),
        "perceptual": case.config("perceptual_weight", 4.0),
    }
    terms = reconstruction_terms(nets, factors, real, recon, frame)
    parts = {name: (factor * values.mean()).reshape(1) for name, (factor, values) in terms.items()}
    case.expect("rec_loss", parts["l1"], REL, ABS)
    case.expect("freq_loss", parts["subbands"], REL, ABS)
    active = is_adversarial(setting, case.config("step"))
    if active:
        terms |= adversarial_terms(nets, setting, real, recon, frame)
    total = summed(terms, 1).total / len(real)
    case.expect("generator_total", total.reshape(1), REL, ABS)
    total.backward()
    case.expect("grad_recon", recon.grad, REL, 1e-8)

    disc.zero_grad()
    loss = torch.zeros(())
    if active:  # what counts nothing is not computed
        loss = discriminators_output(nets, setting, real, recon.detach(), frame).total / len(real)
        loss.backward()
    case.expect("discriminator_total", loss.reshape(1), REL, ABS)
    case.expect_grad_norms(gradient_norms(disc), "grad_norm", GRADIENT, ABS)
