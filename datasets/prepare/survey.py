"""A report about a shard set that came without one: counted from its offset indices, and from the cards of clips spread over it."""

import json
from collections import Counter
from itertools import groupby
from typing import Any

import numpy as np

from datasets.prepare.report import bin_of
from datasets.prepare.tars import BLOCK, BadTar, read_members
from datasets.shards import ShardSet
from utils.errors import UserError

CARDS = 400
"""Cards that are read."""
FACTS = {"source_seconds": "seconds of a source", "source_fps": "frame rate of a source", "motion": "motion of a clip"}
"""Number in a card -> histogram."""


def survey(shards: ShardSet) -> dict[str, Any]:
    """The counts and histograms of report.json, as far as the shards themselves show them. UserError when a card is damaged."""
    histograms: dict[str, Counter[str]] = {}

    def count(histogram: str, value: float) -> None:
        histograms.setdefault(histogram, Counter())[bin_of(histogram, value)] += 1

    videos = 0
    for _, clips in groupby(shards.keys, key=lambda key: key.partition("_")[0]):
        count("clips of a video", sum(1 for _ in clips))
        videos += 1
    fps: Counter[str] = Counter()
    for sample in np.unique(np.linspace(0, shards.num_samples - 1, min(CARDS, shards.num_samples)).astype(int)).tolist():
        card = _card(shards, sample)
        fps[str(card.get("fps"))] += 1
        for name, histogram in FACTS.items():
            if isinstance(card.get(name), int | float):
                count(histogram, card[name])
        if card.get("source_size"):
            count("shorter side of a source", min(card["source_size"]))
    labels = np.bincount(shards.label, minlength=len(shards.classes))
    return {
        "videos": videos,
        "used": videos,
        "clips": shards.num_samples,
        "clips_per_class": {name: int(labels[label]) for label, name in enumerate(shards.classes)},
        "clips_per_fps": fps,
        "histograms": {name: sorted((float(edge), number) for edge, number in bins.items()) for name, bins in histograms.items()},
        "rejected_clips": {},
        "skipped": {},
    }


def _card(shards: ShardSet, sample: int) -> dict[str, Any]:
    try:
        with shards.shard_path(sample).open("rb") as file:
            members, _ = read_members(file, int(shards.offset[sample]) - BLOCK, shards.keys[sample])
        return dict(json.loads(next(member.payload for member in members if member.extension == "json")))
    except (BadTar, StopIteration, ValueError, TypeError) as error:
        raise UserError(f"{shards.describe(sample)} is damaged ({error}): see preprocess.py verify") from None
    except OSError as error:
        raise UserError(f"cannot read {shards.shard_path(sample)}: {error.strerror}") from None
