"""Pictures of a shard set: the contact sheet, clips spread over the whole set as strips of frames with key and class; first frames."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.prepare.stored import decode_clip
from datasets.shards import sidecar_name
from utils.files import atomic_write_bytes

SHEET = "sheet.png"
CLIPS, FRAMES = 24, 6
"""Clips on a sheet, frames of each."""
HEIGHT, LINE, GAP = 80, 16, 6
"""Pixels: of a frame, of the text under it, between strips."""
WIDTH = 1600
"""Pixels of a sheet, about."""


def _clips(folder: Path, entries: list[dict[str, Any]], codec: str, count: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """(key, label, frames) of `count` clips at equal distances in the set; `entries` are rows of index.json."""
    ends = np.cumsum([entry["samples"] for entry in entries])
    wanted = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).astype(np.int64))
    shards = np.searchsorted(ends, wanted, side="right")
    for shard in np.unique(shards).tolist():
        entry = entries[shard]
        table = json.loads((folder / sidecar_name(entry["name"])).read_bytes())
        with (folder / entry["name"]).open("rb") as file:
            for row in (wanted[shards == shard] - (ends[shard] - entry["samples"])).tolist():
                payload = os.pread(file.fileno(), table["nbytes"][row], table["offset"][row])
                yield table["key"][row], table["label"][row], decode_clip(payload, codec, table["frames"][row])


def write_pictures(folder: Path, entries: list[dict[str, Any]], codec: str, count: int, out: Path) -> list[Path]:
    """The first frames of `count` clips as PNGs, the classes in turn: what videos can begin at. Fewer where the set has fewer clips."""
    tables = [json.loads((folder / sidecar_name(entry["name"])).read_bytes()) for entry in entries]
    turns: dict[int, int] = {}
    order = []
    for shard, table in enumerate(tables):
        for row, label in enumerate(table["label"]):
            order.append((turns.get(label, 0), label, shard, row))
            turns[label] = turns.get(label, 0) + 1
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, (_, label, shard, row) in enumerate(sorted(order)[:count]):
        table = tables[shard]
        with (folder / entries[shard]["name"]).open("rb") as file:
            payload = os.pread(file.fileno(), table["nbytes"][row], table["offset"][row])
        buffer = io.BytesIO()
        Image.fromarray(decode_clip(payload, codec, table["frames"][row])[0]).save(buffer, format="PNG")
        paths.append(out / f"{place:06d}-class{label:03d}.png")
        atomic_write_bytes(paths[-1], buffer.getvalue())
    return paths


def _strip(clip: np.ndarray, size: tuple[int, int], text: str) -> Image.Image:
    """Frames spread over a clip side by side, and a line of text; `size`: height and width of a frame."""
    height, width = size
    cell = Image.new("RGB", (FRAMES * width, height + LINE), "white")
    for place, frame in enumerate(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)):
        cell.paste(Image.fromarray(clip[frame]).resize((width, height), Image.Resampling.BICUBIC), (place * width, 0))
    ImageDraw.Draw(cell).text((1, height + 1), text, fill="black", font=ImageFont.load_default(size=11))
    return cell


def write_sheet(folder: Path, entries: list[dict[str, Any]], codec: str, classes: list[str], path: Path | None = None) -> Path:
    """Draws the sheet of a set of npy or mp4 clips into `path`, else into the set's folder. The same set gives the same bytes."""
    strips = []
    for key, label, clip in _clips(folder, entries, codec, CLIPS):
        width = min(WIDTH // FRAMES, max(8, round(HEIGHT * clip.shape[2] / clip.shape[1])))
        strips.append(_strip(clip, (HEIGHT, width), f"{key}  {classes[label]}" if classes else key))
    across, down = (max(strip.size[axis] for strip in strips) + GAP for axis in (0, 1))
    columns = min(len(strips), max(1, WIDTH // across))
    sheet = Image.new("RGB", (columns * across + GAP, -(-len(strips) // columns) * down + GAP), "white")
    for place, strip in enumerate(strips):
        sheet.paste(strip, (GAP + place % columns * across, GAP + place // columns * down))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", compress_level=1)
    path = path or folder / SHEET
    atomic_write_bytes(path, buffer.getvalue())
    return path
