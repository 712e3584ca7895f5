"""What the content and the motion stage share: the frozen autoencoder before them, their condition, their loss and their settings."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import models
from datasets.config import DataConfig
from diffusion import DiffusionConfig, Process
from engine.config import RunConfig
from engine.task import Batch, LossOutput, Network
from pipelines.image_vae import ImageVae, vae_of
from pipelines.loading import Loaded, load_autoencoder
from tasks.clips import ClipInfo, Networks, StoredLatents, VaeConfig, input_clips, units
from utils.config import flag
from utils.errors import ConfigError
from utils.rng import SampleRng

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AutoencoderSourceConfig:
    """The trained autoencoder whose latents the stage learns."""

    path: str = flag("", "ae")
    """Its export: the export/ folder or the run's folder of train_ae.py, or an official checkpoint (.pt)."""
    weights: Literal["ema", "model"] = "ema"
    """Which of the export's weights; ema falls back to model where there is no average."""
    mode: Literal["auto", "pixel", "latent"] = flag("auto", "mode")
    """What the autoencoder takes; auto: as it was trained. Anything else must agree with it."""
    embed_dim: int = flag(0, "embed-dim")
    """Channels of its motion latent; 0: as it was trained. Anything else must agree with it."""


@dataclasses.dataclass(frozen=True)
class ConditionConfig:
    num_classes: int = flag(-1, "num-classes")
    """Classes that the model knows; -1: those of the shard set; 0: no class condition."""
    use_text_embed: bool = flag(False, "use-text-embed")
    """Condition on the vectors stored with the clips (text features) in place of class labels."""
    dropout: float = 0.1
    """Share of samples trained without their condition, which guidance needs."""


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    samples: int = 8
    """Samples drawn for a preview."""
    steps: int = 25
    """Steps of the sampler of a preview."""


@dataclasses.dataclass(frozen=True)
class PreviewConfig(DrawConfig):
    guidance: float | None = flag(None, "preview-guidance")
    """Guidance scale of a preview; 1: none. none: 4, where there is something to guide by."""


@dataclasses.dataclass(frozen=True)
class DenoiserSizeConfig:
    """Changes to a named size. A stage's own adds `name`."""

    patch_size: int = 0
    """Side of the patches; 0: of the named size."""
    hidden_size: int = 0
    """Width of the transformer; 0: of the named size."""
    depth: int = 0
    """Its blocks; 0: of the named size."""
    num_heads: int = 0
    """Its attention heads; 0: of the named size."""
    pos_grid: Literal["true", "release"] = "true"
    """Position tables: of the true grid, or the release's (which scrambles grids that are not square)."""


