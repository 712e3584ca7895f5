"""How well an autoencoder gives clips back: PSNR, SSIM, a perceptual distance, rFVD and rFID, with how they were measured."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from datasets.config import DataConfig, open_shards, resolve
from datasets.mixture import Collection
from datasets.reader import ClipReader
from evaluation.paired import PairedDistance, open_distances
from evaluation.versions import versions
from launch.env import Env, Stopped
from losses import perceptual
from metrics.frames import SSIM_WINDOW, lpips, psnr, quantise, ssim
from pipelines.encoders import ENCODERS, EncoderOptions, FrameEncoder, system_of
from pipelines.loading import SD_SCALE
from utils.errors import ConfigError, UserError
from utils.files import sha256_file
from utils.media import to_float
from utils.rng import SampleRng
from utils.weights import read_card

SEED = 0
"""Of the posteriors' samples."""


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """Measures how well an autoencoder gives clips back."""

    system: str = ""
    """Whose official checkpoint it is: cmd, latte, pvdm or hvdm; empty: as the names in it say. An export says it itself."""
    ae: str = ""
    """The autoencoder: an export or run folder, or an official checkpoint (.pt, .pth)."""
    data_path: str = ""
    """Shard set to measure on, every clip once: its first frames, as many as the autoencoder takes."""
    vae: str = ""
    """Latent mode: folder of the image VAE. Without --ae that VAE itself is measured."""
    scale_factor: float = SD_SCALE
    """Latent mode: factor of the image VAE's latents."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights (where there are any), or the last ones."""
    perceptual: Literal["lpips-alex", "lpips-vgg", "lpips-squeeze", "effl0", "none"] = "lpips-alex"
    """Network of the perceptual distance; it is left out, and said so, when its weights are not there."""
    perceptual_weights: str = ""
    """File with the network's weights; empty: the torch hub cache."""
    i3d: str = ""
    """The network of rFVD, the Frechet video distance of clips and reconstructions by PVDM's protocol: i3d_pretrained_400.pt or
    i3d_torchscript.pt; empty: not measured."""
    inception: str = ""
    """The network of rFID, the same of single frames: pt_inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt; empty: not
    measured."""
    psnr_per_clip: bool = False
    """PSNR of the squared error of whole clips (as PVDM reports it) in place of single frames."""
    max_clips: int = 0
    """Measure on the first clips only; 0: all."""
    batch_size: int = 8
    """Clips at a time, per process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the autoencoder."""
    n_frames: int | None = None
    """Of each clip, for autoencoders of single frames (none: all of a stored clip, 16 where they differ in length); and what an official
    checkpoint takes, which does not say it (none: 16)."""
    out: str = ""
    """JSON file to write the figures to."""
    markdown: str = ""
    """File to which rows of a table are appended, one a figure; a new one gets a heading."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if not self.ae and not self.vae:
            raise ConfigError("which autoencoder? give --ae FOLDER, the run or export folder of train_ae.py")
        if not self.data_path:
            raise ConfigError("measured on what? give --data-path FOLDER, a shard set made by preprocess.py")
        for name, lowest in (("batch_size", 1), ("n_frames", 1), ("max_clips", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {lowest}")


def measure_reconstruction(config: ReconstructConfig, env: Env) -> dict[str, Any]:
    """Figures and protocol; the processes share the clips, each clip is counted once."""
    shards = open_shards(DataConfig(path=(config.data_path,)))
    if shards.is_latent:
        raise ConfigError(f"--data-path {config.data_path}: it holds latents; give the shard set of the clips they were made of")
    pipeline = _open(config, shards, env.device)
    frames, *size = _clip_shape(config, shards, pipeline)
    resolve(DataConfig(path=(config.data_path,), n_frames=frames, image_size=(size[0], size[1])), shards)
    total = min(config.max_clips, shards.num_samples) if config.max_clips else shards.num_samples
    distance, distances = _distance(config, env), open_distances(config.i3d, config.inception, env.device)
    if distances and total < 2:
        raise UserError(f"--data-path {config.data_path}: one clip is measured; {distances[0].name} needs two")
    mine = np.arange(total)[env.rank :: env.world_size]
    sums: dict[str, float] = {}
    with tqdm(total=len(mine), desc="clips of rank 0", unit="clip", disable=None if env.is_main else True) as bar:
        for samples, clips in _clips(shards, mine, frames, config.batch_size, env.device):
            recon = pipeline.reconstruct(clips, SampleRng(SEED, torch.from_numpy(samples), env.device))
            for name, values in _measures(clips, recon, distance, config).items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
            for one in distances:
                one.update(clips, recon)
            bar.update(len(samples))
            if env.stop:
                raise Stopped(agreed=False)
    perceptual_network = _described(config, distance is not None)
    figures = _summary(config, shards, pipeline, perceptual_network, (total, frames), _reduced(sums, len(mine), total, env))
    return _with_distances(figures, distances, (total, frames), env)


def _open(config: ReconstructConfig, shards: Collection, device: torch.device) -> Any:
    """The pipeline of the autoencoder: something with `reconstruct` and `identity`. Raises UserError or ConfigError."""
    system = system_of(config.ae, config.system)
    if system not in ENCODERS:
        raise ConfigError(f"--ae {config.ae or config.vae}: autoencoders of {', '.join(ENCODERS)} are measured, not of '{system}'")
    options = EncoderOptions(
        config.ae,
        config.weights,
        config.vae,
        config.scale_factor,
        config.n_frames or 16,
        shards.size,
        precision=config.precision,
        device=device,
    )
    return ENCODERS[system](options)


def _clip_shape(config: ReconstructConfig, shards: Collection, pipeline: Any) -> tuple[int, int, int]:
    """Frames, height and width of what goes through an autoencoder; one of single frames takes any."""
    if isinstance(pipeline, FrameEncoder):
        return config.n_frames or shards.meta["clip_length"] or 16, *shards.size
    shape: tuple[int, int, int] = pipeline.clip_shape
    return shape


def _distance(config: ReconstructConfig, env: Env) -> nn.Module | None:
    """The perceptual network; None, after one line that says so, when its weights were not asked for by path and are not there."""
    file = perceptual.FILES.get(config.perceptual)
    if file is not None and not config.perceptual_weights and not file.default_path().is_file():
        if env.is_main:
            print(f"{config.perceptual} is left out, {file.name} ({file.size}) is not there: {file.sources()}", file=sys.stderr, flush=True)
        return None
    distance = perceptual.build(config.perceptual, config.perceptual_weights)
    return None if distance is None else distance.to(env.device)


def _described(config: ReconstructConfig, there: bool) -> dict[str, str]:
    """The perceptual network, with the sha256 of its weights where it is one that has some."""
    file = perceptual.FILES.get(config.perceptual)
    if file is None or not there:
        return {"perceptual": "none" if file is None else "none: weights missing"}
    path = Path(config.perceptual_weights) if config.perceptual_weights else file.default_path()
    return {"perceptual": config.perceptual, "perceptual_sha256": sha256_file(path)}


def _kind(ae: str, sha256: str) -> str:
    """ema or model: which file of an export was read; an official checkpoint and an image VAE have one kind of weights."""
    try:
        files = read_card(ae).get("files", {}) if ae else {}
    except UserError:
        files = {}
    return next((Path(name).stem for name, digest in files.items() if digest == sha256), "as in the file")


def _clips(shards: Collection, samples: np.ndarray, n_frames: int, batch: int, device: torch.device) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(numbers, clips b 3 t h w in [-1, 1]): the first frames of each sample."""
    reader = ClipReader(shards, n_frames)
    for start in range(0, len(samples), batch):
        chosen = samples[start : start + batch]
        frames = torch.from_numpy(reader.read(chosen, np.zeros(len(chosen), dtype=np.int64)))
        yield chosen, to_float(frames.to(device).permute(0, 4, 1, 2, 3))


