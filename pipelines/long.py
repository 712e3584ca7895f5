"""Videos of any length, made clip after clip in constant memory: each clip from the latents of the one before it.

The latents of every clip are kept beside the videos, in latents/<sample>/00000.safetensors and so on. So a long video that was stopped
goes on at its last clip, and can be made longer later: here or in another folder. The result is the same, file for file.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.video_files import EXACTEST, Format, Writer, count, exactest, iterate, open_writer, remove_video, video_path
from utils.errors import UserError
from utils.files import atomic_path, atomic_write_bytes
from utils.media import VideoWriter, grid, to_uint8, write_png

LATENTS = "latents"
"""Folder of the latents, beside the videos."""
UNSEEN = ("fps",)
"""Settings that latents do not depend on."""
FILM_FRAMES, FILM_ROWS = 12, 4
"""Frames that film.png shows of a video, evenly spread, and videos that it shows."""

SampleClip = Callable[[int, Tensor | None], Tensor]


@runtime_checkable
class LongJob(Protocol):
    """What can make long videos: clips one after the other, and their frames."""

    @property
    def fps(self) -> float:
        """Frame rate of the files."""

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""

    def new_frames(self, clip: int) -> int:
        """Frames that clip number `clip` adds to the video."""

    def sample_clip(self, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        """Latents b ... of clip number `clip` of these samples, after the clip with the latents `previous` (None: the first)."""

    def decode_clip(self, latents: Tensor, clip: int) -> Tensor:
        """The frames that the clip adds, b 3 t h w in [-1, 1]."""


def chain(sample_clip: SampleClip, *, start: Tensor | None = None, first: int = 0, stop: int) -> Iterator[Tensor]:
    """Latents of the clips number `first` to `stop` - 1, each made from the one before: `sample_clip(k, latents of clip k - 1)`.

    `start`: latents of clip `first` - 1; None: there is none. One clip is held at a time.
    """
    previous = start
    for clip in range(first, stop):
        previous = sample_clip(clip, previous)
        yield previous


def count_clips(job: LongJob, n_frames: int) -> int:
    """How many clips make a video of `n_frames` frames; the last may have more than are left."""
    clips, frames = 0, 0
    while frames < n_frames:
        frames += job.new_frames(clips)
        clips += 1
    return clips


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that latents depend on."""
    seen = {name: value for name, value in settings.items() if name not in UNSEEN}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


class ClipFolder:
    """The latents of the clips of one sample, a file each. `digest` is that of the settings that they were made with."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest = folder, digest

    def path(self, clip: int) -> Path:
        return self.folder / f"{clip:05d}.safetensors"

    def count(self, limit: int) -> int:
        """How many clips are there from the first on without a gap, at most `limit`."""
        return next((clip for clip in range(limit) if not self.path(clip).is_file()), limit)

    def read(self, clip: int, remedy: str = "") -> Tensor:
        """Latents of a clip. Raises UserError when they are damaged, or of other settings; `remedy`: what to do then."""
        path = self.path(clip)
        try:
            with safe_open(path, framework="pt") as file:
                digest, latent = (file.metadata() or {}).get("settings"), file.get_tensor("latent")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): delete it, it is made again") from None
        if digest != self.digest:
            raise UserError(f"{path} was made with other settings: {remedy or f'choose another --out, or delete {self.folder}'}")
        return latent

    def write(self, clip: int, latent: Tensor) -> None:
        """Keep the latents of a clip."""
        with atomic_path(self.path(clip)) as temporary:
            save_file({"latent": latent.cpu().contiguous()}, temporary, metadata={"settings": self.digest})

    def remove(self) -> None:
        """Delete the latents; the folder above too when nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def take(self, other: Path, limit: int) -> int:
        """Copy the clips of another folder that are missing here, and say how many there are, at most `limit`. Raises UserError."""
        theirs = ClipFolder(other, self.digest)
        found = theirs.count(limit)
        for clip in range(found):
            if not self.path(clip).is_file():
                theirs.read(clip, "give the settings that it was made with")
                atomic_write_bytes(self.path(clip), theirs.path(clip).read_bytes())
        return found