@dataclasses.dataclass(frozen=True)
class DenoiserRunConfig(RunConfig):
    """What both stages set. A stage's own adds `stage` and `model`."""

    system: str = "cmd"
    """Which of the toolkit's systems."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    ae: AutoencoderSourceConfig = dataclasses.field(default_factory=AutoencoderSourceConfig)
    vae: VaeConfig = dataclasses.field(default_factory=VaeConfig)
    condition: ConditionConfig = dataclasses.field(default_factory=ConditionConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    preview: PreviewConfig = dataclasses.field(default_factory=PreviewConfig)
    final: bool = flag(False, "final")
    """Accepted as on the release's command line, where it does nothing."""


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """The frozen autoencoder (and in latent mode the image VAE before it): clips to latents, where the shards do not hold those."""

    ae: Loaded
    vae: ImageVae | None = None

    def networks(self) -> dict[str, Network]:
        """Frozen networks by name."""
        nets = {"ae": Network(self.ae.module, "frozen", units=units, methods=("encode", "decode"))}
        if self.vae is not None:
            nets["vae"] = Network(self.vae, "frozen", methods=("encode", "decode"))
        return nets

    @torch.no_grad()
    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """The batch's content frames b C h w and motion latents b D t W'+H', float32: encoded, or as the shards hold them."""
        if "video" in batch:
            content, motion = networks["ae"].encode(input_clips(networks, batch, rng))
        else:
            content, motion = batch["content"], batch["motion"]
        # The loss must not inherit the precision of the autoencoder's arithmetic (spec diffusion.md section 5).
        return content.float(), motion.float()

    @torch.no_grad()
    def clips(self, networks: Networks, batch: Batch, rng: SampleRng) -> Tensor:
        """The batch's clips b C t h w, float32, as the autoencoder takes them; its reconstructions where shards hold latents."""
        if "video" in batch:
            return input_clips(networks, batch, rng)
        return networks["ae"].decode(*self.latents(networks, batch, rng)).float()

    def shown(self, networks: Networks, clips: Tensor) -> Tensor:
        """What the autoencoder takes or gives, b C t h w, as clips b 3 t h w in [-1, 1]."""
        return (clips if self.vae is None else networks["vae"].decode(clips)).clamp(-1, 1)

    @property
    def channels(self) -> int:
        return self.ae.config.channels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the content frame."""
        return self.ae.config.image_size

    def card(self) -> dict[str, Any]:
        """What ties an export to its autoencoder."""
        return {
            "sha256": self.ae.sha256,
            "weights": self.ae.weights,
            "path": str(Path(self.ae.path).absolute()),
            "model": self.ae.card["model"],
        }


def open_first_stage(source: AutoencoderSourceConfig, vae: VaeConfig, clips: ClipInfo) -> FirstStage:
    """The autoencoder of the export, checked against the clips. Raises ConfigError with one line when they do not belong together."""
    if not source.path:
        raise ConfigError("which autoencoder? give --ae FOLDER, the run or export folder of train_ae.py")
    ae = load_autoencoder(source.path, source.weights, n_frames=clips.n_frames, image_size=clips.image_size)
    model = ae.config
    if source.mode not in ("auto", model.mode):
        raise ConfigError(f"--mode {source.mode}: the autoencoder {source.path} was trained in {model.mode} mode")
    if source.embed_dim not in (0, model.embed_dim):
        raise ConfigError(f"--embed-dim {source.embed_dim}: the autoencoder {source.path} has {model.embed_dim}")
    image_vae = vae_of(ae.card, vae.path, vae.scale_factor, vae.chunk)
    first = FirstStage(ae, image_vae)
    if clips.latents is not None:
        _check_latents(first, clips.latents)
    size = clips.image_size if image_vae is None else image_vae.latent_shape((1, 3, clips.n_frames, *clips.image_size))[3:]
    if (model.n_frames, *model.image_size) != (clips.n_frames, *size):
        wanted = "x".join(map(str, (model.n_frames, *model.image_size)))
        raise ConfigError(
            f"--ae {source.path} takes clips of {wanted} (frames x height x width), these are {clips.n_frames}x{size[0]}x{size[1]}"
        )
    return first


def _check_latents(first: FirstStage, stored: StoredLatents) -> None:
    """Raises ConfigError when latents in shards are not those of this autoencoder."""
    ae, made_by = first.ae, stored.autoencoder
    if made_by.get("sha256") != ae.sha256:
        raise ConfigError(
            f"--data-path {stored.location} holds latents of the autoencoder {made_by.get('path')} ({str(made_by.get('sha256'))[:12]}...), "
            f"not of --ae {ae.path} ({ae.sha256[:12]}..., {ae.weights} weights): give that one, or run preprocess.py latents with this one"
        )
    vae = {} if first.vae is None else {"sha256": first.vae.sha256, "scale_factor": first.vae.scale_factor}
    if made_by.get("vae", {}) != vae:
        raise ConfigError(f"--data-path {stored.location} holds latents made behind another image VAE or --scale-factor than --vae gives")
    config = ae.config
    wanted = {"content": (config.channels, *config.image_size), "motion": (config.embed_dim, *config.latent_size)}
    if dict(stored.tensors) != wanted:
        raise ConfigError(
            f"--data-path {stored.location} holds {dict(stored.tensors)}, this stage takes {wanted}: run preprocess.py latents"
        )


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a denoiser is told about a sample: its class, a vector, or nothing."""

    num_classes: int = 0
    cond_dim: int = 0
    dropout: float = 0.1

    @classmethod
    def of(cls, config: ConditionConfig, clips: ClipInfo) -> "Condition":
        """From the settings, checked against the clips. Raises ConfigError."""
        if config.use_text_embed:
            if not clips.cond_dim:
                raise ConfigError(f"--use-text-embed: the shard set {clips.dataset} holds no condition vectors")
            return cls(0, clips.cond_dim, config.dropout)
        known = len(clips.classes)
        if 0 < config.num_classes < known:
            raise ConfigError(
                f"--num-classes {config.num_classes}: the shard set {clips.dataset} has {known} classes; give {known}, or -1 for that"
            )
        return cls(known if config.num_classes < 0 else config.num_classes, 0, config.dropout)

    def training(self, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser for a training batch, the condition dropped for an addressed share of the samples."""
        given = self.given(batch)
        if (self.num_classes or self.cond_dim) and self.dropout > 0:
            given["drop"] = rng.uniform("condition-dropout") < self.dropout
        return given

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser with every condition kept."""
        return {"cond": batch["cond"]} if self.cond_dim else {"y": batch["label"]} if self.num_classes else {}

    def grid(self, count: int, batch: Batch) -> dict[str, Tensor]:
        """Keyword arguments for `count` samples that show the classes one after the other, or the batch's vectors in turn."""
        turn = torch.arange(count, device=batch["label"].device)
        if self.cond_dim:
            return {"cond": batch["cond"][turn % len(batch["cond"])]}
        return {"y": turn % self.num_classes} if self.num_classes else {}

    def guidance(self, preview: PreviewConfig) -> float:
        """The scale of previews: 1 where no condition is dropped in training."""
        usual = 4.0 if preview.guidance is None else preview.guidance
        return usual if self.dropout > 0 else 1.0

    def overrides(self) -> dict[str, int | float]:
        """Settings of the denoiser that follow from the condition."""
        return {"num_classes": self.num_classes, "cond_dim": self.cond_dim, "class_dropout_prob": self.dropout}


def named_size(family: str, sizes: Any, **overrides: Any) -> Any:
    """Config (DiTConfig or MotionDiTConfig) of the network that a stage's settings name. Raises ConfigError with the nearest name."""
    changed = {name: getattr(sizes, name) for name in ("patch_size", "hidden_size", "depth", "num_heads") if getattr(sizes, name)}
    try:
        return models.resolve(sizes.name, family, **changed, pos_grid=sizes.pos_grid, **overrides)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def denoising_loss(process: Process, model: Callable[..., Tensor], x0: Tensor, rng: SampleRng, kwargs: Mapping[str, Tensor]) -> LossOutput:
    """Loss of a denoiser on clean samples b ..., each with its addressed timestep and noise (spec diffusion.md section 5)."""
    t = process.sample_timesteps(rng)
    terms = process.training_losses(model, x0, t, rng.normal("noise", tuple(x0.shape[1:])), kwargs)
    total, count = terms.pop("loss").sum(), len(x0)
    return LossOutput(total, count, {name: (value.detach().sum(), count) for name, value in terms.items()})


def measured(output: LossOutput) -> dict[str, tuple[Tensor, int]]:
    """A loss and its terms as validation metrics."""
    return {"loss": (output.total.detach(), output.count)} | output.metrics


def say_unused(final: bool, is_main: bool) -> None:
    """One line for the release's flag that never did anything."""
    if final and is_main:
        log.warning("--final is accepted for compatibility; it had no effect in the release and has none here")
