"""Videos to shards, decoded in this process or by the ffmpeg program: clips per second of one core, and their ratio.

Every variant cuts the same videos into all consecutive clips, crops and resizes them, and writes them uncompressed into tar shards; all
but the scripts and the floor do the same work in every respect but decoding, and write the same bytes. Time is processor time of this
process and of all programs it starts, so that what other processes of the machine do hardly matters.
"""

import argparse
import io
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
import webdataset
from av.video.reformatter import VideoReformatter
from PIL import Image

from benchmarks.common import machine
from datasets.prepare.build import SetInfo, build
from datasets.prepare.clips import ClipRules
from datasets.shards import ShardSet
from datasets.sources import SourceOptions, list_videos
from datasets.transforms import resize_clip
from datasets.video import ffmpeg_program, probe, to_rgb

TARGET = 1.5
"""Our preparation against itself with one ffmpeg process a video."""
BASELINE, OURS = "preprocess.py --decoder ffmpeg", "preprocess.py (PyAV)"
FLOOR = "floor: decode and RGB in this process"
PER_CLIP = "script: ffmpeg process a clip, scaled by it"
KINDS = {"mpeg4 320x240": ("mpeg4", "avi", (240, 320)), "h264 340x256": ("libx264", "mp4", (256, 340))}
"""Name -> encoder, container, height and width of the videos that are made: as UCF-101's and as Kinetics'."""


def processor_seconds() -> float:
    """Processor time of this process and of the programs that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def program_line(runs: int = 5) -> str:
    """Which ffmpeg program the baselines run, and the processor time that it takes to start."""
    program = ffmpeg_program()
    assert program is not None
    command, started = [program, "-version"], processor_seconds()
    for _ in range(runs):
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    start = (processor_seconds() - started) / runs
    return f"ffmpeg program: {program}, {' '.join(text.split()[:3])}; {start * 1e3:.0f} ms of processor time to start"


def make_videos(folder: Path, kind: str, count: int, frames: int) -> None:
    """Videos of drifting textures with some noise, about as costly to decode as filmed ones."""
    encoder, container_name, (height, width) = KINDS[kind]
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        grey, colour = rng.uniform(0, 255, (height // 8, width // 4, 1)), rng.uniform(-40, 40, (height // 8, width // 4, 3))
        small = Image.fromarray(np.clip(grey + colour, 0, 255).astype(np.uint8))
        texture = np.asarray(small.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
        with av.open(str(folder / f"{number:03d}.{container_name}"), "w") as container:
            stream = container.add_stream(encoder, rate=25, options={"g": "12", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 800_000
            for t in range(frames):
                part = texture[t % height : t % height + height, 2 * t % width : 2 * t % width + width]
                noisy = np.clip(part + rng.normal(0, 3, (height, width, 1)), 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
            container.mux(stream.encode())


def run_ffmpeg(
    path: Path, size: tuple[int, int], frames: int, before: Sequence[str] = (), after: Sequence[str] = ()
) -> Iterator[np.ndarray]:
    """Blocks of so many frames (t, h, w, 3) of `size` out of one run of the ffmpeg program."""
    program = ffmpeg_program()
    assert program is not None
    command = [program, "-nostdin", "-v", "error", "-threads", "1", *before, "-i", f"file:{path.absolute()}", *after]
    process = subprocess.Popen([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    nbytes = frames * size[0] * size[1] * 3
    while len(data := process.stdout.read(nbytes)) == nbytes:
        yield np.frombuffer(data, dtype=np.uint8).reshape(frames, *size, 3)
    process.stdout.close()
    process.wait()


def _scaled(rules: ClipRules) -> list[str]:
    height, width = rules.size
    return ["-vf", f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}"]


def resized_by_us(path: Path, rules: ClipRules) -> Iterator[np.ndarray]:
    """One ffmpeg process decodes the whole video at its own size; crop and antialiased resize as evaluations want them."""
    info = probe(path)
    for frames in run_ffmpeg(path, (info.height, info.width), rules.clip_length):
        yield resize_clip(frames, rules.size, "crop", antialias=True)


def scaled_by_ffmpeg(path: Path, rules: ClipRules) -> Iterator[np.ndarray]:
    """One ffmpeg process decodes and scales the whole video: other pixels than any paper's, but less to do."""
    yield from run_ffmpeg(path, rules.size, rules.clip_length, after=_scaled(rules))


def process_a_clip(path: Path, rules: ClipRules) -> Iterator[np.ndarray]:
    """One ffmpeg process a clip, which seeks, and scales too."""
    info = probe(path)
    for start in range(0, info.frames - rules.clip_length + 1, rules.clip_length):
        before, after = ["-ss", f"{start / info.fps:.6f}"], ["-frames:v", str(rules.clip_length), *_scaled(rules)]
        yield from run_ffmpeg(path, rules.size, rules.clip_length, before, after)


