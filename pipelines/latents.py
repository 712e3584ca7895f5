"""`preprocess.py latents`: a pixel shard set through the encoder of a trained pipeline into a latent shard set.

A system takes part with one entry of `pipelines.encoders.ENCODERS`: what opens its pipeline. An encoder of clips says what clips it
takes, and its `encode_latents(video) -> {name: tensor}` alone decides what is stored of one. An encoder of frames gives the moments of
each frame's posterior, `encode_moments(video)`, of clips of any length.
"""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.commands.parser import Progress, number, whole
from datasets.prepare.latents import Encode, LatentJob, LatentRules, Share, encode_set
from datasets.shards import INDEX, ShardSet
from datasets.storage import CacheConfig
from pipelines.clip import ClipPipeline
from pipelines.encoders import ENCODERS, EncoderOptions, FrameEncoder, LatentEncoder, system_of
from pipelines.image_vae import SD_SCALE
from utils.errors import ConfigError
from utils.media import to_float

SUMMARY = "shards -> shards of latents; goes on where it was stopped"


def add_latents_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `preprocess.py latents`."""
    add = parser.add_argument_group("what").add_argument
    add("shards", metavar="SHARDS", help="pixel shard set: the folder that preprocess.py shards wrote, or a URL of one")
    add("--ae", default="", metavar="EXPORT", help="trained autoencoder: its run or export folder, or an official checkpoint")
    add("--out", type=Path, required=True, metavar="LATENTS", help="folder for the latent set")
    add("--weights", choices=["ema", "model"], default="ema", help="which of the export's weights (default ema, where there are any)")
    add("--vae", default="", metavar="FOLDER", help="image VAE: of an autoencoder in latent mode, or, without --ae, to encode the frames")
    add(
        "--scale-factor",
        "--latent-scale",
        type=number(1e-6),
        metavar="F",
        help=f"factor of the image VAE's latents (default {SD_SCALE}); of encoders of frames: what latents are to be multiplied by in "
        "training (default: measured, so that they have unit variance)",
    )
    add(
        "--system",
        choices=sorted(ENCODERS),
        help="whose official checkpoint or image VAE it is (default: as its names say; for --vae alone latte)",
    )
    add(
        "--store",
        choices=["moments", "sample"],
        help="encoders of frames: mean and deviation of each posterior (default), or a draw from it",
    )
    add("--seed", type=whole(0), metavar="N", help="of --store sample: what the draws depend on, with clip and frame (default 0)")
    add("--n-frames", type=whole(1), metavar="N", help="frames that an official checkpoint takes (default: those of the clips)")
    add("--window-stride", type=whole(1), metavar="N", help="longer clips: frames between two windows (default: those of one clip)")
    add(
        "--pairs",
        action=argparse.BooleanOptionalAction,
        help="encoders of PVDM and HVDM: samples are a clip and the one before it, to learn to go on (default: where stored clips are "
        "long enough)",
    )
    add("--stills", action="store_true", help="encoders of HVDM: also each first frame as a still clip, to learn to start from pictures")
    add("--dtype", choices=["float16", "float32"], default="float16", help="stored numbers (default float16)")
    add("--on-bad-sample", choices=["fail", "skip"], default="fail", help="damaged clips: stop (default), or leave them out and say so")
    speed = parser.add_argument_group("speed").add_argument
    speed("--batch-size", type=whole(1), default=32, metavar="N", help="clips, or frames, through the encoder at a time (default 32)")
    speed("--precision", choices=["fp32", "bf16"], default="fp32", help="arithmetic of the encoder (default fp32; VAEs of frames always)")
    speed("--workers", type=whole(1), default=2, metavar="N", help="threads of each process that read and decode ahead (default 2)")
    speed("--nproc_per_node", metavar="G", help="processes, one per GPU (`gpu`) or core, each of which takes its share of the shards")
    speed("--cache-dir", default="", metavar="FOLDER", help="where fetched shards are kept (default ~/.cache/kinoform)")
    speed("--cache-gib", type=number(), default=64.0, metavar="GIB", help="most that they may take (default 64)")
    speed("--task-id", type=whole(0), metavar="I", help="which of --num-tasks jobs this is, from 0; jobs may run at any time")
    speed("--num-tasks", type=whole(1), default=1, metavar="N", help="jobs that share the set out among them (default 1)")


def run_latents(args: argparse.Namespace, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu") -> None:
    """`preprocess.py latents` in process `rank` of `world_size`: encodes its share of the shards; the last to finish says so."""
    job, share = prepare(args, rank, world_size, torch.device(device))
    total = sum(len(job.windows(number)) for number in job.shards[share.index :: share.count])
    finished = (job.out / INDEX).exists()
    bar = Progress(total, "clip") if rank == 0 else None

    def tell(samples: int) -> None:
        if bar is not None:
            bar.update(bar.done + samples)

    with bar or nullcontext():
        index = encode_set(job, share, tell)
    if index is not None and not (finished and rank):
        print(_told(job, index), flush=True)
    elif rank == 0:
        print(f"{total} clips of this share are encoded; the process that finishes last writes {job.out}/index.json", flush=True)


def prepare(args: argparse.Namespace, rank: int, world_size: int, device: torch.device) -> tuple[LatentJob, Share]:
    """The checked job of a command line, and this process's share of it. Raises ConfigError or UserError in one line."""
    task = 0 if args.task_id is None and args.num_tasks == 1 else args.task_id
    if task is None or task >= args.num_tasks:
        given = "is missing" if task is None else str(task)
        raise ConfigError(f"--task-id {given}: from 0 to {args.num_tasks - 1} (--num-tasks {args.num_tasks})")
    cache = CacheConfig(args.cache_dir, args.cache_gib)
    cache.validate()
    pixels = ShardSet.open(args.shards, cache=cache, on_bad=args.on_bad_sample)
    if pixels.codec == "latent":
        raise ConfigError(f"{args.shards} holds latents already: give the pixel set that they were made of")
    if args.out.exists() and Path(args.shards).exists() and args.out.samefile(args.shards):
        raise ConfigError(f"--out {args.out} is the pixel set: choose another folder")
    if device.type == "cpu":
        # The order of sums depends on the number of threads, and so do the last bits; more processes use more cores.
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # as training does
    encoder = _open(args, pixels, device)
    rules, encode = _rules(args, encoder, pixels), encode_with(encoder, device)
    job = LatentJob(pixels, args.out, rules, encoder.identity(), encode, args.batch_size, args.workers)
    if job.framewise:
        job.encode(np.zeros((1, 1, *pixels.size, 3), np.uint8))  # a size that it cannot take is told before anything is written
    return job, Share(task * world_size + rank, args.num_tasks * world_size)


