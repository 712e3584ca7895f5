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
    loss: Literal["mse", "rescaled_mse", "l1", "kl", "rescaled_kl"] = "mse"
    """mse, or l1 in its place: plus the variational bound where the variance is learned; rescaled_mse: the bound times steps/1000;
    kl: the bound alone; rescaled_kl: the bound times steps."""
    respacing: str = ""
    """Steps kept: empty for all, "50" evenly, "10,15,20" per equal section, "ddim50" at one stride from 0, "trailing50" at one stride
    that ends in the noisiest step."""
    process: Literal["ddpm", "flow"] = flag("ddpm", "process")
    """ddpm: noise in steps, which all of the above describes; flow: the straight path to noise in continuous time (rectified flow),
    of which the network predicts the velocity."""
    weighting: Literal["none", "min_snr"] = flag("none", "loss-weighting")
    """Of the mse over the steps (ddpm). min_snr: min(SNR, gamma) on the clean sample's error, so that easy steps do not dominate."""
    min_snr_gamma: float = 5.0
    """gamma of min_snr."""
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Training times of a flow: the middle of the path more often than its ends, or all alike."""
    logit_mean: float = 0.0
    """Mean of the times' logit; above 0 there is more noise."""
    logit_std: float = 1.0
    """Its standard deviation."""
    time_shift: float = 1.0
    """s of a flow: training and sampling times are moved to s t / (1 + (s - 1) t). Above 1 towards noise; 1: not at all."""


NOT_OF = {
    "ddpm": ("time_sampling", "logit_mean", "logit_std", "time_shift"),
    "flow": ("steps", "schedule", "beta_start", "beta_end", "predict", "loss", "respacing", "weighting", "min_snr_gamma"),
}
"""Settings that mean nothing in a process."""

NOT_WITH = {
    "min_snr_gamma": ("weighting", "none"),
    "logit_mean": ("time_sampling", "uniform"),
    "logit_std": ("time_sampling", "uniform"),
    "beta_start": ("schedule", "squaredcos_cap_v2"),
    "beta_end": ("schedule", "squaredcos_cap_v2"),
}
"""Setting -> (another one, the value of it with which it means nothing)."""


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
        other, without = NOT_WITH.get(name, ("process", None))
        if getattr(config, other) == without:
            raise ConfigError(f"diffusion.{name} {value}: means nothing with diffusion.{other} {without}, leave it out")


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
        weighting=config.weighting,
        min_snr_gamma=config.min_snr_gamma,
        timestep_map=kept,
        channel_dim=channel_dim,
    )


def _flow(config: DiffusionConfig) -> FlowMatching:
    return FlowMatching(
        time_sampling=config.time_sampling, logit_mean=config.logit_mean, logit_std=config.logit_std, time_shift=config.time_shift
    )
