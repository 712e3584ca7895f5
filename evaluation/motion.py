"""How much motion there is in folders of videos: what sampling with a chosen amount of it is measured by (spec, hvdm.md section 8)."""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.error import FFmpegError

from evaluation.clips import joined
from evaluation.videos import OVERVIEWS, sample_settings
from launch.env import Env, Stopped
from models.layers.motion import motion_energy
from pipelines.video_files import form_of, iterate
from utils.errors import ConfigError, UserError
from utils.media import to_float

STORED = {"mp4": "H.264", "png": "PNG", "gif": "GIF"}
"""Formats, as the protocol calls them."""
CLIP_FRAMES = 16
"""Frames of a clip where nobody says them."""


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Measures how much motion there is in generated videos."""

    samples: tuple[str, ...] = ()
    """Folders of mp4 videos, as sample.py writes them. The figures of each are also left in it, in motion.json, for the report."""
    clip_frames: int = 0
    """Frames of a clip, an even number; 0: as many as the model made at a time, 16 where the folder does not say."""
    out: str = ""
    """JSON file to write the figures of all folders to."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if not self.samples:
            raise ConfigError("motion of what? give --samples FOLDER [FOLDER ...], the --out of sample.py")
        if missing := [folder for folder in self.samples if not Path(folder).is_dir()]:
            raise ConfigError(f"--samples {missing[0]}: no such folder")
        if self.clip_frames < 0 or self.clip_frames % 2:
            raise ConfigError(f"--clip-frames {self.clip_frames}: an even number, the transform takes pairs of frames")


def measure_motion(folder: Path, env: Env, clip_frames: int = 0) -> dict[str, Any]:
    """Mean and standard deviation over the videos of a folder of their motion, each the mean over its clips; and how it was measured.

    Clips follow one another; what is left at the end of a video is left out, and an odd last row or column. `clip_frames` 0: as many as
    the model makes at a time, by the settings beside the videos. The processes share the videos; to be called by all ranks, which all get
    the figures. Raises UserError for a folder without videos, and for a file that is none; Stopped after a signal.
    """
    settings = sample_settings(folder)
    frames = clip_frames or settings.get("model", {}).get("latent_frames") or settings.get("n_frames") or CLIP_FRAMES
    frames = max(2, frames - frames % 2)  # the transform takes pairs
    videos = [folder / sample["file"] for sample in settings.get("samples", [])]
    videos = videos or sorted(path for path in folder.glob("*.mp4") if path.name not in OVERVIEWS)
    if not videos:
        raise UserError(f"{folder} holds no videos (*.mp4): give the --out of sample.py, or any folder of mp4 files")
    forms = sorted({form_of(path) for path in videos})
    mine = []
    for path in videos[env.rank :: env.world_size]:
        mine.append(list(_energies(path, frames, settings.get("fps") or 10)))
        if env.stop:
            raise Stopped(agreed=False)
    found = joined(mine, len(videos), env)
    if short := [path for path, energies in zip(videos, found, strict=True) if not energies]:
        raise UserError(f"{short[0]} has fewer than {frames} frames: give --clip-frames")
    means = [statistics.fmean(energies) for energies in found]
    return {
        "motion": statistics.fmean(means),
        "motion_std": statistics.pstdev(means),
        "videos": len(videos),
        "protocol": {
            "motion": "mean |coefficient| of the four subbands of the Haar transform that are high in time, frames in [-1, 1]",
            "clips": sum(map(len, found)),
            "clip_frames": frames,
            "frames": f"as stored, {' and '.join(STORED[form] for form in forms)}",
        },
    }


def _energies(path: Path, frames: int, fps: float) -> Iterator[float]:
    """Motion of the clips of a video, one after the other. Raises UserError for a file that is no video."""
    clip: list[np.ndarray] = []
    try:
        for frame in iterate(path, form_of(path), fps):
            clip.append(frame)
            if len(clip) == frames:
                video = torch.from_numpy(np.stack(clip)).permute(3, 0, 1, 2)[None]
                height, width = video.shape[3:]
                yield motion_energy(to_float(video[..., : height - height % 2, : width - width % 2])).item()
                clip = []
    except (FFmpegError, OSError, LookupError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