def _open(args: argparse.Namespace, pixels: ShardSet, device: torch.device) -> LatentEncoder:
    """The encoder of a command line. Raises ConfigError or UserError in one line."""
    if not (args.ae or args.vae):
        raise ConfigError("say what encodes the clips: --ae, a trained autoencoder, or --vae, an image VAE")
    system = system_of(args.ae, args.system or "")
    if system not in ENCODERS:
        what = f"--ae {args.ae} is an export of '{system}'" if args.ae else f"--vae {args.vae} without --ae"
        raise ConfigError(f"{what}: latents are made by {', '.join(ENCODERS)}")
    options = EncoderOptions(
        args.ae,
        args.weights,
        args.vae,
        args.scale_factor or SD_SCALE,
        args.n_frames or pixels.meta["clip_length"] or 16,
        pixels.size,
        precision=args.precision,
        device=device,
        chunk=args.batch_size,
        pairs=args.pairs,
        stills=args.stills,
        lengths=(int(pixels.frames.min()), int(pixels.frames.max())),
        whole_videos=not pixels.meta["clip_length"],
    )
    if args.stills and system != "hvdm":
        raise ConfigError(f"--stills: the denoisers of {system} start from no pictures; drop the flag")
    if args.pairs is not None and system not in ("pvdm", "hvdm"):
        raise ConfigError(f"--pairs: what {args.ae or args.vae} encodes ({system}) does not go on after another clip; drop the flag")
    return ENCODERS[system](options)


def _rules(args: argparse.Namespace, encoder: LatentEncoder, pixels: ShardSet) -> LatentRules:
    """What decides the values. ConfigError for options that mean nothing to the encoder, and for clips that it does not take."""
    common = {"dtype": args.dtype, "precision": args.precision, "on_bad": args.on_bad_sample}
    what = args.ae or args.vae
    if isinstance(encoder, FrameEncoder):
        _refuse(args, ("n_frames", "window_stride"), f"{what} encodes frame by frame, clips of any length")
        if args.store != "sample":
            _refuse(args, ("seed",), "moments are no draws, it goes with --store sample")
        return LatentRules(0, 0, **common, store=args.store or "moments", seed=args.seed or 0, scale=args.scale_factor or 0.0)
    _refuse(args, ("store", "seed"), f"{what} encodes clips as a whole, and says itself what is stored of them")
    pairs = isinstance(encoder, ClipPipeline) and encoder.pairs
    if isinstance(encoder, ClipPipeline):
        _refuse(args, ("n_frames",), f"{what} says itself how many frames it takes")
    length, *size = encoder.clip_shape
    if tuple(size) != pixels.size:
        raise ConfigError(f"--ae {what} takes frames of {size[0]}x{size[1]}, {args.shards} holds {pixels.size[0]}x{pixels.size[1]}")
    if length > pixels.meta["clip_length"] > 0:
        raise ConfigError(f"--ae {what} takes clips of {length} frames, those of {args.shards} have {pixels.meta['clip_length']}")
    return LatentRules(length, args.window_stride or (length // 2 if pairs else length), **common, pairs=pairs, stills=args.stills)


def _refuse(args: argparse.Namespace, options: tuple[str, ...], why: str) -> None:
    for option in options:
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} means nothing here: {why}")


def encode_with(encoder: LatentEncoder, device: torch.device) -> Encode:
    """uint8 frames b t h w 3 -> name -> float32 latents, computed on the device."""

    def encode(frames: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            video = to_float(torch.from_numpy(frames).to(device).permute(0, 4, 1, 2, 3))
            found = {"moments": encoder.encode_moments(video)} if isinstance(encoder, FrameEncoder) else encoder.encode_latents(video)
            return {name: value.float().cpu().numpy() for name, value in found.items()}

    return encode


def _told(job: LatentJob, index: Mapping[str, Any]) -> str:
    """What the end of the work is, in a few lines."""
    left = index["left_out"]
    lines = [f"left out, damaged: {line}" for line in left["damaged"][:10]]
    lines += [f"left out: {len(left['damaged'])} damaged clips in all"] if len(left["damaged"]) > 10 else []
    lines += [f"left out: {left['short']} clips of fewer than {job.rules.frames} frames"] if left["short"] else []
    tensors = ", ".join(
        f"{name} {'x'.join(map(str, shape))} (mean {index['mean'][name]:.4g}, std {index['std'][name]:.4g})"
        for name, shape in index["tensors"].items()
    )
    if job.framewise:
        latent = index["latent"]
        tensors += f" a frame; draws have mean {latent['mean']:.4g}, std {latent['std']:.4g}, scale {latent['scale']:.5g}"
    lines.append(f"{index['samples']} samples of {job.rules.dtype} latents: {tensors}: {job.out}")
    return "\n".join(lines)
