"""What every stage knows of its clips: where they come from, and how they look to the first network."""

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from datasets.mixture import Collection
from datasets.statistics import pooled_statistics
from datasets.triples import Take
from engine.config import RunConfig
from engine.task import Batch
from launch.env import Env
from tasks.held_out import check_same_kind, shared_split
from utils.config import flag
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng

_log = logging.getLogger(__name__)

Networks = Mapping[str, Any]
"""Name -> module, perhaps wrapped by the engine. Any: tasks call methods of their own networks (`encode`, `decode`)."""


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for it."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


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
class StoredLatents:
    """What shards hold in place of clips: the output of an autoencoder, made by preprocess.py latents."""

    tensors: Mapping[str, tuple[int, ...]]
    """Name -> shape of one sample's; of frame-wise latents that of one frame's, c h w."""
    dtype: torch.dtype
    autoencoder: Mapping[str, Any]
    """What identifies it: system, sha256, path, and its image VAE where there is one."""
    location: str
    framewise: bool = False
    """Every frame was encoded on its own: a batch holds b c t h w, of as many frames as asked for."""
    statistics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Frame-wise: `mean`, `std` of all latents together, and the `scale` and `shift` to train with; empty where that is not known."""

    @classmethod
    def of(cls, shards: Collection) -> "StoredLatents | None":
        """From open shard sets; None where they hold clips."""
        if not shards.is_latent:
            return None
        codec = shards.meta["codec"]
        return cls(
            shards.tensors,
            getattr(torch, codec["dtype"]),
            shards.meta["autoencoder"],
            shards.location,
            framewise=shards.by_frame,
            statistics=pooled_statistics(shards),
        )


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
    latents: StoredLatents | None = None
    """What the stream gives in place of the clips' pixels; None: the pixels."""
    images: int = 0
    """Single frames that the stream gives beside each clip."""
    previous: bool = False
    """The stream gives as many frames again, those before the clip."""
    frame_interval: int = 1
    """Distance of the frames in the stored clips."""
    strides: tuple[int, ...] = ()
    """Distances, one of which each sample draws in its place, and says which."""
    take: Take = "window"
    """What the stream gives of a window of `n_frames`."""
    antialias: bool = True
    """The frames were filtered before they were made smaller."""
    licence: str = ""
    """The licence or source notes of the shard sets."""

    @classmethod
    def of(cls, shards: Collection, data: DataConfig, strides: tuple[int, ...] = (), take: Take = "window") -> "ClipInfo":
        """From open shard sets and their resolved settings."""
        return cls(
            n_frames=data.n_frames,
            image_size=data.image_size,
            fps=shards.fps,
            classes=tuple(shards.classes),
            cond_dim=int(shards.meta.get("cond_dim", 0)),
            dataset=data.dataset_name or shards.name,
            digest=shards.digest,
            latents=StoredLatents.of(shards),
            images=data.images,
            previous=data.previous,
            frame_interval=data.frame_interval,
            strides=strides,
            take=take,
            antialias=bool((shards.meta.get("transform") or {}).get("antialias", True)),
            licence="; ".join(dict.fromkeys(filter(None, (str(item.meta.get("licence") or "") for item in shards.sets)))),
        )

    @property
    def frames(self) -> int:
        """Frames that the stream gives of a sample."""
        if self.take != "window":
            return 3 if self.take == "triple" else 1
        return self.n_frames * (2 if self.previous else 1)

    def card(self) -> dict[str, object]:
        """Plain values for an export's card."""
        return {
            "dataset": self.dataset,
            "digest": self.digest,
            "n_frames": self.n_frames,
            "image_size": list(self.image_size),
            "fps": self.fps,
            "classes": list(self.classes),
            **({"frame_interval": self.frame_interval} if self.frame_interval != 1 else {}),
            **({"frame_strides": list(self.strides)} if self.strides else {}),
            **({} if self.antialias else {"antialias": False}),
            **({"licence": self.licence} if self.licence else {}),
        }


