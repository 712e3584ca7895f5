"""The texts that videos were made from, or that describe them."""

from collections.abc import Sequence
from pathlib import Path

from datasets.prepare.carry import carried
from datasets.sources.base import SourceOptions
from datasets.sources.captions import decode_caption, with_captions
from evaluation.videos import FolderVideos, ShardVideos, VideoSet
from utils.errors import UserError

TABLES = ("prompts.json", "prompts.jsonl", "prompts.csv", "prompts.parquet", "prompts.txt")
"""Looked for beside videos where nobody names a file."""


def captions_of(videos: VideoSet, numbers: Sequence[int], prompts: str = "") -> list[str]:
    """The text of each of the videos `numbers`. UserError where one has none.

    `prompts`: a file of them by video name; empty: prompts.json (or another of TABLES) in the folder of the videos, else <name>.txt
    beside each; of a shard set, the captions in its shards.
    """
    if isinstance(videos, ShardVideos):
        if prompts:
            raise UserError(f"--prompts {prompts}: the captions of a shard set are in its shards; drop the flag")
        texts = [_stored(videos, number) for number in numbers]
    elif isinstance(videos, FolderVideos):
        beside = next((videos.root / name for name in TABLES if (videos.root / name).is_file()), None)
        table = Path(prompts) if prompts else beside
        captioned = with_captions(videos.videos, videos.root, SourceOptions(captions=table))
        texts = [captioned[number].caption for number in numbers]
    else:
        raise UserError("videos that are not on disk have no captions")
    without = [videos.name(number) for number, text in zip(numbers, texts, strict=True) if not text]
    if without:
        others = f" and {len(without) - 1} others have" if len(without) > 1 else " has"
        raise UserError(
            f"{without[0]}{others} no caption: write <name>.txt beside each, prompts.json in the folder, or give --prompts FILE"
        )
    return texts


def _stored(videos: ShardVideos, number: int) -> str:
    text = carried(videos.shards.sets[0], number).get("txt", b"")
    try:
        return decode_caption(text)
    except ValueError as error:
        raise UserError(f"{videos.name(number)}: {error}") from None
