"""Data preparation: `preprocess.py shards FOLDER --out SHARDS` turns a folder of videos into the shards that training reads.

A set for a first try needs no videos: `preprocess.py shards --dataset-name synthetic-digits --num-videos 64 --out SHARDS`.
"""

import argparse

from datasets.commands import COMMANDS
from launch.run import run_main


def main() -> None:
    parser = argparse.ArgumentParser(prog="preprocess.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, _) in COMMANDS.items():
        add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    args = parser.parse_args()
    COMMANDS[args.command][2](args)


if __name__ == "__main__":
    run_main(main)
