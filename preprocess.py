"""Data preparation: `preprocess.py shards VIDEOS --out SHARDS` turns any collection of videos into the shards that training reads.

A set for a first try needs no videos: `preprocess.py shards --dataset-name synthetic-digits --num-videos 64 --out SHARDS`.
`preprocess.py latents SHARDS --ae RUN --out LATENTS` encodes shards once, so that denoisers need not in each step.
`preprocess.py COMMAND --help` lists the options of a command.
"""

import argparse
import io
import sys

from datasets.commands import COMMANDS
from datasets.commands.parser import Parser
from launch.env import independent
from launch.run import parse_launch, run_main
from pipelines.latents import SUMMARY, add_latents_arguments, run_latents
from utils.errors import ConfigError


def _latents(args: argparse.Namespace) -> None:
    env = independent()
    run_latents(args, env.rank, env.world_size, env.device)


def _arguments() -> list[str]:
    """The command line; `latents` may be started in several processes, as training is."""
    if sys.argv[1:2] != ["latents"]:
        return sys.argv[1:]
    launch = parse_launch(__doc__ or "")
    if launch.dry_run or launch.print_config:
        raise ConfigError("preprocess.py latents has neither --dry-run nor --print-config")
    return launch.argv


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text, or none that the terminal can show
    commands = COMMANDS | {"latents": (SUMMARY, add_latents_arguments, _latents)}
    parser = Parser(prog="preprocess.py", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, _) in commands.items():
        add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(_arguments())
    commands[args.command][2](args)


if __name__ == "__main__":
    run_main(main)
