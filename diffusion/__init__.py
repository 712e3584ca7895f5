"""Diffusion mathematics. Knows networks only as callables (x, timesteps, **conditions) -> output."""

from dataclasses import dataclass, fields
from typing import Literal

from diffusion.flow import FlowMatching
from diffusion.gaussian import GaussianDiffusion
from diffusion.schedules import beta_schedule, respace_betas, space_timesteps
from utils.config import flag
from utils.errors import ConfigError

__all__ = ["DiffusionConfig", "FlowMatching", "GaussianDiffusion", "Process", "build", "learned_variance"]

Process = GaussianDiffusion | FlowMatching
"""What a denoiser is trained on. Both offer `sample_timesteps`, `q_sample`, `training_losses` and `num_timesteps`."""


@dataclass(frozen=True)
class DiffusionConfig:
    steps: int = flag(1000, "diffusion-steps")
    """Steps of the process that the network is trained on."""
    schedule: Literal["linear", "squaredcos_cap_v2", "quad"] = flag("linear", "noise-schedule")
    """Noise schedule: betas on a straight line, by the cosine, or with their roots on a straight line."""
    beta_start: float = flag(0.0, "beta-start")
    """First beta of linear and quad; 0: the schedule's own (linear 0.1 / steps, quad 0.0015)."""
    beta_end: float = flag(0.0, "beta-end")
    """Last beta of linear and quad; 0: the schedule's own (linear 20 / steps, quad 0.0195)."""
    predict: Literal["eps", "x0", "v"] = "eps"
    """What the network predicts: the noise, the clean sample, or v = sqrt(A) noise - sqrt(1 - A) sample."""
    variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range"
    """learned_range: the network also predicts where the variance lies between its two bounds; fixed: at one of the bounds.
    A flow has no variance, and takes no notice."""
    loss: Literal["mse", "rescaled_mse", "l1", "robust", "kl", "rescaled_kl"] = "mse"
    """mse, or l1 or robust in its place: plus the variational bound where the variance is learned; rescaled_mse: the bound times
    steps/1000; robust: an error d counts sqrt(d^2 + robust_eta^2); kl: the bound alone; rescaled_kl: the bound times steps."""
    robust_eta: float = 1e-8
    """eta of robust, 1e-18 or more: far above it an error counts its size, about it and below its square."""
    respacing: str = ""
    """Steps kept: empty for all, "50" evenly, "10,15,20" per equal section, "ddim50" at one stride from 0, "trailing50" at one stride
    that ends in the noisiest step."""
    process: Literal["ddpm", "flow"] = flag("ddpm", "process")
    """ddpm: noise in steps, which all of the above describes; flow: the straight path to noise in continuous time (rectified flow),
    of which the network predicts the velocity."""
    weighting: Literal["none", "min_snr", "p2"] = flag("none", "loss-weighting")
    """Of the mse over the steps (ddpm), p2 of robust, too. min_snr: min(SNR, gamma) on the clean sample's error, so that easy steps do
    not dominate; p2: 1 / (k + SNR)^gamma on the noise's error. The bound is not weighted."""
    min_snr_gamma: float = 5.0
    """gamma of min_snr."""
    p2_gamma: float = 1.0
    """gamma of p2; 0: all steps weigh the same."""
    p2_k: float = 1.0
    """k of p2."""
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Training times of a flow: the middle of the path more often than its ends, or all alike."""
    logit_mean: float = 0.0
    """Mean of the times' logit; above 0 there is more noise."""
    logit_std: float = 1.0
    """Its standard deviation."""
    time_shift: float = 1.0
    """s of a flow: training and sampling times are moved to s t / (1 + (s - 1) t). Above 1 towards noise; 1: not at all."""


OF_FLOW = ("time_sampling", "logit_mean", "logit_std", "time_shift")
OF_LOSS = ("loss", "robust_eta", "weighting", "min_snr_gamma", "p2_gamma", "p2_k")
NOT_OF = {"ddpm": OF_FLOW, "flow": ("steps", "schedule", "beta_start", "beta_end", "predict", "respacing", *OF_LOSS)}
"""Settings that mean nothing in a process."""

ONLY_WITH = {
    "robust_eta": ("loss", ("robust",)),
    "min_snr_gamma": ("weighting", ("min_snr",)),
    "p2_gamma": ("weighting", ("p2",)),
    "p2_k": ("weighting", ("p2",)),
    "logit_mean": ("time_sampling", ("logit_normal",)),
    "logit_std": ("time_sampling", ("logit_normal",)),
    "beta_start": ("schedule", ("linear", "quad")),
    "beta_end": ("schedule", ("linear", "quad")),
}
"""Setting -> (another one, the values of it with which it means something)."""


def build(config: DiffusionConfig, channel_dim: int = 1) -> Process:
    """The process of a config; `channel_dim` is the axis that holds eps and variance. ConfigError for an impossible setting."""
    _check_effect(config)
    try:
        return _flow(config) if config.process == "flow" else _gaussian(config, channel_dim)
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from None


def learned_variance(config: DiffusionConfig) -> bool:
    """Whether the network of this process has channels for the variance (`learn_sigma`)."""
    return config.process == "ddpm" and config.variance == "learned_range"


def _check_effect(config: DiffusionConfig) -> None:
    """Raises ConfigError for a setting that was changed and would do nothing."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if value == field.default:
            continue
        if name in NOT_OF[config.process]:
            raise ConfigError(f"diffusion.{name} {value}: means nothing in the process {config.process}, leave it out")
        other, values = ONLY_WITH.get(name, ("process", (config.process,)))
        if getattr(config, other) not in values:
            raise ConfigError(f"diffusion.{name} {value}: means nothing with diffusion.{other} {getattr(config, other)}, leave it out")


def _gaussian(config: DiffusionConfig, channel_dim: int) -> GaussianDiffusion:
    betas = beta_schedule(config.schedule, config.steps, config.beta_start or None, config.beta_end or None)
    if betas[-1] < betas[0]:
        raise ValueError(f"betas go down from {betas[0]:g} to {betas[-1]:g}: beta_start must not be above beta_end")
    kept = space_timesteps(config.steps, config.respacing)
    return GaussianDiffusion(
        respace_betas(betas, kept),
        predict=config.predict,
        variance=config.variance,
        loss=config.loss,
        robust_eta=config.robust_eta,
        weighting=config.weighting,
        min_snr_gamma=config.min_snr_gamma,
        p2_gamma=config.p2_gamma,
        p2_k=config.p2_k,
        timestep_map=kept,
        channel_dim=channel_dim,
    )


def _flow(config: DiffusionConfig) -> FlowMatching:
    return FlowMatching(
        time_sampling=config.time_sampling, logit_mean=config.logit_mean, logit_std=config.logit_std, time_shift=config.time_shift
    )
