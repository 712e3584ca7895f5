"""`preprocess.py inspect`: what a shard set holds, and a picture of it."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets.commands.parser import local_folder, whole
from datasets.conditions import CondFormat
from datasets.prepare.check import read_set
from datasets.prepare.report import read_report, summary
from datasets.prepare.sheet import SHEET, write_pictures, write_sheet
from datasets.prepare.survey import survey
from datasets.prepare.windows import ClipRules
from datasets.shards import ShardSet
from utils.errors import ConfigError, UserError


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `preprocess.py inspect`."""
    parser.add_argument("shards", type=local_folder, metavar="SHARDS", help="folder of a shard set, of pixels or of latents")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help=f"draw the contact sheet into this picture (the set holds one as {SHEET})"
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write first frames of clips into this folder, the classes in turn")
    parser.add_argument("--num-pictures", type=whole(1), default=10, metavar="N", help="how many of them (default 10)")


def run_inspect(args: argparse.Namespace) -> None:
    """`preprocess.py inspect`: prints what the set is, and its report, or what its shards show where there is no report."""
    index = read_set(args.shards)
    drawn = "--sheet" if args.sheet else "--pictures" if args.pictures else ""
    if drawn and index["codec"]["name"] == "latent":
        raise ConfigError(f"{drawn}: {args.shards} holds latents, which are no pictures; draw those of the pixel set")
    print(describe(args.shards, index))
    report = read_report(args.shards)
    if report is None:
        report = survey(ShardSet.open(args.shards))
        print("there is no report.json: counted from the offset indices, and from the cards of some hundred clips")
    print(summary(report))
    if drawn:
        _draw(args, index)


def _draw(args: argparse.Namespace, index: Mapping[str, Any]) -> None:
    """The pictures that are asked for. Raises UserError."""
    shards, codec = index["shards"], index["codec"]["name"]
    try:
        if args.sheet:
            print(f"contact sheet: {write_sheet(args.shards, shards, codec, index['classes'], args.sheet)}")
        if args.pictures:
            print(f"{len(write_pictures(args.shards, shards, codec, args.num_pictures, args.pictures))} first frames: {args.pictures}")
    except OSError as error:
        raise UserError(f"cannot draw {args.sheet or args.pictures}: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{args.shards} is damaged ({error}): preprocess.py verify {args.shards} lists every fault") from None


def describe(folder: Path, index: Mapping[str, Any]) -> str:
    """The set in a few lines: name, licence, counts, form of a sample, the rules that made it."""
    shards, (height, width) = index["shards"], index["size"]
    length = f"{index['clip_length']} frames" if index["clip_length"] else "whole videos"
    gib = sum(entry["bytes"] for entry in shards) / 2**30
    dropped = sum(map(len, index.get("dropped", {}).values()))
    codec = " ".join(_form(index["codec"]))
    lines = [
        f"{folder}: {index['name']}, layout {index['source']}, split {index['split']}",
        f"  {index['samples']} samples of {length}, {height}x{width} at {index['fps']:g} fps, {codec}; {len(shards)} shards, {gib:.3g} GiB",
        f"  {len(index['classes'])} classes, {index['videos']} videos" + (f", {dropped} samples left out as duplicates" if dropped else ""),
        f"  licence or source: {index['licence'] or 'none noted'}",
    ]
    if cond := CondFormat.of(dict(index)):
        lines.append(f"  condition vectors: {cond}")
    told = {"transform": _unusual(index.get("transform") or {})} | {name: index.get(name) for name in ("tensors", "latent", "autoencoder")}
    lines += [f"  {name}: {', '.join(f'{key} {value}' for key, value in values.items())}" for name, values in told.items() if values]
    return "\n".join(lines)


def _form(codec: Mapping[str, Any]) -> list[str]:
    """What a codec is, its name first."""
    form = [str(value) for key, value in codec.items() if key not in ("name", "framewise")]
    return [str(codec["name"]), *form] + (["frame by frame"] if codec.get("framewise") else [])


def _unusual(transform: Mapping[str, Any]) -> dict[str, Any]:
    """The rules, without those that nobody asked for."""
    usual, always = asdict(ClipRules()), ("resize", "antialias", "clip_stride", "frame_stride")
    filters = {name: value for name, value in transform.get("filters", {}).items() if value != usual["filters"].get(name)}
    rules = {name: value for name, value in transform.items() if name in always or (name != "filters" and value != usual.get(name))}
    return rules | filters
