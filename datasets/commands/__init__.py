"""The subcommands of preprocess.py: what each does in a line, its arguments, and what to do with them."""

import argparse
from collections.abc import Callable

from datasets.commands.inspect import add_inspect_arguments, run_inspect
from datasets.commands.options import add_shards_arguments
from datasets.commands.shards import run_shards
from datasets.commands.verify import add_verify_arguments, run_verify

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
"""Summary, what adds the arguments, what runs it."""

COMMANDS: dict[str, Command] = {
    "shards": ("videos -> shards; goes on where it was stopped", add_shards_arguments, run_shards),
    "inspect": ("what a shard set holds, with a contact sheet", add_inspect_arguments, run_inspect),
    "verify": ("checks every hash and decodes every sample of a shard set", add_verify_arguments, run_verify),
}
