"""Official checkpoints to exports of ours and back.

  python -m models.official import SYSTEM STAGE FILE FOLDER [--num-heads 12] [--image-size 64 64] ...
  python -m models.official export SYSTEM STAGE FOLDER FILE [--weights model] [--release tutorial]

A checkpoint does not say all settings of its network: those that have no default must be given, and the error names them. Its names must
be those of the network; those that only one side has are listed and refused. --allow-unmatched leaves out what only the file has; what
only the network has may come from an export of the same network, --fill-from. Exit status: 0 done; 1 error; 2 wrong settings.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.official.checkpoint import NamesError
from models.official.kinds import KINDS, Kind, Read
from utils.command import run_command
from utils.config import from_dict, to_dict
from utils.errors import ConfigError, UserError
from utils.files import atomic_write_bytes, sha256_file
from utils.modelcard import UNKNOWN
from utils.weights import load_tensors, read_export, write_export

_SIZES = ("image_size", "input_size", "keyframe_size", "latent_res")
_NUMBERS = (
    "n_frames", "num_heads", "num_head_channels", "plane_heads", "head_dim", "splits", "latent_frames", "in_channels", "norm_channels",
    "video_timesteps", "diffusion_timesteps",
)  # fmt: skip
_AVERAGES = ("ema", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "diffusion_model.")
_OF_TRAINING = ("dropout", "class_dropout_prob")
"""Settings that change nothing of a network beyond its tensors, and that no checkpoint tells."""

Weights = Literal["ema", "model"]


def main(argv: Sequence[str]) -> None:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("models.official", None, description, rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="import | export")
    for name, run, source, target in (("import", _import, "FILE", "FOLDER"), ("export", _export, "FOLDER", "FILE")):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("system", choices=sorted({system for system, _ in KINDS}))
        command.add_argument("stage", choices=sorted({stage for _, stage in KINDS}))
        command.add_argument("source", metavar=source, type=Path)
        command.add_argument("target", metavar=target, type=Path)
        if run is _import:
            _add_settings(command)
        else:
            command.add_argument(
                "--weights", choices=("ema", "model"), default="ema", help="which, of a release whose file has one state dict"
            )
            command.add_argument("--release", choices=("official", "tutorial"), default="official", help="Latte: whose file")
    args = parser.parse_args(argv)
    kind = KINDS.get((args.system, args.stage))
    if kind is None:
        raise ConfigError(
            f"{args.system} has no {args.stage}: it has {', '.join(stage for system, stage in KINDS if system == args.system)}"
        )
    args.run(kind, args)


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Flags of an import."""
    for name in _SIZES:
        command.add_argument(f"--{name.replace('_', '-')}", type=int, nargs=2, metavar=("H", "W"))
    for name in _NUMBERS:
        command.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    command.add_argument("--license", default=UNKNOWN, help="of the weights, as their authors say it")
    command.add_argument("--allow-unmatched", action="store_true", help="leave out tensors that the network has no place for")
    command.add_argument(
        "--fill-from", type=Path, metavar="EXPORT", help="take tensors that the file lacks from this export of the same network"
    )


def _import(kind: Kind, args: argparse.Namespace) -> None:
    known = _known(kind, args)
    checkpoint = load_tensors(args.source)
    tensors: dict[str, dict[str, Tensor]] = {}
    filled: dict[str, dict[str, Any]] = {}
    found: Read | None = None
    for name, part in _parts(checkpoint, kind):
        found, filled[name] = _read(kind, part, known, name, args)
        state, config, _ = found
        with torch.device("meta"):
            network = kind.network(config)
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{args.source} does not fit the network that it tells of: {str(error).splitlines()[-1].strip()}") from None
        tensors[name] = {key: state[key] for key in network.state_dict()}
    assert found is not None
    source: dict[str, Any] = {"file": args.source.name, "sha256": sha256_file(args.source)}
    if args.fill_from:
        source["filled"] = {name: told for name, told in filled.items() if told}
        if not source["filled"]:
            raise UserError(f"--fill-from {args.fill_from}: {args.source} lacks nothing; drop the flag")
    card = {"system": args.system, "stage": args.stage, "model": to_dict(found[1]), **found[2]}
    write_export(args.target, tensors, {**card, "license": args.license, "source": source})
    _say(sys.stdout, f"{args.target}: {len(tensors[name])} tensors of {args.source} ({' and '.join(tensors)})")


def _export(kind: Kind, args: argparse.Namespace) -> None:
    if args.release == "tutorial" and (args.system, args.stage) != ("latte", "denoiser"):
        raise ConfigError("--release tutorial: only Latte's denoiser has one of its own")
    both = len(kind.entries) == 2 and args.release == "official"
    names = dict(zip(kind.entries, ("model", "ema"), strict=True)) if both else {"".join(kind.entries): args.weights}
    made: dict[str, Any] = {}
    digests: set[str] = set()
    for name, which in names.items():
        tensors, digest, _ = _written(kind, args.source, "ema" if which == "ema" else "model", args.release, args)
        if digest not in digests:  # else there is no average, and the last weights are written already
            made[name] = tensors
        digests.add(digest)
    bare = args.release == "tutorial" or not kind.entries
    content = io.BytesIO()
    torch.save(next(iter(made.values())) if bare else made, content)
    atomic_write_bytes(args.target, content.getvalue())
    _say(sys.stdout, f"{args.target}: {args.weights if bare else ' and '.join(made)} of {args.source}")


