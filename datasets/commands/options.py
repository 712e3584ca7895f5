"""The options of `preprocess.py shards`, and the clip rules that they come to."""

import argparse
from pathlib import Path
from typing import Any

from datasets.commands.parser import cores, number, share, whole
from datasets.prepare.clips import ClipRules
from datasets.prepare.filters import FilterRules
from datasets.sources import SOURCES
from datasets.sources.folders import IMAGES
from datasets.transforms import RELEASES, RESIZE_MODES
from datasets.video import MAX_RATE, MIN_RATE, ffmpeg_program
from utils.errors import ConfigError, UserError

DIGITS = "synthetic-digits"
NPY_LIMIT = 64


def _clip_length(text: str) -> int:
    return 0 if text == "video" else whole(1)(text)


def add_shards_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `preprocess.py shards`, in groups."""
    parser.usage = "preprocess.py shards VIDEOS --out SHARDS [options]"
    width = max(map(len, SOURCES))
    layouts = [f"  {name:<{width}}  {source.summary}" for name, source in SOURCES.items()]
    parser.epilog = "\n".join(["layouts (--dataset-name):", *layouts])
    _add_sources(parser)
    _add_clips(parser)
    _add_filters(parser)
    _add_storage(parser)
    _add_tasks(parser)
    digits = parser.add_argument_group(DIGITS).add_argument
    digits("--num-videos", type=whole(1), default=64, metavar="N", help="default 64")
    digits("--video-frames", type=whole(2), default=32, metavar="N", help="default 32")
    digits("--digits", type=int, choices=[1, 2], default=1, help="digits per video (default 1); the larger one is the label")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what").add_argument
    add("source", nargs="?", type=Path, metavar="VIDEOS", help="folder of videos, or a manifest")
    add("--source", "--data-path", dest="source_flag", type=Path, metavar="FOLDER", help="the same, as a flag")
    add("--out", type=Path, required=True, metavar="SHARDS", help="folder for the shard set")
    add(
        "--dataset-name",
        choices=["auto", *SOURCES, DIGITS],
        default="auto",
        metavar="LAYOUT",
        help="how the videos lie, one of the layouts below; auto (default): what the folder looks like; "
        f"{DIGITS}: needs no videos, makes moving digits under SHARDS/source",
    )
    add(
        "--split", choices=["all", "train", "val", "test"], default="all", help="default all; by the data set's own split or --val-fraction"
    )
    add("--fold", type=int, choices=[1, 2, 3], default=1, help="which of UCF-101's splits (default 1)")
    add("--split-lists", type=Path, metavar="FOLDER", help="UCF-101's ucfTrainTestlist, when it is not in or beside the source folder")
    add(
        "--val-fraction",
        type=share,
        default=0.0,
        metavar="F",
        help="hold out this share of the videos, by a hash of their group's name: --split val (or test) is that share, train the rest",
    )
    add("--captions", type=Path, metavar="FILE", help="captions of the videos by name: a table (.csv .tsv .json .jsonl) or text")
    add(
        "--filter",
        type=Path,
        metavar="FILE",
        help="take only videos that a pattern of this text file matches: one a line, of names without ending, such as *WallPushups*; "
        "with a slash: of paths below the source folder",
    )
    add("--licence", default="", metavar="TEXT", help="a licence or source note that the shard set carries")
    add("--name", default="", help="name of the data set (default: of the source folder)")


def _add_clips(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("clips").add_argument
    add("--image-size", type=whole(2), nargs=2, metavar=("H", "W"), help=f"default 64 64; {DIGITS}: 32 32")
    add("--clip-length", type=_clip_length, metavar="N", help=f"frames (default 16; {DIGITS}: 8; {IMAGES}: 1); 'video': whole videos")
    add("--clip-stride", type=whole(1), metavar="N", help="frames between the beginnings of two clips (default: the clip length)")
    add("--frame-stride", type=whole(1), default=1, metavar="N", help="take every N-th frame (default 1); lengths count taken frames")
    add("--fps", type=number(0, MAX_RATE), default=0.0, metavar="FPS", help="frames taken in a second, by time stamps (default 0: all)")
    add(
        "--clip-rule",
        choices=["consecutive", "linspace", "spread"],
        default="consecutive",
        help="consecutive (default): clips of neighbouring frames. linspace: as Latte's release picks a clip's frames. "
        "spread: one clip a video, its frames spread over the whole (VIDM)",
    )
    add("--scenes", choices=["ignore", "split"], default="ignore", help="split: no clip crosses a scene cut (default: ignore)")
    add(
        "--preset",
        choices=sorted(RELEASES),
        help="--resize, --antialias and --centre as a paper's release has them; any of the three may still be given",
    )
    add(
        "--resize",
        choices=RESIZE_MODES,
        help="crop (default): largest part of the target's aspect, then resize. square: centre square, then resize. stretch: the whole "
        "frame. shorter-side, torchvision: scale the shorter side, then crop. box-halving: as DiT and ADM",
    )
    add("--antialias", action=argparse.BooleanOptionalAction, help="filter before making smaller (default: yes)")
    add("--centre", choices=["floor", "round"], help="which way a crop leans that cannot be in the middle (default floor)")
    add("--on-short", choices=["skip", "pad"], default="skip", help="short videos: skip (default), or repeat the last frame")
    add("--min-frames", type=whole(1), default=1, metavar="N", help="least frames of a whole video or padded clip (default 1)")
    add("--max-clips-per-video", type=whole(0), default=0, metavar="N", help="from the beginning of each video (default 0: all)")
    add("--frames-fps", type=number(MIN_RATE, MAX_RATE), default=25.0, metavar="FPS", help="frame rate of frame folders (default 25)")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("filters", "What is left out is counted by reason and named in report.json.").add_argument
    none, defaults = "(default 0: no bound)", FilterRules()
    add("--min-fps", type=number(), default=0.0, metavar="FPS", help=f"least frame rate of a video {none}")
    add("--max-fps", type=number(), default=0.0, metavar="FPS", help=f"highest frame rate of a video {none}")
    add("--min-size", type=whole(0), default=0, metavar="PIXELS", help=f"least shorter side of a video {none}")
    pixels = defaults.max_pixels
    add(
        "--max-pixels", type=whole(1), default=pixels, metavar="N", help=f"most pixels of a frame; larger is not decoded (default {pixels})"
    )
    add("--min-seconds", type=number(), default=0.0, metavar="S", help=f"least length of a video {none}")
    add("--max-seconds", type=number(), default=0.0, metavar="S", help=f"greatest length of a video {none}")
    motion = "mean absolute difference of neighbouring frames of a clip, 0 to 1"
    add("--min-motion", type=number(0, 1), default=0.0, metavar="M", help=f"least motion: {motion} (default 0); 0.002 drops stills")
    add("--max-motion", type=number(0, 1), default=1.0, metavar="M", help="most motion (default 1)")
    add("--drop-black", action="store_true", help="leave out clips in which every frame is black")
    add(
        "--dedupe",
        type=whole(0),
        metavar="BITS",
        help="leave out clips that show what a clip of another video shows: perceptual hashes of 256 bits that differ in at most "
        "this many (default: keep all; 0: as good as the same; 20: also after resizing and recompression)",
    )
    add(
        "--max-rejects",
        type=number(0, 1),
        default=1.0,
        metavar="SHARE",
        help="end with status 1 when more of the videos than this give no clip (default 1: never)",
    )


def _add_storage(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("storage and speed").add_argument
    add("--codec", choices=["auto", "npy", "mp4"], default="auto", help=f"npy: raw; mp4: H.264 crf 18; auto: npy up to {NPY_LIMIT} pixels")
    add("--shard-size", type=whole(1), default=512, metavar="N", help="clips per shard (default 512)")
    add("--shard-mib", type=whole(1), default=1024, metavar="MIB", help="a shard is also closed at this size (default 1024)")
    add("--decoder", choices=["auto", "pyav", "ffmpeg"], default="auto", help="auto: pyav, in this process; ffmpeg: the ffmpeg program")
    add("--workers", type=whole(1), default=cores(), metavar="N", help="processes (default: all cores)")
    add("--seed", type=int, default=0, help="order of the videos in the shards; also draws the moving digits (default 0)")
    add("--overwrite", action="store_true", help="delete the shard set that --out holds first")


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    about = "Each task makes its share of one set, in any order, at any time, restarted at will; the last one writes index.json."
    add = parser.add_argument_group("many machines", about).add_argument
    add("--task-id", type=whole(0), metavar="I", help="which task this is, from 0 (default 0)")
    add("--num-tasks", type=whole(1), default=1, metavar="N", help="how many tasks there are (default 1)")
    add("--parts", type=whole(1), metavar="P", help="parts that the set is cut into, which decides its bytes (default: --num-tasks)")


def _length(args: argparse.Namespace) -> int:
    """Frames of a clip. ConfigError for more than a picture has."""
    given: int | None = args.clip_length
    if args.dataset_name == IMAGES:
        if given not in (None, 0, 1):
            raise ConfigError(f"--clip-length {given}: clips of --dataset-name {IMAGES} have 1 frame")
        return 1
    return (8 if args.dataset_name == DIGITS else 16) if given is None else given


def clip_rules(args: argparse.Namespace) -> ClipRules:
    """The rules that the options ask for. UserError when the ffmpeg program is asked for and not there."""
    digits = args.dataset_name == DIGITS
    height, width = args.image_size or ((32, 32) if digits else (64, 64))
    length = _length(args)
    codec = args.codec
    if codec == "auto":
        codec = "npy" if max(height, width) <= NPY_LIMIT else "mp4"
    if args.decoder == "ffmpeg" and ffmpeg_program() is None:
        raise UserError("--decoder ffmpeg: there is no ffmpeg program; install ffmpeg or the package imageio-ffmpeg, or use --decoder pyav")
    given = {name: getattr(args, name) for name in ("resize", "antialias", "centre")}
    pictures: dict[str, Any] = dict(RELEASES[args.preset]) if args.preset else {}
    pictures |= {name: value for name, value in given.items() if value is not None}
    filters = ("min_fps", "max_fps", "min_size", "max_pixels", "min_seconds", "max_seconds", "min_motion", "max_motion", "drop_black")
    return ClipRules(
        size=(height, width),
        clip_length=length,
        clip_stride=args.clip_stride or length,
        frame_stride=args.frame_stride,
        fps=args.fps,
        rule=args.clip_rule,
        scenes=args.scenes,
        filters=FilterRules(**{name: getattr(args, name) for name in filters}),
        codec=codec,
        decoder="ffmpeg" if args.decoder == "ffmpeg" else "pyav",
        on_short=args.on_short,
        min_frames=args.min_frames,
        max_clips=args.max_clips_per_video,
        frames_fps=args.frames_fps,
        **pictures,
    )
