"""What a stored clip costs in each format: bytes, encoding, decoding and fidelity, with what npy costs as ratio 1.

npy and mp4 are what `preprocess.py --codec` offers; npz and JPEG pictures are what people use elsewhere. Decoding ends with uint8 frames.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import machine
from benchmarks.preprocess import KINDS, make_videos
from datasets.prepare.clips import MP4_CRF, ClipRules, video_clips
from datasets.prepare.writer import npy_bytes
from datasets.shards import VIDEO_SUFFIXES
from datasets.sources.base import Video
from datasets.stored_video import decode_window
from datasets.video import VideoError
from utils.media import encode_mp4


@dataclass(frozen=True)
class Format:
    """How a clip, uint8 (t, h, w, 3), becomes bytes and comes back."""

    encode: Callable[[np.ndarray], list[bytes]]
    decode: Callable[[list[bytes]], np.ndarray]


def _npz(clip: np.ndarray) -> list[bytes]:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, video=clip)
    return [buffer.getvalue()]


def _jpegs(clip: np.ndarray) -> list[bytes]:
    buffers = [io.BytesIO() for _ in clip]
    for frame, buffer in zip(clip, buffers, strict=True):
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
    return [buffer.getvalue() for buffer in buffers]


def _pictures(parts: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(part))) for part in parts])


def formats(frames: int, rate: float) -> dict[str, Format]:
    """The formats for clips of so many frames; the first is the baseline."""
    return {
        "npy": Format(lambda clip: [npy_bytes(clip)], lambda parts: np.load(io.BytesIO(parts[0]))),
        "mp4": Format(lambda clip: [encode_mp4(clip, rate, crf=MP4_CRF, gop=frames)], lambda parts: decode_window(parts[0], 0, frames)),
        "npz": Format(_npz, lambda parts: np.load(io.BytesIO(parts[0]))["video"]),
        "jpeg pictures, q95": Format(_jpegs, _pictures),
    }


def load_clips(folder: Path, size: int, most: int) -> list[np.ndarray]:
    """The first clip of each video of a folder, 16 frames; files that cannot be used are passed over."""
    rules, clips = ClipRules(size=(size, size), max_clips=1, decoder="pyav"), []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and len(clips) < most:
            try:
                clips += [clip.frames for clip in video_clips(Video(path, path.name), rules, [])]
            except VideoError:
                continue
    return clips


def psnr(clips: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Of all clips together, in dB; infinite where they are equal."""
    error = np.mean([np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(clips, others, strict=True)])
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def report(clips: Sequence[np.ndarray], rounds: int) -> None:
    """Prints a table for clips of one size."""
    length, height, width = clips[0].shape[:3]
    print(f"{len(clips)} clips {length}x{height}x{width}")
    baseline: tuple[float, float] | None = None
    for name, form in formats(length, 25.0).items():
        encoding = decoding = float("inf")
        for _ in range(rounds):
            started = time.process_time()
            stored = [form.encode(clip) for clip in clips]
            middle = time.process_time()
            back = [form.decode(parts) for parts in stored]
            encoding, decoding = min(encoding, middle - started), min(decoding, time.process_time() - middle)
        size = sum(len(part) for parts in stored for part in parts) / len(clips)
        baseline = baseline or (size, decoding)
        print(
            f"  {name:<20} {size / 1024:>8.1f} KiB/clip (ratio {size / baseline[0]:.3f})   encode {len(clips) / encoding:>8.0f}/s   "
            f"decode {len(clips) / decoding:>8.0f}/s (ratio {baseline[1] / decoding:.3f})   PSNR {psnr(clips, back):.1f} dB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=Path, help="a folder of own videos; without it textures are made")
    parser.add_argument("--clips", type=int, default=24, help="clips at most (default 24)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of the clips (default 64 128 256)")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.videos or Path(temporary) / "videos"
        if not args.videos:
            make_videos(folder, next(iter(KINDS)), args.clips, 16)
        for size in args.sizes:
            report(load_clips(folder, size, args.clips), args.rounds)


if __name__ == "__main__":
    main()