def script(clips: Callable[[Path, ClipRules], Iterator[np.ndarray]], folder: Path, rules: ClipRules, out: Path) -> int:
    """A plain script: ffmpeg's clips into webdataset's own writer. Returns the number of clips."""
    out.mkdir()
    written = 0
    with webdataset.ShardWriter(str(out / "shard-%05d.tar"), maxcount=512, verbose=0) as writer:
        for path in sorted(folder.iterdir()):
            for clip in clips(path, rules):
                buffer = io.BytesIO()
                np.save(buffer, clip)
                writer.write({"__key__": f"{path.stem}_{written:06d}", "npy": buffer.getvalue(), "json": {"source": path.name}})
                written += 1
    return written


def ours(folder: Path, rules: ClipRules, out: Path) -> int:
    """`preprocess.py shards` with one worker, in this process. Returns the number of clips."""
    listing = list_videos(folder, "folder", SourceOptions(), seed=0)
    build(listing, rules, SetInfo("benchmark", "folder"), out, workers=1, progress=lambda videos, tally: None)
    return ShardSet.open(out).num_samples


def floor(folder: Path, rules: ClipRules) -> int:
    """PyAV decodes all frames and converts them to RGB, and nothing else is done. Returns the number of clips they would make."""
    clips = 0
    for path in sorted(folder.iterdir()):
        reformatter, frames = VideoReformatter(), 0
        with av.logging.Capture(), av.open(str(path)) as container:  # warnings are no part of the table
            stream = container.streams.best("video")
            assert isinstance(stream, av.VideoStream)
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            for frame in container.decode(stream):
                to_rgb(frame, reformatter)
                frames += 1
        clips += frames // rules.clip_length
    return clips


def measure(variants: dict[str, Callable[[Path], int]], rounds: int) -> tuple[dict[str, int], dict[str, float]]:
    """Clips of each variant, and how many of them it makes in a second of one core: the best of the rounds, which alternate."""
    counts, rates = dict[str, int](), dict.fromkeys(variants, 0.0)
    for _ in range(rounds):
        for variant, work in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                started = processor_seconds()
                counts[variant] = work(Path(folder) / "out")
                rates[variant] = max(rates[variant], counts[variant] / (processor_seconds() - started))
    return counts, rates


def report(name: str, videos: Path, size: int, rounds: int) -> None:
    """Prints a table of one folder of videos."""
    rules = {decoder: ClipRules(size=(size, size), decoder=decoder) for decoder in ("pyav", "ffmpeg")}
    variants: dict[str, Callable[[Path], int]] = {
        BASELINE: lambda out: ours(videos, rules["ffmpeg"], out),
        OURS: lambda out: ours(videos, rules["pyav"], out),
        FLOOR: lambda out: floor(videos, rules["pyav"]),
        "script: ffmpeg process a video, torch resize": lambda out: script(resized_by_us, videos, rules["ffmpeg"], out),
        "script: the same, scaled by ffmpeg": lambda out: script(scaled_by_ffmpeg, videos, rules["ffmpeg"], out),
        PER_CLIP: lambda out: script(process_a_clip, videos, rules["ffmpeg"], out),
    }
    counts, rates = measure(variants, rounds)
    print(f"{name}: {len(list(videos.iterdir()))} videos to {rules['pyav'].clip_length}x{size}x{size}")
    for variant, rate in rates.items():
        ratios = f"ratio {rate / rates[BASELINE]:.2f}   to a process a clip {rate / rates[PER_CLIP]:.2f}"
        print(f"  {variant:<44} {counts[variant]:>5} clips {rate:>8.1f} clips/s of a core   {ratios}", flush=True)
    reached, best = rates[OURS] / rates[BASELINE], rates[FLOOR] / rates[BASELINE]
    print(f"  target: preprocess.py {TARGET} times --decoder ffmpeg: {reached:.2f}, and {best:.2f} if it only decoded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=Path, help="a flat folder of own videos, all whole")
    parser.add_argument("--count", type=int, default=24, help="videos of each kind made without --videos (default 24)")
    parser.add_argument("--frames", type=int, default=180, help="frames of each (default 180)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of the clips (default 64 128 256)")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many (default 2)")
    args = parser.parse_args()
    if ffmpeg_program() is None:
        raise SystemExit("the baseline needs the ffmpeg program: install ffmpeg, or the package imageio-ffmpeg")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine(torch.device("cpu")))
    print(program_line(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"own videos": args.videos} if args.videos else {kind: Path(temporary) / kind for kind in KINDS}
        for name, folder in folders.items():
            if not args.videos:
                make_videos(folder, name, args.count, args.frames)
            for size in args.sizes:
                report(name, folder, size, args.rounds)


if __name__ == "__main__":
    main()
