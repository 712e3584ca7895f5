"""What every stage knows of its clips: where they come from, and how they look to the first network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from datasets.config import DataConfig, resolve
from datasets.loader import ClipSource
from datasets.shards import ShardSet
from engine.config import RunConfig
from engine.task import Batch
from launch.env import Env
from utils.config import flag
from utils.errors import ConfigError
from utils.media import to_float
from utils.rng import SampleRng

Networks = Mapping[str, Any]
"""Name -> module, perhaps wrapped by the engine. Any: tasks call methods of their own networks (`encode`, `decode`)."""


def units(module: Any) -> list[nn.Module]:
    """A network's shard, compile and checkpointing units."""
    return module.units()


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The image VAE of latent mode, whose latents take the place of pixels."""

    path: str = flag("", "vae")
    """Folder of a diffusers AutoencoderKL (config.json and its weights) on this machine; needed in latent mode only."""
    scale_factor: float = flag(0.18215, "scale-factor")
    """Latents are multiplied by this (1 / their standard deviation)."""
    chunk: int = 16
    """Frames per pass through the VAE; less needs less memory."""


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """The clips of a shard set as a task needs to know them."""

    n_frames: int
    image_size: tuple[int, int]
    fps: float = 8.0
    classes: tuple[str, ...] = ()
    cond_dim: int = 0
    """Width of the condition vectors stored beside the clips; 0: none."""
    dataset: str = ""
    digest: str = ""

    @classmethod
    def of(cls, shards: ShardSet, data: DataConfig) -> "ClipInfo":
        """From an open shard set and its resolved settings."""
        return cls(
            n_frames=data.n_frames,
            image_size=data.image_size,
            fps=shards.fps,
            classes=tuple(shards.classes),
            cond_dim=int(shards.meta.get("cond_dim", 0)),
            dataset=data.dataset_name or shards.name,
            digest=shards.digest,
        )

    def card(self) -> dict[str, object]:
        """Plain values for an export's card."""
        return {
            "dataset": self.dataset,
            "digest": self.digest,
            "n_frames": self.n_frames,
            "image_size": list(self.image_size),
            "fps": self.fps,
            "classes": list(self.classes),
        }


def open_clips(config: RunConfig, data: DataConfig, env: Env) -> tuple[ClipInfo, ClipSource, ClipSource | None]:
    """The training clips, and the validation clips when `data.val_path` is set. Raises ConfigError or UserError naming the path."""
    if not data.path:
        raise ConfigError("no training data: give --data-path FOLDER, a shard set made by preprocess.py")
    shards = ShardSet.open(data.path)
    data = resolve(data, shards)
    source = _source(config, data, shards, env, config.train.global_batch_size)
    if not data.val_path:
        return ClipInfo.of(shards, data), source, None
    held_out = ShardSet.open(data.val_path)
    whole = env.world_size * config.train.accumulation
    batch = min(config.train.global_batch_size, held_out.num_samples) // whole * whole
    if batch == 0:
        raise ConfigError(f"--val-path {data.val_path}: {held_out.num_samples} clips are fewer than ranks x accumulation = {whole}")
    still = dataclasses.replace(resolve(dataclasses.replace(data, path=data.val_path), held_out), flip=False)
    return ClipInfo.of(shards, data), source, _source(config, still, held_out, env, batch)


def input_clips(networks: Networks, batch: Batch, rng: SampleRng) -> Tensor:
    """The clips as the autoencoder takes them, b c t h w float32: pixels in [-1, 1], or scaled posterior samples of the image VAE."""
    video = to_float(batch["video"])
    if "vae" not in networks:
        return video
    vae = networks["vae"]
    with torch.no_grad():
        return vae.encode(video, rng.normal("vae", vae.latent_shape(video.shape)[1:]))


def empty_batch(clips: ClipInfo, batch_size: int) -> Batch:
    """A micro-batch of the stream on the meta device (`index` on the CPU, as always)."""
    batch = {
        "video": torch.empty(batch_size, 3, clips.n_frames, *clips.image_size, dtype=torch.uint8, device="meta"),
        "label": torch.empty(batch_size, dtype=torch.int64, device="meta"),
        "index": torch.arange(batch_size),
    }
    if clips.cond_dim:
        batch["cond"] = torch.empty(batch_size, clips.cond_dim, device="meta")
    return batch


def _source(config: RunConfig, data: DataConfig, shards: ShardSet, env: Env, global_batch_size: int) -> ClipSource:
    return ClipSource(
        shards,
        data,
        seed=config.train.seed,
        global_batch_size=global_batch_size,
        accumulation=config.train.accumulation,
        rank=env.rank,
        world_size=env.world_size,
    )