def open_clips(
    config: RunConfig,
    data: DataConfig,
    env: Env,
    *,
    latents: bool = True,
    pairs: bool = False,
    images: bool = False,
    strides: tuple[int, ...] = (),
    take: Take = "window",
    no_pixels: str = "",
) -> tuple[ClipInfo, ClipSource, ClipSource | None]:
    """The training clips, and the validation clips when `data.val_path` is set; where `latents` is False they must be pixels.
    `no_pixels`: why they must be latents, where they must.

    `pairs`: pixels come with what was before them, as with `data.previous`; latents say themselves whether they do. `images`:
    the stage learns from images beside them, too. `strides`, `take`: as of ClipSource.
    Raises ConfigError or UserError naming the path.
    """
    if data.previous and not pairs:
        raise ConfigError("--previous: nothing here goes on after the clip before; drop the flag")
    if data.images and not images:
        raise ConfigError(f"--num-images {data.images}: nothing here learns from images beside the clips; drop the flag")
    shards = _open(data, env)
    if shards.is_latent and not latents:
        why = "an autoencoder is trained on" if take == "window" else "this stage learns from the frames of"
        raise ConfigError(f"--data-path {shards.location} holds latents: {why} the clips they were made of")
    if no_pixels and not shards.is_latent:
        raise ConfigError(no_pixels)
    data = resolve(dataclasses.replace(data, previous=data.previous or (pairs and not shards.is_latent)), shards)
    source = _source(config, data, shards, env, config.train.global_batch_size, strides, take)
    if not data.val_path:
        return ClipInfo.of(shards, data, strides, take), source, None
    held_out = dataclasses.replace(data, path=(data.val_path,), weights=(), flip=False, shuffle="auto", dataset_name="")
    others = _open(held_out, env).numbered_after(shards.classes)
    check_same_kind(shards, others)
    if env.is_main and (leak := shared_split(shards, others)):
        _log.warning("%s", leak)
    whole = env.world_size * config.train.accumulation
    share = held_out.frame_sample_prob
    count = len(others.single_frames(share, config.train.seed)) if share else others.num_samples
    batch = min(config.train.global_batch_size, count) // whole * whole
    if batch == 0:
        kind = "kept frames" if share else "clips"
        raise ConfigError(f"--val-path {data.val_path}: {count} {kind} are fewer than ranks x accumulation = {whole}")
    return ClipInfo.of(shards, data, strides, take), source, _source(config, held_out, others, env, batch, strides, take)


def _open(data: DataConfig, env: Env) -> Collection:
    """The shard sets of `data.path`; UserError when the ranks do not see the same samples, which would draw different batches."""
    shards = open_shards(data)
    seen: list[Any] = [None] * env.world_size
    if env.world_size > 1 and dist.is_initialized():
        # Lengths decide which frames are samples; a shard whose index is bad on one node has none there.
        lengths = zlib.crc32(shards.frames.data) if data.frame_sample_prob else 0
        dist.all_gather_object(seen, (shards.digest, shards.num_samples, lengths))
        other = next((rank for rank, what in enumerate(seen) if what != seen[0]), None)
        if other is not None:
            counts = f"{seen[0][1]} samples on rank 0, {seen[other][1]} on rank {other}"
            differ = "clips of other lengths" if data.frame_sample_prob and seen[0][:2] == seen[other][:2] else counts
            raise UserError(f"{shards.location} is not the same for all processes ({differ}): copy the set again to the node that differs")
    return shards


def check_held_out(clips: ClipInfo, valid: ClipSource | None, *, labels: bool, vectors: bool) -> None:
    """Raises ConfigError when the validation clips lack the condition of a model that is told their classes, or condition vectors."""
    if valid is None:
        return
    where, cond, others = f"--val-path {valid.shards.location}", valid.shards.cond, valid.shards.classes
    if vectors and (0 if cond is None else cond.values) != clips.cond_dim:
        found = f"condition vectors {cond}" if cond else "no condition vectors"
        raise ConfigError(f"{where} holds {found}, the training set such of {clips.cond_dim} numbers: prepare both alike")
    if labels and not vectors and clips.classes and others != list(clips.classes):
        what = f"the class {others[len(clips.classes)]}, which the training set lacks" if others else "no classes, the training set some"
        raise ConfigError(f"{where} has {what}: prepare both with the same classes")


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
    batch = _empty_frames(clips, batch_size, clips.frames) | {
        "label": torch.empty(batch_size, dtype=torch.int64, device="meta"),
        "index": torch.arange(batch_size),
    }
    if clips.previous:
        batch["has_previous"] = torch.empty(batch_size, dtype=torch.bool, device="meta")
    if clips.strides:
        batch["stride"] = torch.empty(batch_size, dtype=torch.int64, device="meta")
    if clips.take == "triple":
        batch["frame"] = torch.empty(batch_size, dtype=torch.int64, device="meta")
    if clips.images:
        (pictures,) = _empty_frames(clips, batch_size, clips.images).values()
        batch["images"] = pictures
        batch["image_label"] = torch.empty(batch_size, clips.images, dtype=torch.int64, device="meta")
    if clips.cond_dim:
        batch["cond"] = torch.empty(batch_size, clips.cond_dim, device="meta")
    return batch


def _empty_frames(clips: ClipInfo, batch_size: int, frames: int) -> Batch:
    """What the stream gives of so many frames: pixels, or the tensors of latents."""
    if clips.latents is None:
        return {"video": torch.empty(batch_size, 3, frames, *clips.image_size, dtype=torch.uint8, device="meta")}
    stored = clips.latents
    shapes = {name: (shape[0], frames, *shape[1:]) if stored.framewise else shape for name, shape in stored.tensors.items()}
    return {name: torch.empty(batch_size, *shape, dtype=stored.dtype, device="meta") for name, shape in shapes.items()}


def _source(
    config: RunConfig, data: DataConfig, shards: Collection, env: Env, global_batch_size: int, strides: tuple[int, ...], take: Take
) -> ClipSource:
    return ClipSource(
        shards,
        data,
        seed=config.train.seed,
        global_batch_size=global_batch_size,
        accumulation=config.train.accumulation,
        rank=env.rank,
        world_size=env.world_size,
        strides=strides,
        take=take,
    )