def continue_from(job: LongJob, indices: Sequence[int], source: Path, folder: Path, n_frames: int) -> None:
    """Take over the clips that another folder has of these samples. Raises UserError when it has none, or of other settings."""
    digest, limit = fingerprint(job.settings()), count_clips(job, n_frames)
    kept = [ClipFolder(folder / LATENTS / name, digest) for name in map(job.name, indices)]
    if not sum(store.take(source / LATENTS / store.folder.name, limit) for store in kept):
        missing = f"no latents of these samples are in {source / LATENTS}"
        raise UserError(f"--continue-from {source}: {missing}; it is the --out of a long video made with --keep-latents")


def write_videos(
    job: LongJob,
    indices: Sequence[int],
    folder: Path,
    n_frames: int,
    device: torch.device,
    step: Callable[[], None],
    *,
    formats: Sequence[Format] = ("mp4",),
    keep: bool = True,
) -> None:
    """A video of `n_frames` frames in each of `formats` for each of these samples, which go through the networks together.

    Frames are written as they come; `step` is called after each clip, and may raise. `keep`: the latents stay when the videos are done.
    """
    digest = fingerprint(job.settings())
    names = [job.name(index) for index in indices]
    stores = [ClipFolder(folder / LATENTS / name, digest) for name in names]
    with ExitStack() as stack:

        def opened(name: str) -> list[Writer]:
            return [stack.enter_context(open_writer(video_path(folder, name, form), form, job.fps)) for form in formats]

        writers = [opened(name) for name in names]
        for clip, latents in enumerate(_latents(job, indices, stores, count_clips(job, n_frames), device)):
            frames = to_uint8(job.decode_clip(latents, clip)).cpu()[:, :, : n_frames - writers[0][0].frames]
            for files, video in zip(writers, frames, strict=True):
                for file in files:
                    file.write(video)
            step()
    for name in names:
        for form in set(EXACTEST).difference(formats):
            if count(video_path(folder, name, form), form, job.fps) != n_frames:  # of the video when it was shorter
                remove_video(video_path(folder, name, form))
    for store in stores if not keep else ():
        store.remove()


def first_frame(job: LongJob, index: int, folder: Path, device: torch.device) -> Tensor:
    """3 h w in [-1, 1]: the first frame of a sample that is there, as it was before it was stored. Raises UserError."""
    latents = ClipFolder(folder / LATENTS / job.name(index), fingerprint(job.settings())).read(0)
    return job.decode_clip(latents[None].to(device), 0)[0, :, 0]


def _latents(job: LongJob, indices: Sequence[int], stores: Sequence[ClipFolder], stop: int, device: torch.device) -> Iterator[Tensor]:
    """Latents b ... of all clips, from the disk where they are there; what is made is kept."""

    def read(clip: int) -> Tensor:
        return torch.stack([store.read(clip) for store in stores]).to(device)

    def sample_clip(clip: int, previous: Tensor | None) -> Tensor:
        made = job.sample_clip(indices, clip, previous)
        for row, store in enumerate(stores):
            if store.path(clip).is_file():  # of a sample that had got further than others of its batch
                made[row] = store.read(clip).to(device)
            else:
                store.write(clip, made[row])
        return made

    first = min(store.count(stop) for store in stores)
    yield from map(read, range(first))
    yield from chain(sample_clip, start=read(first - 1) if 0 < first < stop else None, first=first, stop=stop)


def write_long_grid(
    folder: Path, names: Sequence[str], fps: float, n_frames: int, columns: int = 0, formats: tuple[Format, ...] = ("mp4",)
) -> None:
    """grid.mp4: the videos side by side, in constant memory; grid.png: their first frames; film.png: how the first ones go on."""
    moments = {frame * n_frames // FILM_FRAMES for frame in range(FILM_FRAMES)}
    film: list[Tensor] = []
    form = exactest(formats)
    with VideoWriter(folder / "grid.mp4", fps) as writer:
        videos = [iterate(video_path(folder, name, form), form, fps) for name in names]
        for number, frames in enumerate(zip(*videos, strict=True)):
            pictures = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
            shown = grid(pictures, columns)
            writer.write(shown[:, None])
            if number == 0:
                write_png(folder / "grid.png", shown)
            if number in moments:
                film.append(pictures[:FILM_ROWS])
    write_png(folder / "film.png", grid(torch.stack(film, dim=1).flatten(0, 1), len(film)))
