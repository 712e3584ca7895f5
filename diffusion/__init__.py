"""Diffusion mathematics. Knows networks only as callables (x, timesteps, **conditions) -> output."""

from dataclasses import dataclass
from typing import Literal

from diffusion.gaussian import GaussianDiffusion
from diffusion.schedules import beta_schedule, respace_betas, space_timesteps
from utils.config import flag
from utils.errors import ConfigError

__all__ = ["DiffusionConfig", "GaussianDiffusion", "build"]


@dataclass(frozen=True)
class DiffusionConfig:
    steps: int = flag(1000, "diffusion-steps")
    """Steps of the process that the network is trained on."""
    schedule: Literal["linear", "squaredcos_cap_v2"] = flag("linear", "noise-schedule")
    """Noise schedule."""
    predict: Literal["eps", "x0"] = "eps"
    """What the network predicts: the noise or the clean sample."""
    variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range"
    """learned_range: the network also predicts where the variance lies between its two bounds; fixed: at one of the bounds."""
    loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "mse"
    """mse: plus the variational bound where the variance is learned; rescaled_mse: the bound times steps/1000;
    kl: the bound alone; rescaled_kl: the bound times steps."""
    respacing: str = ""
    """Steps kept: empty for all, "50" evenly, "10,15,20" per equal section, "ddim50" at one stride."""


def build(config: DiffusionConfig, channel_dim: int = 1) -> GaussianDiffusion:
    """The process of a config; `channel_dim` is the axis that holds eps and variance. ConfigError for an impossible setting."""
    try:
        betas = beta_schedule(config.schedule, config.steps)
        kept = space_timesteps(config.steps, config.respacing)
        return GaussianDiffusion(
            respace_betas(betas, kept),
            predict=config.predict,
            variance=config.variance,
            loss=config.loss,
            timestep_map=kept,
            channel_dim=channel_dim,
        )
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from None