def _known(kind: Kind, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that are given. Raises ConfigError for those that this network has no use for, and for want of others."""
    given = {name: getattr(args, name) for name in (*_SIZES, *_NUMBERS) if getattr(args, name) is not None}
    flags = {name: f"--{name.replace('_', '-')}" for name in (*given, *kind.required)}
    if useless := [flags[name] for name in given if name not in kind.settings]:
        raise ConfigError(f"{useless[0]}: the checkpoint of {args.system} {args.stage} tells that, or has no such thing")
    if missing := [flags[name] for name in kind.required if name not in given]:
        raise ConfigError(f"{args.source} does not tell {' and '.join(missing)} of {args.system}'s {args.stage}: give them")
    return {name: tuple(value) if name in _SIZES else value for name, value in given.items()}


def _parts(checkpoint: Mapping[str, Any], kind: Kind) -> Iterator[tuple[Weights, Mapping[str, Any]]]:
    """The last weights of a checkpoint and the averaged ones, by the names of their files; a single state dict is `model`."""
    averaged = {name: value for name, value in checkpoint.items() if name in _AVERAGES and _is_state(value)}
    plain = {name: value for name, value in checkpoint.items() if name not in averaged}
    if not averaged or len(kind.entries) < 2 or not any(_is_state(value) for value in plain.values()):
        yield "model", checkpoint
        return
    yield "model", plain
    yield "ema", averaged


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _read(
    kind: Kind, checkpoint: Mapping[str, Any], known: Mapping[str, Any], weights: Weights, args: argparse.Namespace
) -> tuple[Read, dict[str, Any]]:
    """What a checkpoint holds, and what of it was filled in, of which file. Names that only one side has are listed, and left out or filled
    in where that is allowed."""
    given, digest, config = _written(kind, args.fill_from, weights, "official", args) if args.fill_from else ({}, "", None)
    spare = {_bare(name): value for name, value in given.items()}
    done: set[str] = set()
    filled: set[str] = set()
    while True:
        try:
            found = kind.read(checkpoint, **known)
            break
        except NamesError as error:
            unknown, missing = set(error.unknown), set(error.missing)
            for what, names in (("only the file has", error.unknown), ("only the network has", error.missing)):
                _say(sys.stderr, *(f"{what} {name}" for name in names))
            cures = ["--allow-unmatched leaves out those of the file"] * bool(unknown and not args.allow_unmatched)
            if missing and not args.fill_from:
                cures.append("--fill-from EXPORT, of the same network, has those that are missing")
            elif lacking := sorted(missing - spare.keys()):
                cures.append(f"--fill-from {args.fill_from} lacks {lacking[0]} too")
            if cures or (unknown | missing) <= done:
                count = f"{len(unknown)} names only the file has, {len(missing)} only the network"
                told = "; ".join([f"{count} (listed above)", *cures])
                raise UserError(f"{args.source} does not match {args.system}'s {args.stage}: {told}") from None
            done |= unknown | missing
            filled |= missing
            checkpoint = _with(_without(checkpoint, unknown), {name: spare[name] for name in missing})
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{args.source} is no checkpoint of {args.system}'s {args.stage} that can be read: {error}") from None
    if not filled:
        return found, {}
    theirs, ours = to_dict(config), to_dict(found[1])
    if other := [name for name, value in ours.items() if value != theirs[name] and name not in _OF_TRAINING]:
        told = f"its {other[0]} is {theirs[other[0]]}, that of {args.source} is {ours[other[0]]}"
        raise UserError(f"--fill-from {args.fill_from} is of another network: {told}; give an export of the same")
    return found, {"from": args.fill_from.name, "sha256": digest, "tensors": sorted(filled)}


def _written(kind: Kind, folder: Path, weights: Weights, release: str, args: argparse.Namespace) -> tuple[dict[str, Tensor], str, Any]:
    """The tensors of an export of this network as a release has them, their file's digest, and its config. Raises UserError."""
    state, card, digest = read_export(folder, weights)
    if (card.get("system"), card.get("stage")) != (args.system, args.stage):
        told = f"{card.get('system')} {card.get('stage')}"
        raise UserError(f"{folder} is an export of '{told}', not of '{args.system} {args.stage}'")
    try:
        config = from_dict(kind.config, card["model"], f"{folder}: model")
        return kind.write(state, config, release), digest, config
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder} cannot be written as a checkpoint of the release: {error}") from None


def _with(checkpoint: Mapping[str, Any], more: Mapping[str, Tensor]) -> dict[str, Any]:
    """The checkpoint with these tensors in each of its state dicts, under the prefix of its own."""
    kept = {name: _with(value, more) if _is_state(value) else value for name, value in checkpoint.items()}
    own = [name for name, value in kept.items() if isinstance(value, Tensor)]
    prefix = own[0].removesuffix(_bare(own[0])) if own else ""
    return kept | ({prefix + name: value for name, value in more.items()} if own else {})


def _without(checkpoint: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The checkpoint without the tensors of these names."""
    kept = {name: value for name, value in checkpoint.items() if not (isinstance(value, Tensor) and _bare(name) in names)}
    return {name: _without(value, names) if _is_state(value) else value for name, value in kept.items()}


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _say(stream: Any, *lines: str) -> None:
    stream.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    run_command(main)
