"""Checks of HVDM's diffusion: tables and sampling times, DDIM, the training loss with one ancestral step, a chain of clips."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import Callback
from diffusion.schedules import space_timesteps
from models.autoencoders.hvdm import HVDMAutoencoder
from pipelines.long import chain
from tests.parity.adapters_dit import same_exp
from tests.parity.adapters_hvdm_net import case_autoencoder
from tests.parity.adapters_hvdm_unet import case_unet, gradients, volume
from tests.parity.adapters_pvdm_diffusion import LOSSES, drawn, expect_tables, process
from tests.parity.case import Case, adapter
from utils.media import to_uint8

STEPS, LOSS = 5e-4 if same_exp() else 1e-3, 1e-5
"""Of samples, whose first step divides by 0.012, and of losses. Other bits of the step embedding are 2e-4 of a sample, as is the
difference of the recorded samples from float64's."""
CLIP, CHAIN, CODED = 1e-3, 5e-3, 1e-4
"""Of a long video's clip after the recorded one, of its clips each after our own, and of what the autoencoder makes of the recorded."""
NORMS, SMALLEST = 1e-3, 1e-6
"""Norms of gradients: relative, and absolute."""


def guided(case: Case, model: Callable[..., Tensor], previous: Tensor | None) -> Callable[..., Tensor]:
    """Guidance away from no latent before, where there is one."""
    w = case.config("guidance_w", 0.0)
    return model if previous is None else ClassifierFreeGuidance(model, 1 + w, {"previous": 0.0})


def ddim(
    case: Case, model: Callable[..., Tensor], x: Tensor, noise: Tensor | None, previous: Tensor | None, callback: Callback | None = None
) -> Tensor:
    """The sample that DDIM makes of x in the case's steps; `noise` (steps - 1, ...) may be missing where eta is 0."""
    kept = space_timesteps(case.config("T", 1000), f"trailing{case.config('steps')}")
    draws = (lambda k: torch.zeros_like(x)) if noise is None else noise.__getitem__
    return drawn(case, kept, guided(case, model, previous), x, draws, previous, callback)


@adapter("hvdm", "schedule")
def check_schedule(case: Case) -> None:
    assert case.config("schedule", "sqrt-linear") == "sqrt-linear", "the release's only choice: roots of beta on a straight line"
    expect_tables(case, process(case, steps=case.config("T", 1000)))


@adapter("hvdm", "ddim")
def check_ddim(case: Case) -> None:
    model = case_unet(case, case.fields)
    kept = space_timesteps(case.config("T", 1000), f"trailing{case.config('steps')}")
    if case.has("in/times"):
        assert case.input("times").tolist() == [*reversed(kept), -1]
    states, estimates = [volume(case.input("init"), model)], []

    def see(_: int, x: Tensor, x0: Tensor) -> None:
        states.append(x)
        estimates.append(x0)

    noise, previous = (volume(case.input(name), model) if case.has(f"in/{name}") else None for name in ("noise", "cond"))
    assert noise is not None or not case.config("eta")
    ddim(case, model, states[0], noise, previous, see)
    case.expect("sample", states[-1].flatten(2), 0, STEPS)
    case.expect("x", torch.stack(states[:-1]).flatten(3), 0, STEPS)
    case.expect("x0", torch.stack(estimates).flatten(3), 0, STEPS)


@adapter("hvdm", "diffusion_loss")
def check_loss(case: Case) -> None:
    diffusion, model = process(case, loss=LOSSES[case.config("loss", "l2")]), case_unet(case, case.fields)
    x0, noise = volume(case.input("x0"), model), volume(case.input("noise"), model)
    t = case.input("t")
    kwargs: dict[str, Any] = {"previous": volume(case.input("cond"), model)} if case.has("in/cond") else {}
    errors = diffusion.training_losses(model, x0, t, noise, kwargs)["loss"]
    errors.mean().backward()
    case.expect("loss", errors.mean().reshape(1), LOSS)
    case.expect("loss_per_sample", errors, LOSS)
    case.expect("x_t", diffusion.q_sample(x0, t, noise).flatten(2), 0, 1e-6)
    case.expect_grad_norms(gradients(model, case.config("attention_resolutions")), rel=NORMS, abs=SMALLEST)
    if case.has("out/p_sample"):
        times = case.input("p_t")
        with torch.no_grad():
            step = diffusion.p_mean_variance(model, noise, times, clip_denoised=case.config("clip_x0", True), model_kwargs=kwargs)
        fresh = volume(case.input("p_noise"), model) * (times > 0).float().reshape(-1, 1, 1, 1, 1)
        case.expect("p_sample", (step.mean + torch.exp(0.5 * step.log_variance) * fresh).flatten(2), 0, STEPS)


@adapter("hvdm", "long_sampling")
@torch.no_grad()
def check_long_sampling(case: Case) -> None:
    """Each clip is told of the one before by the latent of its decoded frames."""
    ae, model = case_autoencoder(case, case.config("autoencoder"), "autoencoder"), case_unet(case, case.config("unet"), "unet")
    clips, starts, noise = case.config("clips"), volume(case.input("init"), model), None
    if case.has("in/noise"):
        noise = volume(case.input("noise"), model)
    assert noise is not None or not case.config("eta")

    def sample_after(k: int, condition: Tensor | None) -> Tensor:
        return ddim(case, model, starts[k], None if noise is None else noise[k], condition)

    told, made = volume(case.tensor("out/cond"), model), volume(case.tensor("out/z"), model)
    case.expect("z", torch.stack([sample_after(k, told[k - 1] if k else None) for k in range(clips)]).flatten(3), 0, CLIP)
    again = torch.stack([reencoded(ae, latents) for latents in made])
    case.expect("cond", again[: len(told)].flatten(3), 0, CODED)
    case.expect("video", torch.cat([ae.decode(latents) for latents in made], dim=2), 0, CODED)

    chained = list(chain(lambda k, latents: sample_after(k, None if latents is None else reencoded(ae, latents)), stop=clips))
    case.expect("z", torch.stack(chained).flatten(3), 0, CHAIN)
    video = torch.cat([ae.decode(latents) for latents in chained], dim=2)
    case.expect("video", video, 0, CHAIN)
    if case.has("out/video_uint8"):
        cut = ((1 + case.tensor("out/video")) * 127.5).to(torch.uint8)  # the release cuts off, we round
        case.expect("video_uint8", cut)
        assert (to_uint8(video).int() - cut.int()).abs().max() <= 1 + 127.5 * CHAIN


def reencoded(ae: HVDMAutoencoder, latents: Tensor) -> Tensor:
    """The latents of the clips that latents decode to."""
    return ae.encode(ae.decode(latents).clamp(-1, 1))
