"""Where clips and their reconstructions come from: an autoencoder runs on a set of videos, or there are two folders."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.clips import Clips, choose_clips, joined, totals
from evaluation.folder_pairs import open_pairs
from evaluation.paired import Reconstruct
from evaluation.protocols import Protocol, Size
from evaluation.reconstruction_config import ORIGINALS, ReconstructConfig
from evaluation.videos import ShardVideos, VideoSet, open_videos
from launch.env import Env
from pipelines.encoders import ENCODERS, EncoderOptions, FrameEncoder, system_of
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng
from utils.weights import read_card

SEED = 0
"""Of the posteriors' samples, and of resampled sets."""
RULES = Protocol("reconstruction", drawn=False)
"""Frames in a row from the first on, of the videos in their order."""
FRAMES = 16
"""Of each clip, where nothing says how many."""


@dataclass(frozen=True)
class Source:
    """What is measured."""

    clips: Clips
    frames: int
    """Of an original."""
    reconstruct: Reconstruct | None = None
    """None: the frames of the reconstruction are read with those of the original, behind them."""
    depends: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: all that reconstructions depend on but the clips."""
    described: Mapping[str, Any] = field(default_factory=dict)
    """What readers of the figures have to know of that."""
    resized: str = ""
    """What became of videos of another size than the autoencoder's."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know of the clips."""
        short = f"{self.clips.dropped} videos are shorter than the clips, and left out" if self.clips.dropped else ""
        return [*filter(None, [self.resized, short])]


def open_source(config: ReconstructConfig, env: Env) -> Source:
    """What the settings say. To be called by all ranks. Raises UserError or ConfigError."""
    return _folders(config, env) if config.recon else _autoencoder(config, env)


def _folders(config: ReconstructConfig, env: Env) -> Source:
    pairs = open_pairs(config.data_path, config.recon, env)
    sizes = sorted({shape[1:] for shape in pairs.shapes})
    _refuse_mixed(config, sizes)
    return Source(*_chosen(config, pairs, config.n_frames, config.size or sizes[0], env))


def _autoencoder(config: ReconstructConfig, env: Env) -> Source:
    videos = open_videos(config.data_path, ORIGINALS)
    height, width = videos.read(0, [0]).shape[1:3]
    pipeline = _open(config, config.size or (height, width), env.device)
    by_frame, frames, size = isinstance(pipeline, FrameEncoder), config.n_frames, config.size
    if by_frame and config.precision != "fp32":
        raise ConfigError(f"--precision {config.precision}: autoencoders of single frames run in fp32; drop the flag")
    if not by_frame:
        frames, *taken = pipeline.clip_shape
        if config.size not in (None, tuple(taken)):
            raise ConfigError(f"--resolution {config.resolution}: the autoencoder takes {taken[0]} x {taken[1]}; drop the flag")
        if config.n_frames not in (None, frames):
            raise ConfigError(f"--n-frames {config.n_frames}: the autoencoder takes clips of {frames} frames; drop the flag")
        size = (taken[0], taken[1])
    identity = pipeline.identity()
    clips, frames = _chosen(config, videos, frames, size, env)
    sizes = _sizes(clips, env)
    if by_frame:
        _refuse_mixed(config, sorted(sizes))

    def reconstruct(clips: Tensor, places: range) -> Tensor:
        made: Tensor = pipeline.reconstruct(clips, SampleRng(SEED, torch.tensor(places), env.device))
        return made

    return Source(
        clips,
        frames,
        reconstruct,
        {name: value for name, value in identity.items() if name != "path"} | {"precision": config.precision, "seed": SEED},
        {"autoencoder_sha256": identity["sha256"], "weights": _kind(config.ae, identity["sha256"]), "precision": config.precision}
        | ({"latents": "samples of the posteriors"} if by_frame else {}),
        _resized(sizes, clips.size),
    )


def _sizes(clips: Clips, env: Env) -> Counter[Size]:
    """How many of the clips are of which height and width in their videos; each rank looks at its share. To be called by all ranks."""
    videos = clips.videos
    if isinstance(videos, ShardVideos):
        return Counter({videos.shards.size: len(clips)})
    mine = range(len(clips))[env.rank :: env.world_size]
    found = [videos.read(clips.numbers[place], clips.picks[place][:1]).shape[1:3] for place in mine]
    return Counter(joined(found, len(clips), env))


def _refuse_mixed(config: ReconstructConfig, sizes: list[Size]) -> None:
    """ConfigError where videos are of several sizes and nothing says which one they become."""
    if len(sizes) > 1 and config.size is None:
        raise ConfigError(
            f"{ORIGINALS} {config.data_path}: videos of {len(sizes)} sizes ({_told(sizes)}); say --resolution, which all become"
        )


def _resized(sizes: Mapping[Size, int], size: Size) -> str:
    """What became of videos of other sizes."""
    others = sorted(other for other in sizes if other != size)
    if not others:
        return ""
    count, total = sum(sizes[other] for other in others), sum(sizes.values())
    return (f"{count} of {total} " if count < total else "") + f"videos of {_told(others)} became {_told([size])}"


def _told(sizes: list[Size]) -> str:
    return ", ".join("{} x {}".format(*size) for size in sizes[:3]) + (" and others" if len(sizes) > 3 else "")


def _chosen(config: ReconstructConfig, videos: VideoSet, frames: int | None, size: Size | None, env: Env) -> tuple[Clips, int]:
    """Clips of so many frames, and how many these are. None: all where the videos that may be measured are of one length."""
    count = min(config.max_clips or len(videos), len(videos))
    if frames is None:
        lengths = set(totals(videos, list(range(count)), env))
        frames = -(-lengths.pop() // config.stride) if len(lengths) == 1 else FRAMES
    return choose_clips(videos, RULES, "real", env, count=count, frames=frames, size=size, seed=SEED, stride=config.stride), frames


def _open(config: ReconstructConfig, size: Size, device: torch.device) -> Any:
    """The pipeline of the autoencoder: something with `reconstruct` and `identity`. Raises UserError or ConfigError."""
    system = system_of(config.ae, config.system)
    if system not in ENCODERS:
        raise ConfigError(f"--ae {config.ae or config.vae}: autoencoders of {', '.join(ENCODERS)} are measured, not of '{system}'")
    options = EncoderOptions(
        config.ae,
        config.weights,
        config.vae,
        config.scale_factor,
        config.n_frames or FRAMES,
        size,
        precision=config.precision,
        device=device,
    )
    return ENCODERS[system](options)


def _kind(ae: str, sha256: str) -> str:
    """ema or model: which file of an export was read; an official checkpoint and an image VAE have one kind of weights."""
    try:
        files = read_card(ae).get("files", {}) if ae else {}
    except UserError:
        files = {}
    return next((Path(name).stem for name, digest in files.items() if digest == sha256), "as in the file")
