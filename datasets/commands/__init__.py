"""The subcommands of preprocess.py: what each does in a line, its arguments, and what to do with them."""

import argparse
from collections.abc import Callable

from datasets.commands.shards import add_shards_arguments, run_shards

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "shards": ("videos -> shards; goes on where it was stopped", add_shards_arguments, run_shards),
}
