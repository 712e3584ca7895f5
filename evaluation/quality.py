"""Figures of sets of videos, by what networks see in them: Frechet video distance (FVD) and inception score (VIS)."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from launch.env import Env, Stopped
from metrics.detectors import Detector
from metrics.features import FeatureRows
from metrics.frechet import Moments, frechet_distance
from metrics.inception_score import SHUFFLE_SEED, SPLITS, inception_score, is_distribution, probabilities
from evaluation.protocols import PROTOCOLS, Clips, Protocol, Size, choose_clips
from evaluation.videos import open_videos
from utils.config import flag
from utils.errors import ConfigError, UserError


@dataclass(frozen=True)
class VideosConfig:
    """What figures of videos have in common."""

    dir2: str = ""
    """Generated videos: the --out of sample.py, any folder of mp4, gif and other video files, .npy arrays and folders of pictures, or a
    shard set made by preprocess.py."""
    num_videos: int = flag(2048, "ns")
    """Of each side; a side of fewer is measured whole, and said so."""
    n_frames: int = flag(0, "n")
    """Of each video; 0: as the protocol says, 16 (stylegan-v) or 128 (release)."""
    resolution: int = flag(0, "r")
    """Side of the square that frames become before the network sees them; 0: the size of the generated videos (release: 256)."""
    protocol: Literal["stylegan-v", "release"] = "stylegan-v"
    """stylegan-v: consecutive frames, real ones at a random offset, 0..255 to the network. release: VIDM's scripts with their errors
    (frames spread over the whole video, squashed, [0, 1] to the network), whose numbers compare with no others."""
    batch_size: int = flag(32, "b")
    """Videos at a time, per process."""
    num_workers: int = 4
    """Threads that read videos, per process."""
    seed: int = 0
    """Of the real videos and offsets that are drawn."""
    out: str = ""
    """JSON file to write the figures and the protocol to."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    @property
    def rules(self) -> Protocol:
        """The protocol that is named."""
        return PROTOCOLS[self.protocol]

    @property
    def frames(self) -> int:
        """Of each video."""
        return self.n_frames or self.rules.frames

    @property
    def size(self) -> Size | None:
        """Height and width that frames become; None: the size of the generated ones."""
        side = self.resolution or self.rules.side
        return (side, side) if side else None

    def name(self, figure: str, videos: int) -> str:
        """As published figures are called, fvd2048_16f; another protocol's bears its name."""
        return f"{figure}{videos}_{self.frames}f" + ("" if self.protocol == "stylegan-v" else f"_{self.protocol}")

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if not self.dir2:
            raise ConfigError("which videos? give --dir2 FOLDER, the generated ones")
        for name, lowest in (("num_videos", 2), ("n_frames", 0), ("resolution", 0), ("batch_size", 1), ("num_workers", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {lowest}")


@dataclass(frozen=True)
class FvdConfig(VideosConfig):
    """Frechet video distance between real and generated videos."""

    dir1: str = ""
    """Real videos: of any of these kinds."""
    i3d: str = ""
    """The network: StyleGAN-V's TorchScript I3D (i3d_torchscript.pt), or the I3D weights of PVDM, HVDM and CMD (i3d_pretrained_400.pt)."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.dir1:
            raise ConfigError("compared with which videos? give --dir1 FOLDER, the real ones")
        if not self.i3d:
            raise ConfigError("seen by which network? give --i3d FILE, StyleGAN-V's TorchScript I3D (i3d_torchscript.pt)")


@dataclass(frozen=True)
class VisConfig(VideosConfig):
    """Inception score of generated videos, with its standard deviation over splits of them."""

    c3d: str = ""
    """The network: a TorchScript C3D that classifies UCF-101 (c3d_ucf101.pt)."""
    splits: int = SPLITS
    """Parts of the set, of whose scores the mean and the standard deviation are given."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.c3d:
            raise ConfigError("seen by which network? give --c3d FILE, the TorchScript C3D of UCF-101 (c3d_ucf101.pt)")
        if not 1 <= self.splits <= self.num_videos:
            raise ConfigError(f"--splits {self.splits}: from 1 up to --num-videos {self.num_videos}")


def measure_fvd(config: FvdConfig, env: Env) -> dict[str, Any]:
    """Figures and protocol; the processes share the videos, each is counted once."""
    detector = Detector(config.i3d, env.device, features=True, unit_range=config.rules.unit_range)
    generated = _clips(config, config.dir2, "generated", env, config.size)
    real = _clips(config, config.dir1, "real", env, generated.size)
    for name, clips in (("--dir1", real), ("--dir2", generated)):
        if len(clips) < 2:
            raise UserError(f"{name} {getattr(config, name[2:])}: one video of at least {config.frames} frames; a distance needs two")
    sides = [_moments(config, clips, detector, env) for clips in (real, generated)]
    dim = len(sides[0].mean)
    notes = [*_notes(config, real), *_notes(config, generated)]
    if min(len(real), len(generated)) <= dim:
        notes.append(f"{min(len(real), len(generated))} videos and {dim} features: a covariance is singular, the distance is far too large")
    figures = {"fvd": frechet_distance(sides[0], sides[1]), "real_videos": len(real), "generated_videos": len(generated)}
    described = {"id": config.name("fvd", len(generated)), "covariance": "unbiased"}
    return _report(figures, notes, config, described, detector, [real, generated], env)


def measure_vis(config: VisConfig, env: Env) -> dict[str, Any]:
    """Figures and protocol; the processes share the videos, each is counted once."""
    detector = Detector(config.c3d, env.device, features=False, unit_range=config.rules.unit_range)
    clips = _clips(config, config.dir2, "generated", env, config.size)
    if len(clips) < config.splits:
        raise UserError(f"--dir2 {config.dir2}: {len(clips)} videos cannot be {config.splits} splits; give more videos, or --splits")
    seen = FeatureRows()
    for places, rows in _features(config, clips, detector, env):
        seen.update(places, rows)
    outputs = seen.gather()
    assert len(outputs) == len(clips), f"{len(outputs)} videos were measured, {len(clips)} are there"
    shuffle = SHUFFLE_SEED if config.rules.shuffled else None
    mean, std = inception_score(probabilities(outputs), config.splits, shuffle)
    described = {
        "id": config.name("isv", len(clips)),
        "splits": config.splits,
        "shuffle": "none" if shuffle is None else f"RandomState({shuffle})",
        "classes": outputs.shape[1],
        "outputs": "probabilities" if is_distribution(outputs) else "logits",
    }
    figures = {"vis": mean, "vis_std": std, "generated_videos": len(clips)}
    return _report(figures, _notes(config, clips), config, described, detector, [clips], env)


def _clips(config: VideosConfig, folder: str, role: Literal["real", "generated"], env: Env, size: Size | None) -> Clips:
    videos = open_videos(folder, "--dir1" if role == "real" else "--dir2")
    return choose_clips(videos, config.rules, role, env, count=config.num_videos, frames=config.frames, size=size, seed=config.seed)


def _features(config: VideosConfig, clips: Clips, detector: Detector, env: Env) -> Iterator[tuple[list[int], Tensor]]:
    """(places, rows) of this rank's share. Raises Stopped after a signal."""
    mine = range(len(clips))[env.rank :: env.world_size]
    with tqdm(total=len(mine), desc=f"{clips.role} videos of rank 0", unit="video", disable=None if env.is_main else True) as bar:
        for places, videos in clips.batches(mine, config.batch_size, config.num_workers):
            yield places, detector(videos)
            bar.update(len(places))
            if env.stop:
                raise Stopped(agreed=False)


def _moments(config: VideosConfig, clips: Clips, detector: Detector, env: Env) -> Moments:
    """Moments of the features of all ranks' clips, on all ranks."""
    found: Moments | None = None
    for _, rows in _features(config, clips, detector, env):
        found = found or Moments(rows.shape[1], rows.device)
        found.update(rows)
    dims: list[int] = [0] * env.world_size
    if env.world_size > 1:
        dist.all_gather_object(dims, 0 if found is None else len(found.mean))
    found = found or Moments(max(dims), env.device)  # a rank without a video
    found.reduce()
    assert found.n == len(clips), f"{found.n} videos were measured, {len(clips)} are there"
    return found


def _notes(config: VideosConfig, clips: Clips) -> list[str]:
    """What a reader of the figure has to know of a side."""
    short = f", {clips.dropped} shorter than {config.frames} frames left out" if clips.dropped else ""
    if len(clips) < config.num_videos:
        return [f"{len(clips)} {clips.role} videos, --num-videos {config.num_videos} were asked for{short}"]
    return [f"{clips.role} videos{short}"] if short else []


def _report(
    figures: dict[str, Any],
    notes: list[str],
    config: VideosConfig,
    described: dict[str, Any],
    detector: Detector,
    sides: list[Clips],
    env: Env,
) -> dict[str, Any]:
    """Figures, what to know of them, and how they were measured."""
    notes = [config.rules.note] * bool(config.rules.note) + notes
    for note in notes if env.is_main else []:
        print(f"note: {note}", file=sys.stderr, flush=True)
    measured: dict[str, Any] = {clips.role: clips.videos.identity() | config.rules.describe(clips.role, config.seed) for clips in sides}
    protocol: dict[str, Any] = {"name": config.protocol, **described, "frames": config.frames, "size": list(sides[-1].size), **measured}
    return figures | {"notes": notes, "protocol": protocol | {"detector": detector.identity()}}
