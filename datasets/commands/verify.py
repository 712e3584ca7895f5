"""`preprocess.py verify`: every byte of a shard set checked, every fault named."""

import argparse
import time

import torch

from datasets.commands.parser import Progress, cores, local_folder, whole
from datasets.prepare.check import check_set, read_set
from utils.errors import UserError


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `preprocess.py verify`."""
    parser.add_argument("shards", type=local_folder, metavar="SHARDS", help="folder of a shard set, of pixels or of latents")
    parser.add_argument("--workers", type=whole(1), default=cores(), metavar="N", help="processes (default: all cores)")


def run_verify(args: argparse.Namespace) -> None:
    """`preprocess.py verify`: lists all faults on stdout. UserError when there are any."""
    started = time.monotonic()
    torch.set_num_threads(1)
    index = read_set(args.shards)
    samples = faults = 0
    bad = set()
    with Progress(sum(entry["samples"] for entry in index["shards"]), "sample") as bar:
        for found in check_set(args.shards, index, args.workers):
            samples += found.samples
            faults += len(found.faults)
            bad |= {fault.shard for fault in found.faults}
            for fault in found.faults:
                bar.say(str(fault))
            bar.update(samples, f", {faults} faults")
    counted = f"{samples} samples of {len(index['shards'])} shards checked in {time.monotonic() - started:.1f} s"
    if faults:
        cure = "copy these files again, or delete them and run preprocess.py again with --overwrite"
        raise UserError(f"{args.shards} has {faults} faults in {len(bad)} files ({counted}): {cure}")
    print(f"{args.shards} is whole: {counted}, no fault")
