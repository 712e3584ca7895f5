"""Trained systems as folders to keep, copy and share.

  python -m pipelines.pretrained save RUNS FOLDER [--license mit]     the networks of finished runs, or of another saved folder
  python -m pipelines.pretrained push FOLDER OWNER/NAME [--private]   a saved folder to the Hugging Face hub

    pipeline = from_pretrained("FOLDER")     # or "OWNER/NAME" on the hub
    clips = pipeline.generate([0, 1], seed=0)
    pipeline.save_pretrained("ANOTHER")

sample.py takes FOLDER and OWNER/NAME (or OWNER/NAME@REVISION) in place of RUNS. Exit status: 0 done; 1 error; 2 wrong settings.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.cmd import CMDPipeline
from pipelines.hub import fetch, push
from pipelines.hvdm import HVDMPipeline
from pipelines.latte import LattePipeline
from pipelines.loading import Weights
from pipelines.pvdm import PVDMPipeline
from pipelines.runs import GENERATORS, find_family, systems_in
from pipelines.saved import Saveable, open_saved
from pipelines.vidm import VIDMPipeline
from utils.command import run_command
from utils.errors import ConfigError, UserError

Family = Mapping[str, Path]


def _cmd(parts: Family, **how: Any) -> CMDPipeline:
    return CMDPipeline.from_exports(parts["autoencoder"], parts["content"], parts["motion"], **how)


def _latte(parts: Family, **how: Any) -> LattePipeline:
    own = "" if how.get("vae") else parts.get("autoencoder", "")
    return LattePipeline.from_exports(parts["denoiser"], own, **how)


def _pvdm(parts: Family, vae: str, **how: Any) -> PVDMPipeline:
    return PVDMPipeline.from_exports(parts["denoiser"], parts.get("autoencoder", ""), **how)


def _hvdm(parts: Family, vae: str, **how: Any) -> HVDMPipeline:
    return HVDMPipeline.from_exports(parts["denoiser"], parts.get("autoencoder", ""), **how)


def _vidm(parts: Family, vae: str, **how: Any) -> VIDMPipeline:
    return VIDMPipeline.from_exports(parts["motion"], parts.get("content"), **how)


OPENERS: dict[str, Callable[..., Saveable]] = {"cmd": _cmd, "latte": _latte, "pvdm": _pvdm, "hvdm": _hvdm, "vidm": _vidm}


def from_pretrained(
    source: str | Path,
    revision: str | None = None,
    *,
    system: str = "",
    vae: str = "",
    weights: Weights = "ema",
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Any:
    """The pipeline of a system, ready to generate: CMDPipeline, LattePipeline, PVDMPipeline, HVDMPipeline or VIDMPipeline.

    `source`: a saved folder, a results folder of training, or <owner>/<name> on the hub (a folder of that name comes first), whose
    `revision` is a branch, tag or commit. `system`: which, where a results folder has several. `vae`: folder of the image VAE, where the
    networks need one that is not saved with them. Nothing that is read is run as code. Raises UserError in one line.
    """
    place = fetch(source, revision)
    if not place.is_dir():
        raise UserError(f"{source}: no such folder, and no <owner>/<name> on the Hugging Face hub")
    found = [name for name in systems_in(place) if name in GENERATORS]
    if system and system not in GENERATORS:
        raise ConfigError(f"system {system}: there are {', '.join(GENERATORS)}")
    if not system and len(found) != 1:
        what = f"holds runs of {' and '.join(found)}: say which system" if found else "holds no finished run of a system that generates"
        raise UserError(f"{source} {what}")
    name = system or found[0]
    return OPENERS[name](find_family(place, name), vae=vae, weights=weights, device=device, precision=precision)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("pipelines.pretrained", None, description, rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="save | push")
    command = commands.add_parser("save", help="write the networks of a system into one folder")
    command.set_defaults(run=_save)
    command.add_argument("source", metavar="RUNS", help="results folder of training, a saved folder, or OWNER/NAME on the hub")
    command.add_argument("target", metavar="FOLDER", type=Path)
    command.add_argument("--system", default="", choices=[*GENERATORS, ""], help="which, where RUNS has several")
    command.add_argument("--vae", default="", metavar="FOLDER", help="image VAE, where the runs do not know it; it is saved with them")
    command.add_argument("--license", default="", help="of all networks, in place of what their runs say: apache-2.0, or any line")
    command.add_argument("--weights", choices=("both", "used"), default="both", help="averaged and last weights, or those in use alone")
    command = commands.add_parser("push", help="upload a saved folder to the hub")
    command.set_defaults(run=_push)
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("repo", metavar="OWNER/NAME")
    command.add_argument("--private", action="store_true", help="make the repository private, where it is not there yet")
    args = parser.parse_args(argv)
    args.run(args)


def _save(args: argparse.Namespace) -> None:
    pipeline = from_pretrained(args.source, system=args.system, vae=args.vae)
    saved = pipeline.save_pretrained(args.target, license=args.license, weights=args.weights)
    print(f"{saved}: {pipeline.system} with {', '.join(pipeline.networks())}")


def _push(args: argparse.Namespace) -> None:
    if open_saved(args.folder) is None:
        raise UserError(f"{args.folder} is no saved folder: make one with `python -m pipelines.pretrained save RUNS FOLDER`")
    print(push(args.folder, args.repo, args.private))


if __name__ == "__main__":
    run_command(main)
