"""What settings of denoisers are refused for, whatever the data."""

import models
from diffusion import DiffusionConfig, GaussianDiffusion
from diffusion import build as build_process
from engine.config import BestConfig
from tasks.diffusion_task import ConditionConfig, DrawConfig, PreviewConfig
from utils.errors import ConfigError


def check_settings(
    family: str,
    name: str,
    condition: ConditionConfig,
    preview: PreviewConfig,
    diffusion: DiffusionConfig,
    best: BestConfig,
    flag_of_name: str = "--motion-model-config",
) -> None:
    """Raises ConfigError on settings that cannot work, whatever the data."""
    try:
        models.resolve(name, family)
    except ValueError as error:
        raise ConfigError(f"{flag_of_name} {name}: {error}") from None
    if not 0 <= condition.dropout < 1:
        raise ConfigError(f"condition.dropout {condition.dropout}: a share in [0, 1) is wanted")
    if condition.num_classes < -1:
        raise ConfigError(f"--num-classes {condition.num_classes}: -1 (those of the shard set), 0 (no classes) or their number")
    untold = condition.num_classes == 0 and not condition.use_text_embed
    if (untold or not condition.dropout) and preview.guidance not in (None, 1.0):
        why = "without classes (--num-classes 0)" if untold else "with condition.dropout 0"
        raise ConfigError(f"--preview-guidance {preview.guidance:g}: {why} there is nothing to guide by; give --preview-guidance 1")
    check_process(preview, diffusion, best)


def check_process(preview: DrawConfig, diffusion: DiffusionConfig, best: BestConfig) -> None:
    """Raises ConfigError on a process that cannot be drawn from, or not as previews do, and on a metric that it does not measure."""
    if preview.samples < 1:
        raise ConfigError(f"preview.samples {preview.samples}: at least 1")
    process = build_process(diffusion)
    best.check_among(process.terms)
    if isinstance(process, GaussianDiffusion) and process.predict == "eps" and not process.tables["alphas_cumprod"][-1] > 0:
        raise ConfigError(
            f"diffusion: after the last step of {diffusion.schedule} nothing is left but noise, from which a network that predicts noise "
            "cannot start; use diffusion.predict v or x0, or a beta_end below 1"
        )
    if preview.steps < 1 or (diffusion.process == "ddpm" and preview.steps > diffusion.steps):
        raise ConfigError(f"preview.steps {preview.steps}: between 1 and diffusion.steps = {diffusion.steps}")
