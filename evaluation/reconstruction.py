"""How well an autoencoder gives clips back: PSNR, SSIM, a perceptual distance, rFVD and rFID, with how they were measured."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evaluation.features import Reading, blocks, nameless, open_store
from evaluation.frame_figures import PER_CLIP, FrameFigures, means
from evaluation.paired import Comparison, PairedDistance, open_distances
from evaluation.protocols import figure_name
from evaluation.quality import Figures, agreed, meet
from evaluation.reconstruction_config import ORIGINALS, ReconstructConfig
from evaluation.report import copies
from evaluation.sources import SEED, Source, open_source
from evaluation.versions import made_by, versions
from evaluation.videos import ShardVideos
from launch.env import Env
from utils.errors import UserError


def measure_reconstruction(config: ReconstructConfig, env: Env) -> Figures:
    """Figures and protocol, on all ranks; the processes share the clips, each clip is counted once."""
    distances = open_distances(config.i3d, config.inception, env.device)
    source = open_source(config, env)
    clips, frames = source.clips, FrameFigures(config.perceptual, config.perceptual_weights, env, psnr_per_clip=config.psnr_per_clip)
    if distances and len(clips) < 2:
        raise UserError(f"{ORIGINALS} {config.data_path}: one clip is measured; {distances[0].name} needs two")
    compare = Comparison(source.reconstruct, frames, distances, (source.frames, *clips.size), env.device)
    reading = Reading(config.batch_size, config.num_workers, None if config.no_cache else config.cache)
    networks = {one.name: nameless(one.extractor) for one in distances}
    about = {"reconstructions": source.depends, **frames.describe(), **networks, "made_by": made_by()}
    digest = clips.digest(clips.contents(env))
    columns: dict[str, list[Tensor]] = {}
    marks: list[Tensor] = []
    for block in blocks(clips, compare, env, reading, open_store(digest, about, env, reading)):
        parts = compare.split(block.rows)
        for one in distances:
            one.update(parts.pop(one.name), keep=bool(config.bootstrap))
        for name, part in parts.items():
            columns.setdefault(name, []).append(part)
        marks.append(block.marks)
    if not env.is_main:
        meet(env, len(distances) * config.bootstrap)
        return agreed(None, env)
    figures: Figures = {}
    for name, values in columns.items():
        figures |= means(name, torch.cat(values), config.bootstrap, SEED)
    notes = [*source.notes, *copies(len(torch.cat(marks).unique()), len(clips), "clips")]
    for one in distances:
        found, known = one.finish(config.bootstrap, SEED, env)
        figures, notes = figures | found, notes + known
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    protocol = frames.describe() | _protocol(config, source, distances) | {"content_sha256": digest, "versions": versions()}
    return agreed(figures | {"clips": len(clips), "notes": notes, "protocol": protocol}, env)


def _protocol(config: ReconstructConfig, source: Source, distances: list[PairedDistance]) -> dict[str, Any]:
    """Which clips were measured, what made their reconstructions, and how distances were measured."""
    clips, rules = source.clips, source.clips.protocol
    return {
        "clips": len(clips),
        "frames": source.frames,
        "size": list(clips.size),
        "resize": rules.resized,
        **rules.describe(clips.role, SEED, config.stride),
        **({"which": "the first, in the order of the set"} if isinstance(clips.videos, ShardVideos) else {}),
        **clips.videos.identity(),
        **source.described,
        "seed": SEED,
        "bootstrap": config.bootstrap,
        **{one.name: one.describe(len(clips), source.frames, config.stride) for one in distances},
    }


def reconstruction_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One set of figures for each row of a table: that figure first, with what `evaluation.report.row` takes."""
    protocol, clips = figures["protocol"], figures["clips"]
    rows = []
    for name, value in figures.items():
        if not isinstance(value, float) or name.endswith(("_low", "_high")):
            continue
        own = protocol.get(name)
        label = "psnr_per_clip" if name == "psnr" and protocol["psnr"] == PER_CLIP else name
        named = figure_name(label, clips, protocol["frames"], protocol["stride"])
        described = own if isinstance(own, dict) else {"id": named, "detector": {}}
        if name == protocol["perceptual"].replace("-", "_"):
            described = described | {"detector": {"sha256": protocol["perceptual_sha256"]}}
        bounds = {key: figures[key] for key in (f"{name}_low", f"{name}_high") if key in figures}
        kept = {"frames": protocol["frames"], "size": protocol["size"], "seed": protocol["seed"], "name": "reconstruction"}
        rows.append({name: value, **bounds, "real_videos": clips, "generated_videos": clips, "protocol": kept | described})
    return rows
