"""`preprocess.py shards`: videos -> shards."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.prepare.build import WORK, SetInfo, build
from datasets.prepare.clips import ClipRules
from datasets.prepare.report import REPORT, Tally, table
from datasets.prepare.writer import remove_set
from datasets.shards import INDEX
from datasets.sources.base import SOURCES, Listing, SourceOptions, detect, list_videos
from datasets.synthetic import LICENCE, DigitsConfig, make_digits
from datasets.transforms import RESIZE_MODES
from datasets.video import ffmpeg_program
from utils.errors import ConfigError, UserError

DIGITS = "synthetic-digits"
NPY_LIMIT = 64


def _whole(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in [0, 1)")
    return value


def _cores() -> int:
    """Cores that this process may use; all of them where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _clip_length(text: str) -> int:
    return 0 if text == "video" else _whole(1)(text)


def add_shards_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `preprocess.py shards`."""
    add = parser.add_argument_group("what").add_argument
    add("source", nargs="?", type=Path, help="folder of videos")
    add("--source", "--data-path", dest="source_flag", type=Path, metavar="FOLDER", help="the same, as a flag")
    add("--out", type=Path, required=True, metavar="SHARDS", help="folder for the shard set")
    add(
        "--dataset-name",
        choices=["auto", *SOURCES, DIGITS],
        default="auto",
        help="layout of the folder. UCF101: class folders, with ucfTrainTestlist if there is one. folder: any videos; the first "
        f"sub-folder is the class when all are in sub-folders. frames: a folder of picture folders. {DIGITS}: needs no folder, "
        "makes moving digits under SHARDS/source. auto (default): UCF101, folder or frames, by what is there",
    )
    add("--split", choices=["all", "train", "test"], default="all", help="default all; by UCF-101's lists or --val-fraction")
    add("--fold", type=int, choices=[1, 2, 3], default=1, help="which of UCF-101's splits (default 1)")
    add("--split-lists", type=Path, metavar="FOLDER", help="ucfTrainTestlist, when it is not in or beside the source folder")
    add("--val-fraction", type=_share, default=0.0, metavar="F", help="--split test: this share of the videos, by name; train: the rest")
    add("--licence", default="", metavar="TEXT", help="a licence or source note that the shard set carries")
    add("--name", default="", help="name of the data set (default: of the source folder)")
    clips = parser.add_argument_group("clips").add_argument
    clips("--image-size", type=_whole(2), nargs=2, metavar=("H", "W"), help=f"default 64 64; {DIGITS}: 32 32")
    clips("--clip-length", type=_clip_length, metavar="N", help=f"frames (default 16; {DIGITS}: 8); 'video': whole videos")
    clips("--clip-stride", type=_whole(1), metavar="N", help="frames between the beginnings of two clips (default: the clip length)")
    clips("--frame-stride", type=_whole(1), default=1, metavar="N", help="take every N-th frame (default 1); lengths count taken frames")
    clips("--resize", choices=RESIZE_MODES, default="crop", help="crop (default): the largest part of the aspect")
    clips("--antialias", action=argparse.BooleanOptionalAction, default=True, help="filter before making smaller (default: yes)")
    clips("--on-short", choices=["skip", "pad"], default="skip", help="short videos: skip (default), or repeat the last frame")
    clips("--min-frames", type=_whole(1), default=1, metavar="N", help="with --clip-length video: leave out shorter ones (default 1)")
    clips("--max-clips-per-video", type=_whole(0), default=0, metavar="N", help="from the beginning of each video (default 0: all)")
    clips("--frames-fps", type=float, default=25.0, metavar="FPS", help="frame rate of frame folders (default 25)")
    store = parser.add_argument_group("storage and speed").add_argument
    store(
        "--codec", choices=["auto", "npy", "mp4"], default="auto", help=f"npy: raw; mp4: H.264 crf 18; auto: npy up to {NPY_LIMIT} pixels"
    )
    store("--shard-size", type=_whole(1), default=512, metavar="N", help="clips per shard (default 512)")
    store("--shard-mib", type=_whole(1), default=1024, metavar="MIB", help="a shard is also closed at this size (default 1024)")
    store("--decoder", choices=["auto", "ffmpeg", "pyav"], default="auto", help="auto: the ffmpeg program where there is one, else PyAV")
    store("--workers", type=_whole(1), default=_cores(), metavar="N", help="processes (default: all cores)")
    store("--seed", type=int, default=0, help="order of the videos in the shards; also draws the moving digits (default 0)")
    store("--overwrite", action="store_true", help="delete the shard set that --out holds first")
    digits = parser.add_argument_group(DIGITS).add_argument
    digits("--num-videos", type=_whole(1), default=64, metavar="N", help="default 64")
    digits("--video-frames", type=_whole(2), default=32, metavar="N", help="default 32")
    digits("--digits", type=int, choices=[1, 2], default=1, help="digits per video (default 1); the larger one is the label")


def run_shards(args: argparse.Namespace) -> None:
    """`preprocess.py shards`: lists the videos, writes the shard set, prints the report."""
    started = time.monotonic()
    torch.set_num_threads(1)
    root, name, licence = _source(args)
    rules = _rules(args, digits=args.dataset_name == DIGITS)
    if args.overwrite:
        _clear(args.out)
    if args.dataset_name == DIGITS:
        make_digits(root, DigitsConfig(args.num_videos, rules.size, args.video_frames, args.digits, args.seed))
    exclude = None if args.dataset_name == DIGITS else args.out
    options = SourceOptions(args.split, args.fold, args.split_lists, args.val_fraction, exclude)
    layout = "folder" if args.dataset_name == DIGITS else args.dataset_name
    if layout == "auto":
        layout = detect(root, exclude)
    listing = list_videos(root, layout, options, args.seed)
    info = SetInfo(
        name or (layout if layout == "UCF101" else root.resolve().name),
        layout,
        licence,
        args.split,
        args.seed,
        args.shard_size,
        args.shard_mib << 20,
    )
    with _Progress(listing) as progress:
        total = build(listing, rules, info, args.out, workers=min(args.workers, len(listing.videos)), progress=progress.update)
    print(table(total))
    classes = f"{len(listing.classes)} classes" if listing.classes else "no classes"
    print(
        f"{total.clips} clips of {total.videos} of {len(listing.videos) + len(listing.missing)} videos, {classes}, layout {layout}, "
        f"in {time.monotonic() - started:.1f} s: {args.out} (details in {REPORT})"
    )


def _source(args: argparse.Namespace) -> tuple[Path, str, str]:
    """Source folder, name of the data set (empty: by the folder), licence line."""
    root = args.source or args.source_flag
    if args.dataset_name == DIGITS:
        if root is not None:
            raise ConfigError(f"--dataset-name {DIGITS} makes its own videos: drop the source folder {root}")
        return args.out / "source", args.name or DIGITS, args.licence or LICENCE
    if root is None:
        raise ConfigError(f"say which folder of videos to take, or --dataset-name {DIGITS}")
    if args.source and args.source_flag and args.source != args.source_flag:
        raise ConfigError(f"two source folders: {args.source} and {args.source_flag}")
    if root.exists() and args.out.exists() and root.samefile(args.out):
        raise ConfigError(f"--out {args.out} is the source folder: choose another")
    return root, args.name, args.licence


def _rules(args: argparse.Namespace, digits: bool) -> ClipRules:
    height, width = args.image_size or ((32, 32) if digits else (64, 64))
    length = (8 if digits else 16) if args.clip_length is None else args.clip_length
    codec = args.codec
    if codec == "auto":
        codec = "npy" if max(height, width) <= NPY_LIMIT else "mp4"
    decoder = args.decoder
    if decoder == "ffmpeg" and ffmpeg_program() is None:
        raise UserError("--decoder ffmpeg: there is no ffmpeg program; install ffmpeg or the package imageio-ffmpeg, or use --decoder pyav")
    if decoder == "auto":
        # Starting a program for each of thousands of tiny files would take longer than decoding them.
        decoder = "pyav" if digits or ffmpeg_program() is None else "ffmpeg"
    return ClipRules(
        size=(height, width),
        clip_length=length,
        clip_stride=args.clip_stride or length,
        frame_stride=args.frame_stride,
        codec=codec,
        decoder=decoder,
        resize=args.resize,
        antialias=args.antialias,
        on_short=args.on_short,
        min_frames=args.min_frames,
        max_clips=args.max_clips_per_video,
        frames_fps=args.frames_fps,
    )


def _clear(out: Path) -> None:
    """Deletes a shard set, and nothing that preprocess.py did not write."""
    if (out / INDEX).exists() or (out / WORK).exists() or next(out.glob("shard-*.tar"), None):
        remove_set(out)
        shutil.rmtree(out / WORK, ignore_errors=True)
    if (out / "source" / "digits.json").exists():
        shutil.rmtree(out / "source")


class _Progress:
    """A progress bar on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, listing: Listing) -> None:
        self.total = len(listing.videos)
        self.bar = tqdm(total=self.total, unit="video", disable=not sys.stderr.isatty())
        self.last = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, videos: int, tally: Tally) -> None:
        """`videos` are done; `tally` counts the shards that are finished."""
        self.bar.update(videos - self.bar.n)
        if self.bar.disable and (time.monotonic() - self.last > 10):
            self.last = time.monotonic()
            print(f"{videos} of {self.total} videos, {tally.clips} clips in finished shards", file=sys.stderr, flush=True)