def _measures(clips: Tensor, recon: Tensor, distance: nn.Module | None, config: ReconstructConfig) -> dict[str, Tensor]:
    """Name -> one value per clip."""
    values = {"psnr": psnr(clips, recon, per_clip=config.psnr_per_clip), "l1": (quantise(clips) - quantise(recon)).abs().flatten(1).mean(1)}
    if min(clips.shape[-2:]) >= SSIM_WINDOW:
        values["ssim"] = ssim(clips, recon)
    if distance is not None:
        with torch.no_grad():
            values[config.perceptual.replace("-", "_")] = lpips(distance, clips, recon)
    return values


def _reduced(sums: dict[str, float], count: int, total: int, env: Env) -> dict[str, float]:
    """Means over the clips of all processes."""
    gathered: list[Any] = [(sums, count)] * env.world_size
    if env.world_size > 1:
        dist.all_gather_object(gathered, (sums, count))
    counted = sum(number for _, number in gathered)
    assert counted == total, f"{counted} clips were measured, {total} are there"
    names = dict.fromkeys(name for part, _ in gathered for name in part)
    return {name: sum(part.get(name, 0.0) for part, _ in gathered) / total for name in names}


def _with_distances(figures: dict[str, Any], distances: list[PairedDistance], counts: tuple[int, int], env: Env) -> dict[str, Any]:
    """Figures and protocol with those of whole sets. `counts`: clips, and frames of each."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    for one in distances:
        values[one.name], known = one.finish(env)
        notes += known
    for note in notes if env.is_main else []:
        print(f"note: {note}", file=sys.stderr, flush=True)
    described = {one.name: one.describe(*counts) for one in distances}
    protocol = figures["protocol"] | described
    return figures | values | ({"notes": notes} if distances else {}) | {"protocol": protocol}


def _summary(
    config: ReconstructConfig,
    shards: Collection,
    pipeline: Any,
    perceptual_network: dict[str, str],
    counts: tuple[int, int],
    means: dict[str, float],
) -> dict[str, Any]:
    """Figures first, then how they were measured. `counts`: clips, and frames of each."""
    total, frames = counts
    identity = pipeline.identity()
    latents = {"latents": "samples of the posteriors"} if isinstance(pipeline, FrameEncoder) else {}
    return means | {
        "clips": total,
        "protocol": {
            "psnr": f"8 bit, mean squared error per {'clip' if config.psnr_per_clip else 'frame'}, mean over clips, dB",
            "ssim": "8 bit, Gaussian 11x11 sigma 1.5, per frame, mean over clips",
            "l1": "8 bit, mean absolute difference on [0, 1]",
            **perceptual_network,
            "clips": total,
            "frames": frames,
            "size": list(shards.size),
            "window": "first frames of each stored clip",
            "dataset": shards.name,
            "dataset_digest": shards.digest,
            "autoencoder_sha256": identity["sha256"],
            "weights": _kind(config.ae, identity["sha256"]),
            "precision": config.precision,
            "seed": SEED,
            **latents,
            "versions": versions(),
        },
    }


def reconstruction_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One set of figures for each row of a table: that figure first, with what `evaluation.report.row` takes."""
    protocol, clips = figures["protocol"], figures["clips"]
    rows = []
    for name, value in figures.items():
        if not isinstance(value, float):
            continue
        own = protocol.get(name)
        label = f"{name}_" if name[-1].isdigit() else name
        described = own if isinstance(own, dict) else {"id": f"{label}{clips}_{protocol['frames']}f", "detector": {}}
        if name == protocol["perceptual"].replace("-", "_"):
            described = described | {"detector": {"sha256": protocol["perceptual_sha256"]}}
        kept = {"frames": protocol["frames"], "size": protocol["size"], "seed": protocol["seed"], "name": "reconstruction"}
        rows.append({name: value, "real_videos": clips, "generated_videos": clips, "protocol": kept | described})
    return rows
