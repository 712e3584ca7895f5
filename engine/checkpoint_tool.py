"""`python -m engine.checkpoint inspect|verify|convert`: checkpoints without a run, a process group or a GPU.

Exit status: 0 done, 1 damaged or another error, 2 wrong arguments.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from engine import manifest
from engine.archive import PARTS, pack, unpack
from engine.contents import saved_tensors
from utils.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.checkpoint", description="Look at the checkpoints of a run, check them, move them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what checkpoints hold", description="Say what checkpoints hold, the newest in detail.")
    inspect.add_argument("place", type=Path, help="a run folder, or one of its checkpoints")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor with its type and shape")
    inspect.set_defaults(command=_inspect)
    verify = commands.add_parser("verify", help="whether the files are what was written", description="Read all files and compare digests.")
    verify.add_argument("places", type=Path, nargs="+", metavar="place", help="a run folder (all its checkpoints), or a checkpoint")
    verify.set_defaults(command=_verify)
    convert = commands.add_parser("convert", help="to one safetensors file, or from one", description=_CONVERT)
    convert.add_argument("source", type=Path, help="a checkpoint, a run folder (its newest checkpoint), or a FILE.safetensors made of one")
    convert.add_argument("target", type=Path, help="a FILE.safetensors, or the run folder that the checkpoint is for")
    convert.add_argument("--parts", nargs="+", choices=list(PARTS), help="what to put into the file (default: all)")
    convert.set_defaults(command=_convert)
    args = parser.parse_args(arguments)
    try:
        return args.command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}: it cannot be read now, which is no damage", file=sys.stderr)
    return 1


_CONVERT = (
    "Put a checkpoint into one safetensors file, or such a file back into a run folder, made if need be, from where training goes on. "
    "The file is read by every version of torch; the checkpoint, only by the one that wrote it and newer ones."
)


def _inspect(args: argparse.Namespace) -> int:
    status = 0
    newest: Path | None = None
    record: dict[str, Any] = {}
    for place in _checkpoints(args.place):
        try:
            record, newest = manifest.read_manifest(place), place
        except UserError as damage:
            print(damage)
            status = 1
            continue
        size = sum(entry["bytes"] for entry in record["files"].values())
        written = time.strftime("%F %T", time.localtime((place / manifest.MANIFEST).stat().st_mtime))
        by = f"{record.get('world_size')} process(es), torch {record.get('torch')}"
        print(f"{place}: step {record['step']}, {record.get('samples')} samples, {_bytes(size)}, written {written} by {by}")
    if newest is None:
        return status
    for name in ("progress", "task"):
        values = ", ".join(f"{key} {value}" for key, value in record.get(name, {}).items())
        print(f"  {name:<8} {values or 'nothing'}")
    saved = saved_tensors(FileSystemReader(newest), newest, record)
    for line in _summary(saved):
        print(f"  {line}")
    for name, (shape, dtype) in sorted(saved.items()) if args.tensors else ():
        print(f"  {name}  {_name(dtype)} {list(shape)}")
    return status


def _summary(saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> list[str]:
    """A line for each network of each part."""
    groups: dict[tuple[str, str], list[tuple[torch.Size, torch.dtype]]] = {}
    for key, entry in saved.items():
        part = next(name for name, prefix in PARTS.items() if key.startswith(prefix))
        groups.setdefault((part, key.split(".")[1]), []).append(entry)
    lines = []
    for (part, network), entries in sorted(groups.items()):
        count, size = sum(shape.numel() for shape, _ in entries), sum(shape.numel() * dtype.itemsize for shape, dtype in entries)
        types = "/".join(sorted({_name(dtype) for _, dtype in entries}))
        lines.append(f"{part:<8} {network}: {len(entries)} tensors, {count:,} values, {_bytes(size)}, {types}")
    return lines


def _verify(args: argparse.Namespace) -> int:
    status = 0
    for place in (checkpoint for given in args.places for checkpoint in _checkpoints(given)):
        damage = manifest.find_damage(place)
        if damage:
            status = 1
            print(damage)
            continue
        sizes = [entry["bytes"] for entry in manifest.read_manifest(place)["files"].values()]
        print(f"{place}: {len(sizes)} files, {_bytes(sum(sizes))}, all as written")
    return status


def _convert(args: argparse.Namespace) -> int:
    if args.source.suffix == ".safetensors" and not args.source.is_dir():
        if args.parts:
            raise UserError("--parts: a checkpoint gets all that the file has")
        print(f"{unpack(args.source, args.target)}: made; training goes on from it with --resume {args.target}")
        return 0
    if args.target.suffix != ".safetensors":
        raise UserError(f"{args.target}: the target of a checkpoint is a file that is named like {args.target.name}.safetensors")
    checkpoint = _checkpoints(args.source)[-1]
    print(f"{args.target}: {pack(checkpoint, args.target, args.parts or list(PARTS))} tensors of {checkpoint}")
    return 0


def _checkpoints(place: Path) -> list[Path]:
    """A checkpoint, or all of a run, oldest first; at least one. Raises UserError."""
    place = place.resolve()
    if (place / manifest.MANIFEST).is_file() or place.parent.name == "checkpoints":
        if not place.is_dir():
            raise UserError(f"{place} does not exist")
        return [place]
    if not (place / "checkpoints").is_dir():
        what = "is neither a run folder with checkpoints nor a checkpoint" if place.exists() else "does not exist"
        raise UserError(f"{place} {what}: give <results-dir>/<NNN>-<name> or .../checkpoints/step_<step>")
    found = manifest.folders(place)
    if not found:
        raise UserError(f"{place} has no checkpoint yet")
    return found


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
