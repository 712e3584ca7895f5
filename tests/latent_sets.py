"""Latent sets of a tiny autoencoder, made as a user makes them, for tests."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from datasets.prepare.latents import LatentJob
from datasets.prepare.tars import read_members
from pipelines.latents import add_latents_arguments, prepare, run_latents
from tests.distributed import command


def run(*argv: object) -> str:
    done = command(["preprocess.py", *argv], timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digits(folder: Path) -> Path:
    """96 clips of 4 frames of 16 x 24 in six shards."""
    flags = ["--image-size", 16, 24, "--clip-length", 4, "--shard-size", 16, "--workers", 1]
    run("shards", "--dataset-name", "synthetic-digits", "--num-videos", 12, *flags, "--out", folder)
    return folder


def arguments(pixels: Path, ae: Path, out: Path, *argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_latents_arguments(parser)
    return parser.parse_args([str(pixels), "--ae", str(ae), "--out", str(out), "--batch-size", "5", *map(str, argv)])


def job(pixels: Path, ae: Path, out: Path, *argv: object) -> LatentJob:
    return prepare(arguments(pixels, ae, out, *argv), 0, 1, torch.device("cpu"))[0]


def make(pixels: Path, ae: Path, out: Path, *argv: object) -> Path:
    run_latents(arguments(pixels, ae, out, *argv))
    return out


def rows(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """(row of the offset index, extension -> bytes) of each sample, read without the code under test."""
    for entry in json.loads((folder / "index.json").read_bytes())["shards"]:
        raw = (folder / entry["name"]).read_bytes()
        table = json.loads((folder / entry["name"].replace(".tar", ".index.json")).read_bytes())
        columns = ("key", "offset", "nbytes", "crc32", "frames", "label", "sums")
        for values in zip(*(table[name] for name in columns), strict=True):
            row = dict(zip(columns, values, strict=True))
            with (folder / entry["name"]).open("rb") as file:
                members, _ = read_members(file, row["offset"] - 512, row["key"])
            found = {member.extension: member.payload for member in members}
            assert raw[row["offset"] : row["offset"] + row["nbytes"]] == members[0].payload
            yield row, found
